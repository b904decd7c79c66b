"""A saved model's folder as a whole: writing its parts, sealing them with a manifest, and opening it again."""

from __future__ import annotations

import platform
import stat
import warnings
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from bentoml_detectron import __version__
from bentoml_detectron.artifact import bentoml_v1, config, files, manifest, plain_yaml, weights
from bentoml_detectron.artifact.manifest import Dataset, Manifest
from bentoml_detectron.errors import InvalidArgumentError, InvalidModelError, UnsafeFileError

if TYPE_CHECKING:
    from detectron2.config import CfgNode

BENTOML_FILES = ("model.yaml", "custom_objects.pkl")
"""What BentoML itself writes beside this package's files; the second is never read here."""


@dataclass(frozen=True)
class SavedModel:
    """A saved model whose config was read and checked and whose weights were not touched yet.

    Attributes:
        folder: Where it lies.
        is_predictor: Whether a ``DefaultPredictor`` was saved, or else its bare module.
        cfg: Its config; `folder`'s own weights are not in it.
        dataset: What it knows of its dataset; None in models of BentoML's adapter, which kept nothing.
        manifest: None in models of BentoML's adapter.
    """

    folder: Path
    is_predictor: bool
    cfg: CfgNode
    dataset: Dataset | None
    manifest: Manifest | None

    def check_weights_file(self) -> None:
        """Compares the weights file with its digest; runs outside the interpreter's lock."""
        if self.manifest is not None:
            manifest.check_file(self.folder, weights.WEIGHTS, self.manifest)

    def weights_size(self) -> int:
        """Size of the weights file in bytes."""
        return files.size(self.folder, weights.WEIGHTS)

    def warn_of_other_weights(self, state: weights.State) -> None:
        """Warns where BentoML's adapter saved the model and would have used other weights than its own `state`."""
        if self.manifest is None and self.is_predictor:
            _warn_of_other_weights(state, self.cfg.MODEL.WEIGHTS)


def write_parts(folder: Path, module: nn.Module, cfg: CfgNode) -> None:
    """Writes weights and config of a model into a folder, and reads them again as loading will.

    Raises:
        InvalidArgumentError: The config cannot be kept as plain data.
        InvalidModelError: The module's state holds something else than plain tensors.
    """
    plain, _ = config.to_plain(cfg)
    (folder / config.CONFIG).write_bytes(plain_yaml.dump(plain))
    if config.read(folder) != plain:
        raise InvalidArgumentError("the config does not survive being written as YAML; keep it to finite plain values")
    weights.write(module, folder)
    weights.read(folder)


def seal(folder: Path, cfg: CfgNode, *, is_predictor: bool) -> None:
    """Writes the manifest over everything else in the folder."""
    _, tuples = config.to_plain(cfg)
    content = Manifest(
        format=manifest.FORMAT,
        kind="predictor" if is_predictor else "module",
        config="yacs",
        config_tuples=[list(path) for path in tuples],
        input=config.input_of(cfg),
        dataset=config.dataset_of(cfg),
        registry_entries=config.entries_of(cfg),
        versions=versions(),
        files={path.name: manifest.record(folder, path.name) for path in sorted(folder.iterdir())},
    )
    (folder / manifest.MANIFEST).write_bytes(manifest.dump(content))


def versions() -> dict[str, str]:
    """The versions that a model's results may depend on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "detectron2": detectron2_version(),
        "bentoml-detectron": __version__,
    }


def detectron2_version() -> str:
    """Detectron2's version, also where it runs from a checkout and has no distribution metadata."""
    try:
        return metadata.version("detectron2")
    except metadata.PackageNotFoundError:
        return str(import_module("detectron2").__version__)


def open_saved(folder: Path, *, is_predictor: bool) -> SavedModel:
    """Opens a model that this package saved.

    Args:
        folder: The model's folder in BentoML's store.
        is_predictor: What BentoML's record of the model says.

    Raises:
        InvalidModelError: A file that this needs is damaged, unsafe, or says something else than the others.
    """
    content = manifest.read(folder)
    for name in ("model.yaml", config.CONFIG):
        manifest.check_file(folder, name, content)
    if is_predictor != (content.kind == "predictor"):
        raise InvalidModelError(
            f"{manifest.MANIFEST} in {folder} says {content.kind!r}, model.yaml says _is_predictor={is_predictor}",
            file=manifest.MANIFEST,
            value=content.kind,
        )
    plain = config.read(folder)
    config.import_entries(content.registry_entries)
    cfg = config.from_plain(plain, content.config_tuples)
    return SavedModel(folder, is_predictor, cfg, content.dataset, content)


def open_bentoml_v1(folder: Path, *, is_predictor: bool) -> SavedModel:
    """Opens a model that BentoML's own adapter saved; arguments and errors as in `open_saved`."""
    try:
        plain, tuples = config.to_plain(bentoml_v1.read_config(folder))
    except InvalidArgumentError as exc:
        raise UnsafeFileError(f"{bentoml_v1.CUSTOM_OBJECTS} in {folder}: {exc}", file=bentoml_v1.CUSTOM_OBJECTS) from exc
    return SavedModel(folder, is_predictor, config.from_plain(plain, tuples), None, None)


def _warn_of_other_weights(state: weights.State, source: object) -> None:
    """Warns where BentoML's adapter, which reloads a predictor from its original weights, would have used others."""
    differ: bool | None
    if source is not None and not isinstance(source, str):
        return  # it would have failed
    if not source:
        differ = True  # it would have initialised the model at random
    elif "://" in source:
        differ = None
    else:
        path = Path(source)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                return
        except (OSError, ValueError):
            return  # it would have failed
        differ = weights.differ(state, path.parent, path.name)
    if differ is False:
        return
    what = "differ from" if differ else "could not be compared with"
    where = repr(source) if source else "the random ones"
    warnings.warn(
        f"this model was saved by BentoML's own adapter; its stored weights, which are used now, {what} {where}, which that "
        "adapter would have used. Check its predictions, then save it again with this package.",
        stacklevel=5,  # the caller of load_model
    )
