"""Builds a model from what Detectron2's own tools take: a config file, ``KEY VALUE`` overrides and a file of weights.

Nothing is unpickled and nothing is fetched. A LazyConfig file is a program; it runs only if the caller trusts it.
"""

from __future__ import annotations

import difflib
import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from bentoml_detectron import categories
from bentoml_detectron.artifact import files, lazy, lazy_build, plain_yaml, weights, zoo_pickle
from bentoml_detectron.errors import (
    CorruptFileError,
    DetectronError,
    InvalidArgumentError,
    InvalidModelError,
    UnsafeFileError,
    UntrustedCodeError,
    WeightsMismatchError,
)
from bentoml_detectron.model import build_safely, module_of

# After artifact.config, which says how to install Detectron2 where it is missing.
from detectron2 import model_zoo  # isort: skip
from detectron2.checkpoint import DetectionCheckpointer  # isort: skip
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate  # isort: skip
from detectron2.engine import DefaultPredictor  # isort: skip


@dataclass(frozen=True)
class Built:
    """A model on the CPU, in evaluation mode, with its weights: what `save_model` takes.

    Attributes:
        checkpointables: A ``DefaultPredictor``; of a LazyConfig, the module.
        config: The LazyConfig; None beside a predictor, which brings its own.
        weights: The file that they came from.
        unused: Names in the weights file that the model has no place for.
    """

    checkpointables: DefaultPredictor | nn.Module
    config: Mapping[str, Any] | None
    weights: Path
    unused: tuple[str, ...]

    @property
    def module(self) -> nn.Module:
        """The bare module."""
        return module_of(self.checkpointables)

    @property
    def untrusted(self) -> list[str]:
        """Modules that a LazyConfig names and that loading the model will import only if they are trusted."""
        return [] if self.config is None else lazy_build.untrusted(lazy.to_plain(self.config)[0])


def build(
    config_file: str,
    weights_file: str | None = None,
    overrides: Sequence[str] = (),
    *,
    classes_from: Path | None = None,
    trust_remote_code: bool = False,
) -> Built:
    """Builds a model as Detectron2's own tools do, and puts its weights in.

    Args:
        config_file: A file, or the name of one in Detectron2's model zoo; ``.yaml``, or ``.py`` for a LazyConfig.
        weights_file: A ``.pth`` checkpoint, or a ``.pkl`` of the zoo; what the config names unless given.
        overrides: ``["KEY", "VALUE", ...]``; for a LazyConfig ``["key=value", ...]``.
        classes_from: A COCO file whose categories are the model's classes.
        trust_remote_code: Whether a LazyConfig file may be run.

    Raises:
        InvalidArgumentError: (``ValueError``) A file is not there or no config, an override is none, or the classes do not fit.
        UntrustedCodeError: The config file is a program, and not trusted.
        InvalidModelError: The config does not build, or the weights are damaged, unsafe, or not those that it asks for.
    """
    path = _config_path(config_file)
    named = None if classes_from is None else categories.read(classes_from)
    if path.suffix == ".py":
        lazy_config = _lazy_config(path, overrides, trust_remote_code)
        found = _weights_path(weights_file or OmegaConf.select(lazy_config, "train.init_checkpoint"))
        built = build_safely(lambda: instantiate(lazy.model_node(lazy_config)))
        if named is not None:
            name = categories.register(named, built, next(iter(lazy.dataset_names(lazy_config)), None))
            OmegaConf.update(lazy_config, "dataloader.test.dataset.names", name, force_add=True)
        unused = _put_in(found, built)
        return Built(built.eval().cpu(), lazy_config, found, unused)
    cfg = _yacs_config(path, overrides)
    found = _weights_path(weights_file or cfg.MODEL.WEIGHTS)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    predictor = build_safely(lambda: DefaultPredictor(cfg))
    if named is not None:
        name = categories.register(named, predictor.model, cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else None)
        predictor.cfg.DATASETS.TEST = (name, *cfg.DATASETS.TEST[1:])
    unused = _put_in(found, predictor.model)
    predictor.cfg.MODEL.WEIGHTS = str(found)
    return Built(predictor, None, found, unused)


