"""3x3 convolutions with half of the products, by Winograd's minimal filtering.

The method is that of Lavin and Gray 2015 (arXiv:1509.09308), but along the rows only. From m + 2 rows of the input, m rows of
the output follow by m + 2 products instead of 3 m. A product is a convolution with a window of 1x3, for which oneDNN has
kernels. Before and after the products, whole rows are multiplied by small matrices.

Filtering along both directions would take a fourth of the products, but more passes over memory, and its error is larger.
Along one direction, in float32, the error is about three times that of the convolution itself if the values are of similar
size. In bfloat16, factors and products would be rounded to 8 bits once more.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.polynomial.polynomial import polyfromroots
from torch import nn
from torch.nn import functional

from bentoml_detectron.engines import fusion
from bentoml_detectron.engines.packed import Packed

_POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)
"""Where polynomials are multiplied, beside infinity. Larger ones and smaller ones make rounding errors larger."""
_ONE = 1  # the place of 1 among them: its product goes into each row of the output once, and so would a bias in it
_TALL, _LOW = 6, 5
"""Rows that are computed together, of maps of more than `_LOW_MAP` rows and of others: 14, as ROI heads have, are 3 times 5."""
_LOW_MAP = 15
_LEAST_CHANNELS = 128
"""With fewer, the matrices cost what is gained."""
_LEAST_PIXELS = 1024
"""Of a batch; of fewer, little is gained for weights that are more than twice as large."""
_MOST_SHARE = 0.75  # of the products; maps of few rows have more in the last rows' place
_WINDOW = ((0, 1), (1, 1), (1, 1))
"""Padding, strides and dilation of the products."""
_BYTES = 8 << 20
"""Of rows that are between matrices and products, a few times which the processor's cache should hold."""
_LAYOUTS = 3
"""Of weights that are kept, each a copy; the maps of an RPN's head want as many on a processor with AVX2."""


def speed_up(module: nn.Module) -> None:
    """Lets the convolutions of a module that gain by it compute so where they are given float32; changes it.

    Args:
        module: In float32, fused.
    """
    for each in module.modules():
        if type(each) in fusion.CONVOLUTIONS and _takes(each):
            fusion.compute_by(each, Convolution(each))
            if not fusion.is_fused(each):
                each.forward = partial(_forward, each)


