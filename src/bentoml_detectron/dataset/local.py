"""Runs a model over chunks in this process: threads decode images ahead while the model runs.

The model runs in the thread that asks for the next result. Batches are formed inside a chunk, by the images' order and shapes
alone; no batch has images of two chunks. So a chunk's results do not depend on what was done before it.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from bentoml_detectron import threads
from bentoml_detectron.dataset import parquet_source
from bentoml_detectron.dataset.chunks import Chunk, Clock, Outcome
from bentoml_detectron.dataset.sources import Item
from bentoml_detectron.errors import DamagedImageError, DetectronError, reason
from bentoml_detectron.options import Options
from bentoml_detectron.predictor import Predictor
from bentoml_detectron.preparation import Prepared
from bentoml_detectron.results import Detections

MOST_WORKERS = 8
_USUAL = (480, 640)  # height and width by which one tells how many images a batch may have
_LEAST_AHEAD, _MOST_AHEAD = 8, 256
_BATCHES_AHEAD = 2
_MACHINES = frozenset(
    [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT]
)
"""What a system says where no file can be read, as without room for open ones, or where storage is gone."""
_MOST_FAILED = 20
"""Images on which a model may fail before it has worked on one."""


def workers() -> ThreadPoolExecutor:
    """Threads for what is done beside the model: as many as there are cores, within reason."""
    return ThreadPoolExecutor(min(MOST_WORKERS, threads.cores()), thread_name_prefix="dataset")


def outcomes(
    predictor: Predictor,
    chunks: Iterable[Chunk],
    wanted: Options,
    pool: ThreadPoolExecutor,
    clock: Clock,
    *,
    budget: int,
    image_column: str | None = None,
) -> Iterator[Outcome]:
    """Runs a model over chunks of images, lazily and in their order.

    Args:
        predictor: The model.
        chunks: Are taken as the images are decoded, a few images ahead.
        wanted: Of each image.
        pool: Decodes.
        clock: Is told when the model was busy.
        budget: Most pixels, padding included, in a batch.
        image_column: Of Parquet files.
    """
    health = _Health(predictor)
    window = min(max(_BATCHES_AHEAD * budget // predictor.pixels_of(*_USUAL), _LEAST_AHEAD), _MOST_AHEAD)
    with _Ahead(predictor, wanted, pool, window, image_column) as ahead:
        for _, images in groupby(ahead.decoded(chunks), key=lambda each: each.chunk.number):
            yield from _chunk(health, images, clock, budget)


@dataclass(slots=True, eq=False)
class _Waiting:
    chunk: Chunk
    place: int  # in the chunk
    image: str | Future[bytes | DetectronError]
    prepared: Future[Prepared]

    @property
    def path(self) -> str:
        """The image, or the Parquet file that it is in."""
        return self.chunk.items[self.place].path

    def outcome(self, result: Detections | DetectronError) -> Outcome:
        chunk = self.chunk
        image = self.image if isinstance(self.image, str) else self.image.result()
        kept = None if isinstance(image, DetectronError) else image
        return Outcome(chunk.number, chunk.start + self.place, chunk.items[self.place], kept, result)


class _Ahead:
    """Decodes images ahead of the model, a bounded number of them."""

    def __init__(
        self, predictor: Predictor, wanted: Options, pool: ThreadPoolExecutor, window: int, image_column: str | None
    ) -> None:
        self._predictor, self._wanted, self._pool, self._window = predictor, wanted, pool, window
        self._image_column = image_column
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="parquet")
        self._waiting: deque[_Waiting] = deque()

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._waiting:
            each.prepared.cancel()
        self._reader.shutdown(cancel_futures=True)

    def decoded(self, chunks: Iterable[Chunk]) -> Iterator[_Waiting]:
        """The images in their order; the next ones are decoded while one does something else."""
        for each in self._read(chunks):
            self._waiting.append(each)
            if len(self._waiting) > self._window:
                yield self._waiting.popleft()
        while self._waiting:
            yield self._waiting.popleft()

    def _read(self, chunks: Iterable[Chunk]) -> Iterator[_Waiting]:
        rows = _Rows(self._image_column)
        for chunk in chunks:
            for place, item in enumerate(chunk.items):
                image = item.path if item.row is None else self._reader.submit(rows.read, item)
                yield _Waiting(chunk, place, image, self._pool.submit(self._prepare, image, place))

    def _prepare(self, image: str | Future[bytes | DetectronError], place: int) -> Prepared:
        content = image if isinstance(image, str) else image.result()
        if isinstance(content, DetectronError):
            raise content
        return self._predictor.prepare(content, self._wanted, place)


class _Rows:
    """Images in Parquet files, which are read on where one image follows the last one."""

    def __init__(self, column: str | None) -> None:
        self._column = column
        self._rows: Iterator[bytes | None] = iter(())
        self._next: tuple[str, int | None] | None = None

    def read(self, item: Item) -> bytes | DetectronError:
        """An image's bytes, or why there are none."""
        try:
            if self._next != (item.path, item.row):
                self._rows = parquet_source.contents(item.path, item.row or 0, self._column)
            content = next(self._rows, None)
        except DetectronError as exc:
            self._next = None
            error = DamagedImageError(str(exc), value=item.path)
            error.__cause__ = exc.__cause__
            return error
        self._next = (item.path, (item.row or 0) + 1)
        return DamagedImageError("its row holds no image", value=item.file_name) if content is None else content


