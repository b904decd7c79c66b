"""A part of a model as a module from tensors to tensors, which engines can compute in other ways than it was written for."""

from __future__ import annotations

import copy
import weakref
from functools import partial
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

    Raises:
        TypeError: The part holds a ``forward`` that is bound to its own modules, so a copy would compute with these.
    """

    def __init__(self, model: nn.Module, part: Part, example: Example) -> None:
        super().__init__()
        self.module = fold(_copied(model.get_submodule(part.place)))
        self.place = part.place
        self._part = Part("module", part.method)
        self._arguments = rebuild(example.arguments)
        self._writes = example.writes

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """The part's output tensors."""
        call = self._part.alone(self) if self._writes else self._part.of(self)
        return tuple(tensors(call(*self._arguments(list(inputs)))))


def _copied(module: nn.Module) -> nn.Module:
    """A copy of a module, with what wraps the ``forward`` of one of its modules alone.

    FairScale's ``checkpoint_wrapper``, of Detectron2's ViT, puts ``partial(function, ..., weakref.ref(module), ...)`` there.
    """
    copied = copy.deepcopy(module)
    for own, other in zip(module.modules(), copied.modules(), strict=True):
        wrapped = vars(own).get("forward")
        if wrapped is None:
            continue
        bound = [isinstance(each, weakref.ref) and each() is own for each in getattr(wrapped, "args", ())]
        if type(wrapped) is not partial or not any(bound):
            raise TypeError(f"the forward of a {type(own).__name__} is an attribute, which may be bound to what was copied")
        mine = [weakref.ref(other) if is_own else each for is_own, each in zip(bound, wrapped.args, strict=True)]
        other.forward = partial(wrapped.func, *mine, **wrapped.keywords)
    return copied


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
