"""What each precision costs in AP: the demo model on images that its training never saw, from ``tools/train_demo.py``.

Of int8, ranges are measured on the 20 images that come with the package, which are the first of these.

Usage::

    python benchmarks/bench_precision.py [--images 200] [--device cuda:0]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import train_demo
from bentoml_detectron import Detections, Predictor, demo, engines
from bentoml_detectron.artifact import config


def ground_truth(count: int) -> COCO:
    """Of the first images that the model's training never saw."""
    truth = COCO()
    truth.dataset = train_demo.coco_dataset(count)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def aps(ground_truth: COCO, images: list[np.ndarray], predict: Callable[[np.ndarray], Detections]) -> list[float]:
    """AP, AP50 and AP75 of boxes, then of masks, in points."""
    rows = [row for image_id, image in enumerate(images, start=1) for row in predict(image).to_coco(image_id)]
    found = []
    with contextlib.redirect_stdout(io.StringIO()):
        for kind in ("bbox", "segm"):
            given = [{**row, "category_id": row["category_id"] + 1} for row in rows]
            if kind == "segm":
                given = [{key: value for key, value in row.items() if key != "bbox"} for row in given]
            evaluation = COCOeval(ground_truth, ground_truth.loadRes(given), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            found += [100 * value for value in evaluation.stats[:3]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    count, device = arguments.images, torch.device(arguments.device)
    truth = ground_truth(count)
    images = [image for _, image, _ in train_demo.test_images(count)]
    cfg, model = demo.config(), demo.predictor().model
    known = config.input_of(cfg)
    calibration = None
    here = ["fp32", *(["bf16"] if engines.has_bf16(device) else [])]
    if device.type == "cpu" and engines.has_int8():
        calibration = engines.calibrate(model, lambda each: Predictor(each, known, None, batch="exact")(demo.images()))
        here.append("int8")
    if device.type == "cuda":
        here.append("fp16")
    model.to(device)
    models = {"Detectron2's own": model, **{each: engines.accelerated(model, each, calibration) for each in here}}
    print(f"AP on {count} images, in points")
    print("| precision | box AP | AP50 | AP75 | mask AP | AP50 | AP75 |\n|---|---|---|---|---|---|---|")
    for name, each in models.items():
        predictor = Predictor(each, config.input_of(cfg), None, batch="exact")
        row = aps(truth, images, lambda image, predictor=predictor: predictor([image])[0])
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in row)} |", flush=True)


if __name__ == "__main__":
    main()
