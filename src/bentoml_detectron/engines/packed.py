"""Weights of convolutions in the layouts of oneDNN's kernels, which would put plain ones in order at each call."""

from __future__ import annotations

import threading
from typing import Any

import torch

_SIZES = 64
"""Sizes of inputs that are kept in mind, the last ones that were new."""
_LAYOUTS = 2
"""Copies of the weights; the sizes that an image has in a network want one or two, those of many images together dozens."""


class Packed:
    """The weights of a convolution that does not change any more; threads may share them.

    Which layout a kernel takes depends on the size of its input, and to give it another's is many times slower than to give it
    plain weights. So these stay, for sizes that never came before and for those that want one layout too many.
    """

    def __init__(self, conv: Any) -> None:
        self._conv = conv
        self._how = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self._sizes: dict[torch.Size, torch.Tensor | None] = {}  # None: it came once
        self._layouts: dict[bytes, torch.Tensor] = {}
        self._lock = threading.Lock()

    def of(self, size: torch.Size) -> torch.Tensor:
        """The weights for an input of this size."""
        with self._lock:
            weight: torch.Tensor | None = self._sizes.get(size)
            if weight is None and size in self._sizes:
                weight = self._sizes[size] = self._packed(size)
            elif weight is None:
                weight = self._conv.weight
                self._sizes[size] = None
                if len(self._sizes) > _SIZES:
                    del self._sizes[next(iter(self._sizes))]
            return weight

    def _packed(self, size: torch.Size) -> torch.Tensor:
        weight = torch.ops.mkldnn._reorder_convolution_weight(self._conv.weight, *self._how, list(size))
        layout = torch.ops.mkldnn._get_mkldnn_serialized_md(weight).numpy().tobytes()
        if layout not in self._layouts and len(self._layouts) < _LAYOUTS:
            self._layouts[layout] = weight
        plain: torch.Tensor = self._conv.weight
        return self._layouts.get(layout, plain)
