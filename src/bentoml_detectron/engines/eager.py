"""PyTorch's own kernels, with weights and features laid out as these like it best, in fp32 or bf16."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from bentoml_detectron.engines import fusion

Run = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
"""Computes a part: its input tensors, of any float dtype and layout, to its output tensors."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compiled(graph: nn.Module, precision: str) -> Run:
    """Runs a graph channels-last, its weights and features in a precision.

    Args:
        graph: Of tensors; it is changed.
        precision: One of `DTYPES`.
    """
    dtype = DTYPES[precision]
    graph = graph.to(dtype).to(memory_format=torch.channels_last).eval()
    if fusion.is_there():
        fusion.fuse(graph)

    def run(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(graph(*[channels_last(each.to(dtype)) for each in inputs]))

    return run


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor laid out channels-last, where it is four-dimensional."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
