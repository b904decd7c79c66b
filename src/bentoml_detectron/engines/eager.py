"""Runs a part with PyTorch's own kernels, in fp32, bf16 or int8, in the layouts that are fastest for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import detectron2.layers
import torch
from torch import nn

from bentoml_detectron.engines import fusion, int8, winograd
from bentoml_detectron.engines.graph import Graph
from bentoml_detectron.engines.quantized import Quantized

Run = Callable[[Sequence[Any]], list[Any]]
"""Computes a part: what it takes, tensors of any float dtype and layout or `Quantized`, to what it gives."""
_LAYERS = (detectron2.layers.Conv2d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
"""Those whose weights autocast makes 16 bits of at each call, as it keeps none beyond a call."""


def compiled(
    graph: Graph, dtype: torch.dtype, calibration: int8.Calibration | None = None, chained: bool = True, keeps: bool = False
) -> Run:
    """Runs a graph channels-last.

    Args:
        graph: Of tensors, in float32; it is changed.
        dtype: float32 or bfloat16, of weights and features.
        calibration: Of the model; convolutions that are in it compute in 8-bit integers.
        chained: Whether these may hand on integers to each other.
        keeps: Whether a backbone's feature maps may be given as `Quantized`.
    """
    graph = graph.eval()
    if fusion.is_there():
        fusion.fuse(graph)
        if dtype == torch.float32 and calibration is None:
            winograd.speed_up(graph)
        if dtype == torch.bfloat16 and fusion.adds_float_biases():
            fusion.keep_float_biases(graph)
    if calibration is not None:
        int8.quantize_convolutions(graph.module, graph.place, calibration, dtype, chained, keeps)
    graph = graph.to(dtype).to(memory_format=torch.channels_last)

    def run(inputs: Sequence[Any]) -> list[Any]:
        return list(graph(*[each if isinstance(each, Quantized) else channels_last(each.to(dtype)) for each in inputs]))

    return run


def autocast(graph: Graph, device_type: str, dtype: torch.dtype) -> Run:
    """Runs a graph channels-last under PyTorch's autocast: in 16 bits what gains by it, in float32 what that would harm.

    Args:
        graph: Of tensors, in float32; it is changed, and the weights of what computes in 16 bits become so.
        device_type: Of the device that it is on, such as "cuda".
        dtype: bfloat16 or float16.
    """
    graph = graph.eval().to(memory_format=torch.channels_last)
    for layer in graph.modules():
        if type(layer) in _LAYERS:
            for parameter in layer.parameters(recurse=False):  # not its norm's
                parameter.data = parameter.data.to(dtype)

    def run(inputs: Sequence[Any]) -> list[Any]:
        with torch.autocast(device_type, dtype):
            return list(graph(*[channels_last(each) for each in inputs]))

    return run


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor laid out channels-last, where it is four-dimensional."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
