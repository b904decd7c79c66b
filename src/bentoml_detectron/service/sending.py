"""Answers on their way to clients, which may read them slowly, or never.

uvicorn takes a body at once and keeps what the client has not read, for ever if it never reads: 40 clients who asked for
answers of 8 MB and read none of them held 186 MB. It waits before each further message until most of the one before is gone, so
a large body goes out in pieces, in a time that is bounded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

Send = Callable[[Any], Awaitable[None]]

PIECE = 256 << 10
"""Most bytes of a body that are handed to the server at once."""
_LOOK_SECONDS = 0.02
"""Seconds between two looks at whether the system has the rest of an answer."""

logger = logging.getLogger("bentoml.detectron")


def patiently(send: Send, seconds: float) -> Send:
    """The same, with large bodies in pieces; the connection is closed where a client does not read in time.

    Args:
        send: The server's own, as ASGI has it.
        seconds: Most that it may take until the system has all of a message, and the client has all but what that keeps.
    """
    transport = getattr(getattr(send, "__self__", None), "transport", None)  # uvicorn's
    kept = transport.get_write_buffer_size if transport is not None else lambda: 0  # bytes of what was sent

    async def send_in_pieces(message: Any) -> None:
        if not kept() and len(message.get("body", b"")) <= PIECE:
            await send(message)  # no timer for what need not wait
        else:
            await in_time(pieces(message))
        if message["type"] == "http.response.body" and kept():
            await in_time(emptied())

    async def pieces(message: Any) -> None:
        for piece in _pieces(message):
            await send(piece)

    async def emptied() -> None:
        while kept():
            await asyncio.sleep(_LOOK_SECONDS)

    async def in_time(work: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(seconds) as timer:
                await work
        except TimeoutError:
            if transport is None or not timer.expired():
                raise
            logger.info("a client did not read its answer within %g seconds; its connection is closed", seconds)
            transport.abort()
            await asyncio.sleep(0)  # until the server knows that the client is gone, and expects no more of the answer

    return send_in_pieces


def _pieces(message: Any) -> Iterator[Any]:
    body = message.get("body", b"")
    for start in range(0, len(body) - PIECE, PIECE):
        yield {**message, "body": body[start : start + PIECE], "more_body": True}
    yield {**message, "body": body[(len(body) - 1) // PIECE * PIECE :]} if len(body) > PIECE else message
