"""`compare`: how far two models are apart, and how certain that is, by the bootstrap over images.

The bootstrap is that of Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13: images are drawn with
replacement, as many as there are, and the interval lies between percentiles of the differences. It is paired: both models are
measured on the same images of each draw. Each image's matches are found once, and metrics are accumulated from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bentoml_detectron.errors import InvalidArgumentError
from bentoml_detectron.evaluation.statistics import Evaluation, Task, plain

_DRAWS = 50
"""Resamples that are worked on at once."""
_FEWEST_DRAWS = 20
"""Resamples below which there is no interval."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A metric of one model less that of the other, and between what it is in most resamples; NaN where there is none.

    Attributes:
        value: On the images as they are.
        low: The interval's lower end.
        high: Its upper end.
    """

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, float | None]:
        """As plain data; None for NaN."""
        return {"value": plain(self.value), "low": plain(self.low), "high": plain(self.high)}


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found.

    Attributes:
        metrics: Differences over all classes, by task and metric.
        per_class: By task, class and metric.
        resamples: How often images were drawn.
        seed: Of the draws.
        confidence: The part of the resamples within each interval.
    """

    metrics: Mapping[str, Mapping[str, Difference]]
    per_class: Mapping[str, Mapping[str, Mapping[str, Difference]]]
    resamples: int
    seed: int
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        tasks = {}
        for task, metrics in self.metrics.items():
            classes = {
                name: {column: each.to_dict() for column, each in columns.items()}
                for name, columns in self.per_class[task].items()
            }
            tasks[task] = {"metrics": {name: each.to_dict() for name, each in metrics.items()}, "classes": classes}
        return {"resamples": self.resamples, "seed": self.seed, "confidence": self.confidence, "tasks": tasks}


def compare(
    evaluation: Evaluation, other: Evaluation, *, resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Comparison:
    """The differences of two evaluations on the same images, with bootstrap confidence intervals over images.

    Args:
        evaluation: Of one model.
        other: Of the model that it is compared with; a positive difference means that `evaluation` is better.
        resamples: How often images are drawn, 1 or more; of fewer than 20 there are no intervals, nor of one image.
        seed: Of the draws; the same gives the same intervals.
        confidence: Between 0 and 1.

    Returns:
        The differences of the tasks that both have.

    Raises:
        InvalidArgumentError: (``ValueError``) They are of different images, classes or annotations, or an argument is out of
            range.
    """
    numbers = isinstance(resamples, int) and isinstance(seed, int)
    if not numbers or resamples < 1 or not 0 < confidence < 1 or seed < 0:
        raise InvalidArgumentError(
            f"resamples={resamples}, seed={seed}, confidence={confidence}; they must be at least 1, at least 0, "
            "and between 0 and 1",
            value=(resamples, seed, confidence),
        )
    if evaluation.images != other.images:
        raise InvalidArgumentError("the evaluations are of different images; evaluate both on the same")
    shared = [name for name in evaluation.tasks if name in other.tasks]
    if not shared:
        raise InvalidArgumentError(
            f"one has {', '.join(evaluation.tasks)}, the other {', '.join(other.tasks)}; compare the same tasks"
        )
    metrics, per_class = {}, {}
    for name in shared:
        one, two = evaluation.tasks[name], other.tasks[name]
        if one.classes != two.classes:
            raise InvalidArgumentError(f"{name}: the evaluations are of different classes; evaluate both on the same")
        if one.counts != two.counts:
            raise InvalidArgumentError(f"{name}: the evaluations are of different annotations; evaluate both on the same")
        draws = np.random.default_rng(seed)  # the same for each task
        metrics[name], per_class[name] = _differences(one, two, draws, len(evaluation.images), resamples, confidence)
    return Comparison(metrics, per_class, resamples, seed, confidence)


def _differences(
    one: Task, two: Task, draws: np.random.Generator, images: int, resamples: int, confidence: float
) -> tuple[dict[str, Difference], dict[str, dict[str, Difference]]]:
    """Of a task's metrics, and of each class's."""
    of_means: dict[str, list[NDArray[np.float64]]] = {}
    of_classes = []
    for start in range(0, resamples, _DRAWS):
        size = min(_DRAWS, resamples - start)
        weights = draws.multinomial(images, np.full(images, 1 / images), size=size).astype(np.float64)
        (means, classes), (other_means, other_classes) = one.resampled(weights), two.resampled(weights)
        of_classes.append(classes - other_classes)
        for name, values in means.items():
            of_means.setdefault(name, []).append(values - other_means[name])
    tail = _tail(images, resamples, confidence)
    found = {
        name: _difference(one.metrics[name] - two.metrics[name], np.concatenate(parts), tail)
        for name, parts in of_means.items()
    }
    exact, drawn = one.per_class - two.per_class, np.concatenate(of_classes)
    per_class = {
        name: {
            column: _difference(float(exact[row, place]), drawn[:, row, place], tail)
            for place, column in enumerate(one.columns)
        }
        for row, name in enumerate(one.classes)
    }
    return found, per_class


def _tail(images: int, resamples: int, confidence: float) -> float | None:
    """The part of the draws to leave out at each end; None where there are too few of them, or one image alone.

    Percentiles of few images' draws are too near to each other. So the interval is that of Hesterberg's "expanded percentiles"
    ("What Teachers Should Know About the Bootstrap", The American Statistician 69, 2015): wider, as Student's t is wider than
    the normal distribution.
    """
    if images < 2 or resamples < _FEWEST_DRAWS:
        return None
    normal = NormalDist()
    z, v = normal.inv_cdf((1 + confidence) / 2), images - 1
    # Student's quantile by Cornish and Fisher: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.5.
    t = (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )
    return normal.cdf(-t * math.sqrt(images / v))


def _difference(value: float, drawn: NDArray[np.float64], tail: float | None) -> Difference:
    """A difference with the interval of what was drawn, where there is one."""
    if tail is None or np.isnan(drawn).all():
        return Difference(float(value), float("nan"), float("nan"))
    # Draws without a class tell of no difference. Without them, what is on a single image would be in each of the others.
    low, high = np.quantile(np.nan_to_num(drawn), [tail, 1 - tail])
    return Difference(float(value), float(low), float(high))
