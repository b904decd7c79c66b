"""Runs the model in one process, or in several, beside the worker that answers requests.

If worker and model shared a process, each of the model's many small steps would have to wait until the event loop releases
Python's interpreter lock, and both would slow down under many requests (``benchmarks/bench_overload.py``). The worker starts
the model's process and shares a socket with it that nobody else has. It sends arrays; results come back pickled. The process
ends with the worker.

Two such processes with half of the threads each do more than one with all threads: while one waits for requests, or runs a
step that only one thread can do, the other computes.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from typing import TYPE_CHECKING, Any

import bentoml

from bentoml_detectron.artifact.manifest import Dataset, Input
from bentoml_detectron.errors import DetectronError, ModelEndedError
from bentoml_detectron.images import Limits
from bentoml_detectron.preparation import Batch, Observe, Padding, Preparation, Prepared
from bentoml_detectron.results import Detections
from bentoml_detectron.service.life import REST_SECONDS

if TYPE_CHECKING:
    from bentoml_detectron.predictor import Predictor
    from bentoml_detectron.service.front import Settings

logger = logging.getLogger("bentoml.detectron")

START = "import sys; sys.path[:] = sys.argv[1:]; from bentoml_detectron.service import apart; apart.main({})"
"""What the process runs, with the number of its end of the socket; its arguments are where the worker finds modules."""
_BUSY = 0.15
"""Cores that the worker may take while a model runs alone before that leaves it one. PyTorch's threads wait for the slowest of
them at each step, so two that share a core with another thread are slower than one on a core of its own."""
_NICE = 5
"""By how much the worker goes before its models: what it has to do is short, and a refusal is to be quick."""
_END_SECONDS = 5.0
_LOOK_SECONDS = 0.2
"""Seconds between two looks at whether a model that is being loaded is still wanted, and at how much memory is free."""


@dataclass(frozen=True)
class _Task:
    """What the process needs to load a model."""

    model: bentoml.Model
    settings: Settings
    workers: int | str
    names: dict[str, Any]


@dataclass(frozen=True)
class _Loaded:
    """What the worker needs to know of a loaded model."""

    architecture: str
    input: Input
    padding: Padding
    dataset: Dataset | None
    batch: Batch
    limits: Limits
    budget: int
    versions: dict[str, str]
    threads: int
    instances: int


class Apart(Preparation):
    """A predictor whose images are prepared here, and whose model is in another process.

    Attributes:
        architecture: Name of the model's class.
        versions: Of what the model runs on.
        instances: How many of it this machine has cores and memory for; at most 2.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], connection: Connection, loaded: _Loaded, share: Callable[[int], int]
    ) -> None:
        super().__init__(loaded.input, loaded.padding, loaded.dataset, batch=loaded.batch, limits=loaded.limits)
        self.architecture = loaded.architecture
        self.versions = loaded.versions
        self.instances = loaded.instances
        self._threads = loaded.threads
        self._share = share
        self._process = process
        self._connection = connection
        self._budget = loaded.budget
        self._is_busy = False

    def budget(self) -> int:
        """Most pixels, padding included, that may go through the model together, by what was free a short while ago."""
        return self._budget

    def run(self, group: Sequence[Prepared], observe: Observe = lambda stage, seconds: None) -> list[Any]:
        """As `Predictor.run`, for one thread at a time; a `DetectronError` also in the place of what are no `Detections`.

        Raises:
            ModelEndedError: The process is gone.
            Exception: What the model raises.
        """
        try:
            self._connection.send((list(group), self._threads_for(len(group))))
            cpu, start = time.process_time(), time.perf_counter()
            self._connection.poll(None)
            self._is_busy = time.process_time() - cpu > _BUSY * (time.perf_counter() - start)
            results, stages, self._budget = self._connection.recv()
        except (EOFError, OSError):
            raise ModelEndedError(f"the model's process has ended ({_ending(self._process)}); try again soon") from None
        for stage, seconds in stages:
            observe(stage, seconds)
        if isinstance(results, Exception):
            raise results
        return list(results)

    def _threads_for(self, batch: int) -> int:
        share = self._share(batch)
        return max(1, self._threads - self._is_busy if share == 1 else self._threads // share)

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        _end(self._process)


def start(
    model: bentoml.Model,
    settings: Settings,
    workers: int | str,
    share: Callable[[int], int] = lambda batch: 1,
    is_closed: Callable[[], bool] = lambda: False,
) -> Apart:
    """Starts the process, and waits until it has loaded the model, tested it, and run it for the first time.

    Args:
        model: To be served.
        settings: As given for the service.
        workers: How many workers share this machine's cores.
        share: Among how many such processes of this worker a batch of so many images has to share its threads.
        is_closed: Whether it is not wanted any more.

    Raises:
        ModelEndedError: A signal has ended its process meanwhile, and may not another time.
        DetectronError: It could not; the message says why.
    """
    from bentoml._internal.context import server_context

    from bentoml_detectron.memory import spare_from_collection

    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-c", START.format(theirs.fileno()), *sys.path]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    connection = Connection(ours.detach())
    names = {name: getattr(server_context, name) for name in ("service_type", "service_name", "worker_index")}
    try:
        connection.send(_Task(model, settings, workers, names))
        while not connection.poll(_LOOK_SECONDS):
            if is_closed():
                process.kill()
        loaded = connection.recv()
    except (EOFError, OSError):
        ended = f"its process ended while it was loading ({_ending(process)})"
        connection.close()
        # As by the system, for want of memory, or by someone. What its own code did, it would do again.
        raise (ModelEndedError if process.returncode < 0 else DetectronError)(ended) from None
    except BaseException:
        process.kill()
        connection.close()
        raise
    if isinstance(loaded, _Loaded):
        spare_from_collection()
        return Apart(process, connection, loaded, share)
    connection.close()
    _end(process)
    raise DetectronError(loaded)


def _ending(process: subprocess.Popen[bytes]) -> str:
    """How a process ended, whose end of the socket is closed."""
    code = _end(process)
    return signal.Signals(-code).name if -code in set(signal.Signals) else f"status {code}"


def _end(process: subprocess.Popen[bytes]) -> int:
    """Waits for its end, which it finds on its socket; not for ever."""
    try:
        return process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def main(file: int) -> None:
    """The process, from its start to its end."""
    with suppress(OSError):  # it may be forbidden
        os.nice(_NICE)  # of this thread and those that it starts
    # The worker gets these, too, and ends when its requests are answered.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with suppress(EOFError, OSError), Connection(file) as connection:
        predictor = _load(connection)
        if predictor is not None:
            _serve(predictor, connection)


def _end_with(parent: int) -> None:
    """Ends this process where its worker was killed, whatever it is at."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _load(connection: Connection) -> Predictor | None:
    """Loads a model and says so, or why not."""
    from bentoml_detectron import imports
    from bentoml_detectron.memory import keep_freed_memory, spare_from_collection

    try:
        with imports.for_less():
            import torch
            from bentoml._internal.context import server_context
            from bentoml._internal.log import configure_server_logging

            from bentoml_detectron.artifact import folder
            from bentoml_detectron.service import logs
            from bentoml_detectron.service.loading import load_tested, share_cores, warm_up
    except DetectronError as exc:  # without Detectron2
        connection.send(str(exc))
        return None

    keep_freed_memory()  # before there are threads that allocate
    configure_server_logging()  # type: ignore[no-untyped-call]
    logs.install()
    task: _Task = connection.recv()
    for name, value in task.names.items():
        setattr(server_context, name, value)
    try:
        share_cores(task.workers)
        predictor = load_tested(task.model, task.settings)
        warm_up(predictor)
        loaded = _Loaded(
            type(predictor.model).__name__, predictor.input, predictor.padding, predictor.dataset, predictor.batch,
            predictor.limits, predictor.budget(), folder.versions(), torch.get_num_threads(),
            _instances(predictor, task.workers),
        )  # fmt: skip
    except BaseException as exc:  # a model's own code may raise SystemExit
        if not isinstance(exc, DetectronError):  # which says what to do; where another came from helps to find out
            logger.exception("%s cannot be loaded", task.model.tag)
        connection.send(str(exc) or type(exc).__name__)
        return None
    spare_from_collection()
    connection.send(loaded)
    return predictor


def _instances(predictor: Predictor, workers: int | str) -> int:
    """How many of it there should be: two, where each has a thread, and twice the memory is free that all workers' take."""
    import psutil
    import torch

    from bentoml_detectron.model import device_of
    from bentoml_detectron.predictor import free_memory

    is_on_cpu = device_of(predictor.model).type == "cpu"
    taken = psutil.Process().memory_info().rss * (workers if isinstance(workers, int) else 1)
    return 2 if is_on_cpu and torch.get_num_threads() > 1 and free_memory(torch.device("cpu")) > 2 * taken else 1


def _serve(predictor: Predictor, connection: Connection) -> None:
    """Runs batch after batch, until the worker closes the socket."""
    import torch

    from bentoml_detectron.memory import give_back_freed_memory

    budget, looked = predictor.budget(), time.monotonic()
    while True:
        if not connection.poll(REST_SECONDS):
            give_back_freed_memory()
            connection.poll(None)
        group, threads = connection.recv()
        torch.set_num_threads(threads)
        results, stages = _run(predictor, group)
        if time.monotonic() - looked > _LOOK_SECONDS:
            budget, looked = predictor.budget(), time.monotonic()
        connection.send((results, stages, budget))


def _run(predictor: Predictor, group: list[Prepared]) -> tuple[Any, list[tuple[str, float]]]:
    """Results, or the error, and the stages."""
    stages: list[tuple[str, float]] = []
    try:
        found = predictor.run(group, lambda stage, seconds: stages.append((stage, seconds)))
    except Exception as exc:
        return _sendable(exc), stages
    return [each if isinstance(each, (Detections, DetectronError)) else _no_detections() for each in found], stages


def _no_detections() -> DetectronError:
    return DetectronError("the model's output is not Detections, so this service cannot return it as JSON")


def _sendable(exc: Exception) -> Any:
    """An error with its traceback, where it can be pickled."""
    whole = ExceptionWithTraceback(exc, exc.__traceback__)
    try:
        pickle.loads(pickle.dumps(whole))  # noqa: S301 its own bytes; some errors cannot be read back
    except Exception:
        return ExceptionWithTraceback(RuntimeError(f"{type(exc).__name__}: {exc}"), exc.__traceback__)
    return whole