def _config_path(name: str) -> Path:
    if "://" not in name:
        if Path(name).is_file():
            return Path(name).resolve()
        try:
            return Path(model_zoo.get_config_file(name)).resolve(strict=True)
        except (RuntimeError, OSError, ValueError):
            pass
    raise InvalidArgumentError(
        f"there is no config {name!r}; give a local file, or a name from Detectron2's model zoo such as "
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml",
        value=name,
    )


def _weights_path(name: object) -> Path:
    cure = "give a local .pth or .pkl file with --weights"
    if not isinstance(name, str) or not name:
        raise InvalidArgumentError(f"the config names no weights; {cure}", value=name)
    if "://" in name:
        raise InvalidArgumentError(
            f"the config names {name}, the weights that training started from, and nothing is downloaded; {cure}, such as "
            "--weights output/model_final.pth, which training wrote",
            value=name,
        )
    path = Path(name)
    if not path.is_file():
        raise InvalidArgumentError(f"there is no weights file {name!r}; {cure}", value=name)
    return path.resolve()


class _LocalConfig(CfgNode):  # type: ignore[misc]
    """A CfgNode that reads ``_BASE_`` from local files, where Detectron2's own would also download it, and plain ones.

    One of the zoo's own files has an expression in it; these come with Detectron2, and are as trusted as its code.
    """

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        loaded: dict[str, Any] = super().load_yaml_with_base(filename, allow_unsafe=_is_of_zoo(Path(filename)))
        return loaded

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        if "://" in filename:
            raise InvalidArgumentError(
                f"the config's _BASE_ is at {filename}, but nothing is downloaded; download it and use the local path",
                value=filename,
            )
        path = Path(filename).resolve()
        text = files.read_small(path.parent, path.name)
        if not _is_of_zoo(path):
            plain_yaml.check(text, path.name, aliases=16, may_have_base=True)
        return io.StringIO(text.decode())


def _is_of_zoo(path: Path) -> bool:
    """Whether a file is one of the installed Detectron2's configs."""
    folder = Path(model_zoo.get_config_file("Base-RCNN-FPN.yaml")).resolve().parent
    return path.resolve().is_relative_to(folder)


def _yacs_config(path: Path, overrides: Sequence[str]) -> CfgNode:
    cfg = _LocalConfig(get_cfg())
    try:
        cfg.merge_from_file(str(path), allow_unsafe=False)
    except InvalidModelError as exc:
        raise InvalidArgumentError(
            f"{exc}; give the plain config.yaml that training wrote, or a LazyConfig's .py file", value=str(path)
        ) from exc
    except DetectronError:
        raise
    except Exception as exc:  # a file may be wrong in as many ways as YAML and Detectron2 have lines
        raise InvalidArgumentError(
            f"{path} is not a Detectron2 config: {_reason(exc)}. If it needs keys that a project adds, build the model in "
            "Python and save it with bentoml.detectron.save_model",
            value=str(path),
        ) from exc
    _check_overrides(overrides)
    if len(overrides) % 2:
        raise InvalidArgumentError(f"the override {overrides[-1]} has no value; give KEY VALUE pairs", value=list(overrides))
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        try:
            cfg.merge_from_list([key, value])
        except Exception as exc:  # as above
            raise InvalidArgumentError(
                f"the override {key} {value} is not valid: {_meant(cfg, key) or _reason(exc)}; give a key of the config, "
                "such as MODEL.ROI_HEADS.NUM_CLASSES, and a value of the right type",
                value=key,
            ) from exc
    return CfgNode(cfg)


def _meant(cfg: CfgNode, key: str) -> str | None:
    """Says that a config has no such key, and what it has of about that name; None where it has it."""
    known = [*_keys(cfg)]
    if key in known:
        return None
    near = difflib.get_close_matches(key, known, 1, cutoff=0.8)
    return f"there is no key {key}" + (f"; did you mean {near[0]}?" if near else "")


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in cfg.items():
        yield f"{prefix}{name}"
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")


def _check_overrides(overrides: Sequence[str]) -> None:
    for each in overrides[::2]:
        if each.startswith("-"):
            raise InvalidArgumentError(f"{each} comes after the overrides; put options before the first override", value=each)


