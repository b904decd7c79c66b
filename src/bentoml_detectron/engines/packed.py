"""Weights of convolutions in the layouts of oneDNN's kernels, which would put plain ones in order at each call.

Which layout a kernel takes depends on the size of its input, and to give it another's is many times slower than plain weights.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import torch
from torch import nn

_SIZES = 64
"""Sizes of inputs whose layout is kept in mind, the last ones."""


class Packed:
    """The weights of a convolution; once they are asked for, it has none itself.

    There is one copy a layout, and convolutions have one or few, whatever sizes their inputs have. Threads may share it.
    """

    def __init__(self, conv: Any) -> None:
        self._conv = conv
        self._how = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self._layouts: dict[bytes, torch.Tensor] = {}
        self._lock = threading.Lock()
        self.of = lru_cache(_SIZES)(self._of)

    def plain(self) -> torch.Tensor:
        """The weights as PyTorch has them."""
        with self._lock:
            return self._plain()

    def _plain(self) -> torch.Tensor:
        if not self._layouts:
            weight: torch.Tensor = self._conv.weight.detach()
            return weight
        return next(iter(self._layouts.values())).to_dense()

    def _of(self, size: torch.Size) -> torch.Tensor:
        """The weights for an input of this size."""
        with self._lock:
            weight: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(self._plain(), *self._how, list(size))
            layout = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(weight).tolist())
            if not self._layouts:
                self._conv.weight = nn.Parameter(weight.new_empty(0, layout=torch.strided), requires_grad=False)
            return self._layouts.setdefault(layout, weight)
