"""A part of a model as a module from tensors to tensors, ready to be computed in other ways than it was written for."""

from __future__ import annotations

import copy
from typing import Any

from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from bentoml_detectron.engines.parts import Example, Part
from bentoml_detectron.engines.structure import rebuild, tensors


class Graph(nn.Module):
    """One part, its tensors in a row; the part's own module is copied, and its normalisations go into its convolutions.

    Args:
        model: Left as it is.
        part: Of the model.
        example: What it takes and gives.
    """

    def __init__(self, model: nn.Module, part: Part, example: Example) -> None:
        super().__init__()
        self.module = fold(copy.deepcopy(model.get_submodule(part.place)))
        self.place = part.place
        self._part = Part("module", part.method)
        self._arguments = rebuild(example.arguments)

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """The part's output tensors."""
        return tuple(tensors(self._part.of(self)(*self._arguments(list(inputs)))))


def fold(module: nn.Module) -> nn.Module:
    """Puts the frozen normalisations of a module into the convolutions before them; changes it and gives it back."""
    for each in module.modules():
        norm = getattr(each, "norm", None)
        if not isinstance(each, Conv2d) or not isinstance(norm, (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)):
            continue
        if norm.running_mean is None or norm.running_var is None:  # it would take the batch's
            continue
        weight, bias = fuse_conv_bn_weights(
            each.weight, each.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        each.weight = nn.Parameter(weight.detach(), requires_grad=False)
        each.bias = nn.Parameter(bias.detach(), requires_grad=False) if bias is not None else None
        each.norm = None
    return module
