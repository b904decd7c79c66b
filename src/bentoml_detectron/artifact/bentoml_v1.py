"""Models that BentoML's own adapter wrote (API version ``v1``; BentoML 1.0 to 1.4).

Their config is pickled, in ``custom_objects.pkl``. It is read in two passes: the first looks at the opcodes alone and refuses
what a config never needs; the second builds, with every class replaced by an inert one of this module. Nothing is imported.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, NoReturn

from bentoml_detectron.artifact import files
from bentoml_detectron.errors import CorruptFileError, UnsafeFileError

CUSTOM_OBJECTS = "custom_objects.pkl"

_OPCODES = frozenset(
    """
    PROTO FRAME STOP MARK POP POP_MARK DUP PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    EMPTY_SET ADDITEMS FROZENSET
    GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD
    """.split()  # noqa: SIM905 (one name a line would be fifty lines)
)
_REFUSED = "refused: only a config and plain containers may be read from a pickle"


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
    raise UnsafeFileError(f"{CUSTOM_OBJECTS} asks for {what}; {_REFUSED}", file=CUSTOM_OBJECTS, value=what)


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
        _check_opcodes(content)
        objects = _InertUnpickler(io.BytesIO(content)).load()
    except UnsafeFileError:
        raise
    except Exception as exc:  # a damaged pickle fails in whatever way its bytes lead to
        raise CorruptFileError(f"{CUSTOM_OBJECTS} in {folder} cannot be read: {exc!r}", file=CUSTOM_OBJECTS) from exc
    config = objects.get("config") if type(objects) is dict else None
    if not isinstance(config, _Node):
        raise CorruptFileError(f"{CUSTOM_OBJECTS} in {folder} has no CfgNode named 'config'", file=CUSTOM_OBJECTS)
    return config


def _check_opcodes(content: bytes) -> None:
    for count, (opcode, argument, position) in enumerate(pickletools.genops(content), start=1):
        if opcode.name not in _OPCODES:
            _refuse(f"the opcode {opcode.name} (at byte {position})")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > count:
            _refuse(f"memo entry {argument} (at byte {position})")  # the memo is an array of that length
        if opcode.name == "STOP" and position is not None and position + 1 != len(content):
            _refuse(f"{len(content) - position - 1} bytes after its end")
