"""Masks as run lengths: from a model's small soft masks straight to COCO's RLE, without the bitmaps in between.

An RLE is what pycocotools writes: the lengths of runs of 0 and 1 in turn, column by column, in a compressed string. Inside
this module a mask is mostly a row of *toggles*: the ascending int64 positions ``y + x * height`` where it changes, from off.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from bentoml_detectron.errors import InvalidArgumentError

if TYPE_CHECKING:
    import torch

MOST_PIXELS = 1 << 28
"""Most pixels that an image may have here, 16,384 x 16,384; it bounds what a forged RLE can make `decode` allocate."""

_MOST_CHARACTERS = 7
"""Characters that one count can have: 35 bits with the sign, and counts end at 29."""

_BLOCK = 1 << 16
"""Most values worked on at once: as many as stay in the processor's cache, and some 3 MB with all that is made of them."""

Floats = NDArray[np.float32]
Positions = NDArray[np.int64]


class RLE(TypedDict):
    """One mask, as COCO's files have it.

    Attributes:
        size: Height and width in pixels.
        counts: The compressed run lengths.
    """

    size: list[int]
    counts: str


def from_roi_masks(
    masks: torch.Tensor | NDArray[Any],
    boxes: torch.Tensor | NDArray[Any],
    image_size: tuple[int, int],
    threshold: float = 0.5,
) -> list[RLE]:
    """What pasting soft masks into the image and encoding them gives, bit for bit, without an image-sized array.

    It equals ``paste_masks_in_image`` of Detectron2 on the CPU followed by ``encode`` of pycocotools. Where Detectron2 raises,
    for a box more than a pixel outside the image, the mask is empty.

    Args:
        masks: (N, M, M), probabilities in 0..1. Anything but float32 is converted to it.
        boxes: (N, 4) float32, x0, y0, x1, y1 in pixels of the image.
        image_size: Height and width in pixels.
        threshold: In 0..1; what is at least this belongs to the mask.

    Returns:
        N masks of the image's size.

    Raises:
        InvalidArgumentError: A shape, the size or the threshold does not fit, or a box is not finite.
    """
    height, width = _size(image_size)
    soft, corners = _arguments(masks, boxes, threshold)
    # The part of the image that Detectron2 samples: the box and one to two pixels around it.
    first = np.clip(np.floor(corners[:, :2]) - 1, 0, (width, height)).astype(np.int64).tolist()
    last = np.clip(np.ceil(corners[:, 2:]) + 1, 0, (width, height)).astype(np.int64).tolist()
    with np.errstate(all="ignore"):  # what is infinite or no number is left to PyTorch to sample
        return [
            _rle(_pasted(mask, box, (*start, *stop), height, threshold), height, width)
            for mask, box, start, stop in zip(soft, corners, first, last, strict=True)
        ]


def encode(bitmap: NDArray[np.bool_] | NDArray[np.uint8]) -> RLE:
    """The RLE of a bitmap, as pycocotools encodes it.

    Args:
        bitmap: (H, W) bool, or uint8 of which all but 0 is on.

    Raises:
        InvalidArgumentError: It has another type or shape.
    """
    if not isinstance(bitmap, np.ndarray) or bitmap.ndim != 2 or bitmap.dtype not in (np.bool_, np.uint8):
        found = f"{bitmap.dtype} {bitmap.shape}" if isinstance(bitmap, np.ndarray) else type(bitmap).__name__
        raise InvalidArgumentError(f"the bitmap is {found}; give an (H, W) array of bool or uint8", value=found)
    height, width = _size(bitmap.shape)
    on = bitmap if bitmap.dtype == np.bool_ else bitmap != 0
    # Not by transposing, which takes longer than all the rest: changes inside columns first, then from one to the next.
    row, column = np.divmod(np.flatnonzero(on[1:] != on[:-1]), width)
    turns = np.flatnonzero(on[0, 1:] != on[-1, :-1]) + 1
    edges = [0] * bool(on[0, 0]), [height * width] * bool(on[-1, -1])
    return _rle(np.sort(np.concatenate([*edges, row + 1 + column * height, turns * height]).astype(np.int64)), height, width)


