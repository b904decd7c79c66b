"""Runs a model's heavy parts faster than Detectron2 does, with the same control flow.

A part of a model (`parts`) becomes a module from tensors to tensors (`graph`), and an engine (`eager`) runs that. If an engine
cannot run a part, or does not run it correctly, the model's own part is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from detectron2.modeling import GeneralizedRCNN, PanopticFPN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances
from torch import nn

from bentoml_detectron.engines import anchors, eager, fusion, int8, normalization, processor, proposals
from bentoml_detectron.engines.graph import Graph
from bentoml_detectron.engines.parts import Example, Part, Replacement, find, record, replaced, with_module
from bentoml_detectron.engines.pooler import Pooler
from bentoml_detectron.engines.quantized import Quantized, Range, quantize
from bentoml_detectron.engines.structure import rebuild, tensors
from bentoml_detectron.errors import InvalidArgumentError
from bentoml_detectron.memory import keep_freed_memory

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16", "int8", "auto"]
HALVES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What a GPU's autocast computes in, by precision."""
TOLERANCES = {"fp32": 1e-3, "bf16": 0.25, "fp16": 0.05, "int8": 0.8}
"""How far a part's outputs may be from Detectron2's, root mean square, with respect to their own. This tells a part that
computes something else from rounding, which random weights amplify; what rounding costs a trained model, its AP tells."""
_SIZE = (160, 192)  # height and width of the image that parts are tried with
_MOST_ROWS = 8  # boxes
_MAPS_AT_ONCE = 256
"""Boxes whose maps a mask or keypoint head computes together: each takes a megabyte on its way."""
_CPU = torch.device("cpu")


def check(precision: str, device: torch.device = _CPU, *, is_calibrated: bool = True) -> None:
    """Sees to it that a model can be computed in a precision on a device of this machine.

    Args:
        precision: What a user gave.
        device: The model's.
        is_calibrated: Whether the model has what int8 needs.

    Raises:
        InvalidArgumentError: (``ValueError``) It cannot.
    """
    if precision not in get_args(Precision):
        raise InvalidArgumentError(
            f"precision={precision!r}; give one of {', '.join(map(repr, get_args(Precision)))}", value=precision
        )
    if precision == "bf16" and not has_bf16(device):
        which = "this processor" if device.type == "cpu" else f"{device}, unlike GPUs of compute capability 8.0 and above,"
        raise InvalidArgumentError(f"{which} does not support bf16; use --precision fp32 (precision='fp32')", value=precision)
    if precision == "fp16" and device.type != "cuda":
        raise InvalidArgumentError(f"fp16 needs a GPU, not {device}; use --precision fp32 (precision='fp32')", value=precision)
    if precision == "int8" and device.type != "cpu":
        raise InvalidArgumentError(
            f"int8 needs the CPU, not {device}; use --precision bf16 (precision='bf16') or fp32", value=precision
        )
    if precision == "int8" and not has_int8():
        raise InvalidArgumentError(
            "int8 needs an x86 processor with AVX2, and a PyTorch with oneDNN; use --precision fp32 (precision='fp32')",
            value=precision,
        )
    if precision == "int8" and not is_calibrated:
        raise InvalidArgumentError(
            "the model is not calibrated for int8; calibrate it first: bentoml detectron optimize TAG --calibration DIR",
            value=precision,
        )


