"""``config.yaml``: a Detectron2 CfgNode as plain data, and back without loss.

YAML has no tuples, so the manifest lists where they are. Nothing here follows ``_BASE_`` or resolves a tag. Only
`import_entries` imports modules by name: those that the manifest lists, if they are Detectron2's own or trusted.
"""

from __future__ import annotations

import re
import reprlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from bentoml_detectron.artifact import files, plain_yaml
from bentoml_detectron.artifact.manifest import Dataset, Entry, Input
from bentoml_detectron.artifact.plain_yaml import MAX_DEPTH, MAX_VALUES
from bentoml_detectron.errors import (
    NO_DETECTRON2,
    CorruptFileError,
    DetectronMissingError,
    InvalidArgumentError,
    InvalidModelError,
    UnknownEntryError,
    UnsafeFileError,
    UntrustedCodeError,
)

try:
    from detectron2.config import CfgNode, get_cfg
    from detectron2.data import MetadataCatalog
except ModuleNotFoundError as exc:
    if exc.name is None or exc.name.partition(".")[0] != "detectron2":
        raise
    raise DetectronMissingError(NO_DETECTRON2) from exc

from fvcore.common.registry import Registry

CONFIG = "config.yaml"
Plain = dict[str, Any]
KeyPath = tuple[str | int, ...]

_DETECTRON2_MODULE = re.compile(r"detectron2(\.[A-Za-z_][A-Za-z0-9_]*)+\Z")


