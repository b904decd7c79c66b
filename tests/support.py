"""What several tests need: small models with random weights that detect something, and comparisons of their results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

BLOCK_NETWORK = """
import sys

def _no_network(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        raise RuntimeError(f"network use: {event} {args}")

sys.addaudithook(_no_network)
"""


def run_python(code: str, *args: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, outside the source tree."""
    result = subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, **env},
        cwd=Path(sys.prefix),
        capture_output=True,
        text=True,
        timeout=300,
    )
    if check:
        assert result.returncode == 0, result.stderr
    return result


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its content, and every folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"<folder>"
        for path in sorted(folder.rglob("*"))
    }


def tiny_cfg(meta_architecture: str = "GeneralizedRCNN") -> Any:
    """A narrow Faster R-CNN with FPN: 1.3 MB of weights, for images of 64 pixels."""
    from detectron2.config import get_cfg

    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.META_ARCHITECTURE = meta_architecture
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.INPUT.MAX_SIZE_TEST = 96
    cfg.DATASETS.TEST = ("a_dataset_of_this_test",)
    return cfg


def small_cfg() -> Any:
    """A proposal network over one stage of a narrow ResNet: 70 tensors, 40 KB."""
    from detectron2.config import get_cfg

    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2"]
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    cfg.MODEL.RPN.IN_FEATURES = ["res2"]
    return cfg


def built(cfg: Any, seed: int = 0) -> torch.nn.Module:
    """A module with random weights, in evaluation mode."""
    from detectron2.modeling import build_model

    torch.manual_seed(seed)
    return build_model(cfg).eval()


def checkpoint(cfg: Any, path: Path, seed: int = 0) -> Any:
    """Writes random weights for a config and returns a copy of the config that names them."""
    torch.save({"model": built(cfg, seed).state_dict()}, path)
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = str(path)
    return cfg


def picture(height: int = 64, width: int = 80, seed: int = 0) -> np.ndarray:
    """A smooth random picture, (height, width, 3) uint8."""
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def tensors(output: Any) -> dict[str, torch.Tensor]:
    """Every tensor in a Detectron2 model's output, by its path."""
    from detectron2.structures import Boxes, Instances

    found: dict[str, torch.Tensor] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, torch.Tensor):
            found[path] = value
        elif isinstance(value, Boxes):
            found[path] = value.tensor
        elif isinstance(value, Instances):
            for name, field in value.get_fields().items():
                walk(field, f"{path}.{name}")
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}.{key}")
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                walk(item, f"{path}[{index}]")
        elif isinstance(value, (int, float, bool)):
            found[path] = torch.tensor(value)

    walk(output, "")
    return found


def assert_same(first: Any, second: Any) -> None:
    """Two outputs are equal bit for bit, and hold something."""
    one, other = tensors(first), tensors(second)
    assert one.keys() == other.keys()
    assert sum(tensor.numel() for tensor in one.values()) > 0
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        # As bytes, so that a NaN equals itself and -0.0 does not equal 0.0.
        assert tensor.contiguous().numpy().tobytes() == other[name].contiguous().numpy().tobytes(), name