def _lazy_config(path: Path, overrides: Sequence[str], trusted: bool) -> DictConfig:
    if not trusted:
        raise UntrustedCodeError(
            f"{path} is a LazyConfig, that is, Python code; if you trust its author, run it with --trust-remote-code "
            "(trust_remote_code=True)",
            file=path.name,
            value=str(path),
        )
    _check_overrides(overrides)
    if wrong := [each for each in overrides if "=" not in each]:
        raise InvalidArgumentError(f"the override {wrong[0]!r} is not valid; for a LazyConfig give key=value", value=wrong[0])
    try:
        loaded: DictConfig = LazyConfig.load(str(path))
    except Exception as exc:  # it is code: anything can happen
        raise InvalidArgumentError(
            f"{path} cannot be run: {_reason(exc)}; if it imports modules of yours, add their folder to PYTHONPATH",
            value=str(path),
        ) from exc
    try:
        LazyConfig.apply_overrides(loaded, list(overrides))
    except Exception as exc:  # Hydra's parser has errors of its own
        raise InvalidArgumentError(
            f"the overrides {' '.join(overrides)} do not fit the LazyConfig: {_reason(exc)}; give key=value with its keys, "
            "as model.num_classes=10",
            value=list(overrides),
        ) from exc
    lazy.model_node(loaded)
    return loaded


def _reason(exc: Exception) -> str:
    """What an exception of others says, in short."""
    said = " ".join(str(exc.args[0] if isinstance(exc, KeyError) and exc.args else exc).split())
    return f"{type(exc).__name__}: {said[:300]}" if said else type(exc).__name__


def _put_in(path: Path, module: nn.Module) -> tuple[str, ...]:
    """Puts weights in a module by Detectron2's own rules for names, and gives the names that it has no place for.

    Raises:
        InvalidModelError: The file cannot be read, or the module needs weights that it lacks or has in another shape.
    """
    checkpoint = _checkpoint(path)
    try:
        # The one step between reading a file and loading it; Detectron2's own `load` would unpickle.
        result = DetectionCheckpointer(module)._load_model(checkpoint)
    except Exception as exc:  # names may be such that matching them fails anywhere
        raise InvalidModelError(
            f"Detectron2 cannot match the names in {path} with the model's: {_reason(exc)}; give the weights of this model",
            file=path.name,
        ) from exc
    misshaped = {name: (tuple(found), tuple(due)) for name, found, due in result.incorrect_shapes}
    missing = [each for each in result.missing_keys if each not in misshaped and not weights.is_optional(each)]
    unused = tuple(each for each in result.unexpected_keys if not weights.is_optional(each))
    if missing or misshaped:
        raise WeightsMismatchError(
            f"{path} does not fit the model: {len(missing)} weights are missing, {len(misshaped)} have the wrong shape, and "
            f"{len(unused)} are unexpected; give the weights of the whole trained model, with the config and the "
            "overrides that it was trained with, such as MODEL.ROI_HEADS.NUM_CLASSES",
            missing=missing,
            unexpected=unused,
            misshaped=misshaped,
            file=path.name,
        )
    return unused


def _checkpoint(path: Path) -> dict[str, Any]:
    """What `DetectionCheckpointer` takes of a file."""
    try:
        is_pickle = path.suffix == ".pkl" and not zipfile.is_zipfile(path)  # torch.save writes archives, whatever their names
        checkpoint = zoo_pickle.read(path) if is_pickle else weights.read_checkpoint(path)
    except UnsafeFileError as exc:
        raise UnsafeFileError(
            f"{exc}. Only plain weights are read; give a file written by torch.save with {{'model': model.state_dict()}}",
            file=exc.file,
            value=exc.value,
        ) from exc
    except CorruptFileError as exc:
        raise CorruptFileError(
            f"{exc}; give the .pth that training wrote, with PyTorch 1.6 or later, or the .pkl from Detectron2's model zoo; if "
            "the file is incomplete, download it again",
            file=path.name,
        ) from exc
    return {key: checkpoint[key] for key in ("model", "__author__", "matching_heuristics") if key in checkpoint}
