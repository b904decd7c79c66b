"""The self-test: what a model finds on one fixed image, recorded when it is saved and compared when it is verified.

The image is small and goes to the model as it is, without the resize, and few of the proposals are looked at, so that it costs
little. Thresholds are lifted, so that something is found whatever the model was trained on; the model's own thresholds, and all
other plain settings of its modules, are recorded beside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bentoml_detectron import masks as rle_masks
from bentoml_detectron.artifact.manifest import Dataset, Input, SelfTest, Tensor
from bentoml_detectron.forward import view
from bentoml_detectron.model import device_of
from bentoml_detectron.options import Options
from bentoml_detectron.predictor import Predictor
from bentoml_detectron.results import Detections

IMAGE_SIZE = (192, 256)
PROPOSALS = 50
WANTED = Options(score_threshold=0.0, top_k=20)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far results may be from the recorded ones, for another device, thread count or build of PyTorch.

    Attributes:
        box: Of a box's corner, in pixels of the 256x192 image; degrees of a rotated box's angle.
        score: Of a score.
        keypoint: Of a keypoint's place, in pixels.
        mask_iou: Least intersection over union of two masks.
        matched: Least share of the detections, either way, that have one of the same class within these.
        labels: Least share of the pixels of a semantic or panoptic map that are the same.
        relative: Of a tensor's mean, deviation and values, against its largest value, where the model gives tensors.
    """

    box: float = 0.1
    score: float = 1e-3
    keypoint: float = 1.0
    mask_iou: float = 0.98
    matched: float = 0.9
    labels: float = 0.99
    relative: float = 1e-3


