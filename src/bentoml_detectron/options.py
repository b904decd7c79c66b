"""What a caller wants of one image's results: a score threshold, some of the classes, the best few detections."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, TypeGuard

from bentoml_detectron.errors import InvalidArgumentError

if TYPE_CHECKING:
    from bentoml_detectron.artifact.manifest import Dataset

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "auto")
"""`engines.Precision`, for what imports no PyTorch."""
MAX_TOP_K = 10_000
"""More than any model's own limit."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is wanted of one image's results.

    Attributes:
        score_threshold: In [0, 1]; what scores above it is kept. None: the model's own threshold.
        top_k: At most so many detections, the best. None: the model's own limit.
        things: Ids of the thing classes to keep, contiguous training ids. None: all classes.
        stuff: Ids of the stuff classes to keep; None with `things`, and only then.
        semantic: As `stuff`, for a model that gives nothing but a semantic map.
    """

    score_threshold: float | None = None
    top_k: int | None = None
    things: frozenset[int] | None = None
    stuff: frozenset[int] | None = None
    semantic: frozenset[int] | None = None


def options(
    dataset: Dataset | None,
    *,
    score_threshold: float | None = None,
    classes: Sequence[str | int] | None = None,
    top_k: int | None = None,
) -> Options:
    """Checks what a caller asks for.

    Args:
        dataset: The model's, for the names of its classes.
        score_threshold: In [0, 1].
        classes: Names of thing or stuff classes, blanks around them aside, and contiguous ids: of things, or of a semantic
            model's classes. A text of digits is an id where no class has that name.
        top_k: From 1 to `MAX_TOP_K`.

    Raises:
        InvalidArgumentError: (``ValueError``) One is out of range, or the model has no such class.
    """
    if score_threshold is not None:
        given: object = score_threshold
        if isinstance(given, bool) or not isinstance(given, Real):  # NumPy's numbers are some, too
            raise InvalidArgumentError(f"score_threshold is {score_threshold!r}; it must be a number", value=score_threshold)
        if not (math.isfinite(score_threshold) and 0 <= score_threshold <= 1):
            raise InvalidArgumentError(f"score_threshold is {score_threshold!r}; it must be from 0 to 1", value=score_threshold)
        score_threshold = float(score_threshold)
    if top_k is not None:
        if not _is_whole(top_k) or not 1 <= top_k <= MAX_TOP_K:
            raise InvalidArgumentError(f"top_k is {top_k!r}; it must be a whole number from 1 to {MAX_TOP_K:,}", value=top_k)
        top_k = int(top_k)
    if classes is None:
        return Options(score_threshold, top_k)
    thing_names = (dataset and dataset.thing_classes) or []
    stuff_names = (dataset and dataset.stuff_classes) or []
    things, stuff, semantic = _ids(classes, thing_names, stuff_names)
    return Options(score_threshold, top_k, things, stuff, semantic)


def _ids(
    classes: Sequence[str | int], thing_names: list[str], stuff_names: list[str]
) -> tuple[frozenset[int], frozenset[int], frozenset[int]]:
    """Ids of the thing and stuff classes that are meant, and those of a semantic model's."""
    if isinstance(classes, (str, bytes)) or not isinstance(classes, Sequence):
        raise InvalidArgumentError(f"classes is {classes!r}; give a list of names or ids, such as ['person']", value=classes)
    things: set[int] = set()
    stuff: set[int] = set()
    numbers: set[int] = set()
    most = max(len(thing_names), len(stuff_names))
    wanted = {each for each in classes if isinstance(each, str)}
    thing_places, stuff_places = _places(thing_names, wanted), _places(stuff_names, wanted)
    for each in classes:
        if isinstance(each, str):
            if each in thing_places or each in stuff_places:
                things.update(thing_places.get(each, ()))
                stuff.update(stuff_places.get(each, ()))
            elif each.isascii() and each.isdigit() and len(each) < 10:
                numbers.add(_id(int(each), most))
            else:
                raise InvalidArgumentError(f"the model has no class {each!r}; {_known(each, thing_names + stuff_names)}",
                                           value=each)  # fmt: skip
        else:
            numbers.add(_id(each, most))
    return frozenset(things | numbers), frozenset(stuff), frozenset(stuff | numbers)


def _places(names: list[str], wanted: set[str]) -> dict[str, list[int]]:
    """The ids of those that are wanted, of which a dataset may have one name several times, or with blanks around it."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names if wanted else ()):
        for each in {name, name.strip()} & wanted:
            places.setdefault(each, []).append(place)
    return places


def _is_whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number, Python's or NumPy's."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def plain(classes: Sequence[str | int]) -> tuple[str | int, ...]:
    """Names and ids as Python's own values; what is neither stays."""
    return tuple(int(each) if _is_whole(each) else each for each in classes)


def _id(given: object, most: int) -> int:
    """An id, of so many classes at most if that is known."""
    if _is_whole(given) and 0 <= given < (most or 2**31):
        return int(given)
    known = f"from 0 to {most - 1}" if most else "0 and above"
    raise InvalidArgumentError(f"{given!r} is not a class; ids are whole numbers {known}", value=given)


def _known(name: str, names: list[str]) -> str:
    if not names:
        return "it has no class names, so give ids"
    names = list(dict.fromkeys(names))
    near = difflib.get_close_matches(name, names, 3) or names[:10]
    return f"it has {', '.join(near)}{', ...' if len(near) < len(names) else ''}"