def has_bf16(device: torch.device = _CPU) -> bool:
    """Whether a device multiplies bfloat16: AVX512-BF16 or AMX of x86, BF16 of ARM, CUDA's compute capability 8.0."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(processor.features())


def has_int8() -> bool:
    """Whether the processor multiplies 8-bit integers, AVX2 of x86 and what came after it, and PyTorch makes use of it."""
    return int8.is_there()


def accelerated(model: nn.Module, precision: Precision, calibration: int8.Calibration | None = None) -> nn.Module:
    """A view of a model that computes the same, faster.

    Args:
        model: In evaluation mode; it is left as it is.
        precision: Of the parts; what decodes and chooses boxes is float32.
        calibration: What `calibrate` found, for int8.

    Returns:
        The view. Parts that do not run right in another way stay as they are, and on a GPU in fp32 all of them.
    """
    if any(each.device.type != "cpu" for each in model.parameters()):
        return _keeping_anchors(autocast(model, precision) if precision in HALVES else model)
    keep_freed_memory()
    examples = _examples(model, find(model))
    if precision != "fp32" and _features_go_to(model, examples):
        view = _with_parts(model, examples, precision, calibration, keeps=True)
        # A subclass may do more with features than the class that is known.
        if _runs(view, f"the model does not accept features in {precision}; they are passed between its parts as float32"):
            return view
    view = _with_parts(model, examples, precision, calibration, keeps=False)
    # Features are channels-last now, and what is a user's own may look at them as a row of numbers.
    if not examples or all(map(_is_known, model.modules())):
        return view
    is_right = _runs(view, "the model does not accept the outputs of its accelerated parts; it runs unaccelerated")
    return view if is_right else _keeping_anchors(model)


def _runs(view: nn.Module, otherwise: str) -> bool:
    """Whether a view runs on an image of noise; what follows if not goes to the log."""
    try:
        with torch.inference_mode():
            view([_noise(view)])
        return True
    except Exception:
        logger.warning(otherwise, exc_info=True)
        return False


def _is_known(module: nn.Module) -> bool:
    """Whether it is Detectron2's or PyTorch's own."""
    return type(module).__module__.partition(".")[0] in ("detectron2", "torch", "torchvision")


def _with_parts(
    model: nn.Module,
    examples: Mapping[Part, Example],
    precision: Precision,
    calibration: int8.Calibration | None,
    *,
    keeps: bool,
) -> nn.Module:
    """A view with faster parts; `keeps`: whether features go from part to part in less than float32."""
    replacements = {}
    runs_backbone = False
    for part, example in examples.items():
        run = _compiled_and_tried(model, part, example, precision, calibration, keeps)
        replacements[part] = _adapted(model, part, example, run, keeps)
        runs_backbone |= part.is_backbone and run is not None
    view = _keeping_anchors(replaced(model, replacements))
    for name, module in model.named_modules():
        if Pooler.takes(module):
            is_known = _is_known(model.get_submodule(name.rpartition(".")[0]))
            view = with_module(view, name, partial(Pooler, is_channels_last=is_known))
    if proposals.takes(getattr(model, "proposal_generator", None)):
        view = with_module(view, "proposal_generator", proposals.choosing_first)
    if runs_backbone and normalization.takes(model):
        view = replaced(view, {Part("", "preprocess_image"): normalization.Preprocess(model)})
    return view


def _keeping_anchors(model: nn.Module) -> nn.Module:
    makers = {Part(name, "_grid_anchors"): anchors.Kept(each) for name, each in model.named_modules() if anchors.takes(each)}
    return replaced(model, makers)


def autocast(model: nn.Module, precision: Precision) -> nn.Module:
    """A view of a model whose parts compute in bf16 or fp16 as PyTorch's autocast has it; for GPUs, though any device will do.

    All else is the model's own, in float32: RoIAlign's kernel, and what decodes and chooses boxes. `accelerated` says the rest.
    """
    replacements = {}
    for part, example in _examples(model, find(model)).items():
        run = _tried(part, example, precision, partial(_autocast, model, part, example, HALVES[precision]))
        replacements[part] = _adapted(model, part, example, run, False)
    return replaced(model, replacements)


def calibrate(model: nn.Module, run: Callable[[nn.Module], object]) -> dict[str, int8.Ranges]:
    """Measures the ranges that convolutions in int8 need.

    Args:
        model: In evaluation mode, on the CPU; it is left as it is.
        run: Runs a model on the images of the calibration.

    Returns:
        The ranges that each convolution's input and output had, by its dotted name.
    """
    found: dict[str, int8.Ranges] = {}
    replacements = {}
    for part, example in _examples(model, find(model)).items():
        try:
            graph = Graph(model, part, example)
        except Exception:  # it cannot be copied
            logger.warning("%s cannot be calibrated; it stays in fp32", part.place, exc_info=True)
            replacements[part] = _adapted(model, part, example, None, False)
            continue
        fusion.fuse(graph)
        int8.observe(graph.module, part.place, found)
        replacements[part] = _adapted(model, part, example, partial(_called, graph), False)
    run(replaced(model, replacements))
    return found


def _autocast(model: nn.Module, part: Part, example: Example, dtype: torch.dtype) -> eager.Run:
    return eager.autocast(Graph(model, part, example), tensors(example.output)[0].device.type, dtype)


def _called(graph: Graph, inputs: Sequence[Any]) -> list[Any]:
    return [each.contiguous() for each in graph(*inputs)]  # as Detectron2's are; speed is of no matter


def _examples(model: nn.Module, parts: list[Part]) -> dict[Part, Example]:
    """What the parts take and give for an image of noise."""
    generator = torch.Generator().manual_seed(1)
    try:
        examples = record(model, parts, lambda view: view([_noise(model)]))
        return {part: each if part.sizes else _some_rows(model, part, each, generator) for part, each in examples.items()}
    except Exception:
        logger.warning("the model does not run on a noise image; it runs unaccelerated", exc_info=True)
        return {}


def _noise(model: nn.Module) -> dict[str, Any]:
    """What a model takes as an image; of noise, and always the same."""
    generator = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {"image": torch.randint(0, 256, (3, *_SIZE), generator=generator).float()}
    given |= {"height": _SIZE[0], "width": _SIZE[1]}
    if getattr(model, "proposal_generator", model) is None:  # Fast R-CNN takes what others have proposed
        boxes = torch.tensor([[0.0, 0.0, _SIZE[1] / 2, _SIZE[0] / 2], [0.0, 0.0, _SIZE[1], _SIZE[0]]])
        given["proposals"] = Instances(_SIZE, proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(2))
    return given


def _some_rows(model: nn.Module, part: Part, example: Example, generator: torch.Generator) -> Example:
    """A few boxes' worth of an example; of as many random features where there were no boxes."""
    inputs = [each[:_MOST_ROWS] if len(each) else torch.rand((2, *each.shape[1:]), generator=generator).to(each)
              for each in tensors(example.arguments)]  # fmt: skip
    arguments = rebuild(example.arguments)(inputs)
    with torch.inference_mode():
        return Example(arguments, part.of(model)(*arguments), example.writes)


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