def decode(rle: RLE) -> NDArray[np.bool_]:
    """The (H, W) bitmap of an RLE; its columns are contiguous, as in pycocotools.

    Raises:
        InvalidArgumentError: The RLE is malformed; nothing was allocated for its pixels.
    """
    counts, height, width = _counts(rle)
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def check(rle: RLE, image_size: tuple[int, int]) -> None:
    """Checks that an RLE from elsewhere is a mask of an image of this height and width, without making its pixels.

    Raises:
        InvalidArgumentError: It is malformed, or of another size.
    """
    _, *size = _counts(rle)
    if size != list(image_size):
        raise InvalidArgumentError(f"the RLE's size is {size}; the image's is {list(image_size)}", value=size)


def area(rle: RLE) -> int:
    """How many pixels are on.

    Raises:
        InvalidArgumentError: The RLE is malformed.
    """
    return int(_counts(rle)[0][1::2].sum())


def bounding_box(rle: RLE) -> tuple[int, int, int, int]:
    """The tight box of a mask, as x, y, width and height in pixels; all 0 if the mask is empty.

    Raises:
        InvalidArgumentError: The RLE is malformed.
    """
    counts, height, _ = _counts(rle)
    ends = np.cumsum(counts)[1::2]
    lengths = counts[1::2]
    ends, lengths = ends[lengths > 0], lengths[lengths > 0]
    if not len(ends):
        return 0, 0, 0, 0
    left, top = np.divmod(ends - lengths, height)
    right, bottom = np.divmod(ends - 1, height)
    if (left != right).any():  # a run that goes on in the next column is on in the last row and in the first
        y0, y1 = 0, height - 1
    else:
        y0, y1 = int(top.min()), int(bottom.max())
    return int(left[0]), y0, int(right[-1] - left[0]) + 1, y1 - y0 + 1


