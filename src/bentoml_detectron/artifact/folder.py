"""A saved model's folder as a whole: writing its files, sealing them with a manifest, and opening it again."""

from __future__ import annotations

import platform
import shutil
import stat
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bentoml_detectron import __version__
from bentoml_detectron.artifact import bentoml_v1, code, config, files, lazy, lazy_build, manifest, plain_yaml, weights
from bentoml_detectron.artifact.manifest import Dataset, Input, Manifest, SelfTest
from bentoml_detectron.errors import InvalidArgumentError, InvalidModelError, UnsafeFileError, UntrustedCodeError

# After artifact.config, which says how to install Detectron2 where it is missing.
from detectron2.config import CfgNode  # isort: skip


@dataclass(frozen=True)
class SavedModel:
    """A saved model whose config was read and checked and whose weights were not touched yet.

    Attributes:
        folder: Where it lies.
        is_predictor: Whether a ``DefaultPredictor`` was saved, or else its bare module.
        cfg: Its config; `folder`'s own weights are not in it. Plain data of a LazyConfig's model node.
        input: How an image gets to it.
        dataset: What it knows of its dataset; None in models of BentoML's adapter, which kept nothing.
        manifest: None in models of BentoML's adapter.
        trusted: Modules that the plain data may name besides Detectron2's and PyTorch's.
    """

    folder: Path
    is_predictor: bool
    cfg: CfgNode | config.Plain
    input: Input
    dataset: Dataset | None
    manifest: Manifest | None
    trusted: tuple[str, ...] = ()

    def check_weights_file(self) -> None:
        """Compares the weights file with its digest; runs outside the interpreter's lock."""
        if self.manifest is not None:
            manifest.check_file(self.folder, weights.WEIGHTS, self.manifest)

    def weights_size(self) -> int:
        """Size of the weights file in bytes."""
        return files.size(self.folder, weights.WEIGHTS)

    def warn_of_other_weights(self, state: weights.State) -> None:
        """Warns where BentoML's adapter saved the model and would have used other weights than its own `state`."""
        if self.manifest is None and self.is_predictor and isinstance(self.cfg, CfgNode):
            _warn_of_other_weights(state, self.cfg.MODEL.WEIGHTS)


@dataclass(frozen=True)
class Description:
    """A config as it is saved.

    Attributes:
        kind: Whether it was a CfgNode or a LazyConfig.
        plain: Its plain data.
        tuples: Paths of the lists in these that were tuples.
        input: How an image gets to the model.
        dataset: What this process knows of the dataset that it tests on.
        entries: Entries of Detectron2's registries that it names.
    """

    kind: Literal["yacs", "lazy"]
    plain: config.Plain
    tuples: list[config.KeyPath]
    input: Input
    dataset: Dataset | None
    entries: list[manifest.Entry]


def describe(cfg: CfgNode | Mapping[str, Any], things: int | None = None, stuff: int | None = None) -> Description:
    """Reads a CfgNode, or a LazyConfig: its ``model`` node or a whole one.

    Args:
        cfg: The config.
        things: How many classes of things its model has, as far as that is known; see `config.first_known`.
        stuff: The same for semantic segmentation.

    Raises:
        InvalidArgumentError: It cannot be kept as plain data.
    """
    if isinstance(cfg, CfgNode):
        plain, tuples = config.to_plain(cfg)
        dataset = _dataset(config.dataset_names(cfg), things, stuff)
        return Description("yacs", plain, tuples, config.input_of(cfg), dataset, config.entries_of(cfg))
    plain, tuples = lazy.to_plain(cfg)
    dataset = _dataset(lazy.dataset_names(cfg), things, stuff)
    return Description("lazy", plain, tuples, lazy.input_of(cfg), dataset, [])


def _dataset(names: Sequence[str], things: int | None, stuff: int | None) -> Dataset | None:
    """What is kept of a model's dataset; that its class names are known here is a matter of having loaded it."""
    dataset = config.first_known(names, things, stuff)
    if dataset is not None and not (dataset.thing_classes or dataset.stuff_classes):
        warnings.warn(
            f"results will have no class names: none are registered for {', '.join(names)}, the model's dataset in its config. "
            "Before saving, register the dataset and load it once (DatasetCatalog.get), or set the names, for example with "
            f"MetadataCatalog.get({names[0]!r}).set(thing_classes=['cat', 'dog'])",
            stacklevel=2,
        )
    return dataset


def write_parts(folder: Path, module: nn.Module, plain: config.Plain) -> None:
    """Writes weights and config of a model into a folder, and reads them again as loading will.

    Raises:
        InvalidArgumentError: The config cannot be kept as plain data.
        InvalidModelError: The module's state holds something else than plain tensors.
    """
    (folder / config.CONFIG).write_bytes(plain_yaml.dump(plain))
    if config.read(folder) != plain:
        raise InvalidArgumentError("the config does not survive being written as YAML; use finite plain values only")
    weights.write(module, folder)
    weights.read(folder)


