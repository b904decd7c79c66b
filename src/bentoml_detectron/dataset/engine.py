"""Where the chunks of a run are worked on: the protocol `Engine`, and `Local`, which uses this process."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from bentoml_detectron.dataset.chunks import Chunk, Clock
from bentoml_detectron.dataset.parts import Listing
from bentoml_detectron.dataset.work import Done, Work, run
from bentoml_detectron.options import Options

if TYPE_CHECKING:
    from bentoml_detectron.artifact.manifest import Dataset
    from bentoml_detectron.engines import Precision
    from bentoml_detectron.predictor import Predictor


@dataclass(frozen=True, slots=True)
class Model:
    """What a run has to know of its model.

    Attributes:
        dataset: Its classes; None where it carries none.
        wanted: The options, checked against it.
        budget: Most pixels, padding included, in a batch.
        precision: What it runs in; of "auto", what was chosen.
    """

    dataset: Dataset | None
    wanted: Options
    budget: int
    precision: Precision


class Engine(Protocol):
    """Works on chunks, while it is entered."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def model(self, work: Work) -> Model:
        """Loads the model where the work will be done.

        Raises:
            DetectronError: It cannot be loaded, or does not take the options.
        """

    def run(
        self, work: Work, listing: Listing, numbers: Sequence[int], clock: Clock, told: Callable[[int], None]
    ) -> Generator[Done]:
        """Works on chunks; `model` has been called.

        Args:
            work: What to do, with a budget.
            listing: The images.
            numbers: Of the chunks.
            clock: Is told when the model was busy.
            told: Is called with the number of images that came from the model.

        Yields:
            Each chunk when it is finished.

        Raises:
            OutputError: The folder cannot be written.
            DetectronError: The work cannot go on.
        """


def loaded(work: Work) -> tuple[Predictor, Model]:
    """Loads the model and looks at it; errors are those of `load_predictor`, and of options that it does not take."""
    predictor = work.predictor()
    wanted = predictor.options(score_threshold=work.score_threshold, classes=work.classes, top_k=work.top_k)
    return predictor, Model(predictor.dataset, wanted, predictor.budget(), predictor.precision or work.precision)


class Local:
    """This process."""

    def __init__(self) -> None:
        self._predictor: Predictor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._predictor = None

    def model(self, work: Work) -> Model:
        """As `Engine.model`."""
        self._predictor, model = loaded(work)
        return model

    def run(
        self, work: Work, listing: Listing, numbers: Sequence[int], clock: Clock, told: Callable[[int], None]
    ) -> Generator[Done]:
        """As `Engine.run`; in the order of `numbers`."""
        chunks = (Chunk(number, listing.first(number), listing.items(number)) for number in numbers)
        yield from run(work, self._predictor or work.predictor(), chunks, clock, told)
