"""What a worker counts, in Prometheus's terms, on BentoML's ``/metrics``."""

from __future__ import annotations

import os
from collections import Counter as Counts
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bentoml_detectron.results import Detections

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STAGES = ("decode", "preprocess", "queue", "forward", "postprocess", "encode")


class Metrics:
    """A worker's counters; made in the worker, where BentoML has said how its processes share them."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        _forget_the_dead()
        self._stages = Histogram(
            "detectron_stage_seconds", "Time of a request's stages; forward and postprocess are a batch's", ["stage"],
            buckets=SECONDS,
        )  # fmt: skip
        self._batch = Histogram("detectron_batch_images", "Images in a batch", buckets=(1, 2, 4, 8, 16, 32, 64))
        self._pixels = Histogram(
            "detectron_batch_pixels", "Pixels in a batch, padding included", buckets=(1e5, 3e5, 1e6, 3e6, 1e7, 3e7, 1e8)
        )
        self._waiting = Gauge(
            "detectron_requests_waiting", "Requests that are being read, wait or run", multiprocess_mode="livesum"
        )
        self._found = Counter("detectron_detections", "Detections", ["class_name"])
        self._scores = Histogram("detectron_scores", "Scores of detections", buckets=tuple(i / 10 for i in range(1, 11)))
        self._empty = Counter("detectron_empty_results", "Images on which nothing was found")
        self._refused = Counter("detectron_refused_requests", "Requests that were refused or left", ["reason", "status"])

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

    def found(self, result: Any) -> None:
        """Counts what was found on an image; `result` may be any model's."""
        if not hasattr(result, "class_names"):
            return
        detections: Detections = result
        if not len(detections) and detections.semantic is None:
            self._empty.inc()
        names = zip(detections.class_names, detections.class_ids.tolist(), strict=True)
        for each, count in Counts(name or str(label) for name, label in names).items():
            self._found.labels(each).inc(count)
        for score in detections.scores.tolist():
            self._scores.observe(score)

    def refused(self, reason: str, status: int) -> None:
        """Counts a refusal, by the name of its error's class and by its status: nothing that a request says is a label."""
        self._refused.labels(reason, str(status)).inc()


def _forget_the_dead() -> None:
    """Removes the gauges of workers that were killed, which would count as waiting for ever what they had."""
    import psutil
    from prometheus_client import multiprocess

    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    for path in Path(folder).glob("gauge_live*_*.db") if folder else ():
        number = path.stem.rpartition("_")[2]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            multiprocess.mark_process_dead(int(number), folder)  # type: ignore[no-untyped-call]
