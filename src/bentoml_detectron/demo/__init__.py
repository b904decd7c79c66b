"""A small trained model that comes with the package: a Mask R-CNN that finds and segments handwritten digits.

``tools/train_demo.py`` trained it, with Detectron2's trainer. Its 20 sample images were held out from training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_detectron import imports

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from detectron2.engine import DefaultPredictor

__all__ = ["CLASSES", "config", "ground_truth", "images", "predictor"]

CLASSES = tuple("0123456789")
DATASET = "handwritten_digits"
_HERE = Path(__file__).parent


def config() -> CfgNode:
    """The demo model's config, with its weights, for the CPU.

    Registers the class names in Detectron2's ``MetadataCatalog`` as the dataset ``"handwritten_digits"``.
    """
    with imports.for_less():
        from detectron2.config import get_cfg
        from detectron2.data import MetadataCatalog

    MetadataCatalog.get(DATASET).set(thing_classes=list(CLASSES))
    cfg = get_cfg()
    cfg.merge_from_file(str(_HERE / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(_HERE / "weights.pth")
    return cfg


def predictor() -> DefaultPredictor:
    """The demo model as Detectron2's own predictor; it takes (H, W, 3) uint8 images in BGR."""
    with imports.for_less():
        from detectron2.engine import DefaultPredictor

    return DefaultPredictor(config())


def images() -> list[Path]:
    """The 20 sample images, 192x192 JPEG, in the order of their names."""
    return sorted((_HERE / "images").glob("*.jpg"))


def ground_truth() -> dict[str, Any]:
    """What is on the sample images: a COCO dataset with boxes and RLE masks; category ids are 1 to 10."""
    loaded: dict[str, Any] = json.loads((_HERE / "annotations.json").read_text())
    return loaded
