"""Whole datasets through a model: `predict`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from bentoml_detectron.dataset.prediction import Failure, Prediction
from bentoml_detectron.dataset.sources import items
from bentoml_detectron.errors import DetectronError

if TYPE_CHECKING:
    from bentoml import Model, Tag

    from bentoml_detectron.engines import Precision
    from bentoml_detectron.predictor import Predictor

__all__ = ["Failure", "Prediction", "predict"]

CHUNK = 100
"""Images of which batches are formed."""


def predict(
    bento_model: str | Tag | Model | Predictor,
    source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    device_id: str | None = None,
    precision: Precision | None = None,
    score_threshold: float | None = None,
    classes: Sequence[str | int] | None = None,
    top_k: int | None = None,
    image_root: str | os.PathLike[str] | None = None,
    on_error: Callable[[Failure], None] | None = None,
) -> Iterator[Prediction]:
    """Runs a model over a dataset, lazily and in order."""
    from bentoml_detectron.predictor import Predictor
    from bentoml_detectron.store import load_predictor

    predictor = (
        bento_model
        if isinstance(bento_model, Predictor)
        else load_predictor(bento_model, device_id or "cpu", precision=precision or "fp32")
    )
    wanted = predictor.options(score_threshold=score_threshold, classes=classes, top_k=top_k)
    every = items(source, image_root)

    def results() -> Iterator[Prediction]:
        while chunk := list(islice(every, CHUNK)):
            found = predictor.predict([each.path for each in chunk], [wanted] * len(chunk))
            for item, result in zip(chunk, found, strict=True):
                if not isinstance(result, DetectronError):
                    yield Prediction(item.file_name, item.image_id, result)
                elif on_error is None:
                    raise result
                else:
                    on_error(Failure(item.file_name, item.image_id, result))

    return results()
