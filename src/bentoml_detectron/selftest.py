"""The self-test: what a model finds on one fixed image, recorded when it is saved and compared when it is verified.

To cost little, the image is small and is not resized, and the model looks at few proposals. Thresholds are lifted, so that
something is found whatever the model was trained on. The record also has the model's own thresholds and all other plain
settings of its modules, and a short summary of its features: that shows a change even where a model is not trained and what it
finds depends on the last bit.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bentoml_detectron import masks as rle_masks
from bentoml_detectron.artifact.manifest import Dataset, Input, SelfTest, Tensor
from bentoml_detectron.model import device_of, own_random_numbers
from bentoml_detectron.options import Options
from bentoml_detectron.predictor import Predictor
from bentoml_detectron.results import Detections
from bentoml_detectron.views import view

# Small enough for saving to stay within 1.3 times the memory of a Mask R-CNN R50-FPN; see benchmarks/bench_save.py.
IMAGE_SIZE = (128, 160)
PROPOSALS = 16
WANTED = Options(score_threshold=0.0, top_k=8)
DISTURBANCES = 4
_FEATURES, _BUFFERS, _OUTPUT = "features", "buffers", "output"
_EXACT = 1e-6
"""Relative difference of buffers, which come from the config without much arithmetic."""
_MOST_SETTINGS, _MOST_TENSORS = 10_000, 1000  # as in the manifest
_NOT_SETTINGS = re.compile(r"training$|vis_period$|.*device")
_WRITTEN = "written by each run"
"""In the place of a setting that is none: what a module keeps of its last image, as Swin's blocks its height and width."""

Change = Callable[[str, Any], Any]
"""Is given a part's path and what it puts out; gives what goes on in its place."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far results may be from the recorded ones, for another thread count or build of PyTorch on a CPU.

    Attributes:
        box: Of a box's corner, in pixels of the 160x128 image; degrees of a rotated box's angle.
        score: Of a score.
        keypoint: Of a keypoint's place, in pixels.
        mask_iou: Least intersection over union of two masks.
        matched: Least share of the detections, either way, that have one of the same class within these.
        labels: Least share of the pixels of a semantic or panoptic map that are the same.
        relative: Of a tensor's mean, deviation and values, against its largest value.
        disturbance: Where less than these shares is the same, the model's features are disturbed by this much, relatively, and
            no more is asked than what is the same then. It is ten times and more what rounding makes of them. Of detections
            whose scores are all alike, as those of a model that was not trained, each that comes first comes there by chance.
    """

    box: float = 0.1
    score: float = 1e-3
    keypoint: float = 1.0
    mask_iou: float = 0.98
    matched: float = 1.0
    labels: float = 0.999
    relative: float = 1e-4
    disturbance: float = 1e-4


ON_GPUS = Tolerance(box=1.0, score=1e-2, mask_iou=0.9, relative=1e-2, disturbance=1e-2)
"""GPUs convolve with 10 bits of each number (TF32) where PyTorch is not told otherwise."""


def tolerance_for(due: SelfTest, got: SelfTest) -> Tolerance:
    """The tolerance for two runs on the devices that these ran on."""
    return Tolerance() if due.device == got.device == "cpu" else ON_GPUS


