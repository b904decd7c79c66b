"""Builds a model from the plain data of a LazyConfig, and runs only what Detectron2's models are built of.

A saved model may name any code. Hydra's and Detectron2's own ``instantiate`` import whatever a name says, so they are not used
here.
"""

from __future__ import annotations

import functools
import inspect
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from bentoml_detectron.artifact.config import KeyPath, Plain
from bentoml_detectron.errors import (
    InvalidModelError,
    UnknownEntryError,
    UnsafeFileError,
    UntrustedCodeError,
)

GET_OBJECT = "hydra.utils.get_object"
"""Marks a class or function that is itself an argument; its name is under ``path``."""
CALL_KEYS = ("_target_", "_args_", "_partial_")
DOTTED = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+\Z")

# What a saved model may use unasked: the public nn.Module classes of these packages, of torch.nn those in torch.nn.modules.
# Their constructors compute, and take nothing that names a file, an address or other code; those that build from a CfgNode,
# by way of a registry, are never given one.
_PACKAGES = tuple(f"detectron2.{each}" for each in ("modeling", "layers", "projects", "structures")) + ("fvcore.nn", "torch.nn")
# Not these: one builds models of MMDetection by name and loads what a path or address holds, the other wraps a whole
# predictor with a data set's mapper. Neither is part of a model that Detectron2 trains.
_FOREIGN = ("detectron2.modeling.mmdet_wrapper", "detectron2.modeling.test_time_augmentation")
# What else models need. All other functions of those packages are not for configs (builders from a CfgNode, losses,
# functions of tensors), and all other classes hold data (boxes, images), read data sets or schedule training.
_OTHERS = frozenset([
    "detectron2.data.detection_utils.get_fed_loss_cls_weights",  # of the LVIS models: it asks MetadataCatalog for counts
    "detectron2.layers.batch_norm.FrozenBatchNorm2d.convert_frozen_batchnorm",
    "detectron2.layers.batch_norm.get_norm",
    "detectron2.layers.shape_spec.ShapeSpec",
    "detectron2.modeling.backbone.resnet.ResNet.make_default_stages",
    "detectron2.modeling.backbone.resnet.ResNet.make_stage",
    "detectron2.modeling.backbone.resnet.make_stage",
    "detectron2.modeling.box_regression.Box2BoxTransform",
    "detectron2.modeling.box_regression.Box2BoxTransformLinear",
    "detectron2.modeling.box_regression.Box2BoxTransformRotated",
    "detectron2.modeling.matcher.Matcher",
    "detectron2.structures.boxes.BoxMode",
])  # fmt: skip
_TORCH: dict[str, Any] = {str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}
_TORCH["torch.device"] = torch.device


def build(plain: Plain, tuples: Iterable[Sequence[str | int]] = (), *, trusted: Sequence[str] = ()) -> Any:
    """Builds what plain data say. Every name in them is checked before any module is imported, and found before any is called.

    Args:
        plain: Of `to_plain`, or a file's, which may say anything.
        tuples: The paths of its lists that were tuples.
        trusted: Modules, packages or single names that may be imported and called beside Detectron2's and PyTorch's own.

    Raises:
        InvalidModelError: `tuples` does not fit, a call is malformed, or its arguments are not those its target takes.
        UnsafeFileError: It names what is neither a part of Detectron2's models nor trusted.
        UnknownEntryError: It names what is not there.
    """
    names = {_checked(call) for call in _calls(plain)}
    for name in names:
        _package_of(name, trusted)
    # Detectron2's and PyTorch's first, so that a forged name there ends this before trusted code is imported.
    in_order = sorted(names, key=lambda name: (_below(name, trusted) is not None, name))
    found = {name: _admitted(name, trusted) for name in in_order}
    paths = {tuple(path) for path in tuples}
    built = _build(plain, (), found, paths)
    if paths:
        raise InvalidModelError(f"the manifest lists {list(min(paths, key=repr))!r} as a tuple, but the config has none there")
    return built


def targets(plain: Plain) -> list[str]:
    """Every name of code in plain data, sorted."""
    names = (call.get("path") if call["_target_"] == GET_OBJECT else call["_target_"] for call in _calls(plain))
    return sorted({name for name in names if isinstance(name, str)})


def untrusted(plain: Plain) -> list[str]:
    """The modules of those names that `build` runs only if they are trusted, sorted."""
    modules = set()
    for name in targets(plain):
        try:
            _package_of(name, ())
        except UntrustedCodeError:
            modules.add(name.rpartition(".")[0])
    return sorted(modules)


def _calls(value: Any) -> Iterator[Plain]:
    if isinstance(value, dict):
        if "_target_" in value:
            yield value
        for item in value.values():
            yield from _calls(item)
    elif isinstance(value, list):
        for item in value:
            yield from _calls(item)


