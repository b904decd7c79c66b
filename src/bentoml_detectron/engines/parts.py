"""The parts of a Detectron2 model that take nearly all of its time, and how they are replaced.

Detectron2's own control flow stays. Parts are replaced in a view of the model: heavy modules, or the one method of theirs that
computes, are others there. So every architecture is faster as far as it has such parts, and the given model is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from detectron2.layers import CycleBatchNormList
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.roi_heads import BaseKeypointRCNNHead, BaseMaskRCNNHead, ROIHeads
from torch import nn

from bentoml_detectron.engines.structure import rebuild, tensors
from bentoml_detectron.views import own_modules

Replacement = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a model.

    Attributes:
        place: Its module's dotted name in the model; "" is the model itself.
        method: What of it computes; Detectron2's mask heads, for one, do more in ``forward``, which stays.
        sizes: Whether heights and widths of what it takes depend on the image's; otherwise only the first dimension varies.
        is_backbone: Whether it makes the feature maps for other parts.
    """

    place: str
    method: str = "forward"
    sizes: bool = False
    is_backbone: bool = False

    def of(self, model: nn.Module) -> Callable[..., Any]:
        """The part of a model, to be called."""
        return self.call_of(model.get_submodule(self.place))

    def alone(self, model: nn.Module) -> Callable[..., Any]:
        """The same where it writes attributes of its modules: each call has its own modules, as threads share a model."""
        return lambda *arguments: self.call_of(own_modules(model.get_submodule(self.place)))(*arguments)

    def call_of(self, module: nn.Module) -> Callable[..., Any]:
        """What computes, of the part's own module."""
        call: Callable[..., Any] = module if self.method == "forward" else getattr(module, self.method)
        return call


def find(model: nn.Module) -> list[Part]:
    """The parts of a model that can be replaced, in the order of an image's way; none for unknown models.

    What counts its calls stays, as a replacement would be called by several threads.
    """
    return [each for each in _heavy(model) if not _counts_calls(model.get_submodule(each.place))]


def _counts_calls(module: nn.Module) -> bool:
    return any(isinstance(each, CycleBatchNormList) for each in module.modules())


def _heavy(model: nn.Module) -> list[Part]:
    parts: list[Part] = []
    if isinstance(getattr(model, "backbone", None), Backbone):
        parts.append(Part("backbone", sizes=True, is_backbone=True))
    if isinstance(getattr(getattr(model, "proposal_generator", None), "rpn_head", None), nn.Module):
        parts.append(Part("proposal_generator.rpn_head", sizes=True))
    if isinstance(model, DenseDetector) and isinstance(model.head, nn.Module):
        parts.append(Part("head", sizes=True))
    if isinstance(getattr(model, "sem_seg_head", None), SemSegFPNHead):
        parts.append(Part("sem_seg_head", "layers", sizes=True))
    heads = getattr(model, "roi_heads", None)
    if isinstance(heads, ROIHeads):
        for name in ("res5", "box_head"):
            head = getattr(heads, name, None)
            stages = [f".{stage}" for stage in range(len(head))] if isinstance(head, nn.ModuleList) else [""]
            parts += [Part(f"roi_heads.{name}{stage}") for stage in stages if isinstance(head, nn.Module)]
        for name, kind in (("mask_head", BaseMaskRCNNHead), ("keypoint_head", BaseKeypointRCNNHead)):
            if isinstance(getattr(heads, name, None), kind):
                parts.append(Part(f"roi_heads.{name}", "layers"))
    return parts


def replaced(model: nn.Module, replacements: Mapping[Part, Replacement]) -> nn.Module:
    """A view of the model with others in the places of some parts; parameters of the rest are shared with it."""
    for part, replacement in replacements.items():
        if part.method == "forward":
            model = with_module(model, part.place, partial(_Replaced, call=replacement))
        else:
            model = with_module(model, part.place, partial(_with, name=part.method, value=replacement))
    return model


def with_module(model: nn.Module, place: str, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A view of the model in which the module in a place, "" for the model itself, is what `change` makes of it."""
    if not place:
        return change(model)
    name, _, rest = place.partition(".")
    view = _with(model)
    view._modules = {**model._modules, name: with_module(model.get_submodule(name), rest, change)}
    return view


def _with(module: nn.Module, name: str = "", value: Any = None) -> nn.Module:
    """A shallow copy of a module, with one other attribute."""
    view = module.__class__.__new__(module.__class__)
    view.__dict__ = {**module.__dict__, **({name: value} if name else {})}
    return view


class _Replaced(nn.Module):
    """Stands where a module was, with the attributes that Detectron2 asks backbones and heads for."""

    def __init__(self, module: nn.Module, call: Replacement) -> None:
        super().__init__()
        self._call = call
        parameter = next(module.parameters(), None)
        if parameter is not None:  # a model of a user's own may ask its first one where it is
            self.stand_in = nn.Parameter(parameter.detach().new_empty(0), requires_grad=False)
        for name in ("size_divisibility", "padding_constraints"):
            if hasattr(module, name):
                setattr(self, name, getattr(module, name))
        if hasattr(module, "output_shape"):
            shape = module.output_shape() if callable(module.output_shape) else module.output_shape
            self.output_shape = (lambda: shape) if callable(module.output_shape) else shape
        self.eval()

    def forward(self, *arguments: Any) -> Any:
        return self._call(*arguments)


@dataclass(frozen=True, slots=True)
class Example:
    """What a part took and gave once: tensors in lists, tuples and dicts.

    Attributes:
        arguments: Which it took.
        output: What it gave.
        writes: Whether it wrote attributes of its modules meanwhile, as Swin its blocks' heights and widths.
    """

    arguments: tuple[Any, ...]
    output: Any
    writes: bool = False


def record(model: nn.Module, parts: Sequence[Part], run: Callable[[nn.Module], Any]) -> dict[Part, Example]:
    """Examples of what the parts take and give.

    Args:
        model: Left as it is.
        parts: Of the model.
        run: Runs a model on some images.

    Returns:
        One a part that ran, and gave nothing but tensors.
    """
    found: dict[Part, Example] = {}

    def recorder(part: Part) -> Replacement:
        def recording(*arguments: Any) -> Any:
            given = _copied(arguments)  # before the call: models change some tensors in place
            seen = own_modules(model.get_submodule(part.place))
            before = [dict(vars(each)) for each in seen.modules()]
            output = part.call_of(seen)(*arguments)
            given_back = _copied(output)
            if given is not None and given_back is not None:
                writes = any(not _is_same(one, vars(each)) for one, each in zip(before, seen.modules(), strict=True))
                found.setdefault(part, Example(given, given_back, writes))
            return output

        return recording

    with torch.inference_mode():
        run(replaced(model, {part: recorder(part) for part in parts}))
    return found


def _is_same(attributes: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    return attributes.keys() == others.keys() and all(others[name] is value for name, value in attributes.items())


def _copied(nested: Any) -> Any:
    """A copy of nested tensors; None where something else is in there."""
    try:
        return rebuild(nested)([each.clone() for each in tensors(nested)])
    except TypeError:
        return None
