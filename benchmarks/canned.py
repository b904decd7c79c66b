"""A service that costs its server's own work and next to nothing else: ``bentoml serve canned:service``.

Everything is the service's own but `Predictor.run` in the model's process: for each image it gives the same `Detections`, made
beforehand. The environment variable CANNED says how many, in an image of 640x480; the masks are as in ``bench_masks.py``, the
median of the boxes' longer sides 100 pixels.
"""

from __future__ import annotations

import os
from typing import Any

import bentoml
import numpy as np

from bentoml_detectron.service import apart

HEIGHT, WIDTH, MEDIAN = 480, 640, 100


def detections(count: int) -> Any:
    import bench_masks
    from bentoml_detectron import masks
    from bentoml_detectron.results import Detections

    bench_masks.HEIGHT, bench_masks.WIDTH = HEIGHT, WIDTH
    soft, boxes = bench_masks.inputs(count, MEDIAN)
    scores, classes = np.linspace(1, 0.05, count, dtype=np.float32), np.arange(count) % 10
    rles = masks.from_roi_masks(soft, boxes, (HEIGHT, WIDTH))
    return Detections((HEIGHT, WIDTH), boxes.numpy(), scores, classes, tuple(str(each) for each in classes), rles)


def main(file: int) -> None:
    """The model's process, as the service's own but for what it finds once it is loaded and tested."""
    found, serve = detections(int(os.environ.get("CANNED", "100"))), apart._serve

    def serve_canned(predictor: Any, connection: Any) -> None:
        predictor.run = lambda group, *given: [found] * len(group)
        serve(predictor, connection)

    apart._serve = serve_canned
    apart.main(file)


apart.START = "import sys; sys.path[:] = sys.argv[1:]; import canned; canned.main({})"
service = bentoml.detectron.get_service("digits:latest")
