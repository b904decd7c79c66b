"""What is found on one image of a dataset, and what is not: `Prediction` and `Failure`."""

from __future__ import annotations

from dataclasses import dataclass

from bentoml_detectron.errors import DetectronError
from bentoml_detectron.results import Detections


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was found on one image of a dataset.

    Attributes:
        file_name: As the source names the image: its path, the annotation file's ``file_name``, or the key in Parquet.
        image_id: The annotation file's id; otherwise the image's position in the source, from 1.
        detections: What was found.
    """

    file_name: str
    image_id: int | str
    detections: Detections


@dataclass(frozen=True, slots=True)
class Failure:
    """An image of a dataset that could not be used.

    Attributes:
        file_name: As in `Prediction`.
        image_id: As in `Prediction`.
        error: Why.
    """

    file_name: str
    image_id: int | str
    error: DetectronError

    @property
    def reason(self) -> str:
        """The error's message, without a place in a call that nobody made."""
        return str(self.error).removeprefix(f"image {getattr(self.error, 'index', None)}: ")
