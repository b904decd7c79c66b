"""How long the JSON of 100 instances takes, from what a Mask R-CNN gives to bytes, and how many bytes it has.

The instances are on an image of 1066 x 800, with 80 classes and soft masks of 28 x 28 as in ``bench_masks.py``, the median of
the boxes' longer sides 150 pixels. Compared are

- ours: `Detections` from the soft masks, and `Detections.to_json`;
- Detectron2's: ``detector_postprocess``, which pastes the masks, then ``instances_to_coco_json`` and ``json.dumps``;
- its second half alone, with the masks already pasted;
- bitmaps: pasted, then ``json.dumps`` of ``tolist()`` of every field.

Usage::

    python benchmarks/bench_results.py [--pairs 5] [--count 100]
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from typing import Any

warnings.simplefilter("ignore")

import numpy as np
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances

import bench_masks
import timing
from bentoml_detectron.forward import Output
from bentoml_detectron.options import Options
from bentoml_detectron.outputs import Names, detections
from bentoml_detectron.results import Detections

HEIGHT, WIDTH, MEDIAN = 800, 1066, 150


def raw(count: int, name: str) -> Instances:
    """What the model gives, with its soft masks (count, 1, 28, 28) in this field."""
    bench_masks.HEIGHT, bench_masks.WIDTH = HEIGHT, WIDTH
    soft, boxes = bench_masks.inputs(count, MEDIAN)
    rng = np.random.default_rng(1)
    scores = torch.tensor(np.sort(rng.uniform(0.05, 1, count).astype(np.float32))[::-1].copy())
    fields = {"pred_boxes": Boxes(boxes), "scores": scores, "pred_classes": torch.tensor(rng.integers(0, 80, count))}
    return Instances((HEIGHT, WIDTH), **fields, **{name: soft[:, None]})


def pasted(instances: Instances) -> Instances:
    """Detectron2's results; it changes the boxes that it is given."""
    copied = Instances(instances.image_size, **instances.get_fields())
    copied.pred_boxes = instances.pred_boxes.clone()
    return detector_postprocess(copied, HEIGHT, WIDTH)


def ways(count: int) -> dict[str, Callable[[], bytes]]:
    """Each way to the bytes."""
    output, given, names = Output(instances=raw(count, "roi_masks")), raw(count, "pred_masks"), Names(None)
    done = pasted(given)

    def ours() -> bytes:
        return detections(output, (HEIGHT, WIDTH), Options(), names).to_json().encode()

    def detectron2() -> bytes:
        return json.dumps(instances_to_coco_json(pasted(given), 1)).encode()

    def second_half() -> bytes:
        return json.dumps(instances_to_coco_json(done, 1)).encode()

    def bitmaps() -> bytes:
        results = pasted(given)
        columns: dict[str, Any] = {
            "boxes": results.pred_boxes.tensor, "scores": results.scores, "classes": results.pred_classes,
            "masks": results.pred_masks,
        }  # fmt: skip
        return json.dumps({name: column.tolist() for name, column in columns.items()}).encode()

    return {
        "ours": ours,
        "paste, instances_to_coco_json, json.dumps": detectron2,
        "instances_to_coco_json, json.dumps": second_half,
        "paste, tolist(), json.dumps": bitmaps,
    }


def check(found: dict[str, bytes]) -> None:
    """Ends the benchmark unless all ways say the same."""
    own, whole, half, bitmaps = found.values()
    one = Detections.from_json(own)
    coco, plain = json.loads(whole), json.loads(bitmaps)
    same = one.to_coco(1) == coco == json.loads(half)
    same &= np.array_equal(one.boxes, np.array(plain["boxes"], np.float32)) and one.class_ids.tolist() == plain["classes"]
    same &= np.array_equal(one.to_instances().pred_masks, np.array(plain["masks"]))
    if not same or not len(one):
        raise SystemExit("the ways differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--count", type=int, default=100)
    options = parser.parse_args()
    ours, *others = ways(options.count).items()
    found = {name: way() for name, way in (ours, *others)}  # warms all up, too
    check(found)
    print(f"{options.count} instances at {WIDTH} x {HEIGHT}, {options.pairs} pairs, {torch.get_num_threads()} threads")
    print("| way | ms | bytes | times as long as ours, pair by pair |\n|---|---|---|---|")
    own: list[float] = []
    for name, way in others:
        first, milliseconds, spread = timing.compare(ours[1], way, options.pairs)
        own += first
        print(f"| {name} | {milliseconds:,.1f} | {len(found[name]):,} | {spread} |")
    print(f"| {ours[0]} | {statistics.median(own) * 1e3:,.1f} | {len(found[ours[0]]):,} | |")


if __name__ == "__main__":
    main()
