"""Ways to run a model's heavy parts faster than Detectron2 does, on the same control flow.

There is one seam: a part of a model (`parts`) becomes a graph of tensors (`graph`), and an engine (`eager`) runs that. What an
engine cannot run, or does not run right, stays as it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from detectron2.modeling import GeneralizedRCNN, PanopticFPN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances
from torch import nn

from bentoml_detectron.engines import eager, proposals
from bentoml_detectron.engines.graph import Graph
from bentoml_detectron.engines.memory import keep_freed_memory
from bentoml_detectron.engines.parts import Example, Part, Replacement, find, record, replaced, with_module
from bentoml_detectron.engines.pooler import Pooler
from bentoml_detectron.engines.structure import rebuild, tensors
from bentoml_detectron.errors import InvalidArgumentError

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
TOLERANCES = {"fp32": 1e-3, "bf16": 0.25}
"""How far a part's outputs may be from Detectron2's, root mean square, with respect to their own. This tells a part that
computes something else from rounding, which random weights amplify; what rounding costs a trained model, its AP tells."""
_SIZE = (160, 192)  # height and width of the image that parts are tried with
_MOST_ROWS = 8  # boxes


def check(precision: str) -> None:
    """Sees to it that this machine computes in a precision.

    Raises:
        InvalidArgumentError: (``ValueError``) It does not.
    """
    if precision not in get_args(Precision):
        raise InvalidArgumentError(
            f"precision={precision!r}; give one of {', '.join(map(repr, get_args(Precision)))}", value=precision
        )
    if precision == "bf16" and not has_bf16():
        raise InvalidArgumentError("this processor does not compute in bf16; give precision='fp32'", value=precision)


def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16: AVX512-BF16 or AMX of x86, BF16 of ARM."""
    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return False
    return flags is not None and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags[1].split())


def accelerated(model: nn.Module, precision: Precision) -> nn.Module:
    """A view of a model that computes the same, faster.

    Args:
        model: In evaluation mode; it is left as it is.
        precision: Of the parts; what decodes and chooses boxes is float32.

    Returns:
        The view. Parts that do not run right in another way stay as they are; a model on a GPU stays so as a whole.
    """
    if any(each.device.type != "cpu" for each in model.parameters()):
        return model
    keep_freed_memory()
    examples = _examples(model, find(model))
    keeps_low = precision != "fp32" and _features_go_to(model, examples)
    view = replaced(
        model,
        {
            part: _adapted(model, part, example, _compiled(model, part, example, precision), keeps_low)
            for part, example in examples.items()
        },
    )
    for name, module in model.named_modules():
        if Pooler.takes(module):
            view = with_module(view, name, Pooler)
    if proposals.takes(getattr(model, "proposal_generator", None)):
        view = with_module(view, "proposal_generator", proposals.choosing_first)
    return view


def _examples(model: nn.Module, parts: list[Part]) -> dict[Part, Example]:
    """What the parts take and give for an image of noise."""
    generator = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {"image": torch.randint(0, 256, (3, *_SIZE), generator=generator).float()}
    given |= {"height": _SIZE[0], "width": _SIZE[1]}
    if getattr(model, "proposal_generator", model) is None:  # Fast R-CNN takes what others have proposed
        boxes = torch.tensor([[0.0, 0.0, _SIZE[1] / 2, _SIZE[0] / 2], [0.0, 0.0, _SIZE[1], _SIZE[0]]])
        given["proposals"] = Instances(_SIZE, proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(2))
    try:
        examples = record(model, parts, lambda view: view([given]))
        return {part: each if part.sizes else _some_rows(model, part, each, generator) for part, each in examples.items()}
    except Exception:
        logger.warning("the model does not run on an image of noise; it stays as it is", exc_info=True)
        return {}


def _some_rows(model: nn.Module, part: Part, example: Example, generator: torch.Generator) -> Example:
    """A few boxes' worth of an example; of as many random features where there were no boxes."""
    inputs = [each[:_MOST_ROWS] if len(each) else torch.rand((2, *each.shape[1:]), generator=generator)
              for each in tensors(example.arguments)]  # fmt: skip
    arguments = rebuild(example.arguments)(inputs)
    with torch.inference_mode():
        return Example(arguments, part.of(model)(*arguments))


def _features_go_to(model: nn.Module, examples: Mapping[Part, Example]) -> bool:
    """Whether all that takes the backbone's feature maps is known, and was replaced."""
    known = (StandardROIHeads, CascadeROIHeads, Res5ROIHeads)
    if type(model) in (GeneralizedRCNN, PanopticFPN):
        heads: Any = model.roi_heads
        poolers = [module for name, module in heads.named_children() if name.endswith("pooler")]
        others = [name for name in ("mask_head", "keypoint_head") if getattr(heads, name, None) is not None]
        return (
            type(heads) in known
            and all(Pooler.takes(each) for each in poolers)
            and all(Part(f"roi_heads.{name}", "layers") in examples for name in others)
            and Part("proposal_generator.rpn_head", sizes=True) in examples
            and (not isinstance(model, PanopticFPN) or Part("sem_seg_head", "layers", sizes=True) in examples)
        )
    return isinstance(model, DenseDetector) and Part("head", sizes=True) in examples


def _compiled(model: nn.Module, part: Part, example: Example, precision: Precision) -> eager.Run | None:
    """A part in a precision; None where it is not the same then."""
    try:
        run = eager.compiled(Graph(model, part, example), precision)
        error = _error(run, example)
    except Exception:
        logger.warning("%s does not run in %s; it stays as it is", part.place, precision, exc_info=True)
        return None
    if error <= TOLERANCES[precision]:
        return run
    logger.warning("%s in %s is off by %.2g; it stays as it is", part.place, precision, error)
    return None


def _error(run: eager.Run, example: Example) -> float:
    """Largest relative error of an output, root mean square."""
    with torch.inference_mode():
        pairs = zip(run(tensors(example.arguments)), tensors(example.output), strict=True)
        return max(
            float((mine.float() - due).square().mean().sqrt() / (due.square().mean().sqrt() + 1e-9)) for mine, due in pairs
        )


def _adapted(model: nn.Module, part: Part, example: Example, run: eager.Run | None, keeps_low: bool) -> Replacement:
    """A part with the signature that Detectron2 calls; what it gives is float32 but for feature maps that may be less."""
    if run is None:
        own, into = part.of(model), rebuild(example.arguments)
        return lambda *arguments: own(*into([each.float() for each in tensors(arguments)]))
    # From here on nothing holds the model's own part: its weights would be in memory twice.
    computes, outof = run, rebuild(example.output)

    def computed(*arguments: Any) -> Any:
        outputs = computes(tensors(arguments))
        return outof(outputs if part.is_backbone and keeps_low else [each.float() for each in outputs])

    return computed