def _takes(conv: Any) -> bool:
    return (
        (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and min(conv.in_channels, conv.out_channels) >= _LEAST_CHANNELS
    )


def _forward(conv: Any, x: torch.Tensor) -> torch.Tensor:
    """As a convolution's ``forward``."""
    return fusion.followed(conv, fusion.convolved(conv, x))


class Convolution:
    """Computes a convolution.

    Args:
        conv: Of 3x3 windows over zeros, without strides; its weights are not changed any more.
    """

    def __init__(self, conv: Any) -> None:
        self._conv = conv
        self._weights: dict[int, list[Packed]] = {}  # by the rows that are computed together

    def __call__(self, x: torch.Tensor, relu: bool, add: torch.Tensor | None) -> torch.Tensor:
        """Computes it; small maps, and what is added to, by the convolution itself.

        Args:
            x: (N, C, H, W).
            relu: Whether the result is rectified.
            add: What is added, of the result's shape, which gets the result.

        Returns:
            (N, channels, H, W), channels-last.
        """
        rows = _TALL if x.shape[2] > _LOW_MAP else _LOW
        if add is not None or not self._gains(x, rows):
            return fusion.in_floats(self._conv, x, relu, add)
        count, _, height, width = x.shape
        lines = x.permute(0, 2, 3, 1).reshape(count, height, -1)
        result = x.new_empty(count, height, width * self._conv.out_channels)
        tiles = -(-height // rows)
        of_an_image = (rows + 2) * lines[0, 0].nbytes * tiles
        images = max(1, min(count, _BYTES // of_an_image))
        at_once = -(-tiles // -(-of_an_image // _BYTES))  # all of them, or parts of about the same size
        for image in range(0, count, images):
            for tile in range(0, tiles, at_once):
                first, last = tile * rows, min(tile + at_once, tiles) * rows
                taken = _with_zeros(lines[image : image + images], first - 1, last + 1)
                given = self._some(taken, rows, width)
                for row, values in enumerate(given):
                    into = result[image : image + images, first + row : last : rows]
                    values = values[:, : into.shape[1]]  # the last rows may be more than there are
                    torch.clamp_min(values, 0, out=into) if relu else into.copy_(values)
        return result.view(count, height, width, -1).permute(0, 3, 1, 2)

    def _gains(self, x: torch.Tensor, rows: int) -> bool:
        if x.dtype != torch.float32 or x.ndim != 4 or not x.numel():
            return False
        share = (rows + 2) * -(-x.shape[2] // rows) / (3 * x.shape[2])
        return share <= _MOST_SHARE and x[:, 0].numel() >= _LEAST_PIXELS

    def _some(self, lines: torch.Tensor, rows: int, width: int) -> torch.Tensor:
        """Some rows of the output, (rows, images, tiles, W * channels), of lines, (images, tiles * rows + 2, W * channels)."""
        back, _, there = _matrices(rows)
        windows = lines.unfold(1, rows + 2, rows).permute(3, 0, 1, 2)
        _, images, tiles, _ = windows.shape
        factors = (there @ windows.reshape(rows + 2, -1)).view(rows + 2, 1, images * tiles, width, -1)
        products = torch.stack([self._product(each, rows, place) for place, each in enumerate(factors)])
        return (back @ products.view(rows + 2, -1)).view(rows, images, tiles, -1)

    def _product(self, factor: torch.Tensor, rows: int, place: int) -> torch.Tensor:
        """One factor, (1, H, W, channels), times that of the weights."""
        weights = self._weights.get(rows)
        if weights is None:
            weights = self._weights.setdefault(
                rows, [Packed(partial(self._pack, row), None, _LAYOUTS) for row in _matrices(rows)[1]]
            )
        x = factor.permute(0, 3, 1, 2)
        bias = self._conv.bias if place == _ONE else None
        weight = weights[place].of(x.shape)
        y: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *_WINDOW, 1, "none", [], "")
        return y.permute(0, 2, 3, 1)

    def _pack(self, row: torch.Tensor, size: torch.Size) -> torch.Tensor:
        weight = self._conv.weight.detach()
        factor = sum(weight[:, :, line : line + 1] * value for line, value in enumerate(row.tolist()))
        packed: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(factor, *_WINDOW, 1, list(size))
        return packed


def _with_zeros(lines: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Some lines of images, (N, H, values), with zeros above the first and below the last."""
    height = lines.shape[1]
    within = lines[:, max(0, start) : min(height, end)]
    above, below = max(0, -start), max(0, end - height)
    return functional.pad(within, (0, 0, above, below)) if above or below else within


@cache
@torch.inference_mode(False)  # or what is made by the first call in that mode could be used in no other
def _matrices(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Those of products to rows of the output, of rows of the window to factors, and of rows of the input to factors.

    By Toom's and Cook's algorithm, transposed: A, (rows, rows + 2), and B, (rows + 2, rows + 2), in float32, G, (rows + 2, 3),
    in float64.
    """
    points = np.array(_POINTS[: rows + 1])
    others = [np.delete(points, place) for place in range(len(points))]
    back = np.vander(points, rows, increasing=True).T
    window = np.vander(points, 3, increasing=True) / np.array(
        [[np.prod(point - rest)] for point, rest in zip(points, others, strict=True)]
    )
    there = [[*polyfromroots(rest), 0.0] for rest in others]
    infinity = np.eye(rows)[:, -1:], np.eye(3)[-1:], [polyfromroots(points)]
    return (
        torch.from_numpy(np.hstack([back, infinity[0]])).float(),
        torch.from_numpy(np.vstack([window, infinity[1]])),
        torch.from_numpy(np.vstack([there, infinity[2]])).float(),
    )
