"""Tensors of 8-bit integers, and the ranges of values that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

import torch


class Range(NamedTuple):
    """The values that a tensor had on the calibration's images; zero, which pads images, is always in it."""

    low: float
    high: float

    @property
    def scale(self) -> float:
        """What one step of an integer stands for."""
        return max(self.high - self.low, 1e-6) / 255

    @property
    def zero(self) -> int:
        """The integer that stands for zero, 0 to 255."""
        return round(-self.low / self.scale)

    def joined(self, other: Range) -> Range:
        """The least range that holds both."""
        return Range(min(self.low, other.low), max(self.high, other.high))


@dataclass(frozen=True, slots=True)
class Quantized:
    """A tensor ``(values - zero) * scale``, as in Jacob et al. 2018, section 2.1.

    Attributes:
        values: uint8, of any shape.
        scale: What one step stands for.
        zero: The integer that stands for zero.
    """

    values: torch.Tensor
    scale: float
    zero: int
    _steps: list[torch.Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    def steps(self) -> torch.Tensor:
        """How many steps from zero each value is: bfloat16, which holds these whole numbers exactly. Made once."""
        if not self._steps:
            self._steps.append(self.values.to(torch.bfloat16).sub_(self.zero))
        return self._steps[0]

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        return self.values.shape

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        """As numbers."""
        return self.values.to(dtype).sub_(self.zero).mul_(self.scale)

    def halved(self) -> Quantized:
        """Half of it."""
        return replace(self, scale=self.scale / 2)

    def float(self) -> torch.Tensor:
        """As float32."""
        return self.to(torch.float32)


Features: TypeAlias = torch.Tensor | Quantized


def mapped(change: Callable[[torch.Tensor], torch.Tensor], x: Features) -> Features:
    """What moves numbers without computing with them, of floats and of integers alike."""
    return replace(x, values=change(x.values)) if isinstance(x, Quantized) else change(x)


def quantize(x: Features, range_: Range) -> Quantized:
    """A tensor of floats in 8 bits; what is outside of the range gets its end."""
    if isinstance(x, Quantized):
        return x
    steps = x.to(torch.float32, copy=True).mul_(1 / range_.scale).add_(range_.zero + 0.5).clamp_(0, 255)
    return Quantized(steps.to(torch.uint8), range_.scale, range_.zero)
