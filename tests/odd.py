"""A model that does what an image's height says: what models do that go wrong."""

from __future__ import annotations

import gc
import os
import time
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import nn

FAILS, NO_DETECTIONS, ENDS, FAILS_UNREADABLY, COUNTS_THREADS, COUNTS_SPARED = 40, 41, 42, 43, 44, 45
"""Heights."""


class UnreadableError(Exception):
    """Pickles, and cannot be read back."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(one + other)


@META_ARCH_REGISTRY.register()
class Odd(nn.Module):
    """Finds one box."""

    @configurable
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        if os.environ.get("ODD") == "ends":
            raise SystemExit("it does not want to")

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        return {}

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def forward(self, inputs: list[dict[str, Any]]) -> list[Any]:
        time.sleep(0.05)
        return [self._found(each["height"], each["width"]) for each in inputs]

    def _found(self, height: int, width: int) -> Any:
        if height == FAILS:
            raise RuntimeError("it went wrong")
        if height == FAILS_UNREADABLY:
            raise UnreadableError("it went", " wrong")
        if height == ENDS:
            os._exit(3)
        if height == NO_DETECTIONS:
            return ["a list"]
        boxes = Boxes(torch.tensor([[1.0, 1.0, 9.0, 9.0]]))
        counts = {COUNTS_THREADS: torch.get_num_threads(), COUNTS_SPARED: gc.get_freeze_count()}
        classes = torch.tensor([counts.get(height, 0)])
        return {"instances": Instances((height, width), pred_boxes=boxes, scores=torch.ones(1), pred_classes=classes)}
