"""Convolutions in 8-bit integers, by the operators that PyTorch's compiler uses for x86 processors (oneDNN's).

The method is that of Jacob et al. 2018 and Krishnamoorthi 2018. Activations have one range per tensor, measured on a user's
own images. Weights have one scale per output channel, computed from the weights. Products are summed in 32 bits. Features stay
integers from one convolution to the next.

Processors with VNNI or AMX sum in 32 bits at once. Others, with AVX2 or AVX512, first add two products in 16 bits, which
overflows if both weights are large (oneDNN's documentation, "Nuances of int8 computations"). There, weights have 7 bits, and
two products fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import nn

from bentoml_detectron.engines import fusion, processor
from bentoml_detectron.engines.packed import Packed
from bentoml_detectron.engines.quantized import Features, Quantized, Range, quantize

_LEAST_CHANNELS = 8
"""Convolutions of fewer take the image itself; they cost little, and their input has the most to lose."""

_LAYOUTS = 3
"""Of a convolution's weights that are kept; each is a fourth of the weights in float32."""


class Ranges(NamedTuple):
    """What one convolution took and gave on the calibration's images."""

    taken: Range
    given: Range

    def joined(self, other: Ranges) -> Ranges:
        """The least ranges that hold both."""
        return Ranges(self.taken.joined(other.taken), self.given.joined(other.given))


Calibration: TypeAlias = Mapping[str, Ranges]
"""By the convolution's dotted name in the model."""


def to_plain(calibration: Calibration) -> dict[str, tuple[float, float, float, float]]:
    """A calibration as a saved model's manifest holds it."""
    return {name: (*each.taken, *each.given) for name, each in calibration.items()}


def from_plain(plain: Mapping[str, tuple[float, float, float, float]]) -> dict[str, Ranges]:
    """And back."""
    return {name: Ranges(Range(*each[:2]), Range(*each[2:])) for name, each in plain.items()}


def is_there() -> bool:
    """Whether this PyTorch has the operators, and this processor is one that they are known on."""
    return "avx2" in processor.features() and fusion.is_there() and hasattr(torch.ops.onednn, "qconv2d_pointwise")


