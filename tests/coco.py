"""Random ground truths and detections for what evaluates, and what faster-coco-eval makes of them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from bentoml_detectron import masks
from bentoml_detectron.results import Detections

NAMES = ("cat", "dog", "bird")
"""Of the model; the file has them in another order, under ids with gaps."""
IDS = {"bird": 2, "cat": 7, "dog": 90}
SIZE = (60, 80)


def bitmap_of(box: np.ndarray) -> np.ndarray:
    """(60, 80) bool, a diamond in an XYXY box, so that masks are no boxes."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    (x0, y0, x1, y1) = box
    return np.abs(x - (x0 + x1) / 2) / max(x1 - x0, 1) + np.abs(y - (y0 + y1) / 2) / max(y1 - y0, 1) < 0.5


def detections(boxes: Any, scores: Any, labels: Any, keypoints: Any = None, names: tuple[str, ...] = NAMES) -> Detections:
    """With masks, and the model's names."""
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    return Detections(
        SIZE,
        boxes,
        np.asarray(scores, np.float32),
        np.asarray(labels, np.int64),
        tuple(names[label] if names else "" for label in labels),
        [masks.encode(bitmap_of(box)) for box in boxes],
        keypoints,
    )


def annotation(
    number: int, image_id: Any, name: str, box: Any, *, crowd: bool = False, keypoints: Any = None
) -> dict[str, Any]:
    """One of COCO's, of an XYXY box with a diamond in it."""
    x0, y0, x1, y1 = map(float, box)
    bitmap = bitmap_of(np.array(box))
    posed = {} if keypoints is None else {"keypoints": keypoints, "num_keypoints": sum(each > 0 for each in keypoints[2::3])}
    return {
        "id": number, "image_id": image_id, "category_id": IDS[name], "iscrowd": int(crowd), "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": float(bitmap.sum()), "segmentation": dict(masks.encode(bitmap)), **posed,
    }  # fmt: skip


def content(images: Any, annotations: list[dict[str, Any]]) -> dict[str, Any]:
    """A COCO file's."""
    return {
        "images": [{"id": each, "file_name": f"{each}.jpg", "height": SIZE[0], "width": SIZE[1]} for each in images],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in IDS.items()],
    }


def random_dataset(
    seed: int, images: int = 4, keypoints: int = 17, noise: float = 4.0
) -> tuple[dict[str, Any], dict[int, Detections]]:
    """A COCO file's content, and detections near what is there, some of another class, some of nothing, some missing.

    Scores are all different, within an image and between images.
    """
    rng = np.random.default_rng(seed)
    annotations, found = [], {}
    scores = rng.permutation(np.linspace(0.05, 0.99, 16 * images)).reshape(images, 16)
    for place in range(images):
        image_id = 10 * place + 3
        boxes, labels, points = [], [], []
        for _ in range(rng.integers(0, 7)):
            corner, side = rng.uniform(0, 35, 2), rng.uniform(4, 25, 2)
            box, label = np.concatenate([corner, corner + side]), int(rng.integers(3))
            posed = np.stack(
                [*rng.uniform(box[:2, None], box[2:, None], (2, keypoints)), rng.integers(0, 3, keypoints)], axis=1
            )
            is_crowd = rng.random() < 0.2
            annotations.append(
                annotation(len(annotations) + 1, image_id, NAMES[label], box, crowd=is_crowd, keypoints=posed.ravel().tolist())
            )
            for _ in range(rng.integers(0, 3)):
                boxes.append(box + rng.normal(0, noise / 2, 4))
                labels.append(label if rng.random() < 0.8 else int(rng.integers(3)))
                points.append(posed + rng.normal(0, noise / 4, posed.shape) * [1, 1, 0])
        if rng.random() < 0.7:
            boxes.append(np.array([5, 5, 20, 30]) + rng.normal(0, 2, 4))
            labels.append(int(rng.integers(3)))
            points.append(rng.uniform(0, 40, (keypoints, 3)))
        boxes = [np.concatenate([box[:2], np.maximum(box[2:], box[:2] + 1)]) for box in boxes]
        order = np.sort(scores[place, : len(boxes)])[::-1]
        posed = np.array(points, np.float32).reshape(len(boxes), keypoints, 3)
        found[image_id] = detections(np.array(boxes), order, labels, posed)
    return content(found, annotations), found


def by_faster(
    ground_truth: dict[str, Any], found: dict[int, Detections], kind: str, ids: dict[str, int] = IDS
) -> tuple[np.ndarray, np.ndarray]:
    """faster-coco-eval's statistics, and its AP of each class by COCO's ids in order, -1 where there is none."""
    from faster_coco_eval import COCO, COCOeval_faster

    rows = [{**row, "category_id": ids[name]} for image_id, each in found.items()
            for row, name in zip(each.to_coco(image_id), each.class_names, strict=True)]  # fmt: skip
    if kind == "segm":
        rows = [{key: value for key, value in row.items() if key != "bbox"} for row in rows]
    truth = COCO(copy.deepcopy(ground_truth))
    evaluation = COCOeval_faster(truth, truth.loadRes(rows), kind)
    evaluation.run()
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    return np.asarray(evaluation.stats), precision.mean(axis=(0, 1))
