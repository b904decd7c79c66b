"""What a dataset's images are: files, folders, globs, an annotation file's images."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bentoml_detectron.errors import InvalidArgumentError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source, under the names of `Prediction`, and the file that holds it."""

    file_name: str
    image_id: int | str
    path: str


def items(
    source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], image_root: str | os.PathLike[str] | None = None
) -> Iterator[Item]:
    """The images of a source, lazily."""
    import orjson

    position = 0
    for each in [source] if isinstance(source, (str, os.PathLike)) else source:
        path = Path(each)
        if path.suffix == ".json":
            for image in orjson.loads(path.read_bytes())["images"]:
                position += 1
                yield Item(image["file_name"], image["id"], str(Path(image_root or path.parent) / image["file_name"]))
            continue
        if path.is_dir():
            found = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        else:
            found = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - patterns may be absolute
        if not found:
            raise InvalidArgumentError(f"{str(path)!r}: there are no images", value=str(path))
        for name in found:
            position += 1
            yield Item(name, position, name)
