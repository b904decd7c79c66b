"""Checks the fields of `Detections`: each function returns the value to keep, or raises `InvalidArgumentError`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bentoml_detectron.errors import InvalidArgumentError
from bentoml_detectron.masks import RLE

_T = TypeVar("_T")

MAX_SIDE = 1 << 16
"""Most pixels of an image's side; a little more than `images` takes, whose limit is libjpeg's."""


def restored(kind: type[_T], *values: Any) -> _T:
    """Makes a dataclass of its fields' values without checking them: those of one that was made before, as in a pickle."""
    made = object.__new__(kind)
    for each, value in zip(fields(kind), values, strict=True):  # type: ignore[arg-type]
        if isinstance(value, np.ndarray) and value.flags.writeable:  # a pickle does not say that it cannot be written
            value.flags.writeable = False
        object.__setattr__(made, each.name, value)
    return made


def array(name: str, value: Any, dtype: type[np.generic], shape: tuple[int | None, ...]) -> NDArray[Any]:
    """The value as a read-only array of this shape, or an error that names it; a caller's array stays writable."""
    try:
        given = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as exc:  # PyTorch's tensors raise all of these
        raise InvalidArgumentError(f"{name}: {exc}", value=value) from exc
    if given.shape == (0,) and not shape[0]:
        given = given.reshape([each or 0 for each in shape])  # an empty list
    if given.ndim != len(shape) or any(due not in (None, got) for due, got in zip(shape, given.shape, strict=True)):
        due = tuple("any" if each is None else each for each in shape)
        raise InvalidArgumentError(f"{name} has the shape {given.shape}; it must be {due}", value=given.shape)
    if given.size and given.dtype.kind not in ("iuf" if dtype is np.float32 else "iu"):
        raise InvalidArgumentError(f"{name} must be {np.dtype(dtype)}, not {given.dtype}", value=given.dtype)
    with np.errstate(over="ignore"):
        array: NDArray[Any] = np.asarray(given, dtype, order="C").view()
    if dtype is np.float32 and not np.isfinite(array).all():
        raise InvalidArgumentError(f"{name} holds a number that is not finite", value=name)
    if given.size and given.dtype.kind != "f" and given.dtype != dtype and not np.array_equal(array, given):
        raise InvalidArgumentError(f"{name} holds numbers that do not fit {np.dtype(dtype)}", value=name)
    array.flags.writeable = False
    return array


def boxes(given: Any, count: int) -> NDArray[np.float32]:
    """(N, 4) or (N, 5); of an empty list (0, 4)."""
    found = array("boxes", given, np.float32, (count, None))
    if found.shape == (0, 0):
        found = array("boxes", found.reshape(0, 4), np.float32, (0, 4))
    if found.shape[1] not in (4, 5):
        raise InvalidArgumentError(f"boxes has the shape {found.shape}; it must be ({count}, 4) or ({count}, 5)", value=given)
    return found


def whole(name: str, value: Any, least: int, most: int = (1 << 63) - 1) -> int:
    """The value as int, where it is a whole number in this range."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, (bool, np.bool_)) or not least <= number <= most:
        raise InvalidArgumentError(f"{name} is {value!r:.80}; give a whole number from {least} to {most}", value=value)
    return number


def score(value: Any) -> float:
    """A segment's score, from 0 to 1."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)) or not 0 <= value <= 1:
        raise InvalidArgumentError(f"a segment's score is {value!r:.80}; give a number from 0 to 1, or None", value=value)
    return float(value)


def image_size(value: Any) -> tuple[int, int]:
    """Height and width."""
    try:
        height, width = value
    except (TypeError, ValueError) as exc:
        raise InvalidArgumentError(f"image_size is {value!r:.80}; give height and width", value=value) from exc
    return whole("image_size: the height", height, 1, MAX_SIDE), whole("image_size: the width", width, 1, MAX_SIDE)


def names(name: str, given: Any, count: int) -> tuple[str, ...]:
    """So many strings that can be written; half of a surrogate pair cannot."""
    found = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else ()
    try:
        if len(found) == count and all(isinstance(each, str) for each in found):
            "".join(found).encode()
            return tuple(map(str, found))
    except UnicodeEncodeError:
        pass
    raise InvalidArgumentError(f"{name} is {given!r:.80}; give {count} Unicode strings", value=given)


def masks(given: Any, count: int, size: tuple[int, int]) -> list[RLE]:
    """The masks, as dicts of their own. That their counts are well-formed is left to who reads them: it takes a while."""
    found = list(given) if isinstance(given, Iterable) else None
    if found is None or len(found) != count:
        raise InvalidArgumentError(f"masks are {given!r:.80}; give {count}, one for each score", value=given)
    for place, mask in enumerate(found):
        if not isinstance(mask, dict) or not isinstance(mask.get("counts"), str) or not isinstance(mask.get("size"), Sequence):
            raise InvalidArgumentError(
                f"mask {place} is not an RLE; give {{'size': [height, width], 'counts': '...'}}", value=mask
            )
        if tuple(mask["size"]) != size:
            raise InvalidArgumentError(f"mask {place} has the size {mask['size']!r:.80}, not {list(size)}", value=mask["size"])
    return [RLE(size=list(size), counts=mask["counts"]) for mask in found]
