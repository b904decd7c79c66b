"""A service that costs its server's own work and next to nothing else: ``bentoml serve canned:service``.

Everything is the service's own but `Predictor.run`: for each image it gives the same `Detections`, made beforehand. The
environment variable CANNED says how many, in an image of 640x480; the masks are as in ``bench_masks.py``, the median of the
boxes' longer sides 100 pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import bentoml
import numpy as np

import bench_masks
from bentoml_detectron import masks
from bentoml_detectron.predictor import Observe, Predictor, Prepared
from bentoml_detectron.results import Detections
from bentoml_detectron.service import loading

HEIGHT, WIDTH, MEDIAN = 480, 640, 100


def detections(count: int) -> Detections:
    bench_masks.HEIGHT, bench_masks.WIDTH = HEIGHT, WIDTH
    soft, boxes = bench_masks.inputs(count, MEDIAN)
    scores, classes = np.linspace(1, 0.05, count, dtype=np.float32), np.arange(count) % 10
    rles = masks.from_roi_masks(soft, boxes, (HEIGHT, WIDTH))
    return Detections((HEIGHT, WIDTH), boxes.numpy(), scores, classes, tuple(str(each) for each in classes), rles)


class Canned(Predictor):
    found = detections(int(os.environ.get("CANNED", "100")))

    def run(self, group: Sequence[Prepared], observe: Observe = lambda stage, seconds: None) -> list[Any]:
        return [self.found] * len(group)


loading.Predictor = Canned
service = bentoml.detectron.get_service("digits:latest")