def largest_weight() -> int:
    """The integer that a channel's largest weight becomes: two products with 255 must fit where this processor adds them."""
    return 127 if not {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(processor.features()) else 63


def observe(graph: nn.Module, prefix: str, found: dict[str, Ranges]) -> nn.Module:
    """Lets the fused convolutions of a part note the ranges of what they take and give.

    Args:
        graph: The part's module, fused, in float32; it is changed.
        prefix: Its dotted name in the model.
        found: Where to note them, joined with what is there.
    """

    def observing(name: str, conv: nn.Module) -> fusion.Computes:
        def computed(x: Any, relu: bool, add: Any) -> torch.Tensor:
            y = fusion.in_floats(conv, x, relu, add)
            if x.numel():
                ranges = Ranges(_range(x), _range(y))
                found[name] = found[name].joined(ranges) if name in found else ranges
            return y

        return computed

    for name, conv in _convolutions(graph):
        fusion.compute_by(conv, observing(f"{prefix}.{name}", conv))
    return graph


def _range(x: torch.Tensor) -> Range:
    low, high = torch.aminmax(x)
    return Range(min(float(low), 0.0), max(float(high), 0.0))


def quantize_convolutions(
    graph: nn.Module, prefix: str, calibration: Calibration, dtype: torch.dtype, chained: bool, keeps: bool
) -> None:
    """Lets the calibrated convolutions of a part compute in integers.

    Args:
        graph: The part's module, fused, in float32; it is changed, and the weights of these convolutions go.
        prefix: Its dotted name in the model.
        calibration: Of the model.
        dtype: What the rest of the part computes in.
        chained: Whether convolutions that follow each other hand on integers, which nothing else in the part may take then.
        keeps: Whether a backbone's feature maps may be `Quantized`.
    """
    going_on, largest = set(_going_on(graph, keeps)) if chained else set(), largest_weight()
    chosen = [
        (conv, calibration[f"{prefix}.{name}"]) for name, conv in _convolutions(graph) if f"{prefix}.{name}" in calibration
    ]
    for conv, ranges in chosen:
        given = ranges.given if conv in going_on else None
        fusion.compute_by(conv, Convolution(conv, ranges.taken, given, dtype, largest))
        conv.weight = nn.Parameter(torch.empty(0), requires_grad=False)


class Convolution:
    """Computes a convolution in integers.

    Args:
        conv: Over zeros, with float32 weights; these are copied.
        taken: The range of its input, for inputs of floats.
        given: The range of its output, if that shall be integers.
        dtype: Of its output otherwise.
        largest: The integer that a channel's largest weight becomes, as `largest_weight` says for this processor.
    """

    def __init__(self, conv: Any, taken: Range, given: Range | None, dtype: torch.dtype, largest: int) -> None:
        weight = conv.weight.detach().float()
        self._scales = weight.abs().amax(dim=(1, 2, 3)).clamp(min=1e-12) / largest
        self._zeros = torch.zeros(len(weight), dtype=torch.int32)
        self._bias = None if conv.bias is None else conv.bias.detach().float()
        self._how = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
        values = torch.round(weight / self._scales[:, None, None, None]).clamp(-largest, largest).to(torch.int8)
        self._values = values
        self._packed = Packed(self._pack, None, _LAYOUTS)
        self._taken, self._given, self._dtype = taken, given, dtype

    def _pack(self, size: torch.Size) -> torch.Tensor:
        how = (self._scales, self._taken.scale, self._taken.zero, *self._how, list(size))
        weight: torch.Tensor = torch.ops.onednn.qconv_prepack(self._values, *how)
        return weight

    def taken(self, x: Features) -> Quantized:
        """An input in integers."""
        return quantize(x, self._taken)

    def __call__(self, x: Features, relu: bool, add: torch.Tensor | Quantized | None) -> torch.Tensor | Quantized:
        """The convolution; what is added may be overwritten."""
        x, given = self.taken(x), self._given
        scale, zero, dtype = (1.0, 0, self._dtype) if given is None else (given.scale, given.zero, None)
        # Where there is nothing to compute, as of no boxes, any layout will do.
        weight = self._packed.of(torch.Size(max(1, each) for each in x.values.shape))
        taken = (x.values, x.scale, x.zero, weight, self._scales, self._zeros)
        how = (self._bias, *self._how, scale, zero, dtype)
        result: torch.Tensor
        if add is None:
            result = torch.ops.onednn.qconv2d_pointwise(*taken, *how, "relu" if relu else "none", [], "")
        else:
            into = Quantized(add.to(self._dtype), 1.0, 0) if given is None else quantize(add, given)
            added: tuple[Any, ...] = (into.scale, into.zero, "sum", 1.0, "relu" if relu else None, [], "")
            result = torch.ops.onednn.qconv2d_pointwise(*taken, into.values, *how, *added)
        return result if given is None else Quantized(result, scale, zero)


def _convolutions(graph: nn.Module) -> Iterator[tuple[str, Any]]:
    """Convolutions that `fusion` may compute, by name, but for those of an image, and of windows with strides.

    Of the latter oneDNN's kernel for integers computes something else where a map is one or two pixels wide and many high.
    """
    for name, module in graph.named_modules():
        if not fusion.is_convolution(module) or module.in_channels < _LEAST_CHANNELS:
            continue
        if max(module.kernel_size) == 1 or max(module.stride) == 1:
            yield name, module


def _going_on(graph: nn.Module, keeps: bool) -> Iterator[nn.Module]:
    """Convolutions whose output goes to others alone, or out of the part."""
    each: Any
    for each in graph.modules():
        if fusion.is_fused(each) and isinstance(each, (BasicBlock, BottleneckBlock)):
            yield from each.children()
        elif fusion.is_fused(each) and isinstance(each, FPN):
            yield from each.lateral_convs
            yield from each.output_convs if keeps else ()
        elif isinstance(each, nn.Sequential):
            left = [child for child in each if not fusion.is_skipped(child)]
            yield from (one for one, then in pairwise(left) if fusion.is_fused(one) and fusion.is_fused(then))
