"""How a server's processes begin and end: a worker says that it goes before it goes, and another takes its place at once."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bentoml_detectron.service.engine import Engine

REPLACES_VARIABLE = "BENTOML_DETECTRON_REPLACES"
"""Name of the environment variable of workers that take another's place."""
REST_SECONDS = 5.0
_PAUSE = 1.0
"""Least seconds between two looks at the workers, so that one that ends as it begins is not started all the time."""


async def give_back_at_rest(engine: Engine, seconds: float = REST_SECONDS) -> None:
    """Gives the memory that the C library keeps back to the system, once, when no request came for a while.

    Otherwise a worker holds for ever what its largest requests together once needed, and meets more of these as time goes by.

    Args:
        engine: Whose requests are counted.
        seconds: The while; it takes up to twice as long.
    """
    from bentoml_detectron.engines.memory import give_back_freed_memory

    last = given = 0
    while True:
        await asyncio.sleep(seconds)
        if engine.admitted == last != given and not engine.waiting:
            given = last
            await asyncio.to_thread(give_back_freed_memory)
        last = engine.admitted


def drain_on_sigterm(begin: Callable[[], None], seconds: float) -> None:
    """On SIGTERM calls `begin`, and lets the server end some seconds later.

    The server's own handler stops listening at once, so that whoever balances the load learns it from refused connections.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # outside a server: a test made the instance
        return
    ended = signal.getsignal(signal.SIGTERM)
    if not callable(ended):
        return

    def drain(number: int, frame: Any) -> None:
        begin()
        loop.call_soon_threadsafe(loop.call_later, seconds, ended, number, None)

    try:
        signal.signal(signal.SIGTERM, drain)
    except ValueError:  # not the main thread: the server does not take signals either
        return


def respawn_at_once() -> None:
    """In the process that starts the workers: has one that ended replaced when it ends.

    The new one listens when its model is loaded, and not before: workers share a socket, and the others can answer.

    BentoML's supervisor, circus, looks at its workers every 10 seconds; a child that ends makes it look now. In a container it
    would not replace them at all, and ends with the last one: there it replaces them where there are several.
    """
    last = 0.0

    def ended(number: int, frame: Any) -> None:
        nonlocal last
        arbiter = _arbiter()
        if arbiter is None:
            return
        wait = max(0.0, last + _PAUSE - time.monotonic())
        last = time.monotonic() + wait
        arbiter.loop.add_callback_from_signal(arbiter.loop.call_later, wait, _look, arbiter)

    if signal.getsignal(signal.SIGCHLD) not in (signal.SIG_DFL, signal.SIG_IGN, None):
        return  # the process has a use of its own for it
    try:
        signal.signal(signal.SIGCHLD, ended)
    except ValueError:  # not the main thread
        return


def _arbiter() -> Any:
    """Circus's arbiter in this process, by its handler of SIGTERM; None where there is none yet."""
    handler = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return getattr(getattr(handler, "controller", None), "arbiter", None)


async def _look(arbiter: Any) -> None:
    from circus.exc import ConflictError  # type: ignore[import-untyped]

    for watcher in arbiter.watchers:
        watcher.respawn = watcher.respawn or watcher.numprocesses > 1
        watcher.env[REPLACES_VARIABLE] = "1"
    try:
        await arbiter.manage_watchers()
    except ConflictError:  # it is at something else, such as starting the others
        arbiter.loop.call_later(_PAUSE, _look, arbiter)
