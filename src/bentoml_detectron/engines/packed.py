"""Weights of convolutions in the layouts of oneDNN's kernels, which would otherwise reorder them at each call."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeAlias

import torch

Pack: TypeAlias = Callable[[torch.Size], torch.Tensor]
"""Puts the weights into the layout for an input of some size."""
_SIZES = 64
"""Sizes of inputs that are kept in mind, the last ones that were new."""
_PLAIN = b""  # stands for the layout of plain weights
_UNSET = slice(108, 112)
"""Bytes of oneDNN's description of a layout (``dnnl_memory_desc``) that nothing sets, before ``padded_dims``:
they differ where layouts do not. Should another version have something there, layouts that differ would be taken for the same,
and kernels that want the other put weights in order themselves."""
_NEAR = 2.0
"""An input of at most so many times as many pixels as another, or the other way around, most probably wants the same layout."""


class Packed:
    """The weights of a convolution that does not change any more; threads may share them.

    Which layout a kernel takes depends on the size of its input, and to give it another's can be many times slower than the
    convolution. The sizes that an image has in a network want one or two, those of many images together more; so only a few
    are kept. A size gets its own when it comes for the second time, or at once where there is nothing that will do meanwhile.

    Args:
        pack: Puts the weights in order.
        plain: Weights as any kernel takes them, for sizes that never came before and for those that want one layout too many.
            None where there are no such: then new sizes get what one with about as many pixels has, and of too many layouts the
            one that was not used for the longest time goes.
        most: Layouts that are kept, each of which is a copy of the weights.
    """

    def __init__(self, pack: Pack, plain: torch.Tensor | None, most: int) -> None:
        self._pack = pack
        self._plain = plain
        self._most = most
        self._sizes: dict[torch.Size, bytes | None] = {}  # by their layout; None: it came once
        self._layouts: OrderedDict[bytes, torch.Tensor] = OrderedDict()  # the last that was used at the end
        self._lock = threading.Lock()

    def of(self, size: torch.Size) -> torch.Tensor:
        """The weights for an input of this size, (N, C, H, W)."""
        with self._lock:
            layout = self._sizes.get(size)
            if layout is None:
                meanwhile = None if size in self._sizes else self._meanwhile(size)
                layout = self._packed(size) if meanwhile is None else meanwhile
                self._sizes[size] = layout if meanwhile is None else None
                if len(self._sizes) > _SIZES:
                    del self._sizes[next(iter(self._sizes))]
            if self._plain is not None and layout == _PLAIN:
                return self._plain
            self._layouts.move_to_end(layout)
            return self._layouts[layout]

    def _packed(self, size: torch.Size) -> bytes:
        weight = self._pack(size)
        layout = layout_of(weight)
        if layout not in self._layouts and len(self._layouts) >= self._most:
            if self._plain is not None:
                return _PLAIN
            gone, _ = self._layouts.popitem(last=False)
            self._sizes = {other: its for other, its in self._sizes.items() if its != gone}
        self._layouts.setdefault(layout, weight)
        return layout

    def _meanwhile(self, size: torch.Size) -> bytes | None:
        """What will do for a size that never came before."""
        if self._plain is not None:
            return _PLAIN
        pixels = _pixels(size)
        ratios = {other: max(_pixels(other) / pixels, pixels / _pixels(other))
                  for other, layout in self._sizes.items() if layout is not None}  # fmt: skip
        nearest = min(ratios, key=lambda other: ratios[other], default=None)
        return None if nearest is None or ratios[nearest] > _NEAR else self._sizes[nearest]


def layout_of(weight: torch.Tensor) -> bytes:
    """What tells the layout of a packed weight from others."""
    described = bytearray(torch.ops.mkldnn._get_mkldnn_serialized_md(weight).numpy().tobytes())
    described[_UNSET] = bytes(_UNSET.stop - _UNSET.start)
    return bytes(described)


def _pixels(size: torch.Size) -> int:
    return size[0] * size[2] * size[3]
