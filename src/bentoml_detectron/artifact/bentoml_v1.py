"""Models that BentoML's own adapter wrote (API version ``v1``; BentoML 1.0 to 1.4).

Their config is pickled, in ``custom_objects.pkl``. It is read in two passes. The first looks only at the opcodes and refuses
what a config never needs. The second builds the config, with every class replaced by an inert one of this module. Nothing is
imported.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NoReturn

from bentoml_detectron.artifact import files, pickles
from bentoml_detectron.errors import CorruptFileError, UnsafeFileError

CUSTOM_OBJECTS = "custom_objects.pkl"

_OPCODES = pickles.COMMON | {"EMPTY_SET", "ADDITEMS", "FROZENSET", "STACK_GLOBAL", "NEWOBJ"}
_CURE = (
    "Only a config and plain containers are unpickled. If you trust the model, load it with BentoML's own adapter "
    "(BENTOML_DETECTRON_PLUG=0), which takes a predictor's weights from their original file, then save it with this package, "
    "without those custom objects (docs/upgrade.md)"
)


class _Node(dict):  # type: ignore[type-arg]
    """Stands for a CfgNode; takes its items and leaves the rest of its state."""

    def __setstate__(self, state: Any) -> None:
        pass


_CLASSES: dict[tuple[str, str], Any] = {
    ("detectron2.config.config", "CfgNode"): _Node,
    ("fvcore.common.config", "CfgNode"): _Node,
    ("yacs.config", "CfgNode"): _Node,
    ("collections", "OrderedDict"): dict,
    ("builtins", "set"): set,  # a CfgNode's bookkeeping has some; by name in protocols before 4
    ("__builtin__", "set"): set,
}


def _refuse(what: object) -> NoReturn:
    raise UnsafeFileError(f"{CUSTOM_OBJECTS} refers to {what}", file=CUSTOM_OBJECTS, value=what)


class _InertUnpickler(pickle.Unpickler):
    """Knows the names above, and gives an inert container for each."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CLASSES:
            _refuse(f"{module}.{name}")
        return _CLASSES[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        _refuse(f"the persistent object {pid!r}")


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the pickled config of an old model as nested dicts, with tuples where it has tuples.

    Raises:
        CorruptFileError: The file is missing or no pickle, or has no config.
        UnsafeFileError: The pickle asks for anything but a CfgNode, or is made to exhaust memory.
    """
    content = files.read_small(folder, CUSTOM_OBJECTS)
    try:
        pickles.check(content, CUSTOM_OBJECTS, _OPCODES, lambda module, name: (module, name) in _CLASSES)
        objects = _InertUnpickler(io.BytesIO(content)).load()
    except UnsafeFileError as exc:
        raise UnsafeFileError(f"{exc}. {_CURE}", file=CUSTOM_OBJECTS, value=exc.value) from exc
    except Exception as exc:  # a damaged pickle fails in whatever way its bytes lead to
        raise CorruptFileError(f"{CUSTOM_OBJECTS} in {folder} cannot be read: {exc!r}", file=CUSTOM_OBJECTS) from exc
    config = objects.get("config") if type(objects) is dict else None
    if not isinstance(config, _Node):
        raise CorruptFileError(f"{CUSTOM_OBJECTS} in {folder} has no CfgNode named 'config'", file=CUSTOM_OBJECTS)
    return config
