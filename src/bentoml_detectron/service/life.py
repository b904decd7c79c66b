"""How a server's processes start and end, so that none takes requests that it cannot answer while another could.

A worker announces its end before it ends, it is replaced at once, and a worker listens only when it can answer.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bentoml_detectron.service.engine import Engine

_POLL = 0.02
"""Seconds between two looks at whether a worker may listen, or has its model."""
REST_SECONDS = 5.0
_FLOCK = "hhqqi"  # fcntl.h's struct flock, on 64-bit Linux
_PAUSE = 1.0
"""Seconds between two looks at whether a worker that listens has its model; least seconds between two at the workers, so that
one that ends as it begins is not started all the time."""


async def give_back_at_rest(engine: Engine, seconds: float = REST_SECONDS) -> None:
    """Gives the memory that the C library keeps back to the system, once, when no request came for a while.

    Otherwise a worker holds for ever what its largest requests together once needed, and meets more of these as time goes by.

    Args:
        engine: Whose requests are counted.
        seconds: The while; it takes up to twice as long.
    """
    from bentoml_detectron.memory import give_back_freed_memory

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


def share_turns(service: str) -> int:
    """In the process that starts a service's workers: makes the file by which they know of each other; see `wait_for_turn`.

    It is in memory, and is gone with the process, or when its descriptor, which is given back, is closed.
    """
    return os.memfd_create(_turns(service))


async def wait_for_turn(service: str, engine: Engine, is_ending: Callable[[], bool]) -> None:
    """Waits until a worker may listen: at once if no other is ready, and none says already that it is loading.

    Workers share a socket, and whoever listens gets requests, ``/readyz`` among them. So of those that start together one
    listens at once, to say that the model is being loaded. Any other listens when its own model is loaded, and the first one's
    is, too, or the first one is gone. One that listens and has no model, as that cannot be loaded or its process has ended,
    ends where another is ready; the one in its place waits for its turn.

    The file's lock is the first one's alone while it loads, and shared by those that are ready. It ends with their processes.

    Args:
        service: As given to `share_turns`; without that, the worker is alone.
        engine: The worker's.
        is_ending: Whether the worker was told to end.
    """
    file = _turns_file(service)
    if file is None:
        return
    is_first = _locks(file, fcntl.LOCK_EX)
    if not is_first:
        await engine.loaded()
        while not _locks(file, fcntl.LOCK_SH if engine.failure is None else fcntl.LOCK_EX) and not is_ending():
            await asyncio.sleep(_POLL)
    _keep_turn(file, engine, is_ending, is_first)


def _keep_turn(file: int, engine: Engine, is_ending: Callable[[], bool], is_loading: bool) -> None:
    """Has the lock say what a worker that listens has, from now on.

    Args:
        file: Of the lock.
        engine: The worker's.
        is_ending: As in `wait_for_turn`.
        is_loading: Whether it loads its model for the first time, and the lock is its own.
    """
    seconds = _PAUSE
    if is_ending():
        fcntl.lockf(file, fcntl.LOCK_UN)  # or another without a model would leave all to this one
        return
    if engine.predictor is not None:
        _locks(file, fcntl.LOCK_SH)  # in place of one that is its own, if so: at no moment is there none
        is_loading = False
    elif is_loading and engine.failure is None:
        seconds = _POLL
    else:
        fcntl.lockf(file, fcntl.LOCK_UN)
        if _is_another_ready(file):
            os.kill(os.getpid(), signal.SIGTERM)
            return
    asyncio.get_running_loop().call_later(seconds, _keep_turn, file, engine, is_ending, is_loading)


def _is_another_ready(file: int) -> bool:
    # What stands against a lock for itself alone: that of one that loads is such a one, too, those of ready ones are shared.
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    return bool(struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] == fcntl.F_RDLCK)


def _turns(service: str) -> str:
    return f"bentoml-detectron-{service:.50}"


def _turns_file(service: str) -> int | None:
    """The file that the parent process made, if it made one; open for as long as this process lives."""
    with suppress(OSError):  # it may be another user's
        for path in Path(f"/proc/{os.getppid()}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                if str(path.readlink()) == f"/memfd:{_turns(service)} (deleted)":
                    return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    return None


def _locks(file: int, kind: int) -> bool:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError:  # others have it
        return False
    return True


def respawn_at_once() -> None:
    """In the process that starts the workers: has one that ended replaced when it ends.

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
    try:
        await arbiter.manage_watchers()
    except ConflictError:  # it is at something else, such as starting the others
        arbiter.loop.call_later(_PAUSE, _look, arbiter)
