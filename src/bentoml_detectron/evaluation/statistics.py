"""The result of an evaluation: each task's metrics, and the statistics that give them again for other image weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bentoml_detectron.evaluation.ground_truth import ImageId


class Statistics(Protocol):
    """What each image adds to a task's metrics."""

    def values(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Each class's metrics when each image is there so many times.

        Args:
            weights: (B, images) how many times.

        Returns:
            (B, classes, columns), NaN where a class has nothing to measure.
        """
        ...


@dataclass(frozen=True, slots=True)
class Task:
    """One task's metrics, from 0 to 1, NaN where there is nothing to measure.

    Attributes:
        name: "box", "mask", "keypoint", "panoptic" or "semantic".
        metrics: Over all classes, by their usual names.
        classes: Names.
        columns: Names of the metrics of each class.
        per_class: (classes, columns) float64.
        unit: What `counts` counts: instances, segments or pixels.
        counts: How many of these the ground truth has of each class.
    """

    name: str
    metrics: Mapping[str, float]
    classes: tuple[str, ...]
    columns: tuple[str, ...]
    per_class: NDArray[np.float64] = field(repr=False)
    unit: str
    counts: tuple[int, ...]
    _statistics: Statistics = field(repr=False)
    _groups: Mapping[str, tuple[bool, ...]] = field(repr=False)

    def rows(self) -> Iterator[tuple[str, list[float], int]]:
        """Each class's name, metrics and count."""
        yield from zip(self.classes, self.per_class.tolist(), self.counts, strict=True)

    def resampled(self, weights: NDArray[np.float64]) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64]]:
        """The metrics when each image is there so many times.

        Args:
            weights: (B, images) how many times.

        Returns:
            (B,) of each metric that is a mean over classes, and (B, classes, columns).
        """
        values = self._statistics.values(weights)
        return means(values, self.columns, self._groups), values

    def to_dict(self) -> dict[str, Any]:
        """As plain data; None for NaN."""
        return {
            "metrics": {name: plain(value) for name, value in self.metrics.items()},
            "classes": {
                name: {**dict(zip(self.columns, map(plain, values), strict=True)), self.unit: count}
                for name, values, count in self.rows()
            },
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        images: Ids of the images, in order.
        tasks: By name: "box", "mask" and "keypoint", or "panoptic", or "semantic".
        notes: What a reader of the numbers should know.
    """

    images: tuple[ImageId, ...]
    tasks: Mapping[str, Task]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON; None where there is nothing to measure."""
        tasks = {name: task.to_dict() for name, task in self.tasks.items()}
        return {"images": len(self.images), "notes": list(self.notes), "tasks": tasks}


def plain(value: float) -> float | None:
    """The number, or None for NaN, which JSON has not."""
    return None if np.isnan(value) else float(value)


def means(
    values: NDArray[np.float64], columns: tuple[str, ...], groups: Mapping[str, tuple[bool, ...]]
) -> dict[str, NDArray[np.float64]]:
    """Means over the classes of each group that have something to measure.

    Args:
        values: (B, classes, columns).
        columns: Names of the last axis.
        groups: Which classes belong to it, by what a column becomes there, as "{}_things".

    Returns:
        (B,) by name, NaN where no class has anything to measure.
    """
    found = {}
    for name, members in groups.items():
        chosen = values[:, list(members)]
        is_there = ~np.isnan(chosen)
        with np.errstate(invalid="ignore"):
            average = np.where(is_there, chosen, 0).sum(axis=1) / is_there.sum(axis=1)
        found.update({name.format(column): average[:, place] for place, column in enumerate(columns)})
    return found
