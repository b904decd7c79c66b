"""Average precision of boxes, masks and keypoints, by pycocotools; also from its matches, for other weights of the images."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bentoml_detectron.errors import DependencyMissingError, InvalidArgumentError
from bentoml_detectron.evaluation.ground_truth import Category, GroundTruth, ImageId, Picture, listed
from bentoml_detectron.evaluation.statistics import Task
from bentoml_detectron.masks import check
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
        if not each.is_true.any():
            return np.where(due[:, None] > 0, np.zeros((1, len(COLUMNS))), np.nan)
        # What is right at no threshold adds no recall, and what is before it has better precision: no maximum is there.
        at = np.flatnonzero(each.is_true.any(axis=0))
        times = weights[:, each.image]
        true = np.cumsum(times[:, None, at] * each.is_true[:, at], axis=2)
        counted = each.is_true | each.is_false
        ignored = np.flatnonzero(~counted.all(axis=0))
        left_out = np.cumsum(times[:, None, ignored] * ~counted[:, ignored], axis=2)
        left_out = np.pad(left_out, ((0, 0), (0, 0), (1, 0)))[:, :, np.searchsorted(ignored, at, side="right")]
        with np.errstate(divide="ignore", invalid="ignore"):
            recall = true / due[:, None, None]
        precision = true / (np.cumsum(times, axis=1)[:, None, at] - left_out + np.spacing(1))
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

    def __init__(self, truth: GroundTruth, keypoint_sigmas: Sequence[float] | None, *, with_names: bool) -> None:
        _pycocotools()  # it may not be there, and predictions may take hours
        self.notes: list[str] = []
        self._with_names = with_names  # which have been looked for in the ground truth
        self._truth = truth
        self._sigmas = keypoint_sigmas
        self._ids = {each.name: each.id for each in truth.categories}
        self._every = [each.name for each in truth.every]
        self._known = frozenset(self._every)
        self._unknown: dict[str, None] = {}
        self._rows: list[dict[str, Any]] = []
        self._sizes: list[tuple[int, int]] = [(0, 0)] * len(truth.images)
        # Whether there are "masks" and "keypoints", of images with detections, and of those without any.
        self._with: dict[tuple[str, bool], set[bool]] = defaultdict(set)
        self._are_masks_checked = False
        self._keypoints: set[int] = set()
        self._posed = _posed(truth.annotations)
        self._rle_sizes: dict[ImageId, set[tuple[int, int]]] = {each.id: set() for each in truth.images if each.size is None}
        for each in truth.annotations if self._rle_sizes else ():
            if isinstance(mask := each.get("segmentation"), dict) and each["image_id"] in self._rle_sizes:
                self._rle_sizes[each["image_id"]].add((mask["size"][0], mask["size"][1]))
        if any("area" not in each for each in truth.annotations):
            self.notes.append(f"{truth.source} has annotations without an area: the area of their boxes is used")

    def add(self, place: int, found: Detections) -> None:
        """Takes what was found on the image at this place."""
        if found.boxes.shape[1] != 4:
            raise InvalidArgumentError("the model's boxes are rotated; COCO's average precision needs upright ones")
        self._sizes[place] = found.image_size
        self._check_sizes(self._truth.images[place], found.image_size)
        self._with["masks", len(found) > 0].add(found.masks is not None)
        self._with["keypoints", len(found) > 0].add(found.keypoints is not None)
        if found.masks is not None and not self._are_masks_checked:  # and not when all else is done
            self._are_masks_checked = True
            self._check_masks()
        count = 0 if found.keypoints is None else found.keypoints.shape[1]
        if count and count not in self._keypoints:
            self._keypoints.add(count)
            self._check_keypoints()
        self._check_rles(self._truth.images[place], found)
        for name, label, row in zip(found.class_names, found.class_ids.tolist(), found.to_coco(place), strict=True):
            category = self._category(name, label)
            if category is not None:
                self._rows.append({**row, "category_id": category})

    def _check_rles(self, image: Picture, found: Detections) -> None:
        """Checks masks, which `Detections` takes as they are; pycocotools would not end on one that is cut short."""
        for each in found.masks or ():
            try:
                check(each, found.image_size)
            except InvalidArgumentError as exc:
                raise InvalidArgumentError(f"{image.file_name}: {exc}", value=each) from exc

    def _check_sizes(self, image: Picture, size: tuple[int, int]) -> None:
        """Checks the RLEs of an image whose size the file does not have, for which no other mask would match them."""
        if odd := [each for each in self._rle_sizes.get(image.id, ()) if each != size]:
            raise InvalidArgumentError(
                f"{self._truth.source} has an RLE of {odd[0][0]} rows and {odd[0][1]} columns, but {image.file_name} has "
                f"{size[0]} and {size[1]}; give the images that were annotated",
                value=odd[0],
            )

    def _category(self, name: str, label: int) -> int | None:
        """COCO's id of a class by its name; without one by Detectron2's own rule, the place among the sorted ids."""
        if name:
            if name not in self._known:
                self._unknown[name] = None
            return self._ids.get(name)
        if self._with_names:
            raise InvalidArgumentError(
                f"the model has class names, but none for class {label}, which it found; name all classes. (The proposals of "
                "an RPN alone have no class, and so no average precision)",
                value=label,
            )
        self._note("the model has no class names: its class ids are taken as positions in the list of categories sorted by id")
        if label >= len(self._every):
            raise InvalidArgumentError(
                f"the model found class {label}, but {self._truth.source} has {len(self._every)} categories; save the model "
                "with its class names",
                value=label,
            )
        return self._ids.get(self._every[label])

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def finish(self) -> dict[str, Task]:
        """The tasks that were measured, by name."""
        annotations = self._truth.annotations
        if self._unknown and not self._with_names:
            unknown = listed(map(repr, self._unknown))
            self._note(f"detections of {unknown} are ignored: {self._truth.source} has no such class")
        tasks = {"box": self._measured("box", self._rows, annotations, None)}
        if self._everywhere("masks"):
            if self._has_masks():
                # With "bbox", the areas of boxes would stand for those of masks.
                rows = [{key: value for key, value in row.items() if key != "bbox"} for row in self._rows]
                tasks["mask"] = self._measured("mask", rows, annotations, None)
            else:
                self.notes.append(f"{self._truth.source} has no segmentations, so there is no AP of masks")
        if self._everywhere("keypoints") and self._keypoints:
            if self._posed:
                tasks["keypoint"] = self._measured("keypoint", self._rows, self._posed, self._of_keypoints())
            else:
                self.notes.append(f"{self._truth.source} has no keypoints, so there is no AP of keypoints")
        elif self._sigmas is not None:
            self.notes.append("the model finds no keypoints, so keypoint_sigmas are ignored")
        return tasks

    def _everywhere(self, what: str) -> bool:
        """Whether all detections have it, or would; a note where only some have."""
        found = self._with[what, True] or self._with[what, False]
        if len(found) > 1:
            self.notes.append(f"detections on some images have {what} and on others do not, so there is no AP of {what}")
        return found == {True}

    def _has_masks(self) -> bool:
        return all(each.get("segmentation") for each in self._truth.annotations)

    def _check_masks(self) -> None:
        annotations = self._truth.annotations
        without = [each.get("id", place) for place, each in enumerate(annotations) if not each.get("segmentation")]
        if without and len(without) < len(annotations):
            raise InvalidArgumentError(
                f"{self._truth.source} has segmentations, but none for the annotations {listed(without)}; add them, or "
                "remove all segmentations to evaluate boxes only",
                value=without,
            )

    def _check_keypoints(self) -> None:
        counts = {len(each["keypoints"]) // 3 for each in self._posed} | self._keypoints
        if len(counts) > 1:
            raise InvalidArgumentError(
                f"the model and {self._truth.source} have different numbers of keypoints: {sorted(counts)}", value=counts
            )
        if self._sigmas is not None:
            given, (count,) = np.asarray(self._sigmas, np.float64), counts
            if given.shape != (count,) or not (np.isfinite(given) & (given > 0)).all():
                raise InvalidArgumentError(
                    f"keypoint_sigmas is {self._sigmas!r:.80}; give {count} numbers above 0", value=self._sigmas
                )

    def _of_keypoints(self) -> NDArray[np.float64]:
        """Sigmas of the keypoints that there are."""
        (count,) = self._keypoints
        if self._sigmas is not None:
            return np.asarray(self._sigmas, np.float64)
        if count == len(COCO_SIGMAS):
            return np.array(COCO_SIGMAS)
        self.notes.append(
            f"the AP of {count} keypoints uses a sigma of 1/{count} for each; set others with --keypoint-sigmas "
            "(keypoint_sigmas=)"
        )
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


def _posed(annotations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Annotations of the categories that have keypoints. Who was annotated without any is not seen, and what is found there is
    not counted, as COCO has it."""
    posed = [each for each in annotations if each.get("keypoints")]
    categories = {each["category_id"] for each in posed}
    unseen = {"keypoints": [0] * max((len(each["keypoints"]) for each in posed), default=0), "num_keypoints": 0}
    return [each if each.get("keypoints") else {**each, **unseen} for each in annotations if each["category_id"] in categories]


