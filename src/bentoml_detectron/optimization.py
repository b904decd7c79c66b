"""`optimize`: calibrates a saved model for int8 on a user's own images, measures it, and saves it if it is worth it."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from bentoml import Model, Tag

from bentoml_detectron import errors, imports, store
from bentoml_detectron.errors import ImageError, InvalidArgumentError, InvalidModelError, OptimizationError
from bentoml_detectron.images import ImageLike
from bentoml_detectron.results import Detections

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bentoml_detectron.engines import Precision
    from bentoml_detectron.predictor import Predictor

_T = TypeVar("_T")
Track: TypeAlias = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Gives the items on that it is given, and shows how many of them are done under a title."""
Measure: TypeAlias = "Callable[[Predictor], Mapping[str, float]]"

METADATA = "optimization"
"""Under what BentoML's metadata of the new model hold the report."""
MOST_CALIBRATED, MOST_COMPARED = 100, 200
MOST_LOST = 0.008
"""Most that a metric of annotated images, from 0 to 1, may lose: 0.8 points."""
LEAST_ALIKE = 0.95
"""Least share of detections that both precisions find, where there are no annotations."""
LIKELY = 0.5
"""Score from which on a detection must be found in the other precision, too."""
_LESS = 0.2  # of a score, at most


@dataclass(frozen=True, slots=True)
class Report:
    """What int8 does to a model on this machine.

    Attributes:
        source: Tag of the model.
        precision: "int8".
        calibrated: Images that ranges were measured on.
        compared: Images that times and agreement are of.
        milliseconds: Median of one image, by precision, measured in turn.
        times_as_fast: As fp32: the median of the images' ratios.
        alike: Share of the likely detections, or of the pixels' classes, that are the same in fp32 and int8; None where there
            are none.
        before: Metrics of annotated images in fp32; empty without annotations.
        after: The same in int8.
        problems: Why it is not worth it, a line each.
        is_forced: Whether it was saved in spite of these.
    """

    source: str
    precision: str
    calibrated: int
    compared: int
    milliseconds: dict[str, float]
    times_as_fast: float
    alike: float | None
    before: dict[str, float]
    after: dict[str, float]
    problems: tuple[str, ...] = ()
    is_forced: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As plain values, without `alike` where it is None, which BentoML's metadata do not take."""
        values = {**asdict(self), "problems": list(self.problems)}
        return {name: value for name, value in values.items() if value is not None}


def optimize(
    bento_model: str | Tag | Model,
    images: Sequence[ImageLike],
    *,
    name: str | Tag,
    measure: Measure | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    trusted: Sequence[str] = (),
    track: Track = lambda items, title, count: items,
) -> tuple[Model, Report]:
    """Calibrates a saved model for int8, measures what that does, and saves it as a new one.

    Ranges are measured on at most `MOST_CALIBRATED` of the images, evenly chosen; times and agreement on at most
    `MOST_COMPARED`. The new model has the same weights and config and can be loaded in every precision.

    Args:
        bento_model: The model, or its tag, in BentoML's model store.
        images: A user's own, as the model will see them; a hundred will do.
        name: Of the new model, or a tag with a version.
        measure: Gives metrics from 0 to 1, the higher the better, of a predictor on annotated images; NaN is none.
        force: Whether to save it in spite of the report's problems.
        trust_remote_code: As in `load_model`.
        trusted: As in `load_model`.
        track: Is called for each loop that takes long.

    Returns:
        The new model, whose metadata hold the report, and the report.

    Raises:
        InvalidArgumentError: (``ValueError``) There are no images, or `name` is no tag.
        SaveError: The new model's version exists already.
        OptimizationError: The model in int8 is slower than in fp32, or drifts more than allowed; nothing was saved.
        DetectronError: Any other error that `load_predictor` raises.
    """
    if isinstance(images, (str, bytes)) or not isinstance(images, Sequence):
        raise InvalidArgumentError(f"images must be a list, not {type(images).__name__}", value=type(images))
    if not images:
        raise InvalidArgumentError("there are no images to calibrate on; give some typical input images", value=0)
    store.check_new(name)
    found = store.resolve(bento_model)

    # What may be wrong with these is said before PyTorch is imported, which takes seconds.
    with imports.for_less():
        from bentoml_detectron import engines
        from bentoml_detectron.model import load, module_of, usual_device
        from bentoml_detectron.predictor import Predictor

    engines.check("int8")
    saved = store.open_model(found, trust_remote_code=trust_remote_code, trusted=trusted)
    store.manifest_of(found, saved)  # or all would be for nothing
    module = module_of(load(saved, "cpu"))

    def predictor(view: Any) -> Predictor:
        return Predictor(view, saved.input, saved.dataset, batch="exact")

    chosen = _spread(images, MOST_CALIBRATED)

    def run(view: Any) -> None:
        for image in track(chosen, "measuring ranges", len(chosen)):
            _found(predictor(view), image)

    with usual_device():
        calibration = engines.calibrate(module, run)
    if not calibration:
        raise OptimizationError(
            f"{found.tag} has no convolutions that can run in int8; serve it as it is", value=("no convolutions",)
        )
    names: list[Precision] = ["fp32", "int8"]
    names += ["bf16"] if engines.has_bf16() else []
    with usual_device():
        predictors = {each: predictor(engines.accelerated(module, each, calibration)) for each in names}
    compared = _spread(images, MOST_COMPARED)
    seconds, shares = _compared(predictors, track(compared, "comparing", len(compared)), compared[0])
    before, after = ({} if measure is None else _known(measure(predictors[each])) for each in ("fp32", "int8"))
    report = Report(
        source=str(found.tag),
        precision="int8",
        calibrated=len(chosen),
        compared=len(compared),
        milliseconds={each: round(statistics.median(found) * 1e3, 3) for each, found in seconds.items()},
        times_as_fast=round(statistics.median(a / b for a, b in zip(seconds["fp32"], seconds["int8"], strict=True)), 3),
        alike=round(float(np.mean(shares)), 4) if shares else None,
        before=before,
        after=after,
    )
    against = tuple(problems(report))
    if against and not force:
        raise OptimizationError(
            f"{found.tag} in int8 is not worth it: {'; '.join(against)}. Nothing was saved; to save it "
            "anyway, use --force (force=True)",
            value=against,
        )
    report = Report(**{**asdict(report), "problems": against, "is_forced": bool(against)})
    return store.save_calibrated(found, saved, name, calibration, {METADATA: report.to_dict()}), report


