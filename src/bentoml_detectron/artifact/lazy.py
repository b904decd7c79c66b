"""A LazyConfig's model node as plain data; `lazy_build` builds the module from that data.

The plain data follow Hydra's conventions. ``_target_`` with a dotted name is a call, and ``_args_`` are its positional
arguments. ``_partial_: true`` makes it a ``functools.partial``. A class or function that is itself an argument is a call of
``hydra.utils.get_object``, which here only marks a name and is never called.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import reprlib
import types
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bentoml_detectron.artifact.config import KeyPath, Plain
from bentoml_detectron.artifact.lazy_build import CALL_KEYS, DOTTED, GET_OBJECT, locate
from bentoml_detectron.artifact.manifest import Input
from bentoml_detectron.artifact.plain_yaml import MAX_DEPTH, MAX_VALUES
from bentoml_detectron.errors import InvalidArgumentError


def model_node(config: object) -> Mapping[str, Any]:
    """The model's node in what the user gave: that node itself, or a whole LazyConfig.

    Raises:
        InvalidArgumentError: It is neither.
    """
    if isinstance(config, Mapping):
        if "_target_" in config:
            return config
        node = _at(config, "model")
        if isinstance(node, Mapping) and "_target_" in node:
            return node
    raise InvalidArgumentError(
        f"config is of type {type(config).__name__} and has neither a '_target_' nor a 'model' with one; give the whole "
        "LazyConfig or its model, as LazyConfig.load(file) or LazyConfig.load(file).model",
        value=config,
    )


def to_plain(config: object) -> tuple[Plain, list[KeyPath]]:
    """Copies a LazyConfig's model node into plain dicts, lists and scalars; interpolations are resolved.

    Args:
        config: A model node or a whole LazyConfig.

    Returns:
        The copy, and the paths of the lists in it that were tuples. OmegaConf has no tuples: they are those in plain dicts and
        in objects, as the arguments of a ``functools.partial``.

    Raises:
        InvalidArgumentError: There is no model node, or it holds something that plain data cannot say, cannot be resolved, or
            is nested too deep.
    """
    copier = _Copier()
    return copier.copy(model_node(config), ()), copier.tuples


class _Copier:
    def __init__(self) -> None:
        self.tuples: list[KeyPath] = []
        self.count = 0

    def copy(self, value: Any, path: KeyPath) -> Any:
        self.count += 1
        if len(path) > MAX_DEPTH:  # also where an interpolation holds itself
            raise InvalidArgumentError(f"the config is nested deeper than {MAX_DEPTH} at {_spell(path)}", value=_spell(path))
        if self.count > MAX_VALUES:
            raise InvalidArgumentError(f"the config holds more than {MAX_VALUES:,} values", value=self.count)
        if isinstance(value, np.generic):
            value = value.item()
        if type(value) is int and value.bit_length() > 64:
            raise InvalidArgumentError(f"{_spell(path)} is a number of {value.bit_length()} bits; the limit is 64")
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if isinstance(value, (list, ListConfig)) or type(value) in (tuple, torch.Size):
            if isinstance(value, tuple):
                self.tuples.append(path)
            return [self.copy(_resolved(value, i, path), (*path, i)) for i in range(len(value))]
        return self._object(value, path)

    def _mapping(self, value: Mapping[Any, Any], path: KeyPath) -> Plain:
        for key in value:
            if type(key) is not str:
                raise InvalidArgumentError(f"a key of {_spell(path)} must be a string, not {type(key).__name__}", value=key)
        items = {key: _resolved(value, key, path) for key in value}
        if "_target_" not in items:
            # OmegaConf makes a node of a dataclass's instance.
            kind = OmegaConf.get_type(value) if isinstance(value, DictConfig) else None
            if dataclasses.is_dataclass(kind):
                return self._call(kind, (), {f.name: items[f.name] for f in dataclasses.fields(kind) if f.init}, path)
            return {key: self.copy(item, (*path, key)) for key, item in items.items()}
        target = items.pop("_target_")
        name = target if type(target) is str else _name_of(target, (*path, "_target_"))
        return {"_target_": name, **{key: self.copy(item, (*path, key)) for key, item in items.items()}}

    def _object(self, value: Any, path: KeyPath) -> Plain:
        if isinstance(value, Enum):
            return self._call(type(value), (value.value,), {}, path)
        if isinstance(value, tuple) and hasattr(value, "_asdict"):  # a namedtuple
            return self._call(type(value), (), value._asdict(), path)
        if isinstance(value, types.LambdaType) and value.__name__ == "<lambda>":
            value = _as_partial(value) or value
        if type(value) is functools.partial:
            return {**self._call(value.func, value.args, value.keywords, path), "_partial_": True}
        if isinstance(value, torch.dtype):
            return {"_target_": GET_OBJECT, "path": str(value)}
        if isinstance(value, torch.device):
            return self._call(torch.device, (str(value),), {}, path)
        if inspect.isclass(value) or inspect.isroutine(value):
            return {"_target_": GET_OBJECT, "path": _name_of(value, path)}
        if dataclasses.is_dataclass(value):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
            return self._call(type(value), (), fields, path)
        raise InvalidArgumentError(
            f"{_spell(path)} is of type {type(value).__name__}, which cannot be saved as plain data; use numbers, strings, "
            "lists and mappings, classes and functions themselves, and for any other object the LazyCall that creates it",
            value=value,
        )

    def _call(self, target: Any, args: Sequence[Any], keywords: Mapping[str, Any], path: KeyPath) -> Plain:
        if clash := set(keywords) & set(CALL_KEYS):
            raise InvalidArgumentError(f"{_spell(path)} has an argument {min(clash)!r}, a name that is reserved here")
        call: Plain = {"_target_": _name_of(target, path)}
        if args:
            call["_args_"] = [self.copy(item, (*path, "_args_", i)) for i, item in enumerate(args)]
        return call | {key: self.copy(item, (*path, key)) for key, item in keywords.items()}


def _spell(path: KeyPath) -> str:
    return ".".join(["config", *map(str, path)])


def _resolved(node: Any, key: str | int, path: KeyPath) -> Any:
    try:
        return node[key]
    except OmegaConfBaseException as exc:
        raise InvalidArgumentError(f"{_spell((*path, key))} cannot be resolved: {exc}", value=key) from exc


def _name_of(value: Any, path: KeyPath) -> str:
    """The dotted name under which any process finds this class or function."""
    name = f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', None)}"
    found = None
    if DOTTED.match(name) and not name.startswith("__main__."):
        with suppress(ImportError, AttributeError):
            found = locate(name)[0]
    if found is None or found != value:
        raise InvalidArgumentError(
            f"{_spell(path)} is {reprlib.repr(value)}, which another process cannot import as {name}; define it at the top of "
            "a module that can be imported, not in __main__ or in the config's file, and write "
            "functools.partial(function, argument=...) in place of a lambda",
            value=value,
        )
    return name


def _as_partial(function: types.FunctionType) -> functools.partial[Any] | None:
    """The partial that a lambda is another spelling of, as ``lambda c: NaiveSyncBatchNorm(c, stats_mode="N")`` of the zoo.

    The lambda is run on stand-ins, with its globals replaced by such: it is a partial if all it does is to call one global,
    with its own arguments last among the positional ones, in their order, and before them constants, or what globals hold.
    """
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    takes_more = (
        function.__code__.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS) or function.__code__.co_kwonlyargcount
    )
    if function.__closure__ or function.__defaults__ or takes_more:
        return None
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], object]] = []

    class StandIn:
        def __init__(self, real: Any) -> None:
            self._real = real

        def __getattr__(self, name: str) -> StandIn:
            return StandIn(getattr(self._real, name))

        def __call__(self, *args: Any, **keywords: Any) -> StandIn:
            result = StandIn(object())  # which is no constant
            calls.append((self._real, args, keywords, result))
            return result

        def __bool__(self) -> bool:
            raise TypeError("it decides by its argument")

        def __eq__(self, other: object) -> bool:
            raise TypeError("it decides by its argument")

        __hash__ = None  # type: ignore[assignment]

    known = {name: StandIn(function.__globals__[name]) for name in function.__code__.co_names if name in function.__globals__}
    given = [StandIn(object()) for _ in names]
    try:
        returned = types.FunctionType(function.__code__, {"__builtins__": {}, **known})(*given)
    except Exception:  # it does something else
        return None
    if len(calls) != 1 or returned is not calls[0][-1]:
        return None
    target, args, keywords, _ = calls[0]
    before, last = args[: len(args) - len(given)], args[len(args) - len(given) :]
    if len(last) != len(given) or any(one is not other for one, other in zip(last, given, strict=True)):
        return None
    prefix = [each._real if isinstance(each, StandIn) else each for each in before]
    keywords = {key: each._real if isinstance(each, StandIn) else each for key, each in keywords.items()}
    if not all(each is None or type(each) in (bool, int, float, str) for each in (*prefix, *keywords.values())):
        return None
    return functools.partial(target, *prefix, **keywords)


def input_of(config: object) -> Input:
    """How a whole LazyConfig prepares an image for testing; where it does not say, Detectron2's own defaults.

    Those of a model that pads to a square are this square's side, as in ViTDet's configs.
    """
    node, mapper = model_node(config), _at(config, "dataloader", "test", "mapper")
    image_format = _at(mapper, "image_format") or _at(node, "input_format")
    square = _at(node, "backbone", "square_pad")  # ViTDet's: a larger image would be cut
    short, longest = (square, square) if type(square) is int and square > 0 else (800, 1333)
    if mapper is not None:
        augmentations = _at(mapper, "augmentations")
        steps = list(augmentations) if isinstance(augmentations, (list, tuple, ListConfig)) else []
        sizes = [_resize(step) for step in steps]
        if len(sizes) == 1 and sizes[0] is not None:
            short, longest = sizes[0]
        else:
            warnings.warn(
                "the config's dataloader.test.mapper.augmentations is not a single ResizeShortestEdge to one length; "
                f"the saved model will resize images to {short} pixels, at most {longest}",
                stacklevel=2,
            )
    return Input(format=image_format if isinstance(image_format, str) else "BGR", min_size_test=short, max_size_test=longest)


def _resize(step: Any) -> tuple[int, int] | None:
    """The lengths of a ResizeShortestEdge that leaves nothing to chance."""
    target = _at(step, "_target_")
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    short, longest = _at(step, "short_edge_length"), _at(step, "max_size")
    if isinstance(short, (list, tuple, ListConfig)) and len(set(short)) == 1:
        short = short[0]
    if name.rpartition(".")[2] != "ResizeShortestEdge" or type(short) is not int or type(longest) is not int:
        return None
    return (short, longest) if short >= 0 and longest > 0 else None


def dataset_names(config: object) -> list[str]:
    """The datasets that a whole LazyConfig tests on, and then those that it trains on."""
    given = [_at(config, "dataloader", each, "dataset", "names") for each in ("test", "train")]
    several = [list(each) if isinstance(each, (list, tuple, ListConfig)) else [each] for each in given]
    return [name for names in several for name in names if isinstance(name, str)]


def _at(value: Any, *keys: str) -> Any:
    """What is under these keys; None where nothing is, or nothing that can be resolved."""
    for key in keys:
        try:
            value = value[key] if isinstance(value, Mapping) and key in value else None
        except OmegaConfBaseException:
            return None
    return value