def _area(annotation: Mapping[str, Any]) -> float:
    """An object's area where the file does not say it: of its box, COCO's own being of the mask."""
    return float(annotation["bbox"][2] * annotation["bbox"][3])


def _evaluated(dataset: dict[str, Any], rows: Sequence[Mapping[str, Any]], kind: str, sigmas: Any) -> Any:
    """A COCOeval that has summarized."""
    quiet_coco, quiet_cocoeval = map(_quiet, _pycocotools())
    truth = quiet_coco()
    truth.dataset = dataset
    truth.createIndex()
    if rows:
        found = truth.loadRes([dict(row) for row in rows])
    else:  # of which loadRes knows no kind
        found = quiet_coco()
        found.dataset = {**dataset, "annotations": []}
        found.createIndex()
    evaluation = quiet_cocoeval(truth, found, kind)
    if sigmas is not None:
        evaluation.params.kpt_oks_sigmas = sigmas
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def _pycocotools() -> tuple[Any, Any]:
    """COCO and COCOeval.

    Raises:
        DependencyMissingError: They are not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ModuleNotFoundError as exc:
        raise DependencyMissingError("this needs pycocotools: pip install pycocotools") from exc
    return COCO, COCOeval


def _quiet(kind: type) -> Any:
    """A class whose own methods print nothing. To put another `sys.stdout` in place would take it from all threads."""
    names: dict[str, Any] = {**vars(sys.modules[kind.__module__]), "print": lambda *_, **__: None}
    methods = {
        name: FunctionType(each.__code__, names, name, each.__defaults__, each.__closure__)
        for name, each in vars(kind).items()
        if isinstance(each, FunctionType)
    }
    names[kind.__name__] = found = type(kind.__name__, (kind,), methods)
    return found


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