def crop(rle: RLE) -> tuple[int, int, int, int, Positions]:
    """A mask cut to its tight box: x, y, width, height, and the lengths of its runs there, off first, column by column.

    All without its pixels. A mask without any is one pixel, off, at 0, 0.

    Raises:
        InvalidArgumentError: The RLE is malformed.
    """
    counts, image_height, _ = _counts(rle)
    ends = np.cumsum(counts)[: len(counts) // 2 * 2].reshape(-1, 2)
    starts, stops = ends[ends[:, 0] < ends[:, 1]].T
    if not len(starts):
        return 0, 0, 1, 1, np.ones(1, np.int64)
    # By its last pixel: a run may stop at the edge of the box, which is not where the next column starts in the image.
    (first_x, first_y), (last_x, last_y) = np.divmod(starts, image_height), np.divmod(stops - 1, image_height)
    x, width = int(first_x[0]), int(last_x[-1] - first_x[0]) + 1
    y, height = int(first_y.min()), int(last_y.max() - first_y.min()) + 1
    if (first_x != last_x).any():  # on in the last row of a column and in the first of the next
        y, height = 0, image_height
    starts = (first_x - x) * height + first_y - y
    stops = (last_x - x) * height + last_y - y + 1
    # Runs that touch now are one.
    parted = starts[1:] != stops[:-1]
    toggles = np.stack([starts[np.append(True, parted)], stops[np.append(parted, True)]], axis=1).ravel()
    return x, y, width, height, np.diff(toggles, prepend=0, append=width * height)


def to_polygons(rle: RLE) -> list[list[float]]:
    """A mask's outer contours as COCO polygons, each ``[x0, y0, x1, y1, ...]`` of at least four corners.

    They run along the edges of the pixels, so that a mask without holes comes back from them exactly, which contours through
    the pixels' centres do not give. Holes are lost: COCO's polygons cannot have any. Pixels that only touch at a corner are
    parted.

    Raises:
        InvalidArgumentError: The RLE is malformed.
    """
    x, y, width, height, runs = crop(rle)
    padded = np.zeros((height + 2, width + 2), np.bool_)
    padded[1:-1, 1:-1] = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    return [(np.array(outline) + (x, y)).ravel().astype(float).tolist() for outline in _outlines(padded)]


def _outlines(padded: NDArray[np.bool_]) -> list[list[tuple[int, int]]]:
    """The outer contours, as corners (x, y), of a bitmap with an empty border of one pixel that does not count.

    In each row of corners, those at 2i and 2i + 1 are joined by an edge; likewise in each column.
    """
    nw, ne, sw, se = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    crossing = (nw == se) & (ne == sw) & (nw != ne)  # two corners in one place
    at = np.repeat(np.arange(nw.size), ((nw ^ ne ^ sw ^ se) + 2 * crossing).ravel())
    y, x = np.divmod(at, nw.shape[1])
    order = np.arange(len(at))
    # Of the two at a crossing, the first has the edge to the left. It also has the one upwards, unless the pixels that meet are
    # the upper right and the lower left one: then the second has.
    swapped = (crossing & ne)[y, x]
    downwards = np.lexsort((np.where(swapped, -order, order), y, x))
    above_or_below = np.empty_like(order)
    above_or_below[downwards] = downwards[order ^ 1]
    # A contour is first met at its upper left corner, which is in the mask if the contour is an outer one.
    outer, corners, follow = se[y, x].tolist(), list(zip(x.tolist(), y.tolist(), strict=True)), above_or_below.tolist()
    seen = [False] * len(corners)
    outlines = []
    for start in range(0, len(corners), 2):
        if seen[start]:
            continue
        outline, here = [], start
        while not seen[here]:
            beside = here ^ 1
            seen[here] = seen[beside] = True
            outline += [corners[here], corners[beside]]
            here = follow[beside]
        if outer[start]:
            outlines.append(outline)
    return outlines


def _pasted(mask: Floats, box: Floats, region: tuple[int, ...], height: int, threshold: float) -> Positions:
    """Toggles of one soft mask (M, M) pasted into its box (4,), in an image of this height."""
    left, top, right, bottom = region
    if left >= right or top >= bottom:
        return np.empty(0, np.int64)
    x0, y0, x1, y1 = box
    grid_x, grid_y = _grid(left, right, x0, x1), _grid(top, bottom, y0, y1)
    if not (x0 < x1 and y0 < y1):  # without an inside, its coordinates do not ascend, or are no numbers
        column, row = _sampled(mask, grid_x, grid_y, threshold)
    else:
        step = max(_BLOCK // (len(mask) + 2), 1)
        parts = []
        for start in range(0, len(grid_x), step):
            column, row = _crossings(mask, grid_x[start : start + step], grid_y, threshold)
            parts.append((column + start, row))
        column, row = (np.concatenate(part) for part in zip(*parts, strict=True))
    return _simplified((column + left) * height + row + top)


def _grid(start: int, stop: int, low: np.float32, high: np.float32) -> Floats:
    """Where the pixels lie in the box, from -1 to 1: Detectron2's own operations, in its order and in float32."""
    pixels = np.arange(start, stop, dtype=np.float32) + np.float32(0.5)
    return (pixels - low) / (high - low) * np.float32(2) - np.float32(1)


def _crossings(mask: Floats, grid_x: Floats, grid_y: Floats, threshold: float) -> tuple[Positions, Positions]:
    """Columns and rows in which a mask (M, M), sampled at a grid's x and y (ascending, some may be infinite), changes.

    Between the centres of two of the mask's cells a column's value is linear. So it changes only between two centres on either
    side of the threshold, once, and where is plain. That leaves rounding: a column with a value so close to the threshold, at a
    centre or at a pixel, that rounding may decide is sampled instead.
    """
    values, close = _columns(mask, grid_x, threshold)
    doubtful = np.zeros(len(values), np.bool_)
    doubtful[np.flatnonzero(~(np.abs(values) > close)) // values.shape[1]] = True  # not `<=`: NaN is doubtful too
    # Columns begin and end below the threshold, outside the mask; so there is no change from one to the next.
    flat = values.ravel()
    on = flat > 0
    before = np.flatnonzero(on[1:] != on[:-1])
    column, centre = np.divmod(before, values.shape[1])
    rise = flat[before + 1] - flat[before]
    place = centre - flat[before] / rise
    pixels = _cells(grid_y, len(mask))
    row = np.searchsorted(pixels, place)
    bounds = np.concatenate([[-np.inf], pixels, [np.inf]])
    nearest = np.minimum(place - bounds[row], bounds[row + 1] - place)
    doubtful[column[~(nearest * np.abs(rise) > close)]] = True
    if not doubtful.any():
        return column, row
    again = np.flatnonzero(doubtful)
    sampled_column, sampled_row = _sampled(mask, grid_x[again], grid_y, threshold)
    sure = ~doubtful[column]
    return np.concatenate([column[sure], again[sampled_column]]), np.concatenate([row[sure], sampled_row])


def _columns(mask: Floats, grid_x: Floats, threshold: float) -> tuple[Floats, np.float32]:
    """How far above the threshold a mask is in each column, at each centre: (columns, M + 2); and what counts as close to it.

    The sampler's value differs from the exact one because its coordinates, in cells, are rounded by at most ``M * 2**-23`` in
    each direction, in which the value changes by at most `span` a cell, and by a few roundings of ``2**-24 * span`` when it
    weighs and adds. What is close is twice that sum, and more: the largest difference seen was a tenth of it.
    """
    size = len(mask)
    levels = np.zeros((size + 2, size + 2), np.float32)  # by column; around the mask the sampler takes 0
    levels[1:-1, 1:-1] = mask.T
    close = np.ptp(levels) * np.float32((size + 16) * 2.0**-21)
    levels -= np.float32(threshold)
    place = _cells(grid_x, size)
    cell = np.minimum(place.astype(np.int64), size)
    part = (place - cell).astype(np.float32)[:, None]
    values = levels[cell]
    values *= 1 - part
    values += levels[cell + 1] * part
    return values, close


def _cells(grid: Floats, size: int) -> NDArray[np.float64]:
    """Coordinates -1..1 in cells from the centre of the one before the mask: 0 to M + 1, where all beyond is the same.

    In float64 after the sampler's first rounding, so that only its other ones tell the two apart.
    """
    return np.clip((grid + np.float32(1)).astype(np.float64) * (size / 2) + 0.5, 0, size + 1)


def _sampled(mask: Floats, grid_x: Floats, grid_y: Floats, threshold: float) -> tuple[Positions, Positions]:
    """Columns and rows in which a mask changes, from PyTorch's own sample of each pixel.

    A pixel's sample does not depend on which others are asked for; the tests hold PyTorch to that. All but the sampling is
    NumPy's: PyTorch would wake its threads for each of these small arrays, which takes longer.
    """
    import torch
    from torch.nn.functional import grid_sample

    source = torch.from_numpy(mask.copy())[None, None]
    step = max(_BLOCK // len(grid_y), 1)
    columns, rows = [], []
    for start in range(0, len(grid_x), step):
        part = grid_x[start : start + step]
        grid = np.empty((1, len(part), len(grid_y), 2), np.float32)
        grid[..., 0] = part[:, None]
        grid[..., 1] = grid_y
        values = grid_sample(source, torch.from_numpy(grid), align_corners=False)[0, 0].numpy()
        on = np.zeros((len(part), len(grid_y) + 2), np.bool_)
        on[:, 1:-1] = values >= np.float32(threshold)
        flat = on.ravel()
        column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), len(grid_y) + 2)
        columns.append(column + start)
        rows.append(row)
    return np.concatenate(columns), np.concatenate(rows)


def _simplified(toggles: Positions) -> Positions:
    """Toggles in order, without pairs that undo each other: a run without pixels, or one that goes on in the next column."""
    toggles = np.sort(toggles)
    places = np.flatnonzero(np.diff(toggles, prepend=-1))
    odd = np.diff(places, append=len(toggles)) % 2 == 1
    simplified: Positions = toggles[places[odd]]
    return simplified


def _rle(toggles: Positions, height: int, width: int) -> RLE:
    """The RLE of a mask that changes at these positions, ascending and each once."""
    if len(toggles) and toggles[-1] == height * width:
        toggles = toggles[:-1]
    counts = np.diff(toggles, prepend=0, append=height * width)
    return {"size": [height, width], "counts": _to_string(counts)}


def _to_string(counts: Positions) -> str:
    """COCO's compressed string: each count less the one two before, in groups of five bits, lowest first."""
    values = counts.copy()
    values[3:] -= counts[1:-2]
    characters, due = [], [np.ones(len(values), np.bool_)]
    while due[-1].any():
        group = values & 31
        values >>= 5
        more = values != -(group >> 4)  # what is left is not the sign alone
        characters.append((group + 32 * more + 48).astype(np.uint8))
        due.append(due[-1] & more)
    return np.stack(characters, axis=1)[np.stack(due[:-1], axis=1)].tobytes().decode("ascii")


def _counts(rle: RLE) -> tuple[Positions, int, int]:
    """The run lengths of an RLE, of 0 and 1 in turn, and its height and width.

    Raises:
        InvalidArgumentError: The RLE is malformed.
    """
    if not isinstance(rle, dict) or not {"size", "counts"} <= rle.keys():
        raise InvalidArgumentError("this is no RLE; give {'size': [height, width], 'counts': '...'}", value=rle)
    height, width = _size(rle["size"])
    text = rle["counts"]
    if not isinstance(text, str):
        raise InvalidArgumentError(
            f"the RLE's counts are {type(text).__name__}; give COCO's compressed string (from bytes: .decode())", value=text
        )
    if not text or len(text) > _MOST_CHARACTERS * (height * width + 1):
        raise InvalidArgumentError(f"the RLE has {len(text)} characters for {height} x {width} pixels; encode it again")
    values = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64) - 48
    if not text.isascii() or values.min() < 0 or values.max() > 63:
        raise InvalidArgumentError(
            f"the RLE's counts {text[:40]!r} have characters outside '0'..'o'; encode it again", value=text
        )
    counts = _from_groups(values)
    if counts is None or counts.min() < 0 or counts.max() > height * width or counts.sum() != height * width:
        raise InvalidArgumentError(
            f"the RLE's counts {text[:40]!r} are not the runs of {height} x {width} pixels; encode it again", value=text
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


def _size(size: Any) -> tuple[int, int]:
    """Height and width, checked."""
    try:
        height, width = (operator.index(side) for side in size)
    except (TypeError, ValueError):
        raise InvalidArgumentError(f"the size is {size!r}; give height and width as two integers", value=size) from None
    if height < 1 or width < 1 or height * width > MOST_PIXELS:
        raise InvalidArgumentError(f"the size is {height} x {width}; give 1 to {MOST_PIXELS:,} pixels", value=size)
    return height, width


def _arguments(masks: Any, boxes: Any, threshold: float) -> tuple[Floats, Floats]:
    """The arguments of `from_roi_masks`, checked: (N, M, M) and (N, 4)."""
    soft, corners = _floats(masks, "masks"), _floats(boxes, "boxes")
    if soft.ndim != 3 or soft.shape[1] != soft.shape[2] or (len(soft) and not soft.shape[1]):
        raise InvalidArgumentError(f"masks have the shape {soft.shape}; give (N, M, M), such as masks[:, 0]", value=soft.shape)
    if corners.shape != (len(soft), 4):
        raise InvalidArgumentError(f"boxes have the shape {corners.shape}; give ({len(soft)}, 4)", value=corners.shape)
    finite = np.isfinite(corners).all(axis=1)
    if not finite.all():
        row = int(finite.argmin())
        raise InvalidArgumentError(f"box {row} is {corners[row].tolist()}; leave out boxes that are not finite", value=row)
    if not isinstance(threshold, (int, float, np.floating)) or not 0 <= threshold <= 1:
        raise InvalidArgumentError(f"threshold is {threshold!r}; give a number in 0..1", value=threshold)
    return soft, corners


def _floats(array: Any, name: str) -> Floats:
    """An argument as float32 array."""
    if not isinstance(array, np.ndarray):
        import torch

        if not isinstance(array, torch.Tensor):
            raise InvalidArgumentError(f"{name} are a {type(array).__name__}; give a tensor or an array", value=array)
        array = array.detach().to("cpu", torch.float32).numpy()
    try:
        floats: Floats = array.astype(np.float32, copy=False)
    except (TypeError, ValueError):
        raise InvalidArgumentError(f"{name} are {array.dtype}; give float32", value=array.dtype) from None
    return floats
