"""The work on chunks of a dataset, wherever it is done: from images to finished parts in a folder.

`Work` consists of plain values, so that it can be sent to where the work is done. What is needed there is the model store, the
images and the folder. An engine only has to call `run` there with chunks, in any order, and to pass on what it yields.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_detectron.dataset import parts
from bentoml_detectron.dataset.chunks import Chunk, Clock, Outcome
from bentoml_detectron.dataset.formats import Format, make
from bentoml_detectron.dataset.prediction import Failure, Prediction
from bentoml_detectron.errors import DetectronError, InvalidArgumentError
from bentoml_detectron.images import Limits

if TYPE_CHECKING:
    from bentoml_detectron.engines import Precision
    from bentoml_detectron.predictor import Predictor


_MOST_PIECES = 8  # that wait to be made


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done with each chunk; attributes that are not listed are arguments of `write`, as it was given them.

    Attributes:
        model: Its tag, with the version.
        fingerprint: That of the model: another one of the same tag is not to go on with it.
        image_column: Of Parquet files.
        formats: Of the outputs.
        max_batch_pixels: Most pixels, padding included, in a batch; fixed once, since batches' sizes show in the last digits.
        categories: Ids for COCO results by the model's class ids, where an annotation file has others.
        text_ids: Whether images' ids are strings.
        folder: Of the finished chunks.
    """

    model: str
    fingerprint: str
    device_id: str
    precision: Precision
    trust_remote_code: bool
    trusted: tuple[str, ...]
    limits: Limits
    score_threshold: float | None
    classes: tuple[str | int, ...] | None
    top_k: int | None
    image_column: str | None
    formats: tuple[str, ...]
    max_batch_pixels: int | None = None
    categories: dict[int, int] | None = None
    text_ids: bool = False
    folder: str = ""

    def predictor(self) -> Predictor:
        """Loads the model; errors are those of `load_predictor`.

        Raises:
            DetectronError: Here it is another one of the same tag.
        """
        from bentoml_detectron.store import fingerprint, get, load_predictor

        model = get(self.model)
        if fingerprint(model) != self.fingerprint:
            raise DetectronError(
                f"{self.model} is not the same model here as where the run started; copy that one here with bentoml models "
                "export and bentoml models import",
                value=self.model,
            )
        return load_predictor(
            model,
            self.device_id,
            precision=self.precision,
            trust_remote_code=self.trust_remote_code,
            trusted=self.trusted,
            max_batch_pixels=self.max_batch_pixels,
            limits=self.limits,
        )

    def writers(self) -> list[Format]:
        """What writes the outputs, in their order."""
        return [make(each, self.categories, self.text_ids, self.limits) for each in self.formats]


@dataclass(frozen=True, slots=True)
class Done:
    """A chunk that is finished.

    Attributes:
        number: Its own.
        images: How many it has.
        failures: "NAME: REASON" for each that could not be used.
    """

    number: int
    images: int
    failures: tuple[str, ...]


def run(
    work: Work, predictor: Predictor, chunks: Iterable[Chunk], clock: Clock, told: Callable[[int], None] = lambda images: None
) -> Iterator[Done]:
    """Works on chunks in this process; each is in the folder whole or not at all.

    Args:
        work: What to do.
        predictor: That of `Work.predictor`.
        chunks: Are taken a few images ahead.
        clock: Is told when the model was busy.
        told: Is called with the number of images that came from the model.

    Yields:
        Each chunk when it is finished, in their order.

    Raises:
        OutputError: The folder cannot be written.
    """
    from bentoml_detectron.dataset import local

    wanted = predictor.options(score_threshold=work.score_threshold, classes=work.classes, top_k=work.top_k)
    writers = work.writers()
    pool = local.workers()
    try:
        found = local.outcomes(
            predictor,
            chunks,
            wanted,
            pool,
            clock,
            budget=work.max_batch_pixels or predictor.budget(),
            image_column=work.image_column,
        )
        finishing: deque[Future[Done]] = deque()
        for number, images in groupby(found, key=lambda each: each.chunk):
            chunk = _Unfinished(Path(work.folder), number, writers, pool)
            for outcome in images:
                chunk.add(outcome)
                told(1)
            finishing.append(pool.submit(chunk.finish))
            while finishing and (finishing[0].done() or len(finishing) > 2):
                yield finishing.popleft().result()
        while finishing:
            yield finishing.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Unfinished:
    """A chunk whose pieces are made, by threads, a bounded number ahead of them."""

    def __init__(self, folder: Path, number: int, writers: list[Format], pool: ThreadPoolExecutor) -> None:
        self._folder, self._number, self._writers, self._pool = folder, number, writers, pool
        self._scratch = parts.scratch(folder, number)
        self._pieces: list[Future[tuple[list[Any], Failure | None]]] = []
        self._first = 0  # of the pieces that may not be made yet

    def add(self, outcome: Outcome) -> None:
        self._pieces.append(self._pool.submit(self._make, outcome))
        if len(self._pieces) - self._first > _MOST_PIECES:
            self._pieces[self._first].result()
            self._first += 1

    def _make(self, outcome: Outcome) -> tuple[list[Any], Failure | None]:
        name, image_id, result = outcome.item.file_name, outcome.item.image_id, outcome.result
        if isinstance(result, DetectronError):
            return self._written(failure := Failure(name, image_id, result), outcome), failure
        try:
            return self._written(Prediction(name, image_id, result), outcome), None
        except InvalidArgumentError as exc:  # to be drawn on, it is read again, and may have gone or changed since
            return self._written(failure := Failure(name, image_id, exc), outcome), failure

    def _written(self, made: Prediction | Failure, outcome: Outcome) -> list[Any]:
        with parts.writing(self._folder):
            return [
                writer.piece(made, outcome.position, outcome.image, self._scratch / str(index))
                for index, writer in enumerate(self._writers)
            ]

    def finish(self) -> Done:
        """Runs in one of the pool's threads; the pieces' tasks are before it in the pool's queue, so they end."""
        made = [each.result() for each in self._pieces]
        pieces = [each for each, _ in made]
        failures = tuple(f"{failure.file_name}: {failure.reason}" for _, failure in made if failure is not None)
        with parts.writing(self._folder):
            for index, writer in enumerate(self._writers):
                writer.part([each[index] for each in pieces], self._scratch / str(index))
            parts.publish_chunk(self._scratch, self._folder, self._number, len(pieces), len(failures))
        return Done(self._number, len(pieces), failures)
