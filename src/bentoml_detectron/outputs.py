"""From a Detectron2 model's output on one image to `Detections`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.layers import paste_masks_in_image
from detectron2.structures import Instances, ROIMasks
from numpy.typing import NDArray

from bentoml_detectron import masks as rle_masks
from bentoml_detectron.artifact.manifest import Dataset
from bentoml_detectron.forward import Output, chosen, scores_of
from bentoml_detectron.masks import RLE
from bentoml_detectron.options import Options
from bentoml_detectron.results import VOID, Detections, PanopticSegmentation, Segment
from bentoml_detectron.rle import checked_size

MASK_THRESHOLD = 0.5
"""Of ROI masks, as in Detectron2's ``detector_postprocess``."""
_MAX_VALUES = 1 << 24  # of semantic logits at an image's own size that are in memory at once

_MAX_PASTED = 1 << 25  # pixels of bitmaps that are in memory at once; Detectron2 takes some 14 bytes for each


class Names:
    """Class names and dataset category ids of a model's classes, by contiguous id."""

    def __init__(self, dataset: Dataset | None) -> None:
        self.things = (dataset and dataset.thing_classes) or []
        self.stuff = (dataset and dataset.stuff_classes) or []
        self._thing_ids = _inverted(dataset.thing_dataset_id_to_contiguous_id if dataset else None)
        self._stuff_ids = _inverted(dataset.stuff_dataset_id_to_contiguous_id if dataset else None)

    def of_things(self, class_ids: NDArray[np.int64]) -> tuple[str, ...]:
        """Names of thing classes, "" where the model knows none."""
        return tuple(_name(self.things, each) for each in class_ids.tolist())

    def categories(self, class_ids: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Dataset ids of thing classes; None unless the model knows that of each."""
        found = [self._thing_ids.get(each) for each in class_ids.tolist()]
        return None if not self._thing_ids or None in found else np.array(found, np.int64)

    def segment(self, is_thing: bool, class_id: int) -> tuple[str, int | None]:
        """A segment's class name and dataset id."""
        if is_thing:
            return _name(self.things, class_id), self._thing_ids.get(class_id)
        return _name(self.stuff, class_id), self._stuff_ids.get(class_id)


def _inverted(ids: dict[int, int] | None) -> dict[int, int]:
    return {contiguous: own for own, contiguous in (ids or {}).items()}


def _name(names: list[str], class_id: int) -> str:
    return names[class_id] if 0 <= class_id < len(names) else ""


def detections(output: Output, size: tuple[int, int], wanted: Options, names: Names, label_divisor: int = 1000) -> Any:
    """One image's `Detections`, or what the model gave where that is none of the tasks of Detectron2's zoo.

    Args:
        output: Of `forward.forward`.
        size: The image's height and width.
        wanted: The options that `output` was made with.
        names: The model's.
        label_divisor: By which Panoptic-DeepLab's map encodes class and instance.
    """
    if output.raw is not None:
        return output.raw
    labels = None if output.logits is None else _semantic(output.logits, output.logits_size, size)
    classes = 0 if output.logits is None else output.logits.shape[0]
    if output.proposals is not None:
        return _proposals(output.proposals, size)
    found = Instances(size, scores=torch.empty(0)) if output.instances is None else output.instances
    rest = {name: value for name, value in found.get_fields().items() if name != "roi_masks"}  # these stay where they are
    instances = Instances(found.image_size, **rest).to("cpu")
    masks = _rles(found if found.has("roi_masks") else instances, size)
    panoptic = None
    if output.combine is not None and labels is not None and masks is not None:
        panoptic = _combined(instances, masks, labels, *output.combine)
    elif output.panoptic is not None:
        panoptic = _of_model(*output.panoptic, label_divisor, names)
    semantic = None if labels is None else _map(labels, classes)
    kept = chosen(instances, wanted).nonzero()[:, 0].numpy() if len(instances) else np.empty(0, np.int64)
    if panoptic is not None:
        panoptic = _named(panoptic, kept, wanted, names)
    elif semantic is not None and wanted.semantic is not None:
        semantic = np.where(np.isin(semantic, list(wanted.semantic)), semantic, semantic.dtype.type(VOID[str(semantic.dtype)]))
    return _found(instances, masks, kept, size, names, panoptic, semantic)


def _found(
    instances: Instances,
    masks: list[RLE] | None,
    kept: NDArray[np.int64],
    size: tuple[int, int],
    names: Names,
    panoptic: PanopticSegmentation | None,
    semantic: NDArray[Any] | None,
) -> Detections:
    if not instances.has("pred_boxes"):
        empty = np.empty(0, np.float32)
        return Detections(size, np.empty((0, 4), np.float32), empty, np.empty(0, np.int64), (), None, None, panoptic, semantic)
    if instances.has("pred_classes"):
        class_ids = instances.pred_classes.numpy()[kept].astype(np.int64)
    else:
        class_ids = np.zeros(len(kept), np.int64)
    return Detections(
        image_size=size,
        boxes=instances.pred_boxes.tensor.float().numpy()[kept],
        scores=instances.scores.float().numpy()[kept],
        class_ids=class_ids,
        class_names=names.of_things(class_ids),
        masks=None if masks is None else [masks[i] for i in kept],
        keypoints=instances.pred_keypoints.float().numpy()[kept] if instances.has("pred_keypoints") else None,
        panoptic=panoptic,
        semantic=semantic,
        category_ids=names.categories(class_ids),
    )


def _proposals(proposals: Instances, size: tuple[int, int]) -> Detections:
    """Proposals have no class; their score is the sigmoid of their objectness."""
    proposals = proposals.to("cpu")
    count = len(proposals)
    return Detections(
        image_size=size,
        boxes=proposals.proposal_boxes.tensor.float().numpy(),
        scores=scores_of(proposals).float().numpy(),
        class_ids=np.zeros(count, np.int64),
        class_names=("",) * count,
    )


def _rles(instances: Instances, size: tuple[int, int]) -> list[RLE] | None:
    if instances.has("roi_masks"):
        roi_masks = instances.roi_masks
        roi_masks = roi_masks.tensor if isinstance(roi_masks, ROIMasks) else roi_masks[:, 0]
        boxes = instances.pred_boxes.tensor
        if roi_masks.device.type == "cpu":
            return rle_masks.from_roi_masks(roi_masks, boxes, size, MASK_THRESHOLD)
        return pasted(roi_masks, boxes, size)
    if instances.has("pred_masks"):
        given = instances.pred_masks
        return [rle_masks.encode(np.asarray(mask) != 0) for mask in getattr(given, "tensor", given)]
    return None


def pasted(roi_masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> list[RLE]:
    """ROI masks pasted by Detectron2 where they are, some at a time; a GPU does that sooner than the CPU goes without it.

    Args:
        roi_masks: (N, M, M), probabilities.
        boxes: (N, 4), in pixels of the image.
        size: The image's height and width.

    Raises:
        InvalidArgumentError: The size is none, or too large.
    """
    height, width = checked_size(size)
    step = max(1, _MAX_PASTED // (height * width))
    some = ((roi_masks[start : start + step], boxes[start : start + step]) for start in range(0, len(boxes), step))
    return [rle for each in some for rle in rle_masks.from_bitmaps(paste_masks_in_image(*each, size, MASK_THRESHOLD))]


def _semantic(logits: torch.Tensor, part: tuple[int, int] | None, size: tuple[int, int]) -> NDArray[np.int64]:
    """Each pixel's best class, (H, W).

    Logits are scaled to the image as Detectron2's ``sem_seg_postprocess`` does, some classes at a time: those of 54 classes
    for a picture of 25 megapixels would take 5.4 GB.
    """
    if part is not None:
        logits = logits[:, : part[0], : part[1]]
    if part is None or part == size:
        return logits.argmax(dim=0).cpu().numpy()
    step = max(1, _MAX_VALUES // (size[0] * size[1]))
    best = labels = torch.empty(0)
    for start in range(0, len(logits), step):
        scaled = torch.nn.functional.interpolate(
            logits[None, start : start + step], size=size, mode="bilinear", align_corners=False
        )[0]
        top, index = scaled.max(dim=0)
        if start == 0:
            best, labels = top, index
        else:
            better = top > best  # of equal ones the first stays, as in argmax
            best, labels = torch.where(better, top, best), torch.where(better, index + start, labels)
    return labels.cpu().numpy()


def _map(labels: NDArray[np.int64], classes: int) -> NDArray[Any]:
    return labels.astype(np.uint8 if classes <= VOID["uint8"] else np.int16)


def _combined(
    instances: Instances, masks: list[RLE], labels: NDArray[np.int64], overlap: float, stuff_area: float, score: float
) -> PanopticSegmentation:
    """Things over stuff, as in Panoptic FPN (Kirillov et al. 2019, section 3), each mask no larger than its tight box.

    Equal to Detectron2's ``combine_semantic_and_instance_outputs``: instances in the order of their scores take what is free,
    unless too much of them is taken; then each stuff class takes what is left, where that is enough.
    """
    columns = np.zeros(labels.shape[::-1], np.int32)  # as RLEs have their pixels
    segments: list[Segment] = []
    scores = instances.scores
    for index in torch.argsort(-scores).tolist():
        if scores[index].item() < score:
            break
        x, y, width, height, runs = rle_masks.crop(masks[index])
        inside = columns[x : x + width, y : y + height]
        free = rle_masks.columns(runs, height, width) & (inside == 0)
        area, left = int(runs[1::2].sum()), int(np.count_nonzero(free))
        if not area or (area - left) / area > overlap:
            continue
        inside[free] = len(segments) + 1
        class_id = int(instances.pred_classes[index])
        segments.append(Segment(len(segments) + 1, class_id, "", True, left, scores[index].item(), None, index))
    ids = np.ascontiguousarray(columns.T)
    free = ids == 0
    there = np.flatnonzero(np.bincount(labels.ravel())).tolist()
    counts = np.bincount(labels[free], minlength=there[-1] + 1)
    table = np.zeros(there[-1] + 1, np.int32)
    for class_id in there:
        area = int(counts[class_id])
        if class_id == 0 or area < stuff_area:  # 0 stands for all things
            continue
        table[class_id] = len(segments) + 1
        segments.append(Segment(len(segments) + 1, class_id, "", False, area))
    ids[free] = table[labels[free]]
    return PanopticSegmentation(ids, tuple(segments))


def _of_model(
    panoptic: torch.Tensor, infos: Sequence[dict[str, Any]] | None, label_divisor: int, names: Names
) -> PanopticSegmentation:
    """A panoptic segmentation that the model made itself.

    Without infos the map holds class * `label_divisor` + instance, and -1 where it says nothing, as Panoptic-DeepLab's; things
    are counted from 1 there, stuff is 0.
    """
    labels = panoptic.cpu().numpy().astype(np.int64)
    if infos is None:
        values = [value for value in np.unique(labels).tolist() if value >= 0]
        infos = [{"id": value, "category_id": value // label_divisor, "isthing": value % label_divisor > 0} for value in values]
    ids = np.zeros(labels.shape, np.int32)
    segments = []
    for number, info in enumerate(infos, 1):
        mask = labels == info["id"]
        ids[mask] = number
        score = info.get("score")
        segments.append(
            Segment(number, int(info["category_id"]), "", bool(info["isthing"]), int(mask.sum()),
                    None if score is None else float(score), None, info.get("instance_id"))
        )  # fmt: skip
    return PanopticSegmentation(ids, tuple(segments))


def _named(panoptic: PanopticSegmentation, kept: NDArray[np.int64], wanted: Options, names: Names) -> PanopticSegmentation:
    """The wanted segments, with their names, pointing at the kept detections; the map holds 0 where the others were."""
    place = {int(old): new for new, old in enumerate(kept)}
    segments = []
    table = np.zeros(len(panoptic.segments) + 1, np.int32)
    for segment in panoptic.segments:
        wished = wanted.things if segment.is_thing else wanted.stuff
        if wished is not None and segment.class_id not in wished:
            continue
        if segment.detection is not None and segment.detection not in place:
            continue
        name, category = names.segment(segment.is_thing, segment.class_id)
        table[segment.id] = segment.id
        detection = None if segment.detection is None else place[segment.detection]
        segments.append(
            Segment(segment.id, segment.class_id, name, segment.is_thing, segment.area, segment.score, category, detection)
        )
    return PanopticSegmentation(table[panoptic.ids], tuple(segments))
