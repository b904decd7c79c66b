"""`evaluate`: measures predictions, wherever they come from, against a ground truth. `compare`: compares two models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_detectron.errors import InvalidArgumentError
from bentoml_detectron.evaluation import ground_truth as truths
from bentoml_detectron.evaluation.comparison import Comparison, Difference, compare
from bentoml_detectron.evaluation.ground_truth import GroundTruth, ImageId
from bentoml_detectron.evaluation.statistics import Evaluation, Task
from bentoml_detectron.results import Detections

if TYPE_CHECKING:
    from bentoml_detectron.evaluation.average_precision import Instances
    from bentoml_detectron.evaluation.segmentation import Panoptic, Semantic

__all__ = ["Comparison", "Difference", "Evaluation", "GroundTruth", "Task", "compare", "evaluate"]


def evaluate(
    predictions: Mapping[ImageId, Detections] | Iterable[tuple[ImageId, Detections]],
    ground_truth: GroundTruth | str | Path | Mapping[str, Any],
    *,
    thing_classes: Sequence[str] | None = None,
    stuff_classes: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    panoptic_root: str | Path | None = None,
    keypoint_sigmas: Sequence[float] | None = None,
) -> Evaluation:
    """Measures predictions against a ground truth: AP, panoptic quality or IoU, by what the annotations are.

    COCO's instances give the AP of boxes, and of masks and keypoints where both the file and the model have them; panoptic
    segments give PQ; semantic maps give IoU. Classes go by their names. Crowds are as COCO has them.

    Args:
        predictions: What was found on each image, by the ground truth's image ids; of semantic maps, by their file names
            without the suffix. Any order.
        ground_truth: The path or the content of a COCO file (instances, person keypoints, panoptic), or a folder of semantic
            maps as PNG, whose pixels are the model's class ids, and 255 (65535 with more than 255 classes) where none is known.
        thing_classes: The model's names of things, by id; with them, classes that the model lacks are an error.
        stuff_classes: The model's names of stuff, by id.
        classes: Names of the only ones to evaluate; None: all of the ground truth.
        panoptic_root: Folder of the PNGs of a panoptic file; its path without ".json" unless given.
        keypoint_sigmas: One a keypoint, as pycocotools' ``kpt_oks_sigmas``. None: COCO's for 17 keypoints, else 1/K for K.

    Returns:
        The metrics, from 0 to 1, over all and by class.

    Raises:
        InvalidArgumentError: (``ValueError``) The ground truth cannot be read, images or classes of the two do not match, or
            the model gives nothing that it has.
        DependencyMissingError: pycocotools is not installed.

    Example::

        found = zip([image["id"] for image in content["images"]], predictor(paths))
        print(evaluate(found, "instances.json").tasks["box"].metrics["AP"])
    """
    truth = ground_truth
    if not isinstance(truth, GroundTruth):
        truth = truths.read(truth, panoptic_root=panoptic_root)
    if classes is not None:
        truth = truths.chosen(truth, classes)
    notes = check_names(truth, thing_classes, stuff_classes)
    collector = _collector(truth, thing_classes, stuff_classes, keypoint_sigmas)
    places = {each.id: place for place, each in enumerate(truth.images)}
    left = dict.fromkeys(places)
    for image_id, found in _pairs(predictions):
        if image_id not in left:
            fault = "is given twice" if image_id in places else f"is for no image of {truth.source}"
            raise InvalidArgumentError(f"the prediction for image {image_id!r} {fault}", value=image_id)
        if not isinstance(found, Detections):
            raise InvalidArgumentError(
                f"the prediction for image {image_id!r} must be Detections, not {type(found).__name__}", value=image_id
            ) from (found if isinstance(found, Exception) else None)
        place = places[image_id]
        due = truth.images[place].size
        if due is not None and found.image_size != due:
            name = truth.images[place].file_name
            raise InvalidArgumentError(
                f"{name} has {found.image_size[0]} rows and {found.image_size[1]} columns, but {truth.source} says "
                f"{due[0]} and {due[1]}; give the images that were annotated",
                value=name,
            )
        collector.add(place, found)
        del left[image_id]
    if left:
        names = [truth.images[places[each]].file_name for each in left]
        raise InvalidArgumentError(f"there is no prediction for {truths.listed(names)}; give one for every image", value=names)
    tasks = collector.finish()
    return Evaluation(tuple(places), tasks, (*notes, *collector.notes))


def _pairs(predictions: Any) -> Iterator[tuple[ImageId, Detections]]:
    for each in predictions.items() if isinstance(predictions, Mapping) else predictions:
        if not isinstance(each, (tuple, list)) or len(each) != 2:
            raise InvalidArgumentError(
                f"a prediction must be a pair of an image id and its Detections, not {type(each).__name__}", value=each
            )
        yield each[0], each[1]


def check_names(truth: GroundTruth, thing_classes: Sequence[str] | None, stuff_classes: Sequence[str] | None) -> list[str]:
    """Checks that a model has each class of a ground truth, by its name.

    Args:
        truth: The ground truth.
        thing_classes: As in `evaluate`; of None, and of none, nothing is checked.
        stuff_classes: The same of stuff.

    Returns:
        Notes on classes of the model's that the ground truth has not.

    Raises:
        InvalidArgumentError: (``ValueError``) The model lacks one, or has two of its name.
    """
    extra = []
    if thing_classes and truth.categories:
        extra += truths.check_names(truth, thing_classes, is_thing=True, others=stuff_classes or ())
    if stuff_classes and truth.kind == "panoptic":
        extra += truths.check_names(truth, stuff_classes, is_thing=False, others=thing_classes or ())
    if not extra:
        return []
    return [f"the model's classes {truths.listed(map(repr, extra))} are not evaluated: {truth.source} does not have them"]


def _collector(
    truth: GroundTruth,
    thing_classes: Sequence[str] | None,
    stuff_classes: Sequence[str] | None,
    keypoint_sigmas: Sequence[float] | None,
) -> Instances | Panoptic | Semantic:
    from bentoml_detectron.evaluation import average_precision, segmentation

    if truth.kind == "instances":
        return average_precision.Instances(truth, keypoint_sigmas, with_names=bool(thing_classes))
    if truth.kind == "panoptic":
        return segmentation.Panoptic(truth, with_things=bool(thing_classes), with_stuff=bool(stuff_classes))
    return segmentation.Semantic(truth, stuff_classes or thing_classes)