class _Health:
    """Runs a model, and tells an image that cannot be used from a model that cannot do anything any more, as one whose GPU has
    met an error, and from a machine that can read no file: then all images would be recorded as those that cannot be used."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._good: Prepared | None = None  # an image on which it has worked
        self._failed = 0  # images before that
        self.read: str | None = None  # the last file from which an image came

    def run(self, group: Sequence[Prepared]) -> list[Any]:
        """One result an image. Where a batch fails, its images run alone, so that none is lost for another's sake.

        Raises:
            DetectronError: The model works no more.
        """
        try:
            found = [_checked(result) for result in self.predictor.run(group)]
        except Exception as exc:
            if len(group) == 1:
                said = f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}"
                self._check(said)
                return [DetectronError(f"the model failed: {said}")]
        else:
            self._good = group[0]
            return found
        return [result for each in group for result in self.run([each])]

    def _check(self, said: str) -> None:
        """After it has failed on one image."""
        if self._good is None:
            self._failed += 1
            if self._failed < _MOST_FAILED:
                return
        else:
            with suppress(Exception):
                self.predictor.run([self._good])
                return
        raise DetectronError(
            f"the model stopped working ({said}); finished work is kept: fix this, then continue with --resume (resume=True)"
        )

    def check_machine(self, error: DetectronError) -> None:
        """After an image could not be read.

        Raises:
            DetectronError: No other can be read, either.
        """
        cause = error.__cause__
        if not isinstance(cause, OSError):
            return
        gone = cause.errno == errno.ENOENT and self.read is not None and not Path(self.read).exists()  # so is its storage
        if gone or cause.errno in _MACHINES:
            also = f", and {self.read!r}, which was read before, is gone" if gone else ""
            raise DetectronError(
                f"{reason(error)}{also}; finished work is kept: fix this, then continue with --resume (resume=True)"
            )


def _chunk(health: _Health, images: Iterator[_Waiting], clock: Clock, budget: int) -> Iterator[Outcome]:
    """The outcomes of one chunk, in order; each as soon as those before it are there."""
    waiting: deque[_Waiting] = deque()
    results: dict[int, Any] = {}

    def usable() -> Iterator[Prepared]:
        for each in images:
            waiting.append(each)
            try:
                yield each.prepared.result()
            except DetectronError as exc:
                health.check_machine(exc)
                results[each.place] = exc
            else:
                health.read = each.path

    for group in health.predictor.groups(usable(), budget):
        start = time.perf_counter()
        found = health.run(group)
        clock.busy += time.perf_counter() - start
        results.update((prepared.index, result) for prepared, result in zip(group, found, strict=True))
        while waiting and waiting[0].place in results:
            each = waiting.popleft()
            yield each.outcome(results.pop(each.place))
    for each in waiting:
        yield each.outcome(results.pop(each.place))


def _checked(result: Any) -> Detections | DetectronError:
    if isinstance(result, (Detections, DetectronError)):
        return result
    return DetectronError(f"the model must give Detections, not {type(result).__name__}; load it with load_predictor")
