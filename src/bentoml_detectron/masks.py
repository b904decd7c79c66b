"""Masks as run lengths: from a model's small soft masks straight to COCO's RLE, without bitmaps in between.

Inside this module a mask is mostly its *toggles*: the pixels (x, y) at which it changes between off and on, column by column,
starting with off. The toggles of many masks are found together, in arrays over the columns of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bentoml_detectron.errors import InvalidArgumentError
from bentoml_detectron.outlines import outlines
from bentoml_detectron.rle import MOST_PIXELS as MOST_PIXELS
from bentoml_detectron.rle import RLE as RLE
from bentoml_detectron.rle import Positions, checked_size, from_toggles
from bentoml_detectron.rle import to_counts as _counts

if TYPE_CHECKING:
    import torch

_BLOCK = 1 << 16
"""Most values worked on at once: as many as stay in the processor's cache, and some 3 MB with all that is made of them."""

_BLOCKS = 3
"""How many of these have their toggles sampled, sorted and written together; of toggles, there are far fewer than values."""

Floats = NDArray[np.float32]
Toggles = tuple[Positions, Positions, Positions]  # (K,) each: masks, from 0, and x and y in the image


class _Placed(NamedTuple):
    """Soft masks (N, M, M), and where each goes, (N,): its box, and the pixels looked at, from first to before last."""

    soft: Floats
    x0: Floats
    y0: Floats
    x1: Floats
    y1: Floats
    first_x: Positions
    first_y: Positions
    last_x: Positions
    last_y: Positions


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
    height, width = checked_size(image_size)
    soft, corners = _arguments(masks, boxes, threshold)
    # The part of the image that Detectron2 samples: the box and one to two pixels around it.
    first = np.clip(np.floor(corners[:, :2]) - 1, 0, (width, height)).astype(np.int64)
    last = np.clip(np.ceil(corners[:, 2:]) + 1, 0, (width, height)).astype(np.int64)
    last = np.where((first < last).all(axis=1, keepdims=True), last, first)
    side = soft.shape[1] + 2
    work = np.cumsum((last[:, 0] - first[:, 0] + side) * side)  # the values of its columns, and its own
    starts = np.flatnonzero(np.diff(work // (_BLOCKS * _BLOCK), prepend=-1)).tolist()
    rles = []
    with np.errstate(all="ignore"):  # what is infinite or no number is left to PyTorch to sample
        for start, stop in pairwise([*starts, len(soft)]):
            some = slice(start, stop)
            placed = _Placed(soft[some], *corners[some].T.copy(), *first[some].T.copy(), *last[some].T.copy())
            mask, x, y = _toggles(placed, threshold)
            rles += from_toggles(mask, x * height + y, stop - start, height, width)
    return rles


def encode(bitmap: NDArray[np.bool_] | NDArray[np.uint8]) -> RLE:
    """The RLE of a bitmap, as pycocotools encodes it.

    Args:
        bitmap: (H, W) bool, or uint8 of which all but 0 is on.

    Raises:
        InvalidArgumentError: It has another type or shape.
    """
    if not isinstance(bitmap, np.ndarray) or bitmap.ndim != 2 or bitmap.dtype not in (np.bool_, np.uint8):
        found = f"{bitmap.dtype} {bitmap.shape}" if isinstance(bitmap, np.ndarray) else type(bitmap).__name__
        raise InvalidArgumentError(f"the bitmap must be an (H, W) array of bool or uint8, not {found}", value=found)
    height, width = checked_size(bitmap.shape)
    on = bitmap if bitmap.dtype == np.bool_ else bitmap != 0
    # Not by transposing, which takes longer than all the rest: changes inside columns first, then from one to the next.
    row, column = np.divmod(np.flatnonzero(on[1:] != on[:-1]), width)
    turns = np.flatnonzero(on[0, 1:] != on[-1, :-1]) + 1
    edges = [0] * bool(on[0, 0]), [height * width] * bool(on[-1, -1])
    toggles = np.sort(np.concatenate([*edges, row + 1 + column * height, turns * height]).astype(np.int64))
    return from_toggles(0, toggles, 1, height, width)[0]


def from_bitmaps(bitmaps: torch.Tensor) -> list[RLE]:
    """The RLEs of (N, H, W) bool, as `encode` makes them; found where they are, as on a GPU, so that few numbers leave it.

    Raises:
        InvalidArgumentError: They have another type or shape.
    """
    import torch

    if bitmaps.ndim != 3 or bitmaps.dtype != torch.bool:
        found = f"{bitmaps.dtype} {tuple(bitmaps.shape)}"
        raise InvalidArgumentError(f"the bitmaps must be (N, H, W) of bool, not {found}", value=found)
    count = len(bitmaps)
    if not count:
        return []
    height, width = checked_size(bitmaps.shape[1:])
    # Column by column, with a pixel that is off before the first and after the last.
    on = bitmaps.new_zeros((count, height * width + 2))
    on[:, 1:-1].view(count, width, height).copy_(bitmaps.transpose(1, 2))
    mask, position = (on[:, 1:] != on[:, :-1]).nonzero().cpu().numpy().T
    return from_toggles(mask, position, count, height, width)


def decode(rle: RLE) -> NDArray[np.bool_]:
    """The (H, W) bitmap of an RLE; its columns are contiguous, as in pycocotools.

    Raises:
        InvalidArgumentError: The RLE is malformed; nothing was allocated for its pixels.
    """
    counts, height, width = _counts(rle)
    return columns(counts, height, width).T


def columns(runs: Positions, height: int, width: int) -> NDArray[np.bool_]:
    """The bitmap of runs, off first, column by column; transposed, (W, H)."""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height)


def check(rle: RLE, image_size: tuple[int, int]) -> None:
    """Checks that an RLE from elsewhere is a mask of an image of this height and width, without making its pixels.

    Raises:
        InvalidArgumentError: It is malformed, or of another size.
    """
    _, *size = _counts(rle)
    if size != list(image_size):
        raise InvalidArgumentError(f"the RLE's size is {size}, but the image's is {list(image_size)}", value=size)


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
    padded[1:-1, 1:-1] = columns(runs, height, width).T
    return [(np.array(outline) + (x, y)).ravel().astype(float).tolist() for outline in outlines(padded)]


def _toggles(placed: _Placed, threshold: float) -> Toggles:
    """Where masks change when they are pasted into the image."""
    stops = np.cumsum(placed.last_x - placed.first_x)
    levels = _levels(placed.soft, threshold)
    step = max(_BLOCK // levels.shape[1], 1)
    parts: list[Toggles] = [(np.empty(0, np.int64),) * 3]
    again = [(np.empty(0, np.int64),) * 2]
    for start in range(0, stops[-1], step):
        column = np.arange(start, min(start + step, stops[-1]))
        mask = np.searchsorted(stops, column, side="right")
        x = column - stops[mask] + placed.last_x[mask]
        found, doubtful = _crossings(placed, levels, mask, x)
        parts.append(found)
        again.append((mask[doubtful], x[doubtful]))
    mask, x = (np.concatenate(part) for part in zip(*again, strict=True))
    parts += _sampled_columns(placed, mask, x, threshold)
    mask, x, y = (np.concatenate(part) for part in zip(*parts, strict=True))
    return mask, x, y


def _levels(soft: Floats, threshold: float) -> Floats:
    """How far above the threshold masks (N, M, M) are, by column, with the sampler's 0 around them: (N, M + 2, M + 2).

    The unit is what counts as close to the threshold. The sampler's value differs from the exact one because its coordinates,
    in cells, are rounded by at most ``M * 2**-23`` in each direction, in which the value changes by at most `span` a cell, and
    by a few roundings of ``2**-24 * span`` when it weighs and adds. What is close is twice that sum, and more: the largest
    difference seen was a tenth of it.
    """
    count, size, _ = soft.shape
    levels = np.zeros((count, size + 2, size + 2), np.float32)
    levels[:, 1:-1, 1:-1] = soft.transpose(0, 2, 1)
    close = np.ptp(levels, axis=(1, 2), keepdims=True) * np.float32((size + 16) * 2.0**-21)
    levels -= np.float32(threshold)
    levels /= np.maximum(close, np.finfo(np.float32).tiny)
    return levels


def _crossings(placed: _Placed, levels: Floats, mask: Positions, x: Positions) -> tuple[Toggles, NDArray[np.bool_]]:
    """Where columns x (K,), of a mask each, change; and which columns (K,) are left out of these.

    Between the centres of two of the mask's cells a column's value is linear. So it changes only between two centres on either
    side of the threshold, once, and where is plain. That leaves rounding: a column with a value so close to the threshold, at a
    centre or at a pixel, that rounding may decide is doubtful, and is to be sampled instead. So is all of a box without an
    inside, whose coordinates do not ascend, or are no numbers.
    """
    side = levels.shape[1]
    values = _columns(levels, mask, _cells(x, placed.x0[mask], placed.x1[mask], side - 2))
    doubtful = ~((placed.x0 < placed.x1) & (placed.y0 < placed.y1))[mask]
    doubtful[np.flatnonzero(~(np.abs(values) > 1)) // side] = True  # not `<=`: NaN is doubtful too
    # Columns begin and end below the threshold, outside the mask; so there is no change from one to the next.
    flat = values.ravel()
    on = flat > 0
    before = np.flatnonzero(on[1:] != on[:-1])
    column = before // side
    rise = flat[before + 1] - flat[before]
    place = before - column * side - flat[before] / rise
    mask, x = mask[column], x[column]
    y, distance = _nearest(placed, mask, place, side - 2)
    doubtful[column[~(distance * np.abs(rise) > 1)]] = True
    sure = ~doubtful[column]
    return (mask[sure], x[sure], y[sure]), doubtful


def _nearest(placed: _Placed, mask: Positions, place: NDArray[np.float64], size: int) -> tuple[Positions, NDArray[np.float64]]:
    """The first pixel y (K,) after a place, in cells, of a mask each; and how far, in cells, the nearest pixel is.

    The distance is negative where rounding made y another pixel.
    """
    scale = (placed.y1.astype(np.float64) - placed.y0) / size
    first, last = placed.first_y[mask], placed.last_y[mask]
    y = np.ceil(place * scale[mask] + (placed.y0 - 0.5 * scale - 0.5)[mask])
    y = np.clip(y, first, last).astype(np.int64)
    above, below = _cells(np.stack([y - 1, y]), placed.y0[mask], placed.y1[mask], size)
    return y, np.minimum(np.where(y > first, place - above, np.inf), np.where(y < last, below - place, np.inf))


def _columns(levels: Floats, mask: Positions, place: NDArray[np.float64]) -> Floats:
    """The levels (K, M + 2) of columns at a place, in cells, of a mask each."""
    side = levels.shape[1]
    cell = np.clip(place.astype(np.int64), 0, side - 2)
    part = (place - cell).astype(np.float32)[:, None]
    by_column = levels.reshape(-1, side)
    cell += mask * side
    values: Floats = by_column.take(cell, axis=0)
    values *= 1 - part
    after = by_column.take(cell + 1, axis=0)
    after *= part
    values += after
    return values


def _grid(pixels: Positions, low: Floats, high: Floats) -> Floats:
    """Where pixels lie in boxes, from -1 to 1: Detectron2's own operations, in its order and in float32."""
    return (pixels.astype(np.float32) + np.float32(0.5) - low) / (high - low) * np.float32(2) - np.float32(1)


def _cells(pixels: Positions, low: Floats, high: Floats, size: int) -> NDArray[np.float64]:
    """Where pixels lie, in cells from the centre of the one before the mask: 0 to M + 1, where all beyond is the same.

    In float64 after the sampler's first rounding, so that only its other ones tell the two apart.
    """
    grid = _grid(pixels, low, high)
    return np.clip((grid + np.float32(1)).astype(np.float64) * (size / 2) + 0.5, 0, size + 1)


def _sampled_columns(placed: _Placed, mask: Positions, x: Positions, threshold: float) -> Iterator[Toggles]:
    """Where columns x (K,), of a mask each, change, by sampling each of their pixels."""
    if not len(x):
        return
    rows = placed.last_y - placed.first_y
    step = max(_BLOCK // 2 // max(int(rows[mask].max()), placed.soft[0].size), 1)  # half: a pixel has two coordinates
    for start in range(0, len(x), step):
        some = slice(start, start + step)
        number, which = np.unique(mask[some], return_inverse=True)
        low, high = placed.first_y[number, None], placed.last_y[number, None]
        y = low + np.arange(rows[number].max())
        grid_y = _grid(y, placed.y0[number, None], placed.y1[number, None])
        grid_x = _grid(x[some], placed.x0[mask[some]], placed.x1[mask[some]])
        column, row = _sampled(placed.soft[mask[some]], grid_x, grid_y[which], (y < high)[which], threshold)
        yield mask[some][column], x[some][column], y[which[column], 0] + row


def _sampled(
    masks: Floats, grid_x: Floats, grid_y: Floats, inside: NDArray[np.bool_], threshold: float
) -> tuple[Positions, Positions]:
    """Columns and rows in which masks (K, M, M) change, one column of each, from PyTorch's own sample of each pixel.

    The grid's x is (K,), its y (K, R), of which those that are not `inside` (K, R) are off. A pixel's sample does not depend on
    which others are asked for; the tests hold PyTorch to that. All but the sampling is NumPy's: PyTorch would wake its threads
    for each of these small arrays, which takes longer.
    """
    import torch
    from torch.nn.functional import grid_sample

    count, most = grid_y.shape
    grid = np.empty((count, 1, most, 2), np.float32)
    grid[..., 0] = grid_x[:, None, None]
    grid[..., 1] = grid_y[:, None]
    values = grid_sample(torch.from_numpy(masks)[:, None], torch.from_numpy(grid), align_corners=False)[:, 0, 0].numpy()
    on = np.zeros((count, most + 2), np.bool_)
    on[:, 1:-1] = (values >= np.float32(threshold)) & inside
    flat = on.ravel()
    before = np.flatnonzero(flat[1:] != flat[:-1])
    column = before // (most + 2)
    return column, before - column * (most + 2)


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
        raise InvalidArgumentError(f"box {row} is {corners[row].tolist()}; remove boxes that are not finite", value=row)
    if not isinstance(threshold, (int, float, np.floating)) or not 0 <= threshold <= 1:
        raise InvalidArgumentError(f"threshold is {threshold!r}; it must be a number from 0 to 1", value=threshold)
    return soft, corners


def _floats(array: Any, name: str) -> Floats:
    """An argument as float32 array."""
    if not isinstance(array, np.ndarray):
        import torch

        if not isinstance(array, torch.Tensor):
            raise InvalidArgumentError(f"{name} must be a tensor or an array, not {type(array).__name__}", value=array)
        array = array.detach().to("cpu", torch.float32).numpy()
    try:
        floats: Floats = array.astype(np.float32, copy=False)
    except (TypeError, ValueError):
        raise InvalidArgumentError(f"{name} must be float32, not {array.dtype}", value=array.dtype) from None
    return floats
