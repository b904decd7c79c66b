"""The result of one image of a dataset: a `Prediction`, or a `Failure` if the image cannot be used."""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from bentoml_detectron import errors
from bentoml_detectron.errors import DetectronError, InvalidArgumentError
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

    def to_json(self) -> str:
        """As one JSON object, a line: the attributes; "detections" is that of `Detections.to_json`."""
        detections = orjson.Fragment(self.detections.to_json())
        return orjson.dumps({**_names(self.file_name, self.image_id), "detections": detections}).decode()

    @classmethod
    def from_json(cls, text: str | bytes | bytearray) -> Prediction:
        """Reads what `to_json` wrote.

        Raises:
            InvalidArgumentError: (``ValueError``) It is no such text.
        """
        try:
            row = orjson.loads(text)
            name, image_id, found = row["file_name"], row["image_id"], orjson.dumps(row["detections"])
        except (ValueError, KeyError, TypeError) as exc:
            raise InvalidArgumentError(f"not a line written by a Prediction: {exc!r}", value=text) from exc
        return cls(name, image_id, Detections.from_json(found))


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
        """The error's message, without the place in a call that nobody made."""
        return errors.reason(self.error)

    def named(self) -> DetectronError:
        """The error as one whose message begins with the image's name."""
        return errors.named(self.error, self.file_name)

    def to_json(self) -> str:
        """As one JSON object, a line: "file_name", "image_id" and "reason"."""
        return orjson.dumps({**_names(self.file_name, self.image_id), "reason": written(self.reason)}).decode()


def written(name: str) -> str:
    """A file's name as JSON and Parquet can hold it: bytes of it that are no UTF-8 are replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _names(file_name: str, image_id: int | str) -> dict[str, int | str]:
    return {"file_name": written(file_name), "image_id": image_id}