def _spread(images: Sequence[_T], most: int) -> list[_T]:
    """At most so many, from the first to the last."""
    places = np.unique(np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int))
    return [images[place] for place in places]


def _known(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without those that are NaN, as of annotations that have none of a task's: they say nothing of a drop."""
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _found(predictor: Predictor, image: ImageLike) -> Detections:
    """What is found on an image, or why nothing, by the image's name.

    Raises:
        InvalidModelError: The model gives no detections.
    """
    try:
        found: object = predictor([image])[0]
    except ImageError as exc:
        if isinstance(image, (str, os.PathLike)):
            raise errors.named(exc, os.fspath(image)) from exc
        raise
    if not isinstance(found, Detections):
        raise InvalidModelError(
            f"the model must give Detections, not {type(found).__name__}; without them int8 cannot be compared with fp32",
            value=found,
        )
    return found


def _compared(
    predictors: Mapping[Any, Predictor], images: Iterable[ImageLike], first: ImageLike
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each image by precision, in turn, and how alike fp32 and int8 are on each that tells."""
    for each in predictors.values():  # what is made at the first run
        _found(each, first)
    seconds: dict[str, list[float]] = {each: [] for each in predictors}
    shares: list[float] = []
    for image in images:
        found: dict[str, Detections] = {}
        for name, predictor in predictors.items():
            start = time.perf_counter()
            found[name] = _found(predictor, image)
            seconds[name].append(time.perf_counter() - start)
        shares += [] if (share := alike(found["fp32"], found["int8"])) is None else [share]
    return seconds, shares


def problems(report: Report) -> list[str]:
    """What is against a model in int8, a line each."""
    found = []
    if report.times_as_fast < 1:
        found.append(f"it is slower than fp32 here: {report.times_as_fast:.2f} times as fast, by the median over the images")
    for name, value in report.before.items():
        lost = value - report.after.get(name, 0.0)
        if lost > MOST_LOST:
            found.append(f"{name} falls by {100 * lost:.2f} points, but at most {100 * MOST_LOST:.1f} are allowed")
    if report.before:
        return found
    if report.alike is None:
        found.append(f"nothing with a score of {LIKELY} or more was found on the images, so its drift is unknown")
    elif report.alike < LEAST_ALIKE:
        found.append(f"only {report.alike:.1%} of its detections agree with those of fp32, but {LEAST_ALIKE:.0%} are required")
    return found


def alike(one: Detections, other: Detections) -> float | None:
    """How alike two results for one image are.

    Returns:
        Of the detections that score at least `LIKELY` in either, the share that has one of the same class in the other, with an
        intersection over union of 0.5 at least and at most 0.2 less of a score; of maps, the share of pixels of the same class;
        the less where there are both. None where there are no such detections and no map.
    """
    shares = []
    pairs = [(one, other), (other, one)]
    count = sum(int((each.scores >= LIKELY).sum()) for each in (one, other))
    if count:
        shares.append(sum(_matched(first, then) for first, then in pairs) / count)
    maps = [_classes(each) for each in (one, other)]
    if maps[0] is not None and maps[1] is not None:
        shares.append(float((maps[0] == maps[1]).mean()))
    return min(shares, default=None)


def _matched(one: Detections, other: Detections) -> int:
    """How many likely detections of one are in the other."""
    likely, near = one.scores >= LIKELY, other.scores >= LIKELY - _LESS
    overlap = _ious(_corners(one.boxes[likely]), _corners(other.boxes[near])) >= 0.5
    same = one.class_ids[likely][:, None] == other.class_ids[near][None]
    close = other.scores[near][None] >= one.scores[likely][:, None] - _LESS
    return int((overlap & same & close).any(axis=1).sum())


def _corners(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Boxes as XYXY; rotated ones (XYWHA) as those around them."""
    if boxes.shape[1] == 4:
        return boxes
    x, y, width, height, angle = boxes.T
    sine, cosine = np.abs(np.sin(np.radians(angle))), np.abs(np.cos(np.radians(angle)))
    half = (width * cosine + height * sine) / 2, (width * sine + height * cosine) / 2
    return np.stack([x - half[0], y - half[1], x + half[0], y + half[1]], axis=1)


def _ious(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, M) intersections over unions."""
    low, high = np.maximum(one[:, None, :2], other[None, :, :2]), np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(each[:, 2:] - each[:, :2], axis=1) for each in (one, other)]
    return np.asarray(shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-9))


def _classes(found: Detections) -> NDArray[Any] | None:
    """The class of each pixel, where there is a map."""
    from bentoml_detectron import selftest

    return found.semantic if found.panoptic is None else selftest.panoptic_classes(found)