def image() -> NDArray[np.uint8]:
    """The image, (128, 160, 3) uint8 in BGR: slopes, stripes, discs and boxes, from whole numbers alone."""
    y, x = np.mgrid[: IMAGE_SIZE[0], : IMAGE_SIZE[1]].astype(np.int64)
    channels = [(x + y) // 2, (x * 3 // 4 + 40) % 256, 255 - y]
    pixels = np.stack(channels, axis=2) % 256
    for number, (top, left, size) in enumerate([(13, 20, 40), (60, 13, 53), (20, 100, 60), (87, 113, 33), (47, 73, 27)]):
        disc = (y - top - size // 2) ** 2 + (x - left - size // 2) ** 2 <= (size // 2) ** 2
        box = (top <= y) & (y < top + size) & (left <= x) & (x < left + size * 2 // 3)
        shape = disc if number % 2 else box
        color = [(37 * number + 200) % 256, (91 * number + 30) % 256, (150 * number + 90) % 256]
        pixels[shape] = (pixels[shape] + 3 * np.array(color)) // 4
        stripes = shape & ((x // (4 + number)) % 3 == 0)
        pixels[stripes] = 255 - pixels[stripes]
    return pixels.astype(np.uint8)


def run(model: nn.Module, image_input: Input, dataset: Dataset | None, change: Change = lambda path, output: output) -> Any:
    """What a model makes of the image: `Detections`, or whatever else it gives. The model is left as it is.

    Args:
        model: In any mode; it runs in evaluation mode.
        image_input: Its channel order.
        dataset: Its class names.
        change: Is given what its parts put out, as far as that is tensors alone: features and logits, no detections.

    Raises:
        Exception: Whatever the model raises, if an image alone is not what it takes.
    """
    return _run(model, _for_the_test(model, change), image_input, dataset)


def _for_the_test(model: nn.Module, change: Change) -> nn.Module:
    """A view of a model that `run` runs, each of its modules another: what they keep of a run is kept in the view."""
    parts = {id(part): path for path, part in model.named_modules() if path and ("." not in path or path.endswith(".rpn_head"))}

    def for_the_test(module: nn.Module) -> dict[str, Any]:
        changes: dict[str, Any] = {"training": False}
        if module._buffers:  # a model may write into its own where it counts or adapts
            changes["_buffers"] = {name: None if each is None else each.clone() for name, each in module._buffers.items()}
        most = getattr(module, "post_nms_topk", None)
        if isinstance(most, dict):
            changes["post_nms_topk"] = {key: min(value, PROPOSALS) for key, value in most.items()}
        if path := parts.get(id(module)):

            def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
                return change(path, output) if _is_raw(output) else None

            changes["_forward_hooks"] = OrderedDict([*module._forward_hooks.items(), (-1, hook)])
        return changes

    return view(model, for_the_test)


def _run(model: nn.Module, seen: nn.Module, image_input: Input, dataset: Dataset | None) -> Any:
    unresized = Input(format=image_input.format, min_size_test=0, max_size_test=0)
    predictor = Predictor(seen, unresized, dataset, batch="exact")
    device = device_of(model)
    # Whoever saves or verifies may be inside autocast, which is for what they compute.
    with _evaluating(model), own_random_numbers(device), torch.autocast(device.type, enabled=False):
        result = predictor.predict([image()], [WANTED])[0]
    if isinstance(result, Exception):
        raise result
    return result


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Sets a model's modules to evaluation: some keep others in lists too, as ResNet its stages, where no view reaches."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def record(model: nn.Module, image_input: Input, dataset: Dataset | None) -> SelfTest:
    """Runs the self-test for a model's manifest; errors as in `run`."""
    tensors: dict[str, Tensor] = {}

    def keep(path: str, output: Any) -> Any:
        for inner, tensor in _tensors(output, f"{_FEATURES}.{path}"):
            tensors.setdefault(inner, _summary(tensor, first=0))
        return output

    seen = _for_the_test(model, keep)
    before = settings(seen)
    result = _run(model, seen, image_input, dataset)
    after = settings(seen)
    written = {name: _WRITTEN for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    for path, tensor in _constants(model):
        tensors[f"{_BUFFERS}.{path}"] = _summary(tensor)
    found = isinstance(result, Detections)
    if not found:
        tensors.update({path: _summary(tensor) for path, tensor in _tensors(result, _OUTPUT)})
    plain = {f"input.{name}": repr(value) for name, value in image_input.model_dump().items()} | settings(model) | written
    return SelfTest(
        device=str(device_of(model)),
        image_sha256=hashlib.sha256(image().tobytes()).hexdigest(),
        settings=dict(islice(plain.items(), _MOST_SETTINGS)),
        detections=result.to_json() if found else None,
        tensors=dict(islice(tensors.items(), _MOST_TENSORS)),
    )


def check(
    due: SelfTest, model: nn.Module, image_input: Input, dataset: Dataset | None, *, other_versions: bool = False
) -> tuple[SelfTest, list[str]]:
    """Runs the self-test once more, and says where it differs from the recorded one; arguments as in `record`, `compare`."""
    got = record(model, image_input, dataset)
    return got, compare(due, got, again=again(model, image_input), other_versions=other_versions)


def check_rebuilt(due: SelfTest, model: nn.Module, image_input: Input, dataset: Dataset | None) -> tuple[SelfTest, list[str]]:
    """As `check`, of what another model's config builds, before that model is saved.

    Returns:
        The other's self-test, without what is no setting of its, and where this model's differs.
    """
    got = record(model, image_input, dataset)
    due = _with_settings_of(due, got)
    return due, compare(due, got, again=again(model, image_input))


def again(model: nn.Module, image_input: Input) -> Callable[[Change], Any]:
    """Runs a model once more, as `compare` asks for; arguments as in `run`."""
    return lambda change: run(model, image_input, None, change)


def compare(
    due: SelfTest,
    got: SelfTest,
    *,
    again: Callable[[Change], Any],
    other_versions: bool = False,
) -> list[str]:
    """Says where two runs of the self-test differ by more than their devices, thread counts and versions explain, a line each.

    Args:
        due: The recorded one; it may say anything.
        got: Of the model as it is now.
        again: Runs that model once more, with its features changed; see `run`.
        other_versions: Whether settings may be there on one side only, as other versions of Detectron2 have more or fewer.
    """
    tolerance = tolerance_for(due, got)
    problems = []
    if due.image_sha256 != got.image_sha256:
        problems.append("the self-test's image differs from the one that the model was saved with")
    both = due.settings.keys() & got.settings.keys()
    for name in sorted(both if other_versions else due.settings.keys() | got.settings.keys()):
        was, now = due.settings.get(name, "absent"), got.settings.get(name, "absent")
        if was != now and _WRITTEN not in (was, now):
            problems.append(f"setting {name} is {now}; it was {was}")
    if (due.detections is None) != (got.detections is None):
        return [*problems, "the model's output is of a different kind than when it was saved"]
    problems += _compare_tensors(due.tensors, got.tensors, tolerance, other_versions)
    if due.detections is not None and got.detections is not None and due.detections != got.detections:
        problems += _compare_detections(
            Detections.from_json(due.detections), Detections.from_json(got.detections), again, tolerance
        )
    return problems


def _with_settings_of(due: SelfTest, got: SelfTest) -> SelfTest:
    """A model's, without what is no setting of the other that its config builds.

    Args:
        due: Of the model, which may have been used and trained.
        got: Of the other, which has nothing of what training leaves in a module, as `RetinaNet` its loss's normalizer.
    """
    kept = {
        name: _WRITTEN if got.settings.get(name) == _WRITTEN else value
        for name, value in due.settings.items()
        if name in got.settings or name.startswith("input.")
    }
    return due.model_copy(update={"settings": kept})


def is_alike(due: Any, got: Any, tolerance: Tolerance) -> bool:
    """Whether two outputs of `run`, of `Detections`, are the same within a tolerance; what gives something else never is."""
    if not isinstance(due, Detections) or not isinstance(got, Detections) or _kinds(due) != _kinds(got):
        return False
    least = {"detections": tolerance.matched, "semantic pixels": tolerance.labels, "panoptic pixels": tolerance.labels}
    return all(share >= least[part] for part, share in _alike(due, got, tolerance).items())


def settings(model: nn.Module) -> dict[str, str]:
    """The plain values that a model's modules hold, by path; those of layers, which are many and alike, counted by class."""
    found = {}
    layers: dict[str, Counter[str]] = {}
    for path, module in model.named_modules():
        kind = type(module)
        is_layer = kind.__module__.startswith(("torch.", "detectron2.layers."))
        for name, value in _plain_attributes(module):
            if is_layer:
                layers.setdefault(f"{kind.__qualname__}.{name}", Counter())[value] += 1
            else:
                found[f"{path}.{name}" if path else name] = value
    counted = {name: ", ".join(f"{value} x {count}" for value, count in sorted(of.items())) for name, of in layers.items()}
    return {name: value[:1000] for name, value in sorted((found | counted).items())}


def _plain_attributes(holder: object) -> Iterator[tuple[str, str]]:
    """Public plain attributes, also those of small objects that Detectron2's modules hold, as ``Box2BoxTransform``."""
    for name, value in vars(holder).items():
        if name.startswith("_") or _NOT_SETTINGS.match(name):
            continue
        if (plain := _spelled(value)) is not None:
            yield name, plain
        elif type(value).__module__.startswith("detectron2.modeling.") and not isinstance(value, nn.Module):
            for inner, each in getattr(value, "__dict__", {}).items():
                if (plain := _spelled(each)) is not None:
                    yield f"{name}.{inner}", plain


def _spelled(value: Any, depth: int = 0) -> str | None:
    """A plain value as text, the same for a list, a tuple and OmegaConf's list; None where it is none."""
    if value is None or type(value) in (bool, int, float, str):
        return repr(value)
    if depth > 3 or not isinstance(value, (Mapping, Sequence)):
        return None
    keys = [_spelled(key) for key in value] if isinstance(value, Mapping) else []
    items = [_spelled(item, depth + 1) for item in (value.values() if isinstance(value, Mapping) else value)]
    known = [each for each in (*keys, *items) if each is not None]
    if len(known) < len(keys) + len(items):
        return None
    if not isinstance(value, Mapping):
        return f"[{', '.join(known)}]"
    return f"{{{', '.join(f'{key}: {item}' for key, item in zip(known, known[len(keys) :], strict=False))}}}"


def _constants(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that are not among the weights, such as pixel statistics and anchors."""
    for path, module in model.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers.get(name)
            if buffer is not None:
                yield f"{path}.{name}" if path else name, buffer


def _compare_detections(due: Detections, got: Detections, again: Callable[[Change], Any], tolerance: Tolerance) -> list[str]:
    for name in ("masks", "keypoints", "panoptic", "semantic"):
        if (getattr(due, name) is None) != (getattr(got, name) is None):
            return [f"there are {'no longer' if getattr(got, name) is None else 'now'} {name}"]
    if _kinds(due) != _kinds(got):
        return ["the image, boxes or keypoints are of a different kind than when it was saved"]
    problems = []
    names = _names(due)
    if any(names.get(key, name) != name for key, name in _names(got).items()):
        problems.append("the class names differ from those that it was saved with")
    least = {"detections": tolerance.matched, "semantic pixels": tolerance.labels, "panoptic pixels": tolerance.labels}
    shares = _alike(due, got, tolerance)
    if any(share < least[part] for part, share in shares.items()):
        for number in range(DISTURBANCES):
            disturbed = again(_disturbing(number, tolerance.disturbance))
            if isinstance(disturbed, Detections) and _kinds(disturbed) == _kinds(got):
                least |= {part: min(least[part], share) for part, share in _alike(got, disturbed, tolerance).items()}
    problems += [
        f"only {share:.1%} of the {part} are the same, but {least[part]:.1%} should be; {len(due)} detections were "
        f"recorded, {len(got)} were found"
        for part, share in shares.items()
        if share < least[part]
    ]
    return problems


def _disturbing(seed: int, amount: float) -> Change:
    """Changes every feature by a small random part of itself."""
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def disturbed(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator).to(value)
            return value * (1 + amount * noise)
        if isinstance(value, Mapping):
            return {key: disturbed(each) for key, each in value.items()}
        return type(value)(disturbed(each) for each in value) if type(value) in (list, tuple) else value

    return lambda path, output: disturbed(output)


def _kinds(found: Detections) -> tuple[Any, ...]:
    """What two results must have in common to be compared number by number."""
    keypoints = None if found.keypoints is None or not len(found) else found.keypoints.shape[1]
    return found.image_size, found.boxes.shape[1], keypoints


def _names(found: Detections) -> dict[Any, Any]:
    """Names and dataset ids by class."""
    categories = [None] * len(found) if found.category_ids is None else found.category_ids.tolist()
    things = dict(zip(found.class_ids.tolist(), zip(found.class_names, categories, strict=True), strict=True))
    segments = found.panoptic.segments if found.panoptic else ()
    return things | {(each.is_thing, each.class_id): (each.class_name, each.category_id) for each in segments}


def _alike(due: Detections, got: Detections, tolerance: Tolerance) -> dict[str, float]:
    """Which share of two results is the same, part by part."""
    close = _close(due, got, tolerance)
    if len(due) and len(got):
        shares = {"detections": float(min(close.any(axis=1).mean(), close.any(axis=0).mean()))}
    else:
        shares = {"detections": float(len(due) == len(got))}
    if due.semantic is not None and got.semantic is not None:
        shares["semantic pixels"] = float((due.semantic == got.semantic).mean())
    if due.panoptic is not None and got.panoptic is not None:
        shares["panoptic pixels"] = float((panoptic_classes(due) == panoptic_classes(got)).mean())
    return shares


def _close(due: Detections, got: Detections, tolerance: Tolerance) -> NDArray[np.bool_]:
    """Which recorded detection is which found one, (N, M)."""
    close: NDArray[np.bool_] = due.class_ids[:, None] == got.class_ids[None]
    close &= np.abs(due.scores[:, None] - got.scores[None]) <= tolerance.score
    close &= (np.abs(due.boxes[:, None] - got.boxes[None]) <= tolerance.box).all(axis=2)
    if due.keypoints is not None and got.keypoints is not None and close.size:
        apart = np.abs(due.keypoints[:, None, :, :2] - got.keypoints[None, :, :, :2])
        close &= (apart <= tolerance.keypoint).mean(axis=(2, 3)) >= tolerance.matched
    if due.masks is not None and got.masks is not None:
        for one, other in zip(*np.nonzero(close), strict=True):
            close[one, other] = _iou(due.masks[one], got.masks[other]) >= tolerance.mask_iou
    return close


def _iou(one: rle_masks.RLE, other: rle_masks.RLE) -> float:
    if one == other:
        return 1.0
    first, second = rle_masks.decode(one), rle_masks.decode(other)
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0


def panoptic_classes(found: Detections) -> NDArray[np.int64]:
    """A panoptic map's classes, (H, W): things and stuff apart, 0 where there is nothing."""
    if found.panoptic is None:
        return np.zeros(found.image_size, np.int64)
    table = np.zeros(max(found.panoptic.ids.max(), *(segment.id for segment in found.panoptic.segments), 0) + 1, np.int64)
    for segment in found.panoptic.segments:
        table[segment.id] = 1 + 2 * segment.class_id + segment.is_thing
    return table[found.panoptic.ids]


def _is_raw(value: Any) -> bool:
    """Whether an output is tensors alone, and the containers and numbers around them."""
    if isinstance(value, Mapping):
        return all(_is_raw(each) for each in value.values())
    if type(value) in (list, tuple):
        return all(_is_raw(each) for each in value)
    return value is None or isinstance(value, (torch.Tensor, int, float))


def _tensors(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of an output, by its path."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{path}.{key}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, item in enumerate(value):
            yield from _tensors(item, f"{path}[{number}]")
    elif hasattr(value, "get_fields"):  # Instances
        yield from _tensors(value.get_fields(), path)
    elif isinstance(getattr(value, "tensor", None), torch.Tensor):  # Boxes and the like
        yield path, value.tensor


def _summary(tensor: torch.Tensor, first: int = 20) -> Tensor:
    values = tensor.detach().cpu()
    values = (torch.view_as_real(values) if values.is_complex() else values).double()
    values = torch.nan_to_num(values, posinf=1e38, neginf=-1e38)  # whose mean and deviation are finite
    return Tensor(
        shape=list(tensor.shape),
        mean=float(values.mean()) if values.numel() else 0.0,
        std=float(values.std(correction=0)) if values.numel() else 0.0,
        first=values.flatten()[:first].tolist(),
    )


def _compare_tensors(
    due: Mapping[str, Tensor], got: Mapping[str, Tensor], tolerance: Tolerance, other_versions: bool
) -> list[str]:
    problems = []
    for path in sorted(due.keys() | got.keys()):
        one, other = due.get(path), got.get(path)
        if one is None or other is None:
            if path.startswith(_OUTPUT) or not other_versions:
                problems.append(f"{path} is {'no longer' if other is None else 'now'} there")
            continue
        if one.shape != other.shape or len(one.first) != len(other.first):
            problems.append(f"{path} has the shape {other.shape}; it had {one.shape}")
            continue
        before, after = (np.array([each.mean, each.std, *each.first]) for each in (one, other))
        largest = float(np.abs(before).max())
        relative = _EXACT if path.startswith(_BUFFERS) else tolerance.relative
        if not np.allclose(before, after, rtol=0, atol=relative * max(largest, 1e-6)):
            problems.append(f"{path} differs by {np.abs(before - after).max():.3g}; its values are up to {largest:.3g}")
    return problems