def _compiled_and_tried(
    model: nn.Module, part: Part, example: Example, precision: Precision, calibration: int8.Calibration | None, keeps: bool
) -> eager.Run | None:
    """A part in a precision; None where it is not the same then, or would not be in float32, where rounding hides nothing."""
    run = _tried(part, example, "fp32", lambda: eager.compiled(Graph(model, part, example), torch.float32))
    if run is None or precision == "fp32":
        return run
    return _tried(part, example, precision, partial(_compiled, model, part, example, precision, calibration, keeps))


def _compiled(
    model: nn.Module, part: Part, example: Example, precision: Precision, calibration: int8.Calibration | None, keeps: bool
) -> eager.Run:
    """A part in a precision."""
    if precision == "int8" and calibration is not None:
        return _in_integers(model, part, example, calibration, keeps)
    return eager.compiled(Graph(model, part, example), _float(precision))


def _tried(part: Part, example: Example, precision: Precision, compiled: Callable[[], eager.Run]) -> eager.Run | None:
    """A part as it is compiled; None where it is not the same then."""
    try:
        run = compiled()
        error = _error(run, example)
    except Exception:
        logger.warning("%s does not run in %s; it runs unaccelerated", part.place, precision, exc_info=True)
        return None
    if error <= TOLERANCES[precision]:
        return run
    logger.warning("%s in %s is off by %.2g; it runs unaccelerated", part.place, precision, error)
    return None


def _float(precision: str) -> torch.dtype:
    """What a precision computes in, of what it does not compute in integers."""
    return torch.bfloat16 if precision != "fp32" and has_bf16() else torch.float32


def _in_integers(model: nn.Module, part: Part, example: Example, calibration: int8.Calibration, keeps: bool) -> eager.Run:
    """A part in int8; in it, and between parts, features stay integers where only convolutions in integers take them."""
    dtype, given = _float("int8"), tensors(example.arguments)
    keeps_own = keeps and part.is_backbone
    run = eager.compiled(Graph(model, part, example), dtype, calibration, keeps=keeps_own)
    try:
        _try(run, given)
    except (TypeError, AttributeError):  # what takes tensors alone was given integers
        run = eager.compiled(Graph(model, part, example), dtype, calibration, chained=False)
    if keeps and part.sizes and not part.is_backbone:  # a head that takes feature maps
        try:
            _try(run, [quantize(each, Range(*(float(end) for end in each.aminmax()))) for each in given])
        except (TypeError, AttributeError):
            return lambda inputs: run([each.float() for each in inputs])
    return run


def _try(run: eager.Run, inputs: Sequence[Any]) -> None:
    with torch.inference_mode():
        run(inputs)


def _error(run: eager.Run, example: Example) -> float:
    """Largest relative error of an output, root mean square."""
    with torch.inference_mode():
        pairs = zip(run(tensors(example.arguments)), tensors(example.output), strict=True)
        errors = [(mine.float() - due).square().mean().sqrt() / (due.square().mean().sqrt() + 1e-9) for mine, due in pairs]
        return float(torch.stack(errors).max())  # NaN where any is, unlike Python's max


def _adapted(model: nn.Module, part: Part, example: Example, run: eager.Run | None, keeps: bool) -> Replacement:
    """A part with the signature that Detectron2 calls; what it gives is float32 but for feature maps that may be less."""
    if run is None:
        own, into = part.alone(model) if example.writes else part.of(model), rebuild(example.arguments)
        # Contiguous, as Detectron2's are: a part of a user's own may look at what it takes as a row of numbers.
        return lambda *arguments: own(*into([each.float().contiguous() for each in tensors(arguments)]))
    # From here on nothing holds the model's own part: its weights would be in memory twice.
    computes, outof = run, rebuild(example.output)
    gives_maps = not part.sizes and all(each.ndim == 4 for each in tensors(example.output))

    def computed(*arguments: Any) -> Any:
        inputs = tensors(arguments)
        outputs = _in_pieces(computes, inputs) if gives_maps else computes(inputs)
        return outof(outputs if part.is_backbone and keeps else [each.float() for each in outputs])

    return computed


def _in_pieces(run: eager.Run, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Runs a head that gives each box a map on some boxes after the others, so that many of them do not take the memory."""
    count = len(inputs[0])
    if count <= _MAPS_AT_ONCE:
        return run(inputs)
    starts = range(0, count, _MAPS_AT_ONCE)
    pieces = [run([each[start : start + _MAPS_AT_ONCE] for each in inputs]) for start in starts]
    return [torch.cat([_numbers(piece) for piece in each]) for each in zip(*pieces, strict=True)]


def _numbers(features: torch.Tensor | Quantized) -> torch.Tensor:
    return features.float() if isinstance(features, Quantized) else features
