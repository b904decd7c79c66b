"""How often `compare` says "clear" of two models that are equally good, and what it takes beside `evaluate`.

Both models find each object with the same probability, its box as far off, and as much that is not there; so each "clear" is
one by chance, of which an interval of 95% should have 5%. The class "dog" has two objects on each image, "cat" one on the first
few images alone. The second table is of a dataset of 80 classes with masks.

Usage::

    python benchmarks/bench_compare.py [--trials 200] [--images 2000]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bentoml_detectron import Detections, compare, evaluate, masks

SIZE = (60, 80)
CASES = ((2, 2), (3, 3), (5, 5), (10, 10), (20, 20), (50, 50), (20, 1), (20, 3), (50, 2))
"""Images, and how many of them have a cat."""


def found_by_a_model(rng: np.random.Generator, objects: list[tuple[NDArray[Any], int]], classes: int) -> Detections:
    """Most of the objects, some pixels off, and now and then one that is not there; with masks of whole boxes."""
    rows = [(box + rng.normal(0, 2, 4), rng.uniform(0.3, 1), label) for box, label in objects if rng.random() < 0.85]
    if rng.random() < 0.4:
        rows.append((np.array([5, 5, 30, 30]) + rng.normal(0, 4, 4), rng.uniform(0.2, 0.8), int(rng.integers(classes))))
    rows.sort(key=lambda each: -each[1])
    boxes = np.array([each[0] for each in rows], np.float32).reshape(-1, 4)
    labels = np.array([each[2] for each in rows], np.int64)
    names = tuple(str(each) for each in labels)
    return Detections(SIZE, boxes, np.array([each[1] for each in rows], np.float32), labels, names, [rle(box) for box in boxes])


def rle(box: NDArray[Any]) -> masks.RLE:
    x0, y0, x1, y1 = np.clip(box.round(), 0, (80, 60, 80, 60)).astype(int)
    bitmap = np.zeros(SIZE, bool)
    bitmap[y0:y1, x0:x1] = True
    return masks.encode(bitmap)


def dataset(rng: np.random.Generator, labels: list[list[int]], classes: int) -> tuple[Any, list[dict[int, Detections]]]:
    """A ground truth with objects of these classes on each image, and what two models find there."""
    annotations: list[dict[str, Any]] = []
    found: list[dict[int, Detections]] = [{}, {}]
    for image, own in enumerate(labels):
        corners = rng.uniform(0, 35, (len(own), 2))
        boxes = np.concatenate([corners, corners + rng.uniform(10, 24, (len(own), 2))], axis=1)
        for box, label in zip(boxes, own, strict=True):
            sides = box[2:] - box[:2]
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": label + 1, "iscrowd": 0,
                "bbox": [*box[:2], *sides], "area": float(sides.prod()), "segmentation": dict(rle(box)),
            })  # fmt: skip
        for each in found:
            each[image] = found_by_a_model(rng, list(zip(boxes, own, strict=True)), classes)
    images = [{"id": each, "file_name": "", "height": SIZE[0], "width": SIZE[1]} for each in range(len(labels))]
    categories = [{"id": each + 1, "name": str(each)} for each in range(classes)]
    return {"images": images, "annotations": annotations, "categories": categories}, found


def report_chance(trials: int) -> None:
    print(f"| images | with a cat | all AP | dog AP | cat AP |\n|---|---|---|---|---|   ({trials} trials)")
    for images, cats in CASES:
        clear = np.zeros((trials, 3))
        for seed in range(trials):
            rng = np.random.default_rng(seed)
            truth, (one, other) = dataset(rng, [[0, 0, 1][: 2 + (each < cats)] for each in range(images)], 2)
            compared = compare(evaluate(one, truth), evaluate(other, truth), resamples=300, seed=seed)
            per_class = compared.per_class["box"]
            differences = (compared.metrics["box"]["AP"], per_class["0"]["AP"], per_class["1"]["AP"])
            clear[seed] = [each.is_clear for each in differences]
        print(f"| {images} | {cats} | {' | '.join(f'{each:.1%}' for each in clear.mean(axis=0))} |", flush=True)


def report_time(images: int) -> None:
    rng = np.random.default_rng(0)
    truth, (one, other) = dataset(rng, [rng.integers(0, 80, 8).tolist() for _ in range(images)], 80)
    start = time.perf_counter()
    evaluations = evaluate(one, truth), evaluate(other, truth)
    between = time.perf_counter()
    compare(*evaluations)
    end = time.perf_counter()
    print(f"\n{images:,} images, {len(truth['annotations']):,} objects: both evaluated in {between - start:.1f} s, ", end="")
    print(f"compared by 1,000 resamples in {end - between:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--images", type=int, default=2000)
    options = parser.parse_args()
    report_chance(options.trials)
    report_time(options.images)


if __name__ == "__main__":
    main()
