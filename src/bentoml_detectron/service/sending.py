"""Sends answers to clients, which may read them slowly, or never.

uvicorn accepts a body at once and keeps what the client has not read, for ever if the client never reads. Before each further
message, it waits until most of the one before is gone. So a large body is sent in pieces, within a limited time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakKeyDictionary

Send = Callable[[Any], Awaitable[None]]

PIECE = 256 << 10
"""Most bytes of a body that are handed to the server at once."""
_LOOK_SECONDS = 0.02
"""Seconds between two looks at whether the system has the rest of an answer."""

logger = logging.getLogger("bentoml.detectron")


class Patience:
    """Sends large bodies in pieces, and closes the connection of a client that does not read in time.

    After an answer's end the rest of it is watched until the system has it, or until the next answer on the connection begins,
    which is watched then. (Under TLS what the connection below keeps, a piece, is not seen.)
    """

    def __init__(self, seconds: float) -> None:
        """Takes how long a client may take to read.

        Args:
            seconds: Most that each message may take, until all of it but a piece has left, and at an answer's end all of it.
        """
        self._seconds = seconds
        self._latest: WeakKeyDictionary[Any, object] = WeakKeyDictionary()  # answers that have begun, by their connections

    def of(self, send: Send) -> Send:
        """The server's `send`, as ASGI has it, with that patience; for one answer."""
        return _Answer(send, self._seconds, self._latest).send


class _Answer:
    def __init__(self, send: Send, seconds: float, latest: WeakKeyDictionary[Any, object]) -> None:
        self._send = send
        self._seconds = seconds
        self._latest = latest
        self._transport = getattr(getattr(send, "__self__", None), "transport", None)  # uvicorn's

    async def send(self, message: Any) -> None:
        """See ASGI's specification."""
        deadline = asyncio.get_running_loop().time() + self._seconds
        if message["type"] == "http.response.start" and self._transport is not None:
            self._latest[self._transport] = self
        if not self._kept() and len(message.get("body", b"")) <= PIECE:
            await self._send(message)  # no timer for what need not wait
        else:
            await self._in_time(self._send_in_pieces(message), deadline)
        if message["type"] == "http.response.body" and not message.get("more_body", False) and self._kept():
            await self._in_time(self._emptied(), deadline)

    def _kept(self) -> int:
        """Bytes that were sent on the connection, and that the system has not taken."""
        try:
            return 0 if self._transport is None else int(self._transport.get_write_buffer_size())
        except AttributeError:  # asyncio's for TLS, once it was closed twice
            return 0

    async def _send_in_pieces(self, message: Any) -> None:
        body = message.get("body", b"")
        for start in range(0, len(body) - PIECE, PIECE):
            await self._send({**message, "body": body[start : start + PIECE], "more_body": True})
        await self._send({**message, "body": body[(len(body) - 1) // PIECE * PIECE :]} if len(body) > PIECE else message)

    async def _emptied(self) -> None:
        while self._kept() and self._latest.get(self._transport) is self:
            await asyncio.sleep(_LOOK_SECONDS)

    async def _in_time(self, work: Awaitable[None], deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline) as timer:
                await work
        except TimeoutError:
            if self._transport is None or not timer.expired():
                raise
            logger.info("a client did not read its answer within %g seconds; closing its connection", self._seconds)
            self._transport.abort()
            await asyncio.sleep(_LOOK_SECONDS)  # until the server knows it, and expects no more of the answer
