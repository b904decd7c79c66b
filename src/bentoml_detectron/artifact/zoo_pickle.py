"""The ``.pkl`` weights of Detectron2's model zoo and of Detectron 1: pickled NumPy arrays, read as arrays and nothing else.

As with a checkpoint's structure, the opcodes are checked first. Then an unpickler that knows a handful of NumPy's names reads
the arrays. It replaces each name by a class or function of this module that checks and bounds its arguments.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from bentoml_detectron.artifact import files, pickles
from bentoml_detectron.errors import CorruptFileError, UnsafeFileError

MAX_ARRAYS = 10_000
"""Most arrays in a file; the zoo's largest models have some 1,500. Matching names takes time that grows with them."""

_OPCODES = pickles.COMMON | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "STACK_GLOBAL"}
_DTYPES = frozenset(["b1", "i1", "i2", "i4", "i8", "u1", "f2", "f4", "f8"])
_ORDERS = frozenset("<>=|")
_KNOWN = frozenset(
    [
        ("_codecs", "encode"),  # how Python 3 writes bytes for Python 2,
        ("__builtin__", "bytes"),  # and none
        ("builtins", "bytes"),
        ("collections", "OrderedDict"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        # NumPy 1 and 2; the second of each pair by pickle's protocol 5
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.numeric", "_frombuffer"),
    ]
)


class _NotPlainError(Exception):
    """Something in a file is no plain array."""


def read(path: Path) -> dict[str, Any]:
    """Reads a file of weights as Detectron2's ``DetectionCheckpointer`` takes them.

    Returns:
        ``"model"``: arrays by name, copies in this machine's byte order. ``"__author__"``: a string, ``"Caffe2"`` for a file of
        Detectron 1. ``"matching_heuristics"``: whether names are to be matched, rather than equal.

    Raises:
        CorruptFileError: The file is missing, damaged, or holds no weights.
        UnsafeFileError: It holds something else than plain arrays that it has the bytes for.
    """
    with os.fdopen(files.open_inside(path.parent, path.name), "rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                pickles.check(content, path.name, _OPCODES, lambda module, name: (module, name) in _KNOWN)
                loaded = _Reader(content).load()
        except UnsafeFileError:
            raise
        except _NotPlainError as exc:
            raise UnsafeFileError(f"{path} holds {exc}", file=path.name) from exc
        except Exception as exc:  # a damaged file fails in whatever way its bytes lead to
            raise CorruptFileError(f"{path} cannot be read as pickled arrays: {exc!r}", file=path.name) from exc
    if not isinstance(loaded, dict):
        raise CorruptFileError(f"{path} must hold a dict of named arrays, not {type(loaded).__name__}", file=path.name)
    if "model" in loaded and "__author__" in loaded:
        author, arrays, heuristics = loaded["__author__"], loaded["model"], loaded.get("matching_heuristics", False) is True
    else:
        blobs = loaded.get("blobs", loaded)
        arrays = _without_momentum(blobs) if isinstance(blobs, dict) else blobs
        author, heuristics = "Caffe2", True
    return {"model": _plain(arrays, path), "__author__": str(author)[:200], "matching_heuristics": heuristics}


def _without_momentum(blobs: dict[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in blobs.items() if not str(key).endswith("_momentum")}


def _plain(arrays: Any, path: Path) -> dict[str, NDArray[Any]]:
    if not isinstance(arrays, dict) or not arrays or len(arrays) > MAX_ARRAYS:
        raise CorruptFileError(f"{path} holds no weights, or more than {MAX_ARRAYS:,}", file=path.name)
    found = {}
    for key, value in arrays.items():
        array = value.array if isinstance(value, _Array) else None
        if type(key) is not str or array is None:
            label = key[:200] if isinstance(key, str) else type(key).__name__
            raise UnsafeFileError(f"{path}: {label!r} is not an array of numbers", file=path.name, value=label)
        found[key] = array
    return found


class _DType:
    """Stands for ``numpy.dtype``: a plain kind of numbers, whose byte order comes as its state."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if type(code) is not str or code not in _DTYPES:
            raise _NotPlainError(f"arrays of {str(code)[:50]!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        _, order, *parts = state
        if order not in _ORDERS or any(each is not None for each in parts[:3]):
            raise _NotPlainError("arrays of structured values")
        if order in "<>":
            self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands for an array; in protocols before 5 its values come as its state."""

    def __init__(self, reader: _Reader, array: NDArray[Any] | None = None) -> None:
        self._reader = reader
        self.array = array

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, values = state
        self.array = self._reader.values(values, dtype, shape, "F" if is_fortran else "C")


class _Reader(pickle.Unpickler):
    """Builds arrays from checked bytes; knows the names above, and gives for each a thing of this module."""

    def __init__(self, content: mmap.mmap) -> None:
        super().__init__(content, encoding="latin1")  # Python 2 wrote bytes as strings
        # One text or array of the file may be named again and again, and each time it would be copied.
        self._bytes_left = 2 * len(content)
        self._class = pickles.Inert(self._no_call)
        self._things: dict[str, Any] = {
            "encode": pickles.Inert(self._encode),
            "bytes": pickles.Inert(lambda: b""),
            "OrderedDict": dict,
            "dtype": pickles.Inert(_DType),
            "ndarray": self._class,
            "_reconstruct": pickles.Inert(self._reconstruct),
            "_frombuffer": pickles.Inert(self._frombuffer),
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise _NotPlainError(f"the name {module}.{name}"[:200])
        return self._things[name]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _NotPlainError("a persistent object")

    def values(self, values: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
        """A copy of the array that these bytes are, if they are exactly as many as it needs."""
        if isinstance(values, str):
            self._spend(len(values))
            values = values.encode("latin1")
        if not isinstance(values, (bytes, bytearray)) or not isinstance(dtype, _DType) or order not in ("C", "F"):
            raise _NotPlainError("something other than a plain array")
        if type(shape) is not tuple or any(type(size) is not int or not 0 <= size < 2**48 for size in shape):
            raise _NotPlainError("an array with an invalid shape")
        if math.prod(shape) * dtype.dtype.itemsize != len(values):
            raise _NotPlainError(f"an array of shape {shape!r}, but only {len(values)} bytes for it"[:200])
        self._spend(len(values))
        array = np.frombuffer(values, dtype.dtype).reshape(shape, order=order)
        return array.astype(dtype.dtype.newbyteorder("="), order="C")

    def _spend(self, count: int) -> None:
        self._bytes_left -= count
        if self._bytes_left < 0:
            raise _NotPlainError("arrays larger than the file")

    def _encode(self, text: Any, encoding: Any) -> bytes:
        if type(text) is not str or encoding != "latin1":
            raise _NotPlainError("encoded text")
        self._spend(len(text))
        return text.encode("latin1")

    def _reconstruct(self, kind: Any, shape: Any, code: Any) -> _Array:
        if kind is not self._class:
            raise _NotPlainError("something other than a plain array")
        return _Array(self)

    def _frombuffer(self, values: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        return _Array(self, self.values(values, dtype, shape, order))

    def _no_call(self, *args: Any) -> NoReturn:
        raise _NotPlainError("an array without its bytes")
