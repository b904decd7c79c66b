"""RoIAlign on the CPU as a weighted sum of rows of channels-last feature maps.

Each output of RoIAlign (He et al. 2017, section 3) is an average of bilinear samples, so it is a weighted sum of the feature
rows around them. A weight is the product of one factor along y and one along x. Along each axis, a bin's samples are merged
into one weight for each pixel that they touch. `torch.nn.functional.embedding_bag` sums the rows. Torchvision's kernel reads
four rows per sample instead, channel by channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch.nn.functional import embedding_bag

Pixels: TypeAlias = tuple[torch.Tensor, torch.Tensor]

_SPANS = (3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Pixels that a bin touches along an axis; boxes are done together with others of about as many."""
_MOST = 1 << 21  # weights, or samples, in memory at once
_GROUP = 1 << 12  # weights that take about as long as it takes to begin with another group
_MOST_SAMPLES = 1 << 16  # of a bin along an axis; boxes that are larger are of no picture


def roi_align(
    features: Sequence[torch.Tensor],
    boxes: torch.Tensor,
    levels: torch.Tensor,
    scales: Sequence[float],
    output_size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
    gains: Sequence[float] | None = None,
) -> torch.Tensor:
    """RoIAlign over the levels of a pyramid; equal to ``torchvision.ops.roi_align`` but for rounding.

    Args:
        features: (B, C, H, W) a level, float32 or bfloat16; fastest where they are channels-last.
        boxes: (M, 5) float32: the image's index in the batch, and XYXY in absolute pixels.
        levels: (M,) int64, each box's level.
        scales: Of each level with respect to the image.
        output_size: Height and width of the output.
        sampling_ratio: Samples a bin along each axis; 0: as many as the bin has pixels, rounded up.
        aligned: Whether pixels' centers are at half a pixel, as in Detectron2's ROIAlignV2.
        gains: What to multiply each level by; 1 unless given.

    Returns:
        (M, C, *output_size), channels-last, of the features' dtype.
    """
    channels = features[0].shape[1]
    rows = [each.permute(0, 2, 3, 1).reshape(-1, channels) for each in features]
    scale = boxes.new_tensor(scales)[levels]
    heights, widths = (boxes.new_tensor([each.shape[axis] for each in features])[levels] for axis in (2, 3))
    along_y = _Axis(boxes[:, 2], boxes[:, 4], scale, heights, output_size[0], sampling_ratio, aligned)
    along_x = _Axis(boxes[:, 1], boxes[:, 3], scale, widths, output_size[1], sampling_ratio, aligned)
    first = boxes[:, 0] * heights * widths
    bins = output_size[0] * output_size[1]
    output = features[0].new_empty((len(boxes), bins * channels))
    order, groups = _groups(levels, along_y.span, along_x.span, bins)
    step = max(1, _MOST // max(1, along_y.most(), along_x.most()))
    for some, inside in _steps(order, groups, step):
        (line, down), (column, across) = along_y.pixels(some), along_x.pixels(some)
        line = (line * widths[some, None, None] + first[some, None, None]).to(torch.int32)
        if gains is not None:
            down = down * boxes.new_tensor(gains)[levels[some], None, None]
        for level, span_y, span_x, start, stop in inside:
            here = slice(start, stop)
            y, x = (line[here, :, :span_y], down[here, :, :span_y]), (column[here, :, :span_x], across[here, :, :span_x])
            output[some[here]] = _summed(rows[level], y, x).view(-1, bins * channels)
    return output.view(-1, *output_size, channels).permute(0, 3, 1, 2)


_Group: TypeAlias = tuple[int, int, int, int, int]
"""Boxes of one level and of about the same spans: the level, both spans, and from where to before where they are."""


def _groups(levels: torch.Tensor, span_y: torch.Tensor, span_x: torch.Tensor, bins: int) -> tuple[torch.Tensor, list[_Group]]:
    """An order of the boxes in which those of a group follow each other, and the groups, of `_MOST` weights at most."""
    spans = torch.tensor(_SPANS)
    y, x = (torch.bucketize(each, spans) for each in (span_y, span_x))
    key = (levels * (len(spans) + 1) + y) * (len(spans) + 1) + x
    order = key.argsort()
    keys, counts = torch.unique_consecutive(key[order], return_counts=True)
    kinds: list[tuple[int, int, int, int]] = []
    for each, count in zip(keys.tolist(), counts.tolist(), strict=True):
        level, both = divmod(each, (len(spans) + 1) ** 2)
        kinds.append((level, *divmod(both, len(spans) + 1), count))
    groups, stop = [], 0
    for level, place_y, place_x, count in _merged(kinds, bins):
        start, stop = stop, stop + count
        limits = [_SPANS[place] if place < len(spans) else int(span[order[start:stop]].max())
                  for place, span in ((place_y, span_y), (place_x, span_x))]  # fmt: skip
        few = max(1, _MOST // (bins * limits[0] * limits[1]))
        groups += [(level, limits[0], limits[1], low, min(low + few, stop)) for low in range(start, stop, few)]
    return order, groups


def _merged(kinds: list[tuple[int, int, int, int]], bins: int) -> list[tuple[int, int, int, int]]:
    """Groups that follow each other as one, where that costs less than a group: level, places of both spans, and boxes."""
    merged = kinds[:1]
    for level, y, x, count in kinds[1:]:
        before, last_y, last_x, boxes = merged[-1]
        most_y, most_x = max(y, last_y), max(x, last_x)
        if level == before and most_y < len(_SPANS) and most_x < len(_SPANS):
            apart = count * _SPANS[y] * _SPANS[x] + boxes * _SPANS[last_y] * _SPANS[last_x]
            if bins * ((count + boxes) * _SPANS[most_y] * _SPANS[most_x] - apart) < _GROUP:
                merged[-1] = (level, most_y, most_x, count + boxes)
                continue
        merged.append((level, y, x, count))
    return merged


def _steps(order: torch.Tensor, groups: list[_Group], step: int) -> Iterator[tuple[torch.Tensor, list[_Group]]]:
    """At most so many boxes at once, in order, and the groups among them, counted from their first."""
    for low in range(0, len(order), step):
        some = order[low : low + step]
        inside = ((*kind, max(start - low, 0), min(stop - low, len(some))) for *kind, start, stop in groups)
        yield some, [(level, y, x, start, stop) for level, y, x, start, stop in inside if start < stop]


def _summed(rows: torch.Tensor, along_y: Pixels, along_x: Pixels) -> torch.Tensor:
    """The bins of some boxes, (boxes * bins, C); pixels along y are given as the first of their line."""
    index = along_y[0][:, :, None, :, None] + along_x[0][:, None, :, None, :]
    weight = along_y[1][:, :, None, :, None] * along_x[1][:, None, :, None, :]
    touched = index.shape[3] * index.shape[4]
    return embedding_bag(index.view(-1, touched), rows, mode="sum", per_sample_weights=weight.view(-1, touched).to(rows.dtype))


class _Axis:
    """The samples of all boxes along one axis; the arithmetic is torchvision's, operation by operation, in float32.

    Attributes:
        span: (M,) int64, most pixels that a bin of the box touches.
    """

    def __init__(
        self,
        low: torch.Tensor,
        high: torch.Tensor,
        scale: torch.Tensor,
        length: torch.Tensor,
        bins: int,
        sampling_ratio: int,
        aligned: bool,
    ) -> None:
        offset = 0.5 if aligned else 0.0
        self._start = low * scale - offset
        size = high * scale - offset - self._start
        if not aligned:
            size = size.clamp(min=1.0)
        self._bin = size / bins
        self._count = torch.full_like(size, sampling_ratio) if sampling_ratio > 0 else self._bin.ceil().clamp(0, _MOST_SAMPLES)
        self._length = length
        self._bins = bins
        self.span = torch.minimum(self._bin.abs().ceil() + 2, length).to(torch.int64)

    def most(self) -> int:
        """Most values that a box has while its pixels are looked for."""
        return self._bins * int(torch.maximum(self._count, self.span).max()) if len(self.span) else 0

    def pixels(self, chosen: torch.Tensor) -> Pixels:
        """Pixels and weights of the bins of some boxes.

        Returns:
            (boxes, bins, span) int32 and float32, for the largest span of these boxes; weights of pixels that no sample touches
            are 0, and those are behind the others.
        """
        start, size, count, length = (each[chosen, None, None] for each in (self._start, self._bin, self._count, self._length))
        span, most = int(self.span[chosen].max()), int(count.max().clamp(min=1))
        bins = torch.arange(self._bins, dtype=torch.float32)[:, None]
        samples = torch.arange(most, dtype=torch.float32)
        at = start + bins * size + (samples + 0.5) * size / count.clamp(min=1)
        weight = ((at >= -1) & (at <= length) & (samples < count)) / count.clamp(min=1)
        at = torch.minimum(at.clamp(min=0), length - 1)
        below = at.floor()
        part = at - below
        lowest = below.amin(dim=2, keepdim=True)
        place = (below - lowest).to(torch.int64).clamp(max=span - 1)
        weights = torch.zeros((len(chosen), self._bins, span + 1), dtype=torch.float32)
        weights.scatter_add_(2, place, weight * (1 - part))
        weights.scatter_add_(2, place + 1, weight * part)
        pixels = torch.minimum(lowest + torch.arange(span), length - 1)
        return pixels.to(torch.int32), weights[:, :, :span]
