"""Panoptic quality, and the mean IoU of semantic maps, from counts of each image.

Panoptic quality is that of Kirillov et al., "Panoptic Segmentation" (CVPR 2019), with their rules for void and crowds. Mean
IoU is that of Everingham et al., "The PASCAL Visual Object Classes Challenge" (IJCV 2010), over the classes that the ground
truth has. The ``SemSegEvaluator`` of Detectron2's main branch computes it in the same way; that of version 0.6 also counts
classes that are only found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bentoml_detectron.errors import InvalidArgumentError
from bentoml_detectron.evaluation.ground_truth import GroundTruth, listed
from bentoml_detectron.evaluation.statistics import Task, means
from bentoml_detectron.panoptic import PanopticSegmentation
from bentoml_detectron.results import VOID, Detections

_OF_PANOPTIC = ("PQ", "SQ", "RQ")
_OF_SEMANTIC = ("IoU", "ACC")
_IDS = 1 << 24  # more than a segment's id can be


@dataclass(frozen=True, slots=True)
class PanopticCounts:
    """(images, classes, 4): the sum of matched segments' IoU, and how many are matched, found wrongly, and missed."""

    counts: NDArray[np.float64]

    def values(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """PQ, SQ and RQ of each class; see `Statistics`."""
        iou, true, false, missed = np.moveaxis(np.tensordot(weights, self.counts, axes=1), 2, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            recognition = true / (true + 0.5 * false + 0.5 * missed)
            segmentation = np.where(true > 0, iou / true, np.where(np.isnan(recognition), np.nan, 0))
        return np.stack([segmentation * recognition, segmentation, recognition], axis=2)


@dataclass(frozen=True, slots=True)
class SemanticCounts:
    """(images, classes, 3): pixels of a class that are found, that there are, and that are said to be; void left out."""

    counts: NDArray[np.float64]

    def values(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """IoU, and the part that is found (ACC), of each class; see `Statistics`."""
        found, there, said = np.moveaxis(np.tensordot(weights, self.counts, axes=1), 2, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.stack([found / (there + said - found), found / there], axis=2)
        return np.where(there[:, :, None] > 0, values, np.nan)


class Panoptic:
    """Takes each image's panoptic segmentation, and counts matched segments."""

    def __init__(self, truth: GroundTruth, *, with_things: bool, with_stuff: bool) -> None:
        self.notes: list[str] = []
        self._truth = truth
        self._with_names = {True: with_things, False: with_stuff}  # of which have been looked for in the ground truth
        self._known = {(each.name, each.is_thing) for each in truth.every}
        self._place = {each.id: place for place, each in enumerate(truth.categories)}
        self._named = {(each.name, each.is_thing): place for place, each in enumerate(truth.categories)}
        self._counts = np.zeros((len(truth.images), len(truth.categories), 4))
        self._annotations = {each["image_id"]: each for each in truth.annotations}
        self._unknown: dict[tuple[str, bool], None] = {}  # what was found: names, and whether things

    def add(self, place: int, found: Detections) -> None:
        """Takes what was found on the image at this place."""
        if found.panoptic is None:
            raise InvalidArgumentError(f"{self._truth.source} is panoptic, but the model is not; give instance annotations")
        if any(not each.class_name for each in found.panoptic.segments):
            raise InvalidArgumentError("the model's segments have no class names; save it with its class names")
        classes = [(each.class_name, each.is_thing) for each in found.panoptic.segments]
        self._unknown.update(dict.fromkeys(each for each in classes if each not in self._known))
        annotation = self._annotations[self._truth.images[place].id]
        due = _segment_ids(Path(self._truth.folder or ".") / annotation["file_name"], found.image_size)
        crowds = {each["id"]: each["category_id"] for each in annotation["segments_info"] if each.get("iscrowd")}
        segments = {each["id"]: each["category_id"] for each in annotation["segments_info"] if each["id"] not in crowds}
        self._counts[place] = self._matched(due, segments, crowds, found.panoptic)

    def finish(self) -> dict[str, Task]:
        """The task, by its name."""
        odd = [(name, is_thing) for name, is_thing in self._unknown if (name, not is_thing) in self._known]
        if odd:
            self.notes.append(
                f"{listed(repr(name) for name, _ in odd)} {'is' if len(odd) == 1 else 'are'} ignored: stuff in one of the "
                f"model and {self._truth.source}, a thing in the other; for stuff, the file must say 'isthing': 0"
            )
        if unknown := [
            repr(name) for name, is_thing in self._unknown if (name, is_thing) not in odd and not self._with_names[is_thing]
        ]:
            self.notes.append(f"detections of {listed(unknown)} are ignored: {self._truth.source} has no such class")
        things = tuple(each.is_thing for each in self._truth.categories)
        groups = {"{}": (True,) * len(things), "{}_things": things, "{}_stuff": tuple(not each for each in things)}
        names = [each.name for each in self._truth.categories]
        counts = (self._counts[:, :, 1] + self._counts[:, :, 3]).sum(axis=0)
        return {"panoptic": _task("panoptic", names, _OF_PANOPTIC, "segments", counts, PanopticCounts(self._counts), groups)}

    def _matched(
        self, due: NDArray[np.int64], segments: Mapping[int, int], crowds: Mapping[int, int], found: PanopticSegmentation
    ) -> NDArray[np.float64]:
        """One image's counts, (classes, 4).

        Args:
            due: (H, W), each pixel's segment in the ground truth; 0 is void.
            segments: Category ids by segment id.
            crowds: The same of crowds.
            found: What the model found.
        """
        counts = np.zeros((len(self._place), 4))
        pairs, pixels = np.unique(due * _IDS + found.ids, return_counts=True)
        shared = {(pair // _IDS, pair % _IDS): number for pair, number in zip(pairs.tolist(), pixels.tolist(), strict=True)}
        area_due, area_found = _areas(due), _areas(found.ids)
        of_found = {each.id: self._named.get((each.class_name, each.is_thing)) for each in found.segments}
        void = {each: shared.get((0, each), 0) for each in of_found}
        matched_due, matched_found = set(), set()
        for (one, other), pixels_shared in shared.items():
            category = self._place.get(segments.get(one, -1))
            if category is None or of_found.get(other) != category:
                continue
            iou = pixels_shared / (area_due[one] + area_found[other] - pixels_shared - void[other])
            if iou > 0.5:  # so that there is one match at most
                counts[category] += [iou, 1, 0, 0]
                matched_due.add(one)
                matched_found.add(other)
        for one, category_id in segments.items():
            place = self._place.get(category_id)
            if one not in matched_due and place is not None:
                counts[place, 3] += 1
        for other, place in of_found.items():
            if place is None or other in matched_found or not area_found.get(other):
                continue
            left_out = void[other] + sum(
                shared.get((crowd, other), 0) for crowd, category_id in crowds.items() if self._place.get(category_id) == place
            )
            counts[place, 2] += left_out <= 0.5 * area_found[other]
        return counts


class Semantic:
    """Takes each image's semantic map, and counts pixels."""

    def __init__(self, truth: GroundTruth, classes: Sequence[str] | None) -> None:
        self.notes: list[str] = []
        self._truth = truth
        self._classes = classes
        self._counts: list[NDArray[np.int64]] = [np.zeros((0, 3), np.int64)] * len(truth.images)

    def add(self, place: int, found: Detections) -> None:
        """Takes what was found on the image at this place."""
        if found.semantic is None:
            raise InvalidArgumentError(
                f"{self._truth.source} holds semantic maps, but the model predicts none; give a COCO file"
            )
        path = Path(self._truth.folder or ".") / self._truth.annotations[place]["file_name"]
        due = _pixels(path, found.image_size, 2)
        # Detectron2's own ignore labels: 255, and 65535 of datasets with more classes.
        is_known = due != (255 if found.semantic.dtype == np.uint8 else 65535)
        due, said = due[is_known], found.semantic[is_known].astype(np.int64)
        highest = int(due.max(initial=-1))
        if self._classes is not None and highest >= len(self._classes):
            raise InvalidArgumentError(
                f"{path.name} has class {highest}, but the model has {len(self._classes)} classes; give maps of its class ids",
                value=highest,
            )
        is_said = said != VOID[str(found.semantic.dtype)]
        length = max(highest, int(said[is_said].max(initial=-1))) + 1
        parts = (due[due == said], due, said[is_said])
        self._counts[place] = np.stack([np.bincount(each, minlength=length) for each in parts], axis=1)

    def finish(self) -> dict[str, Task]:
        """The task, by its name."""
        length = max(len(each) for each in self._counts)
        count = Counter(self._classes or ())
        names = [name if count[name] == 1 else f"{name} ({number})" for number, name in enumerate(self._classes or ())]
        names += [str(number) for number in range(len(names), length)]
        counts = np.stack([np.pad(each, ((0, len(names) - len(each)), (0, 0))) for each in self._counts]).astype(np.float64)
        groups, pixels = {"m{}": (True,) * len(names)}, counts[:, :, 1].sum(axis=0)
        return {"semantic": _task("semantic", names, _OF_SEMANTIC, "pixels", pixels, SemanticCounts(counts), groups)}


def _task(
    name: str,
    classes: Sequence[str],
    columns: tuple[str, ...],
    unit: str,
    counts: NDArray[np.float64],
    statistics: PanopticCounts | SemanticCounts,
    groups: Mapping[str, tuple[bool, ...]],
) -> Task:
    """A task whose metrics are what its statistics give for each image once."""
    values = statistics.values(np.ones((1, len(statistics.counts))))
    metrics = {key: float(value[0]) for key, value in means(values, columns, groups).items()}
    whole = tuple(int(each) for each in counts)
    return Task(name, metrics, tuple(classes), columns, values[0], unit, whole, statistics, groups)


def _areas(ids: NDArray[Any]) -> dict[int, int]:
    values, pixels = np.unique(ids, return_counts=True)
    return dict(zip(values.tolist(), pixels.tolist(), strict=True))


def _segment_ids(path: Path, size: tuple[int, int]) -> NDArray[np.int64]:
    """A panoptic PNG's segment ids: red + 256 green + 65536 blue."""
    pixels = _pixels(path, size, 3)
    ids: NDArray[np.int64] = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
    return ids


def _pixels(path: Path, size: tuple[int, int], dimensions: int) -> NDArray[np.int64]:
    """A PNG's pixels as they are stored.

    Raises:
        InvalidArgumentError: It cannot be read, has other channels, or another size than the image.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture).astype(np.int64)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as exc:
        raise InvalidArgumentError(f"cannot read the map {path} ({exc}); give a PNG", value=str(path)) from exc
    if pixels.shape != (*size, 3)[:dimensions]:
        what = "one value per pixel" if dimensions == 2 else "red, green and blue"
        raise InvalidArgumentError(
            f"the map {path} has the shape {pixels.shape}; give {what}, at the image's size {size}", value=pixels.shape
        )
    return pixels
