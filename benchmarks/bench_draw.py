"""How long it takes to draw 100 instances, with masks, boxes and labels, on a picture of 1920 x 1080.

Masks and boxes are as in ``bench_masks.py``, the median of the boxes' longer sides 200 pixels; the picture is smooth noise.
`draw` is compared with Detectron2's ``Visualizer`` from its detections to its picture, and with other ways through supervision:

- MaskAnnotator: from supervision's own reading of the RLEs;
- MaskAnnotator, crops: from `Detections.to_supervision`, which cuts the RLEs itself;
- MaskAnnotator, bitmaps: from (N, H, W) bool;
- PolygonAnnotator: outlines, which leave the masks unfilled.

Usage::

    python benchmarks/bench_draw.py [--pairs 5] [--count 100]
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from typing import Any

warnings.simplefilter("ignore")

import numpy as np
import supervision as sv
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image

import bench_masks
import timing
from bentoml_detectron import draw, masks
from bentoml_detectron.results import Detections

HEIGHT, WIDTH, MEDIAN = 1080, 1920, 200


def inputs(count: int) -> tuple[np.ndarray, Detections, Instances]:
    """A picture, and what is on it, as ours and as Detectron2's."""
    bench_masks.HEIGHT, bench_masks.WIDTH = HEIGHT, WIDTH
    soft, boxes = bench_masks.inputs(count, MEDIAN)
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 256, (27, 48, 3), dtype=np.uint8))
    picture = np.array(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    rles = masks.from_roi_masks(soft, boxes, (HEIGHT, WIDTH))
    scores, classes = np.linspace(1, 0.05, count, dtype=np.float32), rng.integers(0, 80, count)
    found = Detections((HEIGHT, WIDTH), boxes.numpy(), scores, classes, ("person",) * count, rles)
    instances = Instances((HEIGHT, WIDTH), pred_boxes=Boxes(boxes), scores=torch.tensor(scores))
    instances.pred_classes = torch.tensor(classes)
    instances.pred_masks = torch.tensor(np.stack([masks.decode(rle) for rle in rles]))
    return picture, found, instances


def through_supervision(picture: np.ndarray, detections: sv.Detections, annotator: Any) -> np.ndarray:
    """Masks by this annotator, then boxes and labels."""
    scene = annotator.annotate(picture.copy(), detections)
    return sv.LabelAnnotator().annotate(sv.BoxAnnotator().annotate(scene, detections), detections)


def ways(count: int) -> dict[str, Callable[[], np.ndarray]]:
    picture, found, instances = inputs(count)

    def visualizer() -> np.ndarray:
        return Visualizer(picture[:, :, ::-1]).draw_instance_predictions(instances).get_image()[:, :, ::-1]

    def its_own_crops() -> np.ndarray:
        detections = found.to_supervision()
        x, y, w, h = np.array([masks.bounding_box(rle) for rle in found.masks or []]).T
        whole = np.stack([x, y, x + w - 1, y + h - 1], axis=1)
        detections.mask = sv.CompactMask.from_coco_rle(found.masks, whole, found.image_size)
        return through_supervision(picture, detections, sv.MaskAnnotator())

    def bitmaps() -> np.ndarray:
        detections = found.to_supervision()
        detections.mask = np.stack([masks.decode(rle) for rle in found.masks or []])
        return through_supervision(picture, detections, sv.MaskAnnotator())

    return {
        "draw": lambda: draw(picture, found),
        "Visualizer": visualizer,
        "MaskAnnotator": its_own_crops,
        "MaskAnnotator, crops": lambda: through_supervision(picture, found.to_supervision(), sv.MaskAnnotator()),
        "MaskAnnotator, bitmaps": bitmaps,
        "PolygonAnnotator": lambda: through_supervision(picture, found.to_supervision(), sv.PolygonAnnotator()),
    }


def check(count: int) -> None:
    """Ends the benchmark unless `draw` colors the same pixels as supervision's annotator, alike, and as Visualizer fills."""
    picture, found, instances = inputs(count)
    only = Detections(found.image_size, np.zeros((count, 4)), found.scores, found.class_ids, found.class_names, found.masks)
    ours = draw(picture, only, labels=False).astype(int)
    theirs = sv.MaskAnnotator().annotate(picture.copy(), found.to_supervision()).astype(int)
    ours[:4, :4] = theirs[:4, :4] = 0  # the empty boxes
    masked = instances.pred_masks.any(dim=0).numpy()
    masked[:4, :4] = False
    changed = (ours != picture).any(axis=2)
    changed[:4, :4] = False
    if abs(ours - theirs).max() > 2 or (changed & ~masked).any() or (masked & ~changed).mean() > 0.01:
        raise SystemExit("the masks differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--count", type=int, default=100)
    options = parser.parse_args()
    check(options.count)
    ours, *others = ways(options.count).items()
    for _, way in (ours, *others):
        way()
    print(f"{options.count} instances at {WIDTH} x {HEIGHT}, {options.pairs} pairs, {torch.get_num_threads()} threads")
    print("| way | ms | times as long as draw, pair by pair |\n|---|---|---|")
    own: list[float] = []
    for name, way in others:
        first, milliseconds, spread = timing.compare(ours[1], way, options.pairs)
        own += first
        print(f"| {name} | {milliseconds:,.1f} | {spread} |")
    print(f"| {ours[0]} | {statistics.median(own) * 1e3:,.1f} | |")


if __name__ == "__main__":
    main()