def _checked(call: Plain) -> str:
    """The name in a call whose form is right."""
    name = call["_target_"]
    if name == GET_OBJECT:
        name = call.get("path")
        if call.keys() != {"_target_", "path"}:
            raise InvalidModelError(
                f"the config's {GET_OBJECT} has the arguments {reprlib.repr(call)}; it takes only a path", value=name
            )
    if not isinstance(name, str) or not DOTTED.match(name):
        raise UnsafeFileError(f"the config calls {reprlib.repr(name)}, which is not a dotted name", value=name)
    if type(call.get("_args_", [])) is not list or type(call.get("_partial_", False)) is not bool:
        raise InvalidModelError(f"the config's call of {name} must have a list as _args_ and a bool as _partial_")
    return name


def _below(name: str, packages: Iterable[str]) -> str | None:
    """The first package that is, or holds, what has this name."""
    return next((each for each in packages if f"{name}.".startswith(f"{each}.")), None)


def _package_of(name: str, trusted: Sequence[str]) -> str:
    """The package for whose sake a name may be looked up; nothing is imported.

    Raises:
        UnsafeFileError: There is none.
    """
    if name in _TORCH or name in _OTHERS:
        return name
    parts = name.split(".")
    package = _below(name, trusted)
    if package is not None and not any(part.startswith("__") for part in parts):
        return package
    package = _below(name, _PACKAGES) if _below(name, _FOREIGN) is None else None
    if package is not None and package != name and not any(part.startswith("_") for part in parts):
        return package
    raise _unsafe(name)


def _unsafe(name: str) -> UntrustedCodeError:
    return UntrustedCodeError(
        f"the config names {name}, which is not one of the parts that Detectron2 models are built from; none of it was run. "
        f"If you trust that code, load the model with --trusted {name.rpartition('.')[0]} "
        f"(trusted=[{name.rpartition('.')[0]!r}])",
        value=name,
    )


def _admitted(name: str, trusted: Sequence[str]) -> Any:
    """What a name that has a package says, provided that it is defined where the name says.

    Raises:
        UnsafeFileError: It is no class or function, only imported there, or none that a config may name.
        UnknownEntryError: There is none.
    """
    if name in _TORCH:
        return _TORCH[name]
    package = _package_of(name, trusted)
    try:
        found, qualname = locate(name)
    except Exception as exc:  # importing runs code: anything can happen
        raise UnknownEntryError(f"the config needs {name}, which cannot be imported: {exc!r}", value=name) from exc
    defined = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"
    # What a module merely imported, and all that is reached through that, is defined under another name.
    if not callable(found) or getattr(found, "__qualname__", None) != qualname or _below(defined, [package]) is None:
        raise UnsafeFileError(
            f"the config names {name}, but this is {reprlib.repr(found)}, not a class or function defined there; none of it "
            "was run. Name code by the module that defines it",
            value=name,
        )
    if _below(defined, trusted) is None:
        _package_of(defined, trusted)  # it may be an alias of what is refused under its own name
        elsewhere = package == "torch.nn" and _below(defined, ["torch.nn.modules"]) is None  # as torch.nn.parallel
        is_module = inspect.isclass(found) and issubclass(found, nn.Module) and not elsewhere
        if not is_module and defined not in _OTHERS:
            raise _unsafe(defined)
    return found


def locate(name: str) -> tuple[Any, str]:
    """What is under a dotted name, and its path inside its module, which is the longest prefix that can be imported.

    Raises:
        ImportError: There is no such module.
        AttributeError: The module has nothing of that name.
    """
    parts = name.split(".")
    found: Any = import_module(parts[0])
    rest = 1
    while rest < len(parts):
        module = ".".join(parts[: rest + 1])
        try:
            found = import_module(module)
        except ModuleNotFoundError as exc:
            if exc.name != module:  # it is there, and what it imports is not
                raise
            break
        rest += 1
    for part in parts[rest:]:
        found = getattr(found, part)
        if not inspect.isclass(found):
            break  # only classes have names inside; whatever else there is, its own name is not the whole path
    return found, ".".join(parts[rest:])


def _build(value: Any, path: KeyPath, found: Mapping[str, Any], tuples: set[KeyPath]) -> Any:
    if isinstance(value, list):
        items = [_build(item, (*path, i), found, tuples) for i, item in enumerate(value)]
        if path not in tuples:
            return items
        tuples.remove(path)
        return tuple(items)
    if not isinstance(value, dict):
        return value
    if value.get("_target_") == GET_OBJECT:
        return found[value["path"]]
    built = {key: _build(item, (*path, key), found, tuples) for key, item in value.items()}
    if "_target_" not in built:
        return built
    name, args = built.pop("_target_"), built.pop("_args_", [])
    if built.pop("_partial_", False):
        return functools.partial(found[name], *args, **built)
    try:
        return found[name](*args, **built)
    except TypeError as exc:
        raise InvalidModelError(f"{name} cannot be called as the config says: {exc}", value=name) from exc
