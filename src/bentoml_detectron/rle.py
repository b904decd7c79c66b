"""COCO's RLE as a string: writing the runs of masks, and checking and reading those of masks from elsewhere.

An RLE is what pycocotools writes: the lengths of alternating runs of 0 and 1, column by column, in a compressed string.
"""

from __future__ import annotations

import operator
from itertools import pairwise
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from bentoml_detectron.errors import InvalidArgumentError

MOST_PIXELS = 1 << 28
"""Most pixels that an image may have here, 16,384 x 16,384; it bounds what a forged RLE can make `decode` allocate."""

_MOST_CHARACTERS = 7
"""Characters that one count can have: 35 bits with the sign, and counts end at 29."""

Positions = NDArray[np.int64]


class RLE(TypedDict):
    """One mask, as COCO's files have it.

    Attributes:
        size: Height and width in pixels.
        counts: The compressed run lengths.
    """

    size: list[int]
    counts: str


def from_toggles(mask: Positions | int, position: Positions, count: int, height: int, width: int) -> list[RLE]:
    """The RLEs of masks of one size that change at these positions, in any order.

    Two changes at one position undo each other: a run without pixels, or one that goes on in the next column.

    Args:
        mask: (K,), which mask changes, from 0.
        position: (K,), where: ``y + x * height``.
        count: How many masks there are.
        height: Of each, in pixels.
        width: Of each, in pixels.
    """
    # One key for both. A mask has one more than its pixels, so that the end of one is not the start of the next.
    pixels = height * width
    keys = (mask * (pixels + 1) + position)[position < pixels]
    ends = np.arange(1, count + 1) * (pixels + 1) - 1
    keys = np.sort(np.concatenate([keys, ends]), kind="stable")  # nearly in order, of which a stable sort makes use
    places = np.flatnonzero(np.diff(keys, prepend=-1))
    keys = keys[places[np.diff(places, append=len(keys)) & 1 != 0]]
    stops = np.searchsorted(keys, ends) + 1
    counts = np.diff(keys, prepend=-1)
    starts = np.append(0, stops[:-1])
    counts[starts] -= 1  # from the end of the mask before
    text, bounds = _to_strings(counts, starts)
    return [{"size": [height, width], "counts": text[start:stop]} for start, stop in pairwise(bounds)]


def _to_strings(counts: Positions, starts: Positions) -> tuple[str, list[int]]:
    """COCO's compressed strings of masks whose counts start at `starts`, as one; and where each begins and the last ends.

    From its fourth on, a mask's count is less the one two before; each is written in groups of five bits, lowest first.
    """
    values = counts.copy()
    values[2:] -= counts[:-2]
    whole = (starts[:, None] + np.arange(3)).ravel()
    whole = whole[whole < len(counts)]
    values[whole] = counts[whole]  # what is beyond a mask's end is among the next one's first three
    magnitude = values ^ (values >> 63)
    lengths = np.ones(len(values), np.int64)
    for group in range(1, _MOST_CHARACTERS):
        longer = magnitude >> (5 * group - 1) != 0  # what is left is not the sign alone
        if not longer.any():
            break
        lengths += longer
    stops = np.cumsum(lengths)
    places = stops - lengths
    characters = np.empty(stops[-1], np.uint8)
    group = 0
    while len(values):
        more = lengths > group + 1
        characters[places + group] = (values >> 5 * group & 31) + 32 * more + 48
        values, lengths, places, group = values[more], lengths[more], places[more], group + 1
    bounds = np.append(np.append(0, stops)[starts], stops[-1]).tolist()
    return characters.tobytes().decode("ascii"), bounds


def to_counts(rle: RLE) -> tuple[Positions, int, int]:
    """The run lengths of an RLE, of 0 and 1 in turn, and its height and width.

    Raises:
        InvalidArgumentError: The RLE is malformed.
    """
    if not isinstance(rle, dict) or not {"size", "counts"} <= rle.keys():
        raise InvalidArgumentError("not an RLE; give {'size': [height, width], 'counts': '...'}", value=rle)
    height, width = checked_size(rle["size"])
    text = rle["counts"]
    if not isinstance(text, str):
        raise InvalidArgumentError(
            f"the RLE's counts must be COCO's compressed string, not {type(text).__name__} (for bytes: .decode())", value=text
        )
    if not text or len(text) > _MOST_CHARACTERS * (height * width + 1):
        raise InvalidArgumentError(
            f"the RLE has {len(text)} characters for {height} x {width} pixels, too many; encode it again"
        )
    values = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64) - 48
    if not text.isascii() or values.min() < 0 or values.max() > 63:
        raise InvalidArgumentError(
            f"the RLE's counts {text[:40]!r} have characters outside '0'..'o'; encode it again", value=text
        )
    counts = _from_groups(values)
    if counts is None or counts.min() < 0 or counts.max() > height * width or counts.sum() != height * width:
        raise InvalidArgumentError(
            f"the RLE's counts {text[:40]!r} do not add up to {height} x {width} pixels; encode it again", value=text
        )
    return counts, height, width


def _from_groups(values: Positions) -> Positions | None:
    """The counts in a string's groups of six bits; None if it ends inside one or one is too long."""
    last = np.flatnonzero(values < 32)
    if not len(last) or last[-1] != len(values) - 1:
        return None
    lengths = np.diff(last, prepend=-1)
    if lengths.max() > _MOST_CHARACTERS:
        return None
    first = last - lengths + 1
    place = np.arange(len(values)) - np.repeat(first, lengths)
    counts: Positions = np.add.reduceat((values & 31) << (5 * place), first)
    counts -= ((values[last] & 16) != 0) * (np.int64(1) << (5 * lengths))  # the sign
    # From the fourth on, they are differences to the one two before.
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts


def checked_size(size: Any) -> tuple[int, int]:
    """Height and width, checked."""
    try:
        height, width = (operator.index(side) for side in size)
    except (TypeError, ValueError):
        raise InvalidArgumentError(f"the size is {size!r}; give height and width as two integers", value=size) from None
    if height < 1 or width < 1 or height * width > MOST_PIXELS:
        raise InvalidArgumentError(f"the size is {height} x {width}; give 1 to {MOST_PIXELS:,} pixels", value=size)
    return height, width
