"""The output formats. Results are written in three steps, so that any number of machines can share the first two.

1. An image's result becomes a piece, in any thread.
2. A chunk's pieces become a part, which is a file or a folder.
3. All parts together, in their order, become the output.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import orjson

from bentoml_detectron import images
from bentoml_detectron.dataset.prediction import Failure, Prediction
from bentoml_detectron.errors import DependencyMissingError, InvalidArgumentError
from bentoml_detectron.images import Limits

COCO, JSON_LINES, DETECTION_ROWS, IMAGE_ROWS, PICTURES, FAILURES = (
    "coco", "jsonl", "parquet-detections", "parquet-images", "pictures", "failures",
)  # fmt: skip
_SUFFIXES = {".json": COCO, ".jsonl": JSON_LINES, ".ndjson": JSON_LINES, "": PICTURES}
_QUALITY = 90  # of JPEG


class Format(Protocol):
    """One form of results."""

    def piece(self, outcome: Prediction | Failure, position: int, image: str | bytes | None, path: Path) -> Any:
        """What comes of one image; None if that is nothing, or is in a folder that will be the part already.

        Args:
            outcome: What was found, or why nothing.
            position: The image's, from 1.
            image: Its path, or its encoded bytes.
            path: Where the part will be.
        """

    def part(self, pieces: Sequence[Any], path: Path) -> None:
        """Writes what comes of a chunk, to a path where there is nothing."""

    def join(self, parts: Iterable[Path], path: Path) -> None:
        """Writes the output, to a path where there is nothing."""


def named(path: Path, rows: str = "detection") -> str:
    """The format that an output's name asks for.

    Args:
        path: The output.
        rows: Of Parquet: one a "detection", or one an "image".

    Raises:
        InvalidArgumentError: (``ValueError``) It asks for none.
    """
    suffix = Path(f"_{path.name}").suffix.lower()  # of ".json", too
    if rows not in ("detection", "image"):
        raise InvalidArgumentError(f"parquet_rows is {rows!r}; give 'detection' or 'image'", value=rows)
    if suffix == ".parquet":
        return DETECTION_ROWS if rows == "detection" else IMAGE_ROWS
    if suffix not in _SUFFIXES or path.name in ("", "-"):
        raise InvalidArgumentError(
            f"{str(path)!r} has an unknown extension; use .json (COCO results), .jsonl or .parquet, or none for a folder of "
            "annotated images",
            value=str(path),
        )
    return _SUFFIXES[suffix]


def make(name: str, categories: Mapping[int, int] | None, text_ids: bool, limits: Limits) -> Format:
    """The format of a name.

    Args:
        name: One of this module's.
        categories: The ids that COCO results shall have, by the model's class ids; others have those of `Detections.to_coco`.
        text_ids: Whether ids of images are strings.
        limits: Of images, which are read again to be drawn on.

    Raises:
        DependencyMissingError: What it needs is not installed.
    """
    if name in (DETECTION_ROWS, IMAGE_ROWS):
        from bentoml_detectron.dataset import parquet_format

        return (parquet_format.DetectionRows if name == DETECTION_ROWS else parquet_format.ImageRows)(text_ids)
    if name == PICTURES:
        return _Pictures(limits)
    return _Coco(categories or {}) if name == COCO else _JsonLines() if name == JSON_LINES else _Failures()


class _Text:
    """Rows with a separator between them, and something before and after all."""

    before, between, after = b"", b"\n", b"\n"

    def part(self, pieces: Sequence[bytes | None], path: Path) -> None:
        path.write_bytes(self.between.join(piece for piece in pieces if piece))

    def join(self, parts: Iterable[Path], path: Path) -> None:
        with path.open("wb") as whole:
            whole.write(self.before)
            is_first = True
            for part in parts:
                if part.stat().st_size:
                    whole.write(b"" if is_first else self.between)
                    is_first = False
                    with part.open("rb") as file:
                        shutil.copyfileobj(file, whole)
            whole.write(b"" if is_first and not self.before else self.after)


class _Coco(_Text):
    """One JSON list of COCO results."""

    before, between, after = b"[", b",\n", b"]\n"

    def __init__(self, categories: Mapping[int, int]) -> None:
        self._categories = categories

    def piece(self, outcome: Prediction | Failure, position: int, image: str | bytes | None, path: Path) -> bytes | None:
        if isinstance(outcome, Failure):
            return None
        rows = outcome.detections.to_coco(outcome.image_id)
        for row, class_id in zip(rows, outcome.detections.class_ids.tolist(), strict=True):
            row["category_id"] = self._categories.get(class_id, row["category_id"])
        return self.between.join(map(orjson.dumps, rows))


class _JsonLines(_Text):
    """One JSON object a line: `Prediction.to_json`."""

    def piece(self, outcome: Prediction | Failure, position: int, image: str | bytes | None, path: Path) -> bytes | None:
        return outcome.to_json().encode() if isinstance(outcome, Prediction) else None


class _Failures(_Text):
    """One JSON object a line, for each image that could not be used."""

    def piece(self, outcome: Prediction | Failure, position: int, image: str | bytes | None, path: Path) -> bytes | None:
        return outcome.to_json().encode() if isinstance(outcome, Failure) else None


class _Pictures:
    """A folder of JPEGs with what was found on them, by position and name."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        try:
            import supervision  # noqa: F401
        except ModuleNotFoundError as exc:
            raise DependencyMissingError("annotated images need supervision: pip install supervision") from exc

    def piece(self, outcome: Prediction | Failure, position: int, image: str | bytes | None, path: Path) -> None:
        from PIL import Image

        from bentoml_detectron.drawing import draw

        if isinstance(outcome, Failure) or image is None:
            return
        path.mkdir(exist_ok=True)
        picture = Image.fromarray(draw(images.load(image, self._limits), outcome.detections)[:, :, ::-1])
        picture.save(path / picture_name(outcome, position), "JPEG", quality=_QUALITY)

    def part(self, pieces: Sequence[None], path: Path) -> None:
        path.mkdir(exist_ok=True)  # also where no image could be used

    def join(self, parts: Iterable[Path], path: Path) -> None:
        path.mkdir()
        for part in parts:
            for picture in sorted(part.iterdir()):
                try:
                    os.link(picture, path / picture.name)
                except OSError:  # on another file system, or one without links
                    shutil.copyfile(picture, path / picture.name)


def picture_name(outcome: Prediction, position: int) -> str:
    """An annotated picture's name, which no other has, and which sorts by position."""
    stem = "".join(each if each.isalnum() or each in "-_." else "_" for each in Path(outcome.file_name).stem)
    return f"{position:07d}-{stem.encode()[:100].decode(errors='ignore')}.jpg"