def to_plain(cfg: Mapping[str, Any]) -> tuple[Plain, list[KeyPath]]:
    """Copies a config into plain dicts, lists and scalars.

    Args:
        cfg: A CfgNode, or any mapping shaped like one.

    Returns:
        The copy, and the paths of the lists in it that were tuples, inner ones first.

    Raises:
        InvalidArgumentError: The config holds something that YAML cannot say, or is nested too deep.
    """
    tuples: list[KeyPath] = []
    count = 0

    def copy(value: Any, path: KeyPath) -> Any:
        nonlocal count
        count += 1
        where = ".".join(map(str, path))
        if len(path) > MAX_DEPTH:
            raise InvalidArgumentError(f"the config is nested deeper than {MAX_DEPTH} at {where}", value=where)
        if count > MAX_VALUES:  # one list in many places is many values
            raise InvalidArgumentError(f"the config holds more than {MAX_VALUES:,} values", value=count)
        if isinstance(value, np.generic):
            value = value.item()
        if type(value) is int and value.bit_length() > 64:
            raise InvalidArgumentError(f"config.{where} is a number of {value.bit_length()} bits; the limit is 64")
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Mapping):
            for key in value:
                if type(key) is not str:
                    raise InvalidArgumentError(f"a key under {where or 'its top'} must be a string, not {type(key).__name__}")
            return {key: copy(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [copy(item, (*path, i)) for i, item in enumerate(value)]
            if isinstance(value, tuple):
                tuples.append(path)
            return items
        raise InvalidArgumentError(
            f"config.{where} is of type {type(value).__name__}; a saved config can hold only str, int, float, bool, None, "
            "lists, tuples and CfgNodes; convert it",
            value=value,
        )

    return copy(cfg, ()), tuples


def from_plain(plain: Plain, tuples: list[KeyPath] | list[list[str | int]]) -> CfgNode:
    """Builds the CfgNode again.

    What the config lacks against the installed Detectron2's defaults is added, so that a config saved with an earlier version
    still builds.

    Raises:
        InvalidModelError: `tuples` does not fit, or a section of Detectron2's is none here.
    """
    for path in sorted(tuples, key=len, reverse=True):
        try:
            parent: Any = plain
            for step in path[:-1]:
                parent = parent[step]
            parent[path[-1]] = tuple(parent[path[-1]])
        except (LookupError, TypeError) as exc:
            raise InvalidModelError(f"the manifest lists {list(path)!r} as a tuple, but the config has none there") from exc
    cfg = CfgNode(plain)

    def complete(node: CfgNode, defaults: CfgNode) -> None:
        for key, value in defaults.items():
            if key not in node:
                node[key] = value
            elif isinstance(value, CfgNode):
                if not isinstance(node[key], CfgNode):
                    raise InvalidModelError(f"the config's {key} is {reprlib.repr(node[key])}, not a section", value=key)
                complete(node[key], value)

    complete(cfg, get_cfg())
    return cfg


def read(folder: Path) -> Plain:
    """Reads ``config.yaml`` of a saved model as plain data.

    Raises:
        CorruptFileError: It is missing or no YAML.
        UnsafeFileError: It is too large or too deep, or holds tags, aliases or ``_BASE_``.
    """
    plain = plain_yaml.load(files.read_small(folder, CONFIG), CONFIG)
    if not isinstance(plain, dict):
        raise CorruptFileError(f"{CONFIG} in {folder} must hold a mapping, not {type(plain).__name__}", file=CONFIG)
    try:
        to_plain(plain)  # dates, sets and the like are safe, but no configuration
    except InvalidArgumentError as exc:
        raise UnsafeFileError(f"{CONFIG} in {folder}: {exc}", file=CONFIG) from exc
    return plain


def input_of(cfg: CfgNode) -> Input:
    """How this config prepares an image; InvalidModelError where it does not say so."""
    try:
        found = Input(format=cfg.INPUT.FORMAT, min_size_test=cfg.INPUT.MIN_SIZE_TEST, max_size_test=cfg.INPUT.MAX_SIZE_TEST)
    except ValidationError as exc:
        key = f"INPUT.{str(exc.errors()[0]['loc'][0]).upper()}"
        value = exc.errors()[0]["input"]
        what = "a string" if key == "INPUT.FORMAT" else "a whole number of pixels"
        raise InvalidModelError(f"the config's {key} is {value!r:.100}; it must be {what}", value=value) from exc
    if found.min_size_test > 0 and found.max_size_test == 0:
        raise InvalidModelError(
            "the config's INPUT.MAX_SIZE_TEST is 0, to which no image can be scaled; set it to 1333", value=0
        )
    return found


def dataset_of(cfg: CfgNode) -> Dataset | None:
    """What this process knows of the datasets that the config tests and trains on; None where it names none."""
    return first_known(dataset_names(cfg))


def dataset_names(cfg: CfgNode) -> list[str]:
    """The datasets that the config tests on, and then those that it trains on."""
    given = [each for each in (cfg.DATASETS.TEST, cfg.DATASETS.TRAIN) if isinstance(each, (list, tuple))]
    return [name for names in given for name in names if isinstance(name, str)]


def first_known(names: Sequence[str], things: int | None = None, stuff: int | None = None) -> Dataset | None:
    """What this process knows of the dataset, out of some, that a model's class names come from.

    Args:
        names: The datasets.
        things: How many classes of things the model has; None where that is not known, or it finds none.
        stuff: The same for semantic segmentation.

    Returns:
        The first that names as many classes as the model has, or else the first that names any, or the first; None of none.
    """
    found = [known_dataset(name) for name in names]
    named = [each for each in found if each.thing_classes or each.stuff_classes]

    def fits(each: Dataset) -> bool:
        counted = each.stuff_classes if things is None else each.thing_classes
        return len(counted or ()) == (stuff if things is None else things)

    return next((each for each in (*filter(fits, named), *named, *found)), None)


def known_dataset(name: str) -> Dataset:
    """What this process knows of a dataset."""
    known = MetadataCatalog.get(name).as_dict() if name in MetadataCatalog.list() else {}
    if known.get("evaluator_type") == "lvis":  # whose ids are from 1, as Detectron2's reader of LVIS has it
        ids = {1 + number: number for number in range(len(known.get("thing_classes") or ()))}
        known = {"thing_dataset_id_to_contiguous_id": ids, **known}
    fields: dict[str, Any] = {}
    for key in Dataset.model_fields:
        value = known.get(key)
        if key == "name" or value is None:
            continue
        if key in ("thing_classes", "stuff_classes"):
            value = [str(each) for each in value]
        try:
            Dataset.model_validate({"name": name, key: value})
        except ValidationError as exc:  # no reason not to save the model
            warnings.warn(f"{key} of the dataset {name!r} is not saved with the model: {exc}", stacklevel=2)
        else:
            fields[key] = value
    return Dataset(name=name, **fields)


def entries_of(cfg: CfgNode) -> list[Entry]:
    """The entries of Detectron2's registries that the config names, whoever registered them."""
    named = set(_strings(cfg))
    entries = {
        (registry._name, name): Entry(registry=registry._name, name=name, module=entry.__module__)
        for registry in _registries()
        for name, entry in registry
        if name in named
    }
    return [entries[key] for key in sorted(entries)]


def is_trusted(module: str, trusted: Sequence[str]) -> bool:
    """Whether a module is one of the trusted ones, or below one."""
    return any(module == each or module.startswith(f"{each}.") for each in trusted)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _registries() -> Iterator[Registry]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "detectron2":
            yield from (value for value in list(vars(module).values()) if isinstance(value, Registry))


def import_entries(entries: list[Entry], trusted: Sequence[str] = (), carried: Sequence[str] = ()) -> None:
    """Imports the modules that define a model's registry entries, where they are not registered yet.

    Args:
        entries: As the model's manifest lists them.
        trusted: Names of modules, or of packages above them, that may be imported besides Detectron2's own.
        carried: Names of modules that the model brings along and that were not imported.

    Raises:
        UntrustedCodeError: An entry that is not registered yet is defined in a module that is not trusted.
        UnknownEntryError: Importing its module failed.
    """
    for entry in entries:
        if entry.module in sys.modules:
            continue
        if any(registry._name == entry.registry and entry.name in registry for registry in _registries()):
            continue  # from another place
        if is_trusted(entry.module, [name.partition(".")[0] for name in carried]) and not is_trusted(entry.module, trusted):
            raise UntrustedCodeError(
                f"the model needs {entry.name!r} of the registry {entry.registry}, defined in {entry.module}, which is bundled "
                "with it; if you trust whoever made the model, load it with --trust-remote-code (trust_remote_code=True)",
                value=entry.module,
            )
        if not _DETECTRON2_MODULE.match(entry.module) and not is_trusted(entry.module, trusted):
            raise UntrustedCodeError(
                f"the model needs {entry.name!r} of the registry {entry.registry}, defined in the module {entry.module!r}; "
                f"if you trust that code, load the model with --trusted {entry.module} (trusted=[{entry.module!r}]), or import "
                f"{entry.module} first",
                value=entry.module,
            )
        try:
            import_module(entry.module)
        except Exception as exc:  # it is code: anything can happen
            raise UnknownEntryError(
                f"the model needs {entry.name!r} of the registry {entry.registry}, defined in {entry.module}; importing it "
                f"failed: {exc!r}",
                value=entry.module,
            ) from exc
