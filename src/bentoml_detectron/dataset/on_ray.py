"""The Ray engine: processes of a cluster work on chunks, and each loads the model once.

Ray Data hands out the chunks, one per row, and repeats a row if its worker dies. A row is a few numbers. The images stand in
the run's list, and the results go into the run's folder; both are on storage that the cluster shares. So nothing large goes
through Ray, and a chunk that is done twice does no harm.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bentoml_detectron import __version__, errors, threads
from bentoml_detectron.dataset import parts
from bentoml_detectron.dataset.chunks import Chunk, Clock
from bentoml_detectron.dataset.engine import Model, loaded
from bentoml_detectron.dataset.parts import Listing, listed
from bentoml_detectron.dataset.work import Done, Work, run
from bentoml_detectron.errors import DependencyMissingError, DetectronError, InvalidArgumentError
from bentoml_detectron.memory import KEEP

if TYPE_CHECKING:
    from ray.data import DataContext

    from bentoml_detectron.predictor import Predictor

_TRIES = 4  # of a chunk whose worker dies: Ray tries for ever, and an image that kills its worker would kill them all
_BETWEEN = b"\0"  # messages; one that has it, as of a key in Parquet, has something else there
_AHEAD = 2  # chunks that a worker has: one to work on, and the next
_REACH_SECONDS = 10.0
_CURE = (
    "start one with ray start --head, or give the address of one, as --ray-address 10.0.0.1:6379 (ray_address='10.0.0.1:6379')"
)


@dataclass(frozen=True, slots=True)
class _Place:
    """What a worker has of its node, and what it has to know of this process.

    Attributes:
        cpus: Cores, and threads of PyTorch where there are any.
        gpus: 0 or 1.
        version: Of this package.
    """

    cpus: int
    gpus: int
    version: str

    def open(self, work: Work) -> tuple[Predictor, Model]:
        """Loads the model in a worker."""
        import torch

        if self.version != __version__:
            raise DetectronError(
                f"a worker has bentoml-detectron {__version__}, but the run has {self.version}; install the same "
                "version on all nodes"
            )
        torch.set_num_threads(max(1, self.cpus))
        return loaded(work)


class Ray:
    """Processes of a Ray cluster."""

    def __init__(self, address: str | None, workers: int | None) -> None:
        """Connects to nothing yet.

        Args:
            address: "HOST:PORT"; None: the cluster that this process is connected to, else RAY_ADDRESS in the environment, else
                the cluster on this machine.
            workers: How many processes load the model; None: one a GPU, or on the CPU one a node.

        Raises:
            InvalidArgumentError: (``ValueError``) One is out of range.
            DependencyMissingError: Ray is not installed.
        """
        if find_spec("ray") is None or find_spec("pandas") is None:
            raise DependencyMissingError("the engine 'ray' needs Ray Data: pip install 'ray[data]'")
        if (address is not None and not address.rpartition(":")[2].isdigit()) or "://" in (address or ""):
            raise InvalidArgumentError(f"--ray-address (ray_address) is {address!r}; give HOST:PORT", value=address)
        if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
            raise InvalidArgumentError(f"ray_workers is {workers!r}; give 1 or more", value=workers)
        self._address, self._wanted = address, workers
        self._workers = 0
        self._place = _Place(0, 0, "")
        self._connected = False

    def __enter__(self) -> Self:
        import ray

        if not ray.is_initialized():
            connect(self._address)
            self._connected = True
        elif self._address not in (None, ray.get_runtime_context().gcs_address):
            raise InvalidArgumentError(
                f"this process is already connected to a cluster other than {self._address!r}; call ray.shutdown() first",
                value=self._address,
            )
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        if self._connected:
            ray.shutdown()
            self._connected = False

    def model(self, work: Work) -> Model:
        """As `Engine.model`; one of the cluster's processes loads it."""
        import ray

        self._workers, cpus, gpus = shares(_nodes(), self._wanted, with_gpu=work.device_id != "cpu")
        self._place = _Place(cpus, gpus, __version__)
        with _one_error():
            found: Model | bytes = ray.get(ray.remote(_model).options(**self._resources(work)).remote(work, self._place))
        if isinstance(found, bytes):
            raise _error(found)
        return found

    def run(
        self, work: Work, listing: Listing, numbers: Sequence[int], clock: Clock, told: Callable[[int], None]
    ) -> Generator[Done]:
        """As `Engine.run`; in the order in which they are finished."""
        from ray import data

        if not numbers:
            return
        rows = [
            {"number": each, "first": listing.first(each), "start": start, "size": size}
            for each in numbers
            for start, size in [listing.place(each)]
        ]
        workers = min(self._workers, len(rows))
        with _one_error(), _quiet():
            with data.DataContext.current(_context()):
                chunks = data.from_items(rows, override_num_blocks=len(rows))
            finished = chunks.map(
                _Worker,
                fn_constructor_args=(work, self._place, str(listing.path), _witness(listing, numbers)),
                compute=data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=_AHEAD),
                **self._resources(work),
            )
            for batch in finished.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in batch.to_pylist():
                    if row["problem"]:
                        raise _error(row["problem"])
                    clock.busy += row["busy"] / workers
                    told(row["images"])
                    yield Done(row["number"], row["images"], _names(row["failures"]))

    def _resources(self, work: Work) -> dict[str, Any]:
        """What Ray keeps for a worker, and the model store that it looks into."""
        from bentoml_detectron.store import get

        home = Path(get(work.model).path).parents[2]  # of models/NAME/VERSION
        variables = {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"}
        variables |= {KEEP: os.environ[KEEP]} if KEEP in os.environ else {}
        variables |= threads.decided() | threads.environment()
        return {"num_cpus": self._place.cpus, "num_gpus": self._place.gpus, "runtime_env": {"env_vars": variables}}


class _Worker:
    """One process of the pool."""

    def __init__(self, work: Work, place: _Place, listing: str, witness: str | None) -> None:
        self._work, self._listing, self._witness = work, Path(listing), witness
        self._predictor, _ = place.open(work)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Works on a chunk; gives what `Done` says of it, how long the model ran, and a problem if there is one."""
        clock = Clock()
        try:
            self._check_sight()
            done = self._done(Chunk(row["number"], row["first"], listed(self._listing, row["start"], row["size"])), clock)
        except DetectronError as exc:
            return {"number": row["number"], "images": 0, "failures": b"", "busy": 0.0, "problem": _problem(exc)}
        failures = _BETWEEN.join(os.fsencode(each).replace(_BETWEEN, b"\\0") for each in done.failures)
        return {"number": done.number, "images": done.images, "failures": failures, "busy": clock.busy, "problem": b""}

    def _check_sight(self) -> None:
        """Refuses to work where this node does not see what the run's own sees: no image could be used."""
        for path in filter(None, (self._work.folder, str(self._listing), self._witness)):
            if not os.access(path, os.R_OK):
                raise DetectronError(
                    f"the node {_node()} cannot read {path!r}, which the node that started the run can; all nodes need the "
                    "same files at the same paths: fix this, then continue with --resume (resume=True)",
                    value=path,
                )

    def _done(self, chunk: Chunk, clock: Clock) -> Done:
        with parts.trying(Path(self._work.folder), chunk.number, _TRIES) as may:
            if not may:
                raise DetectronError(
                    f"{_TRIES} workers in a row died on the {len(chunk.items)} images starting with "
                    f"{chunk.items[0].file_name!r}; if they run out of memory, use fewer of them (--ray-workers, "
                    "ray_workers=), then continue with --resume (resume=True)",
                    value=chunk.items[0].file_name,
                )
            [done] = run(self._work, self._predictor, [chunk], clock)
        return done


def _node() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def _witness(listing: Listing, numbers: Sequence[int]) -> str | None:
    """One of the images, or of the Parquet files with them, that can be read here."""
    items = (item for number in (numbers[0], numbers[-1]) for item in listing.items(number))
    return next((item.path for item in items if os.access(item.path, os.R_OK)), None)


def _model(work: Work, place: _Place) -> Model | bytes:
    """Looks at the model in a worker; a problem where it cannot be loaded."""
    try:
        return place.open(work)[1]
    except DetectronError as exc:
        return _problem(exc)


def _problem(error: DetectronError) -> bytes:
    return _BETWEEN.join((type(error).__name__.encode(), os.fsencode(str(error))))


def _error(problem: bytes) -> DetectronError:
    """The error that a worker met, as one of this process."""
    name, message = _names(problem)
    kind: type[DetectronError] = getattr(errors, name, DetectronError)
    return kind(message)


def _names(joined: bytes) -> tuple[str, ...]:
    return tuple(map(os.fsdecode, joined.split(_BETWEEN))) if joined else ()


def _nodes() -> list[tuple[int, int]]:
    """Cores and GPUs of each node."""
    import ray

    alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return [(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in alive]


def shares(nodes: Sequence[tuple[int, int]], wanted: int | None, *, with_gpu: bool) -> tuple[int, int, int]:
    """How a cluster is shared out among workers, all of which have the same.

    Args:
        nodes: Cores and GPUs of each.
        wanted: How many workers; None: one a GPU, or without GPUs one a node.
        with_gpu: Whether each has a GPU.

    Returns:
        How many workers there are, and the cores and GPUs of each.

    Raises:
        InvalidArgumentError: (``ValueError``) There is no room for them.
    """
    usable = [node for node in nodes if node[with_gpu]]
    what, most = ("GPUs", sum(gpus for _, gpus in usable)) if with_gpu else ("cores", sum(cpus for cpus, _ in usable))
    workers = wanted or (most if with_gpu else len(usable))
    if not 0 < workers <= most:
        raise InvalidArgumentError(
            f"the Ray cluster has {most} {what}, but {max(workers, 1)} workers need one each; start more nodes", value=wanted
        )
    most_on_one = -(-workers // len(usable))
    cpus = min(cpus for cpus, _ in usable) // most_on_one
    return workers, cpus if with_gpu else max(1, cpus), int(with_gpu)


def connect(address: str | None) -> None:
    """Connects this process to a cluster; one on this machine has to be a part of it.

    Raises:
        DetectronError: There is none.
    """
    import ray

    try:
        if address is not None:  # Ray itself would wait for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), _REACH_SECONDS).close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of settings that are the cluster's
            ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as exc:
        where = "on this machine" if address is None else f"at {address}"
        raise DetectronError(f"no Ray cluster {where} can be used ({_line(exc)}); {_CURE}", value=address) from exc


def _context() -> DataContext:
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    return context


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Ray Data's lines from the terminal, where the run's own are; its log file has them."""
    consoles = [each for each in logging.getLogger("ray.data").handlers if isinstance(each, logging.StreamHandler)]
    levels = [each.level for each in consoles]
    for each in consoles:
        each.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for each, level in zip(consoles, levels, strict=True):
            each.setLevel(level)


@contextmanager
def _one_error() -> Iterator[None]:
    """Turns what Ray raises, pages of it, into one line.

    Raises:
        DetectronError: Ray gave up.
    """
    from ray.exceptions import RayError

    try:
        yield
    except RayError as exc:
        raise DetectronError(
            f"Ray gave up: {_line(exc)}; finished work is kept: fix this, then continue with --resume (resume=True)"
        ) from exc


def _line(error: Exception) -> str:
    """What says most in an error: of a traceback the last line, of an explanation the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (lines[-1] if "Traceback" in str(error) else lines[0])[:300]
