"""A model's ``model.yaml``, BentoML's record of it: made, written, and checked before BentoML reads it."""

from __future__ import annotations

import base64
import copy
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml import Model, Tag
from bentoml.exceptions import BentoMLException

from bentoml_detectron.artifact import files, manifest, plain_yaml
from bentoml_detectron.errors import CorruptFileError, DetectronError, InvalidArgumentError, ModelNotFoundError

# BentoML's adapters, its own and those of other distributions, all build on these.
from bentoml._internal.models.model import ModelContext, ModelInfo, ModelSignature, ModelStore, PartialKwargsModelOptions  # isort: skip

if TYPE_CHECKING:
    from bentoml._internal.models.model import ModelSignaturesType

MODULE = "bentoml.detectron"
MODULES = (MODULE, "bentoml._internal.frameworks.detectron")
"""The names under which a model of this framework may be recorded; the second by some versions of BentoML's adapter."""
API_VERSION = "v2"
"""Ours; BentoML's own adapter wrote ``v1``."""
IS_PREDICTOR = "_is_predictor"
RECORD = "model.yaml"


def _new_version() -> str:
    """Looks as BentoML's do, which follow from the clock: processes that were forked together have got the same one."""
    return base64.b32encode(secrets.token_bytes(10)).decode("ascii").lower()


def new(
    tag: Tag,
    is_predictor: bool,
    detectron2: str,
    signatures: ModelSignaturesType | None,
    labels: dict[str, str] | None,
    metadata: dict[str, Any] | None,
) -> ModelInfo:
    """The record of a new model; BentoML converts metadata in place, so it gets copies.

    Raises:
        InvalidArgumentError: (``ValueError``) The version is "latest", or BentoML does not accept the signatures, labels or
            metadata.
    """
    if tag.version == "latest":
        raise InvalidArgumentError(f"{str(tag)!r}: 'latest' is BentoML's name for the newest version; give another", value=tag)
    if signatures is not None and not (
        isinstance(signatures, Mapping) and all(isinstance(each, (Mapping, ModelSignature)) for each in signatures.values())
    ):
        raise InvalidArgumentError(
            f"signatures is {signatures!r:.200}; give a dict, such as {{'__call__': {{'batchable': False}}}}", value=signatures
        )
    try:
        return ModelInfo(
            tag=tag if tag.version else Tag(tag.name, _new_version()),
            module=MODULE,
            api_version=API_VERSION,
            signatures=copy.deepcopy(signatures) if signatures else {"__call__": ModelSignature(batchable=False)},
            labels=dict(labels or {}),
            options=PartialKwargsModelOptions(),
            metadata={**copy.deepcopy(metadata or {}), IS_PREDICTOR: is_predictor},
            context=ModelContext(framework_name="detectron2", framework_versions={"detectron2": detectron2}),
        )
    except Exception as exc:  # attrs, cattrs and BentoML have errors of their own
        raise InvalidArgumentError(f"BentoML does not accept these signatures, labels or metadata: {exc}") from exc


def write(folder: Path, info: ModelInfo) -> None:
    """Writes a model's record into its folder.

    Raises:
        InvalidArgumentError: It could not be read again, for what a user's metadata or labels hold.
    """
    with (folder / RECORD).open("w", encoding="utf-8") as file:
        info.dump(file)
    try:
        check(folder)
    except DetectronError as exc:
        raise InvalidArgumentError(
            f"with these labels and metadata the model could not be loaded again: {exc}; put large values, or a config, into "
            "custom_objects"
        ) from exc


class Store(ModelStore):
    """BentoML's store, where each record is checked before BentoML reads it."""

    def _get_item(self, tag: Tag) -> Model:
        if not tag.version:
            latest = self._path / tag.latest_path()
            raise CorruptFileError(f"{latest} is damaged; give a version, or save the model again", file=str(latest))
        check(self._path / tag.path())
        return super()._get_item(tag)


def check(folder: Path) -> None:
    """Checks a record's text before BentoML reads it; `UnsafeFileError` or `CorruptFileError` where that may not be."""
    # What BentoML itself may write of a user's metadata: bytes, and a few shared values.
    binary = frozenset(["tag:yaml.org,2002:binary"])
    plain_yaml.check(files.read_small(folder, RECORD), RECORD, aliases=16, tags=binary)


def is_newer(info: ModelInfo, present: Path) -> bool:
    """Whether a new model is at least as new as the one in a folder; as anything is newer than what is no whole model."""
    try:
        check(present)
        return bool(info.creation_time >= Model.from_path(present).creation_time)
    except Exception:
        return True


def check_tag(tag_like: object) -> Tag:
    """A tag as BentoML's; what is none raises InvalidArgumentError."""
    if not isinstance(tag_like, (str, Tag)):
        raise InvalidArgumentError(
            f"{tag_like!r} is not a valid tag; give a name such as 'mask_rcnn', or a Tag", value=tag_like
        )
    try:
        tag = Tag.from_taglike(tag_like)
        if not str(tag).isprintable():  # BentoML lets a line's end pass
            raise ValueError("it has characters that cannot be printed")
        return tag
    except (ValueError, BentoMLException) as exc:
        raise InvalidArgumentError(
            f"{tag_like!r} is not a valid tag: {exc}. Give 'name' or 'name:version', with lower-case letters, "
            "digits, '_', '-' and '.'",
            value=tag_like,
        ) from exc


def check_framework(model: Model) -> None:
    """Sees to it that a model is one of Detectron2's; ModelNotFoundError where another framework saved it."""
    if model.info.module not in MODULES:
        folder = Path(model.path)
        if (folder / manifest.MANIFEST).is_file():  # it is one of ours; then its record is damaged
            manifest.check_file(folder, RECORD, manifest.read(folder))
        raise ModelNotFoundError(
            f"{model.tag} was saved with {model.info.module or 'no framework'}, not with {MODULE}; load it with that",
            value=model.info.module,
        )
