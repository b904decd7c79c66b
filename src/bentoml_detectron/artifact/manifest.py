"""``manifest.json``: what a saved model says of itself.

One entry is the SHA-256 of the file itself, computed with zeros in that entry's place, so that any damage is found. To change
the format, raise `FORMAT`, and keep a reader of each earlier format beside `Manifest`, one function per format.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bentoml_detectron.artifact import files
from bentoml_detectron.errors import CorruptFileError, UnsupportedFormatError

FORMAT: Literal[1] = 1
MANIFEST = "manifest.json"
DIGEST = "manifest_sha256"
_ZEROS = "0" * 64

_Name = Annotated[str, Field(max_length=1000)]
_Names = Annotated[list[_Name], Field(max_length=100_000)]
_Colors = Annotated[list[tuple[int, int, int]], Field(max_length=100_000)]
_Id = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # larger ones may all have one hash, so that a dict takes minutes
_Ids = Annotated[dict[_Id, _Id], Field(max_length=100_000)]
_Hex128 = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
_Hex256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Part):
    """Size in bytes and digests of one file; see `files.checksum` for why there are two."""

    size: Annotated[int, Field(ge=0)]
    sha256: _Hex256
    xxh3_128: _Hex128


class Dataset(_Part):
    """What Detectron2's ``MetadataCatalog`` knew of the model's dataset, under the same names."""

    name: _Name
    thing_classes: _Names | None = None
    thing_colors: _Colors | None = None
    thing_dataset_id_to_contiguous_id: _Ids | None = None
    stuff_classes: _Names | None = None
    stuff_colors: _Colors | None = None
    stuff_dataset_id_to_contiguous_id: _Ids | None = None
    keypoint_names: _Names | None = None
    keypoint_flip_map: Annotated[list[tuple[_Name, _Name]], Field(max_length=100_000)] | None = None
    keypoint_connection_rules: Annotated[list[tuple[_Name, _Name, tuple[int, int, int]]], Field(max_length=100_000)] | None = (
        None
    )


class Entry(_Part):
    """One registry entry that the config names, and the module that defines it."""

    registry: _Name
    name: _Name
    module: _Name


class Input(_Part):
    """How an image gets to the model: channel order, and lengths in pixels of the shorter and at most the longer edge.

    A shorter edge of 0 leaves images as they are.
    """

    format: _Name
    min_size_test: Annotated[int, Field(ge=0)]
    max_size_test: Annotated[int, Field(ge=0)]


class Tensor(_Part):
    """A tensor in short: its shape, mean and standard deviation, and its first values."""

    shape: Annotated[list[int], Field(max_length=20)]
    mean: float
    std: float
    first: Annotated[list[float], Field(max_length=100)]


class SelfTest(_Part):
    """What the model found on the self-test's image when it was saved; see ``selftest``.

    Attributes:
        device: Where it ran.
        image_sha256: Of the image's pixels.
        settings: Plain values that the model's modules held, such as thresholds, by path.
        detections: ``Detections.to_json``, where the model gives these.
        tensors: By path, of models whose output is something else.
    """

    device: _Name
    image_sha256: _Hex256
    settings: Annotated[dict[_Name, str], Field(max_length=10_000)]
    detections: str | None
    tensors: Annotated[dict[_Name, Tensor], Field(max_length=1000)]


_Low = Annotated[float, Field(le=0, allow_inf_nan=False)]
_High = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Manifest(_Part):
    """A whole manifest.

    Attributes:
        calibration: The least and largest value that each convolution took, and those that it gave, on a user's images, by the
            convolution's dotted name; what int8 needs.
    """

    format: Literal[1]
    kind: Literal["predictor", "module"]
    config: Literal["yacs", "lazy"]
    config_tuples: Annotated[list[list[str | int]], Field(max_length=100_000)]
    input: Input
    dataset: Dataset | None
    registry_entries: Annotated[list[Entry], Field(max_length=1000)]
    external_modules: Annotated[list[_Name], Field(max_length=1000)] = []
    self_test: SelfTest | None = None
    calibration: Annotated[dict[_Name, tuple[_Low, _High, _Low, _High]], Field(max_length=10_000)] | None = None
    versions: Annotated[dict[_Name, _Name], Field(max_length=100)]
    files: Annotated[dict[_Name, FileRecord], Field(max_length=100)]


def _entry(digest: str) -> bytes:
    """The digest's entry as it stands in the text; quotes make it impossible inside another string."""
    return f'"{DIGEST}": "{digest}"'.encode()


def spell(content: dict[str, object]) -> bytes:
    """A manifest's text for its content, whatever digest that has."""
    text = json.dumps({**content, DIGEST: _ZEROS}, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    return text.replace(_entry(_ZEROS), _entry(hashlib.sha256(text).hexdigest()))


def dump(manifest: Manifest) -> bytes:
    """A manifest's text."""
    return spell(manifest.model_dump(mode="json"))


def read(folder: Path) -> Manifest:
    """Reads and checks the manifest of a saved model.

    Raises:
        CorruptFileError: It is missing, damaged, or not a manifest.
        UnsafeFileError: It is too large, or no regular file.
        UnsupportedFormatError: A later version of this package wrote it.
    """
    text = files.read_small(folder, MANIFEST)
    try:
        content = json.loads(text)
        written = content.pop(DIGEST)
        zeroed = text.replace(_entry(written), _entry(_ZEROS))
        intact = text.count(_entry(written)) == 1 and hashlib.sha256(zeroed).hexdigest() == written
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as exc:
        reason = f"{type(exc).__name__}: {str(exc)[:200]}"  # some hold all of the text
        raise CorruptFileError(f"{MANIFEST} in {folder} is damaged ({reason}); save the model again", file=MANIFEST) from exc
    if not intact:
        raise CorruptFileError(
            f"{MANIFEST} in {folder} is damaged: its content does not match its digest; save the model again", file=MANIFEST
        )
    if isinstance(content.get("format"), int) and content["format"] > FORMAT:
        raise UnsupportedFormatError(
            f"{folder} has format {content['format']}, but this bentoml-detectron reads up to {FORMAT}; upgrade it",
            file=MANIFEST,
            value=content["format"],
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as exc:
        raise CorruptFileError(f"{MANIFEST} in {folder} is not a valid manifest: {exc}", file=MANIFEST) from exc


def record(folder: Path, name: str) -> FileRecord:
    """Takes a file's size and digests."""
    sha256, xxh3_128 = files.digests(folder, name)
    return FileRecord(size=files.size(folder, name), sha256=sha256, xxh3_128=xxh3_128)


def check_file(folder: Path, name: str, manifest: Manifest) -> None:
    """Checks one file against the manifest.

    Raises:
        CorruptFileError: The manifest does not list the file, or lists another content.
    """
    due = manifest.files.get(name)
    if due is None:
        raise CorruptFileError(f"{MANIFEST} in {folder} does not list {name}", file=name)
    if files.size(folder, name) != due.size or files.checksum(folder, name) != due.xxh3_128:
        raise CorruptFileError(
            f"{name} in {folder} is damaged: its content differs from what was saved; save the model again", file=name
        )
