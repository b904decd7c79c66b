"""Weights of convolutions in the layouts of oneDNN's kernels, which would put others in order at each call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias

import torch

Pack: TypeAlias = Callable[[torch.Size], torch.Tensor]
"""Puts the weights into the layout for an input of some size."""
_SIZES = 64
"""Sizes of inputs that are kept in mind, the last ones that were new."""
_NEAR = 2.0
"""An input of at most so many times as many pixels as another, or the other way around, most probably wants the same layout."""


class Packed:
    """The weights of a convolution that does not change any more; threads may share them.

    Which layout a kernel takes depends on the size of its input, and to give it another's can be many times slower than the
    convolution. The sizes that an image has in a network want one or two, those of many images together dozens; so only a few
    are kept, and a size gets its own when it comes for the second time.

    Args:
        pack: Puts the weights in order.
        plain: Weights as any kernel takes them, for sizes that never came before and for those that want one layout too many.
            None where there are no such: then these get what was packed for the input with about as many pixels.
        most: Layouts that are kept, each of which is a copy of the weights.
    """

    def __init__(self, pack: Pack, plain: torch.Tensor | None, most: int) -> None:
        self._pack = pack
        self._plain = plain
        self._most = most
        self._sizes: dict[torch.Size, torch.Tensor | None] = {}  # None: it came once
        self._layouts: dict[bytes, torch.Tensor] = {}
        self._lock = threading.Lock()

    def of(self, size: torch.Size) -> torch.Tensor:
        """The weights for an input of this size, (N, C, H, W)."""
        with self._lock:
            weight = self._sizes.get(size)
            if weight is None:
                stand_in = self._plain if self._plain is not None else self._nearest(size, _NEAR)
                if size in self._sizes or stand_in is None:
                    weight = self._sizes[size] = self._packed(size)
                else:
                    self._sizes[size], weight = None, stand_in
                if len(self._sizes) > _SIZES:
                    del self._sizes[next(iter(self._sizes))]
            return weight

    def _packed(self, size: torch.Size) -> torch.Tensor:
        weight = self._pack(size)
        layout = torch.ops.mkldnn._get_mkldnn_serialized_md(weight).numpy().tobytes()
        if layout not in self._layouts and len(self._layouts) < self._most:
            self._layouts[layout] = weight
        if layout in self._layouts:
            return self._layouts[layout]
        if self._plain is not None:
            return self._plain
        nearest = self._nearest(size)
        return weight if nearest is None else nearest

    def _nearest(self, size: torch.Size, most: float = float("inf")) -> torch.Tensor | None:
        """What the size with about as many pixels has, unless it has more than so many times as many, or as few."""
        pixels = _pixels(size)
        ratios = {other: max(_pixels(other) / pixels, pixels / _pixels(other))
                  for other, weight in self._sizes.items() if weight is not None}  # fmt: skip
        nearest = min(ratios, key=lambda other: ratios[other], default=None)
        return None if nearest is None or ratios[nearest] > most else self._sizes[nearest]


def _pixels(size: torch.Size) -> int:
    return size[0] * size[2] * size[3]
