"""Ways to run a model's heavy parts faster than Detectron2 does, on the same control flow.

There is one seam: a part of a model (`parts`) becomes a graph of tensors (`graph`), and an engine (`eager`, `openvino`) runs
that. What an engine cannot run, or does not run right, stays with PyTorch.
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
from torch import nn

from bentoml_detectron.engines import eager, openvino, proposals
from bentoml_detectron.engines.graph import Graph
from bentoml_detectron.engines.memory import keep_freed_memory
from bentoml_detectron.engines.parts import Example, Part, Replacement, find, record, replaced, with_module
from bentoml_detectron.engines.pooler import Pooler
from bentoml_detectron.engines.structure import rebuild, tensors
from bentoml_detectron.errors import InvalidArgumentError

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2}
"""How far a part's outputs may be from Detectron2's, root mean square, with respect to their own."""
_SIZES = ((160, 192), (128, 224))  # heights and widths of the images that parts are tried with
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


def accelerated(model: nn.Module, precision: str, *, engine: str | None = None) -> nn.Module:
    """A view of a model that computes the same, faster.

    Args:
        model: In evaluation mode on the CPU; it is left as it is.
        precision: "fp32" or "bf16".
        engine: "eager" or "openvino"; None: the faster of those that are there.

    Returns:
        The view. Parts that no engine runs right are the model's own.
    """
    if next(model.parameters()).device.type != "cpu":
        return model
    keep_freed_memory()
    if engine is None:
        engine = "openvino" if precision == "bf16" and openvino.is_installed() else "eager"
    parts = find(model)
    first, second = (_examples(model, parts, size) for size in _SIZES)
    keeps_low = precision != "fp32" and _features_go_to(model, first)
    replacements: dict[Part, Replacement] = {}
    for part, example in first.items():
        run = _compiled(model, part, example, second.get(part), precision, engine, low=part.is_backbone and keeps_low)
        replacements[part] = _adapted(model, part, example, run, keeps_low)
    view = replaced(model, replacements)
    for name, module in model.named_modules():
        if Pooler.takes(module):
            view = with_module(view, name, Pooler)
    generator = getattr(model, "proposal_generator", None)
    if proposals.takes(generator):
        view = replaced(view, {Part("proposal_generator", "predict_proposals"): proposals.PredictProposals(generator)})
    return view


def _examples(model: nn.Module, parts: list[Part], size: tuple[int, int]) -> dict[Part, Example]:
    """What the parts take and give for an image of noise."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), generator=generator).float()
    try:
        examples = record(model, parts, lambda view: view([{"image": image, "height": size[0], "width": size[1]}]))
    except Exception:
        logger.info("the model does not run on an image of noise; it stays as it is", exc_info=True)
        return {}
    return {part: example if part.sizes else _some_rows(model, part, example, generator) for part, example in examples.items()}


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
        poolers = [module for name, module in heads.named_children() if name.endswith("pooler") and module is not None]
        return (
            type(heads) in known
            and all(Pooler.takes(each) for each in poolers)
            and Part("proposal_generator.rpn_head", sizes=True) in examples
            and (not isinstance(model, PanopticFPN) or Part("sem_seg_head", "layers", sizes=True) in examples)
        )
    return isinstance(model, DenseDetector) and Part("head", sizes=True) in examples


def _compiled(
    model: nn.Module, part: Part, first: Example, second: Example | None, precision: str, engine: str, *, low: bool
) -> eager.Run | None:
    """A part on the engine, or on PyTorch's kernels; None where it is not the same on either."""
    for each in dict.fromkeys((engine, "eager")):
        try:
            graph = Graph(model, part, first)
            if each == "openvino":
                run = openvino.compiled(
                    openvino.converted(graph, tensors(first.arguments), part.sizes), precision, low_outputs=low
                )
            else:
                run = eager.compiled(graph, precision)
            errors = [_error(run, example) for example in (first, second) if example is not None]
        except Exception:
            logger.info("%s does not run on %s", part.place, each, exc_info=True)
            continue
        if max(errors) <= TOLERANCES[precision]:
            return run
        logger.info("%s on %s is off by %.2g", part.place, each, max(errors))
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
    into, outof = rebuild(example.arguments), rebuild(example.output)
    call = part.of(model)

    def computed(*arguments: Any) -> Any:
        inputs = tensors(arguments)
        if run is None:
            return call(*into([each.float() for each in inputs]))
        outputs = run(inputs)
        return outof(outputs if part.is_backbone and keeps_low else [each.float() for each in outputs])

    return computed
