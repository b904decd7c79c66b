"""Average precision of boxes, masks and keypoints by pycocotools, and from its matches for images weighed anew."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bentoml_detectron.errors import DependencyMissingError, InvalidArgumentError
from bentoml_detectron.evaluation.ground_truth import Category, GroundTruth, listed
from bentoml_detectron.evaluation.statistics import Task
from bentoml_detectron.results import Detections

KINDS = {"box": "bbox", "mask": "segm", "keypoint": "keypoints"}
"""What COCOeval calls each task."""
_OF_BOXES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR", "ARs", "ARm", "ARl")
_OF_KEYPOINTS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
COLUMNS = ("AP", "AP50", "AP75", "AR")
"""What a class has of its own, and what `Matches` gives."""
COCO_SIGMAS = (
    .026, .025, .025, .035, .035, .079, .079, .072, .072, .062, .062, .107, .107, .087, .087, .089, .089,
)  # fmt: skip
"""How far annotators of COCO's 17 keypoints were apart, relative to a person's scale: pycocotools' ``kpt_oks_sigmas``."""
_BLOCK = 2_000_000
"""Numbers that `Matches` works on at once."""


@dataclass(frozen=True, slots=True)
class _Class:
    """One class's detections, best first, at T thresholds of IoU.

    Attributes:
        image: (N,) the place of each detection's image.
        is_true: (T, N) whether it is matched.
        is_false: (T, N) whether it is not; neither where it is ignored.
        instances: (images,) how many there are to find.
    """

    image: NDArray[np.int64]
    is_true: NDArray[np.bool_]
    is_false: NDArray[np.bool_]
    instances: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Matches:
    """COCOeval's matches of one task, in all areas, up to its most detections an image."""

    classes: tuple[_Class, ...]
    thresholds: NDArray[np.float64]
    recalls: NDArray[np.float64]

    def values(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """`COLUMNS` of each class when each image is there so many times, as COCOeval would accumulate them.

        Copies of one image follow each other among equal scores; nothing else is different from evaluating anew.

        Args:
            weights: (B, images) how many times.

        Returns:
            (B, classes, 4), NaN where there is nothing to find.
        """
        found = np.full((len(weights), len(self.classes), len(COLUMNS)), np.nan)
        for place, each in enumerate(self.classes):
            step = max(1, _BLOCK // max(1, each.is_true.size))
            for start in range(0, len(weights), step):
                found[start : start + step, place] = self._of_class(each, weights[start : start + step])
        return found

    def _of_class(self, each: _Class, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        due = weights @ each.instances
        if not len(each.image):
            return np.where(due[:, None] > 0, np.zeros((1, len(COLUMNS))), np.nan)
        times = weights[:, None, each.image]
        true = np.cumsum(times * each.is_true, axis=2)
        false = np.cumsum(times * each.is_false, axis=2)
        with np.errstate(divide="ignore", invalid="ignore"):
            recall = true / due[:, None, None]
        precision = true / (true + false + np.spacing(1))
        best = np.maximum.accumulate(precision[:, :, ::-1], axis=2)[:, :, ::-1]
        # COCOeval asks for the precision at 101 recalls, each where it is first reached.
        reached = np.searchsorted(self.recalls, recall, side="right")
        average = (np.diff(reached, axis=2, prepend=0) * best).sum(axis=2) / len(self.recalls)
        columns = [average.mean(axis=1), *(average[:, self._at(each)] for each in (0.5, 0.75)), recall[:, :, -1].mean(axis=1)]
        return np.where(due[:, None] > 0, np.stack(columns, axis=1), np.nan)

    def _at(self, threshold: float) -> int:
        return int(np.argmin(np.abs(self.thresholds - threshold)))


class Instances:
    """Takes each image's detections, and measures what they and the annotations have: boxes, masks, keypoints."""

    def __init__(self, truth: GroundTruth, keypoint_sigmas: Sequence[float] | None) -> None:
        self.notes: list[str] = []
        self._truth = truth
        self._sigmas = keypoint_sigmas
        self._ids = {each.name: each.id for each in truth.categories}
        self._ordered = [each.id for each in truth.categories]
        self._rows: list[dict[str, Any]] = []
        self._sizes: list[tuple[int, int]] = [(0, 0)] * len(truth.images)
        self._with_masks = self._with_keypoints = True
        self._keypoints: set[int] = set()
        if any("area" not in each for each in truth.annotations):
            self.notes.append(f"{truth.source} has annotations without an area: that of their boxes is taken")

    def add(self, place: int, found: Detections) -> None:
        """Takes what was found on the image at this place."""
        if found.boxes.shape[1] != 4:
            raise InvalidArgumentError("the model's boxes are rotated; COCO's average precision is of upright ones")
        self._sizes[place] = found.image_size
        self._with_masks &= found.masks is not None
        self._with_keypoints &= found.keypoints is not None
        if found.keypoints is not None:
            self._keypoints.add(found.keypoints.shape[1])
        for name, label, row in zip(found.class_names, found.class_ids.tolist(), found.to_coco(place), strict=True):
            category = self._category(name, label)
            if category is not None:
                self._rows.append({**row, "category_id": category})

    def _category(self, name: str, label: int) -> int | None:
        """COCO's id of a class by its name; without one by Detectron2's own rule, the place among the sorted ids."""
        if name:
            return self._ids.get(name)
        note = "the model carries no class names: its ids are the places of the categories, in the order of their ids"
        if note not in self.notes:
            self.notes.append(note)
        if label >= len(self._ordered):
            raise InvalidArgumentError(
                f"the model finds the class {label}, {self._truth.source} has {len(self._ordered)} categories; save the model "
                "with its classes' names",
                value=label,
            )
        return self._ordered[label]

    def finish(self) -> dict[str, Task]:
        """The tasks that were measured, by name."""
        annotations = self._truth.annotations
        tasks = {"box": self._measured("box", self._rows, annotations, None)}
        if self._with_masks and self._has_masks():
            # With "bbox", the areas of boxes would stand for those of masks.
            rows = [{key: value for key, value in row.items() if key != "bbox"} for row in self._rows]
            tasks["mask"] = self._measured("mask", rows, annotations, None)
        if self._with_keypoints and self._keypoints:
            posed = [each for each in annotations if each.get("keypoints")]
            if posed:
                tasks["keypoint"] = self._measured("keypoint", self._rows, posed, self._checked_sigmas(posed))
            else:
                self.notes.append(f"{self._truth.source} has no keypoints, so there is no AP of these")
        return tasks

    def _has_masks(self) -> bool:
        annotations = self._truth.annotations
        without = [each.get("id", place) for place, each in enumerate(annotations) if not each.get("segmentation")]
        if without and len(without) < len(annotations):
            raise InvalidArgumentError(
                f"{self._truth.source} has segmentations, but not of the annotations {listed(without)}; complete it, or take "
                "all of them out to measure boxes",
                value=without,
            )
        if without:
            self.notes.append(f"{self._truth.source} has no segmentations, so there is no AP of masks")
        return not without

    def _checked_sigmas(self, posed: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        counts = {len(each["keypoints"]) // 3 for each in posed} | self._keypoints
        if len(counts) > 1:
            raise InvalidArgumentError(
                f"the model and {self._truth.source} have different numbers of keypoints: {sorted(counts)}", value=counts
            )
        (count,) = counts
        if self._sigmas is not None:
            given = np.asarray(self._sigmas, np.float64)
            if given.shape != (count,) or not (np.isfinite(given) & (given > 0)).all():
                raise InvalidArgumentError(
                    f"keypoint_sigmas is {self._sigmas!r:.80}; give {count} numbers above 0", value=self._sigmas
                )
            return given
        if count == len(COCO_SIGMAS):
            return np.array(COCO_SIGMAS)
        self.notes.append(f"the AP of {count} keypoints is with a sigma of 1/{count} for each; give others as keypoint_sigmas")
        return np.full(count, 1 / count)

    def _measured(
        self, task: str, rows: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]], sigmas: Any
    ) -> Task:
        categories = self._truth.categories
        if task == "keypoint":  # which not all of a file's categories have
            posed = {each["category_id"] for each in annotations}
            categories = tuple(each for each in categories if each.id in posed)
        evaluation = _evaluated(self._dataset(annotations, categories), rows, KINDS[task], sigmas)
        matches = _matches(evaluation, len(self._truth.images))
        names = tuple(each.name for each in categories)
        metrics = dict(zip(_OF_KEYPOINTS if task == "keypoint" else _OF_BOXES, _or_nan(evaluation.stats).tolist(), strict=True))
        instances = tuple(int(each.instances.sum()) for each in matches.classes)
        return Task(
            task, metrics, names, COLUMNS, _columns(evaluation), "instances", instances, matches, {"{}": (True,) * len(names)}
        )

    def _dataset(self, annotations: Sequence[Mapping[str, Any]], categories: Sequence[Category]) -> dict[str, Any]:
        """COCO's content with images by their place, and annotations from 1: to pycocotools an id of 0 is no match."""
        places = {each.id: place for place, each in enumerate(self._truth.images)}
        sizes = [each.size or found for each, found in zip(self._truth.images, self._sizes, strict=True)]
        return {
            "images": [{"id": place, "height": height, "width": width} for place, (height, width) in enumerate(sizes)],
            "annotations": [
                {"area": _area(each), **each, "id": number, "image_id": places[each["image_id"]]}
                for number, each in enumerate(annotations, start=1)
            ],
            "categories": [{"id": each.id, "name": each.name} for each in categories],
        }


def _area(annotation: Mapping[str, Any]) -> float:
    """An object's area where the file does not say it: of its box, COCO's own being of the mask."""
    return float(annotation["bbox"][2] * annotation["bbox"][3])


def _evaluated(dataset: dict[str, Any], rows: Sequence[Mapping[str, Any]], kind: str, sigmas: Any) -> Any:
    """A COCOeval that has summarized."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ModuleNotFoundError as exc:
        raise DependencyMissingError("this needs pycocotools: pip install 'bentoml-detectron[evaluate]'") from exc
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        if rows:
            found = truth.loadRes([dict(row) for row in rows])
        else:  # of which loadRes knows no kind
            found = COCO()
            found.dataset = {**dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, kind)
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = sigmas
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _or_nan(values: Any) -> NDArray[np.float64]:
    """The same with NaN for COCOeval's -1, where there is nothing to find."""
    array = np.asarray(values, np.float64)
    return np.where(array < 0, np.nan, array)


def _columns(evaluation: Any) -> NDArray[np.float64]:
    """`COLUMNS` of each class as COCOeval accumulated them, (classes, 4)."""
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, classes
    recall = evaluation.eval["recall"][:, :, 0, -1]
    thresholds = evaluation.params.iouThrs
    at = [int(np.argmin(np.abs(thresholds - each))) for each in (0.5, 0.75)]
    average = precision.mean(axis=1)
    return _or_nan(np.stack([average.mean(axis=0), average[at[0]], average[at[1]], recall.mean(axis=0)], axis=1))


def _matches(evaluation: Any, images: int) -> Matches:
    """COCOeval's matches in all areas."""
    params = evaluation.params
    per_class = len(params.areaRng) * images
    parts = [
        _class(evaluation.evalImgs[number * per_class : number * per_class + images], params.maxDets[-1], len(params.iouThrs))
        for number in range(len(params.catIds))
    ]
    return Matches(tuple(parts), params.iouThrs, params.recThrs)


def _class(found: Sequence[Mapping[str, Any] | None], most: int, thresholds: int) -> _Class:
    instances = np.zeros(len(found))
    scores, places, matched, ignored = [], [], [np.zeros((thresholds, 0), bool)], [np.zeros((thresholds, 0), bool)]
    for place, each in enumerate(found):
        if each is None:
            continue
        instances[place] = np.count_nonzero(np.asarray(each["gtIgnore"]) == 0)
        scores += each["dtScores"][:most]
        places += [place] * len(each["dtScores"][:most])
        matched.append(np.asarray(each["dtMatches"][:, :most]) != 0)
        ignored.append(np.asarray(each["dtIgnore"][:, :most]) != 0)
    order = np.argsort(-np.array(scores), kind="mergesort")
    hits, left_out = (np.concatenate(each, axis=1)[:, order] for each in (matched, ignored))
    return _Class(np.array(places, np.int64)[order], hits & ~left_out, ~hits & ~left_out, instances)