def image() -> NDArray[np.uint8]:
    """The image, (192, 256, 3) uint8 in BGR: slopes, stripes, discs and boxes, from whole numbers alone."""
    y, x = np.mgrid[: IMAGE_SIZE[0], : IMAGE_SIZE[1]].astype(np.int64)
    channels = [(x + y) // 2, (x * 3 // 4 + 40) % 256, 255 - y]
    pixels = np.stack(channels, axis=2) % 256
    for number, (top, left, size) in enumerate([(20, 30, 60), (90, 20, 80), (30, 150, 90), (130, 170, 50), (70, 110, 40)]):
        disc = (y - top - size // 2) ** 2 + (x - left - size // 2) ** 2 <= (size // 2) ** 2
        box = (top <= y) & (y < top + size) & (left <= x) & (x < left + size * 2 // 3)
        shape = disc if number % 2 else box
        color = [(37 * number + 200) % 256, (91 * number + 30) % 256, (150 * number + 90) % 256]
        pixels[shape] = (pixels[shape] + 3 * np.array(color)) // 4
        stripes = shape & ((x // (4 + number)) % 3 == 0)
        pixels[stripes] = 255 - pixels[stripes]
    return pixels.astype(np.uint8)


def run(model: nn.Module, image_input: Input, dataset: Dataset | None) -> Any:
    """What a model makes of the image: `Detections`, or whatever else it gives. The model is left as it is.

    Raises:
        Exception: Whatever the model raises, if an image alone is not what it takes.
    """

    def few_proposals(module: nn.Module) -> dict[str, Any]:
        changes: dict[str, Any] = {"training": False} if module.training else {}
        most = getattr(module, "post_nms_topk", None)
        if isinstance(most, dict):
            changes["post_nms_topk"] = {key: min(value, PROPOSALS) for key, value in most.items()}
        return changes

    unresized = Input(format=image_input.format, min_size_test=0, max_size_test=0)
    predictor = Predictor(view(model, few_proposals), unresized, dataset, batch="exact")
    result = predictor.predict([image()], [WANTED])[0]
    if isinstance(result, Exception):
        raise result
    return result


def record(model: nn.Module, image_input: Input, dataset: Dataset | None) -> SelfTest:
    """Runs the self-test for a model's manifest; errors as in `run`."""
    result = run(model, image_input, dataset)
    found = isinstance(result, Detections)
    return SelfTest(
        device=str(device_of(model)),
        image_sha256=hashlib.sha256(image().tobytes()).hexdigest(),
        settings=settings(model),
        detections=result.to_json() if found else None,
        tensors={} if found else {path: _summary(tensor) for path, tensor in _tensors(result, "")},
    )


def compare(due: SelfTest, got: SelfTest, tolerance: Tolerance | None = None) -> list[str]:
    """Says where two runs of the self-test differ by more than the tolerance, a line each."""
    tolerance = tolerance or Tolerance()
    problems = []
    if due.image_sha256 != got.image_sha256:
        problems.append("the self-test's image is not the one that the model was saved with")
    for name in sorted(due.settings.keys() | got.settings.keys()):
        if due.settings.get(name) != got.settings.get(name):
            problems.append(f"setting {name} is {got.settings.get(name, 'absent')}; it was {due.settings.get(name, 'absent')}")
    if (due.detections is None) != (got.detections is None):
        return [*problems, "the model's output is of another kind than it was"]
    if due.detections is not None and got.detections is not None:
        return problems + _compare_detections(
            Detections.from_json(due.detections), Detections.from_json(got.detections), tolerance
        )
    return problems + _compare_tensors(due.tensors, got.tensors, tolerance)


def settings(model: nn.Module) -> dict[str, str]:
    """The plain values that a model's modules hold, by path; those of PyTorch's own layers are in the weights' shapes."""
    found = {}
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.") or isinstance(module, nn.Conv2d):
            continue
        for name, value in vars(module).items():
            if not name.startswith("_") and name not in ("training", "vis_period") and _is_plain(value):
                found[f"{path}.{name}" if path else name] = repr(value)[:1000]
    return dict(sorted(found.items()))


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, Mapping):
        return depth < 3 and all(_is_plain(each, depth + 1) for pair in value.items() for each in pair)
    if isinstance(value, (list, tuple)):
        return depth < 3 and all(_is_plain(each, depth + 1) for each in value)
    return value is None or type(value) in (bool, int, float, str)


def _compare_detections(due: Detections, got: Detections, tolerance: Tolerance) -> list[str]:
    problems = []
    for name in ("masks", "keypoints", "panoptic", "semantic"):
        if (getattr(due, name) is None) != (getattr(got, name) is None):
            problems.append(f"there {'are no' if getattr(got, name) is None else 'are now'} {name}; that was otherwise")
    if due.class_names != got.class_names and np.array_equal(due.class_ids, got.class_ids):
        problems.append("the class names are others than they were")
    if problems or due.boxes.shape[1] != got.boxes.shape[1]:
        return problems or ["boxes are of another kind than they were"]
    close = _close(due, got, tolerance)
    share = min((close.any(axis=axis).mean() for axis in (0, 1) if close.shape[1 - axis]), default=1.0)
    if not (len(due) or len(got)):
        share = 1.0
    elif not (len(due) and len(got)):
        share = 0.0
    if share < tolerance.matched:
        problems.append(
            f"only {share:.0%} of {len(due)} recorded and {len(got)} found detections are the same, within {tolerance.box} "
            f"pixels and {tolerance.score} of the score"
        )
    maps: list[tuple[str, Any, Any]] = [("semantic map", due.semantic, got.semantic)]
    if due.panoptic is not None and got.panoptic is not None:
        maps.append(("panoptic map", _classes(due), _classes(got)))
    for name, one, other in maps:
        if one is not None and other is not None and (one == other).mean() < tolerance.labels:
            problems.append(f"only {(one == other).mean():.0%} of the pixels of the {name} are the same")
    return problems


def _close(due: Detections, got: Detections, tolerance: Tolerance) -> NDArray[np.bool_]:
    """Which recorded detection is which found one, (N, M)."""
    close: NDArray[np.bool_] = due.class_ids[:, None] == got.class_ids[None]
    close &= np.abs(due.scores[:, None] - got.scores[None]) <= tolerance.score
    close &= (np.abs(due.boxes[:, None] - got.boxes[None]) <= tolerance.box).all(axis=2)
    if due.keypoints is not None and got.keypoints is not None:
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


def _classes(found: Detections) -> NDArray[np.int64]:
    """A panoptic map's classes: things and stuff apart, 0 where there is nothing."""
    if found.panoptic is None:
        return np.zeros(found.image_size, np.int64)
    table = np.zeros(max((segment.id for segment in found.panoptic.segments), default=0) + 1, np.int64)
    for segment in found.panoptic.segments:
        table[segment.id] = 1 + 2 * segment.class_id + segment.is_thing
    return table[found.panoptic.ids]


def _tensors(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of an output, by its path."""
    if isinstance(value, torch.Tensor):
        yield path or "output", value
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


def _summary(tensor: torch.Tensor) -> Tensor:
    values = torch.nan_to_num(tensor.detach().double().cpu())
    return Tensor(
        shape=list(tensor.shape),
        mean=float(values.mean()) if values.numel() else 0.0,
        std=float(values.std(correction=0)) if values.numel() else 0.0,
        first=values.flatten()[:20].tolist(),
    )


def _compare_tensors(due: Mapping[str, Tensor], got: Mapping[str, Tensor], tolerance: Tolerance) -> list[str]:
    if due.keys() != got.keys():
        return [f"the output holds {', '.join(sorted(got))}; it held {', '.join(sorted(due))}"]
    problems = []
    for path, one in due.items():
        other = got[path]
        if one.shape != other.shape:
            problems.append(f"output {path} has the shape {other.shape}; it had {one.shape}")
            continue
        before, after = (np.array([each.mean, each.std, *each.first]) for each in (one, other))
        largest = float(np.abs(before).max())
        if not np.allclose(before, after, rtol=0, atol=tolerance.relative * max(largest, 1e-6)):
            problems.append(f"output {path} differs by {np.abs(before - after).max():.3g}; its values are up to {largest:.3g}")
    return problems
