"""Zoo models that detect something without their weights, which the benchmarks cannot download.

Weights are random. Each BatchNorm gets the statistics of one real picture, so that activations keep their size from layer to
layer, and the classifiers' weights are scaled, so that scores differ from box to box and from class to class.
"""

from __future__ import annotations

import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from PIL import Image
from torch import nn

from bentoml_detectron import demo

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x.yaml"
FASTER_RCNN = "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_3x.yaml"
KEYPOINT_RCNN = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x.yaml"
PANOPTIC_FPN = "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml"
X101 = "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml"


def picture(height: int, width: int, index: int = 0) -> np.ndarray:
    """One of the demo's images as (height, width, 3) uint8, BGR."""
    image = Image.open(demo.images()[index]).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


def config(name: str, path: str, shortest: int = 800) -> CfgNode:
    """A zoo model's config, its weights written to `path`.

    Args:
        name: Of the zoo's config file.
        path: Where the weights go.
        shortest: Shorter edge to which images are scaled.
    """
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(name))
    cfg.MODEL.DEVICE = "cpu"
    cfg.INPUT.MIN_SIZE_TEST = shortest
    training = cfg.clone()
    training.MODEL.RESNETS.NORM = "BN"  # has the keys of FrozenBN, and takes statistics
    torch.manual_seed(0)
    model = build_model(training)
    _calibrate(model)
    torch.save({"model": model.state_dict()}, path)
    cfg.MODEL.WEIGHTS = path
    return cfg


def _calibrate(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    pixels = torch.from_numpy(picture(480, 640).transpose(2, 0, 1).astype(np.float32))
    model.train()
    with torch.no_grad():
        model.backbone(model.preprocess_image([{"image": pixels}]).tensor)
        for name, parameter in model.named_parameters():
            if name.endswith(("cls_score.weight", "objectness_logits.weight")):
                parameter.mul_(12)
    model.eval()
