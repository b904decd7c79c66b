"""Keeps the anchors of the last image sizes, which Detectron2 makes anew for each image."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch import nn

MOST_BYTES = 32 << 20
"""Of anchors that are kept; those of an FPN at 800x1088 take 3.5 MB."""


def takes(module: nn.Module) -> bool:
    """Whether it makes anchors as Detectron2 does: by the feature maps' sizes alone."""
    own = DefaultAnchorGenerator
    return isinstance(module, own) and all(
        getattr(type(module), name) is getattr(own, name) for name in ("forward", "_grid_anchors")
    )


class Kept:
    """Stands where ``DefaultAnchorGenerator._grid_anchors`` was; threads may share it.

    It gives copies: a proposal generator of a user's own may write into its anchors, as ``Boxes.scale`` does.
    """

    def __init__(self, generator: Any) -> None:
        self._make = generator._grid_anchors
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[tuple[int, ...], ...], list[torch.Tensor]] = OrderedDict()
        self._bytes = 0

    def __call__(self, grid_sizes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """As ``_grid_anchors``: a level's (A, 4) float32."""
        key = tuple(tuple(map(int, size)) for size in grid_sizes)
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return [each.clone() for each in found]
        made: list[torch.Tensor] = self._make(grid_sizes)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self._bytes += _bytes(made)
            while self._bytes > MOST_BYTES:
                self._bytes -= _bytes(self._kept.popitem(last=False)[1])
        return [each.clone() for each in made]


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(each.nbytes for each in tensors)