def seal(
    folder: Path,
    description: Description,
    *,
    is_predictor: bool,
    external_modules: Sequence[str] = (),
    self_test: SelfTest | None = None,
) -> None:
    """Writes the manifest over everything else in the folder."""
    content = Manifest(
        format=manifest.FORMAT,
        kind="predictor" if is_predictor else "module",
        config=description.kind,
        config_tuples=[list(path) for path in description.tuples],
        input=description.input,
        dataset=description.dataset,
        registry_entries=description.entries,
        external_modules=list(external_modules),
        self_test=self_test,
        versions=versions(),
        files={path.name: manifest.record(folder, path.name) for path in sorted(folder.iterdir())},
    )
    (folder / manifest.MANIFEST).write_bytes(manifest.dump(content))


def copy_calibrated(
    source: Path, folder: Path, content: Manifest, calibration: Mapping[str, tuple[float, float, float, float]]
) -> None:
    """Writes a saved model once more, with a calibration; all but ``model.yaml``, which is in the folder already.

    Args:
        source: The saved model's folder.
        folder: Where to write.
        content: The source's manifest.
        calibration: As in `Manifest`.

    Raises:
        CorruptFileError: A file of the source is damaged.
    """
    for name in sorted(content.files.keys() - {"model.yaml"}):
        manifest.check_file(source, name, content)  # before it is followed anywhere
        shutil.copyfile(source / name, folder / name)
        manifest.check_file(folder, name, content)
    listed = {path.name: manifest.record(folder, path.name) for path in sorted(folder.iterdir())}
    changed = Manifest.model_validate({**content.model_dump(), "calibration": dict(calibration), "files": listed})
    (folder / manifest.MANIFEST).write_bytes(manifest.dump(changed))


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


def open_saved(folder: Path, *, is_predictor: bool, trusted: Sequence[str] = (), trust_remote_code: bool = False) -> SavedModel:
    """Opens a model that this package saved.

    Args:
        folder: The model's folder in BentoML's store.
        is_predictor: What BentoML's record of the model says.
        trusted: Installed modules, or packages above them, that may be imported because the model names them.
        trust_remote_code: Whether source that the model brings along may be imported.

    Raises:
        InvalidModelError: A file that this needs is damaged, unsafe, or says something else than the others.
        UntrustedCodeError: The model needs code that is not trusted.
        UnknownEntryError: It needs an entry that nobody registered.
    """
    content = manifest.read(folder)
    for name in ("model.yaml", config.CONFIG):
        manifest.check_file(folder, name, content)
    if is_predictor != (content.kind == "predictor"):
        raise InvalidModelError(
            f"{manifest.MANIFEST} in {folder} says {content.kind!r}, but model.yaml says _is_predictor={is_predictor}",
            file=manifest.MANIFEST,
            value=content.kind,
        )
    if is_predictor and content.config == "lazy":
        raise InvalidModelError(
            f"{manifest.MANIFEST} in {folder} says that a LazyConfig's model is a predictor, but only a CfgNode's can be one",
            file=manifest.MANIFEST,
            value=content.kind,
        )
    plain = config.read(folder)
    carried: Sequence[str] = content.external_modules
    code.check_names(carried)
    if carried and trust_remote_code:
        manifest.check_file(folder, code.ARCHIVE, content)
        code.load(folder, carried)
        trusted, carried = (*trusted, *(name.partition(".")[0] for name in carried)), ()
    if content.config == "lazy":
        _refuse_carried(plain, carried, trusted)
        return SavedModel(folder, is_predictor, plain, content.input, content.dataset, content, tuple(trusted))
    config.import_entries(content.registry_entries, trusted, carried)
    cfg = config.from_plain(plain, content.config_tuples)
    return SavedModel(folder, is_predictor, cfg, config.input_of(cfg), content.dataset, content)


def _refuse_carried(plain: config.Plain, carried: Sequence[str], trusted: Sequence[str]) -> None:
    """Says how to load a LazyConfig's model that needs the source that it brings along."""
    tops = [name.partition(".")[0] for name in carried]
    for target in lazy_build.targets(plain):
        if config.is_trusted(target, tops) and not config.is_trusted(target, trusted):
            raise UntrustedCodeError(
                f"the model needs {target}, which is bundled with it; if you trust whoever made the model, load it with "
                "--trust-remote-code (trust_remote_code=True)",
                file=config.CONFIG,
                value=target,
            )


def open_bentoml_v1(folder: Path, *, is_predictor: bool) -> SavedModel:
    """Opens a model that BentoML's own adapter saved; arguments and errors as in `open_saved`."""
    try:
        plain, tuples = config.to_plain(bentoml_v1.read_config(folder))
    except InvalidArgumentError as exc:
        raise UnsafeFileError(f"{bentoml_v1.CUSTOM_OBJECTS} in {folder}: {exc}", file=bentoml_v1.CUSTOM_OBJECTS) from exc
    cfg = config.from_plain(plain, tuples)
    return SavedModel(folder, is_predictor, cfg, config.input_of(cfg), config.dataset_of(cfg), None)


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
    where = repr(source) if source else "the random weights"
    warnings.warn(
        f"this model was saved by BentoML's own adapter; its stored weights, which are now used, {what} {where}, which that "
        "adapter would have used. Check its predictions, then save it again with this package.",
        stacklevel=5,  # the caller of load_model
    )
