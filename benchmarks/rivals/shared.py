"""What the other servers of ``bench_serve.py`` share: Detectron2's pixels in, Detectron2's JSON out."""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from PIL import Image


def pixels(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8, BGR."""
    return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])


def spell(output: dict[str, Any]) -> list[dict[str, Any]]:
    """COCO results, boxes as x, y, width and height, masks as RLE."""
    return instances_to_coco_json(output["instances"].to("cpu"), 0)
