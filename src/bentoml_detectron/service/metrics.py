"""A worker's Prometheus metrics, on BentoML's ``/metrics``."""

from __future__ import annotations

import math
import os
from collections import Counter as Counts
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from prometheus_client.core import Metric

    from bentoml_detectron.results import Detections

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STAGES = ("decode", "preprocess", "queue", "forward", "postprocess", "encode")


class Metrics:
    """A worker's counters; made in the worker, where BentoML has said how its processes share them."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        _forget_the_dead()
        self._stages = Histogram(
            "detectron_stage_seconds", "Seconds in each stage of a request; forward and postprocess are per batch", ["stage"],
            buckets=SECONDS,
        )  # fmt: skip
        self._batch = Histogram("detectron_batch_images", "Images in a batch", buckets=(1, 2, 4, 8, 16, 32, 64))
        self._pixels = Histogram(
            "detectron_batch_pixels", "Pixels in a batch, padding included", buckets=(1e5, 3e5, 1e6, 3e6, 1e7, 3e7, 1e8)
        )
        self._waiting = Gauge(
            "detectron_requests_waiting", "Requests being read, waiting or running", multiprocess_mode="livesum"
        )
        self._found = Counter("detectron_detections", "Detections", ["class_name"])
        self._scores = _Histogram("detectron_scores", "Scores of detections", [i / 10 for i in range(1, 11)])
        self._empty = Counter("detectron_empty_results", "Images on which nothing was found")
        self._refused = Counter(
            "detectron_refused_requests", "Requests that were refused, or whose client disconnected", ["reason", "status"]
        )

    def observe(self, stage: str, value: float) -> None:
        """Takes what the engine tells."""
        if stage == "batch_size":
            self._batch.observe(value)
        elif stage == "batch_pixels":
            self._pixels.observe(value)
        elif stage in STAGES:
            self._stages.labels(stage).observe(value)

    def wait(self, change: int) -> None:
        """One request more, or less."""
        self._waiting.inc(change)

    def found(self, detections: Detections) -> None:
        """Counts what was found on an image."""
        if not len(detections) and detections.semantic is None:
            self._empty.inc()
        names = zip(detections.class_names, detections.class_ids.tolist(), strict=True)
        for each, count in Counts(name or str(label) for name, label in names).items():
            self._found.labels(each).inc(count)
        self._scores.observe(detections.scores)

    def refused(self, reason: str, status: int) -> None:
        """Counts a refusal, by the name of its error's class and by its status: nothing that a request says is a label."""
        self._refused.labels(reason, str(status)).inc()


class _Histogram:
    """A histogram that takes many values at once: Prometheus's own takes them one by one, which for the scores of 100
    detections costs as much as their JSON.

    It is stored as Prometheus's own, so that it is one where several processes are read, too.
    """

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        from prometheus_client import REGISTRY
        from prometheus_client.utils import floatToGoString
        from prometheus_client.values import ValueClass

        self._name, self._documentation, self._bounds = name, documentation, np.array(bounds)
        self._labels = [floatToGoString(bound) for bound in (*bounds, math.inf)]  # type: ignore[no-untyped-call]
        self._sum = ValueClass("histogram", name, f"{name}_sum", (), (), documentation)
        self._counts = [
            ValueClass("histogram", name, f"{name}_bucket", ("le",), (label,), documentation) for label in self._labels
        ]
        REGISTRY.register(self)

    def observe(self, values: NDArray[np.floating[Any]]) -> None:
        """Counts values of any number, (N,)."""
        if not len(values):
            return
        self._sum.inc(float(values.sum(dtype=np.float64)))
        counts = np.bincount(np.searchsorted(self._bounds, values), minlength=len(self._counts))
        for each, count in zip(self._counts, counts.tolist(), strict=True):
            if count:
                each.inc(count)

    def collect(self) -> Iterator[Metric]:
        """For a registry of one process."""
        from prometheus_client.core import HistogramMetricFamily

        totals = accumulate(each.get() for each in self._counts)
        buckets = list(zip(self._labels, totals, strict=True))
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self._sum.get())


def _forget_the_dead() -> None:
    """Removes the gauges of workers that were killed, which would count as waiting for ever what they had."""
    import psutil
    from prometheus_client import multiprocess

    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    for path in Path(folder).glob("gauge_live*_*.db") if folder else ():
        number = path.stem.rpartition("_")[2]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            with suppress(FileNotFoundError):  # another worker does the same
                multiprocess.mark_process_dead(int(number), folder)  # type: ignore[no-untyped-call]
