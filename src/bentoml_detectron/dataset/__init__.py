"""Runs a model over whole datasets: `predict` gives results lazily, `write` writes them to files.

- `sources` finds the images.
- `local` runs the model over them.
- `formats` writes the results.
- `parts` keeps what is finished.
- `work` does what is to be done with a chunk of images, wherever that happens.
- `engine` and `on_ray` decide where it happens.
- `runs` ties these together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from bentoml_detectron import imports
from bentoml_detectron.dataset.chunks import CHUNK, check_chunk
from bentoml_detectron.dataset.prediction import Failure, Prediction
from bentoml_detectron.dataset.runs import Progress, Report, write
from bentoml_detectron.errors import DetectronError, InvalidArgumentError

if TYPE_CHECKING:
    from bentoml import Model, Tag

    from bentoml_detectron.dataset.sources import Dataset
    from bentoml_detectron.engines import Precision
    from bentoml_detectron.images import Limits
    from bentoml_detectron.options import Options
    from bentoml_detectron.predictor import Predictor

__all__ = ["Failure", "Prediction", "Progress", "Report", "predict", "write"]

OnError = Callable[[Failure], None]


def predict(
    bento_model: str | Tag | Model | Predictor,
    source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    device_id: str | None = None,
    precision: Precision | None = None,
    trust_remote_code: bool = False,
    trusted: Sequence[str] = (),
    limits: Limits | None = None,
    score_threshold: float | None = None,
    classes: Sequence[str | int] | None = None,
    top_k: int | None = None,
    image_root: str | os.PathLike[str] | None = None,
    image_column: str | None = None,
    key_column: str | None = None,
    chunk: int = CHUNK,
    on_error: OnError | None = None,
) -> Iterator[Prediction]:
    """Runs a model over a dataset: images are decoded in other threads, and results come lazily and in order.

    Args:
        bento_model: The model, or its tag, in BentoML's model store; or a predictor, whose device, precision and
            limits stay.
        source: One, or several in their order: the path of an image, a folder (with those in it), a glob, a COCO annotation
            file (then it is the only one), a Parquet file with encoded images, or "-" for a list of paths on stdin, one image
            a line. Nothing is fetched.
        device_id: Device to run on, such as "cpu" or "cuda:0".
        precision: See `load_predictor`.
        trust_remote_code: See `load_model`.
        trusted: See `load_model`.
        limits: Size limits for input images; see `Limits`.
        score_threshold: See `Predictor.__call__`.
        classes: See `Predictor.__call__`.
        top_k: See `Predictor.__call__`.
        image_root: Folder that the file names of an annotation file start from. None: that file's folder.
        image_column: Parquet column with the encoded images. None: "image", or the only column of bytes.
        key_column: Parquet column with the images' names. None: the first of "file_name", "path", "key", "id".
        chunk: Images of which batches are formed; results do not depend, to the last bit, on those of other chunks.
        on_error: Is called, in order, with each image that cannot be used, which is then left out. None: its error is raised.

    Returns:
        One `Prediction` an image, in the order of the source: a folder's images by name, before those of the folders in it.

    Raises:
        InvalidArgumentError: (``ValueError``) An argument is out of range, or, while one goes through the results, a source is
            none or has no images.
        ImageError: While one goes through the results: an image, which the message names, cannot be used.
        DetectronError: Any other error that `load_predictor` raises.

    Example::

        for each in bentoml.detectron.predict("mask_rcnn:latest", "photos/", score_threshold=0.6):
            print(each.file_name, each.detections)
    """
    with imports.for_less():
        from bentoml_detectron.dataset.sources import Columns, Dataset
        from bentoml_detectron.predictor import Predictor
        from bentoml_detectron.store import load_predictor

    if not isinstance(bento_model, Predictor):
        predictor = load_predictor(
            bento_model,
            device_id or "cpu",
            precision=precision or "fp32",
            trust_remote_code=trust_remote_code,
            trusted=trusted,
            limits=limits,
        )
    elif any(each is not None for each in (device_id, precision, limits)) or trust_remote_code or trusted:
        raise InvalidArgumentError(
            "a Predictor already has a device, a precision and limits, and its code is loaded; give a tag, or omit these"
        )
    else:
        predictor = bento_model
    wanted = predictor.options(score_threshold=score_threshold, classes=classes, top_k=top_k)
    dataset = Dataset(source, image_root=image_root, columns=Columns(image_column, key_column))
    return _predictions(predictor, dataset, wanted, check_chunk(chunk), on_error)


def _predictions(
    predictor: Predictor, dataset: Dataset, wanted: Options, chunk: int, on_error: OnError | None
) -> Iterator[Prediction]:
    from bentoml_detectron.dataset import local
    from bentoml_detectron.dataset.chunks import Chunk, Clock

    every = iter(dataset)
    some = iter(lambda: list(islice(every, chunk)), [])
    chunks = (Chunk(number, number * chunk + 1, items) for number, items in enumerate(some))
    pool = local.workers()
    try:
        for each in local.outcomes(
            predictor, chunks, wanted, pool, Clock(), budget=predictor.budget(), image_column=dataset.columns.image
        ):
            if not isinstance(each.result, DetectronError):
                yield Prediction(each.item.file_name, each.item.image_id, each.result)
                continue
            failure = Failure(each.item.file_name, each.item.image_id, each.result)
            if on_error is None:
                raise failure.named() from each.result
            on_error(failure)
    finally:
        pool.shutdown(cancel_futures=True)
