"""A model that gives rotated boxes and needs none of Detectron2's compiled ops: its weights are the boxes.

One of a server's workers can be made slow to load it: ``TURNED_SLOW="FOLDER NUMBER SECONDS"`` is the how-manieth to build it;
for less than 0 seconds it fails. Several have commas between them.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances, RotatedBoxes
from torch import nn

BOXES = [[0.3, 0.3, 0.3, 0.1, 30.0], [0.6, 0.5, 0.4, 0.15, -60.0], [0.5, 0.8, 0.5, 0.1, 0.0], [0.75, 0.25, 0.3, 0.1, 90.0]]
"""Center, width and height, of the image's, and degrees counter-clockwise."""


@META_ARCH_REGISTRY.register()
class TurnedBoxes(nn.Module):
    """Gives `BOXES`, for any image."""

    @configurable
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.tensor(BOXES))
        if "TURNED_SLOW" in os.environ:
            folder, slow, seconds = os.environ["TURNED_SLOW"].split()
            if _turn(Path(folder)) in map(int, slow.split(",")):
                time.sleep(float(seconds))  # a ValueError, if less than 0

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        return {}

    @property
    def device(self) -> torch.device:
        return self.places.device

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        return [{"instances": self._found(each["height"], each["width"])} for each in inputs]

    def _found(self, height: int, width: int) -> Instances:
        scale = torch.tensor([width, height, width, width, 1.0])
        count = len(self.places)
        return Instances(
            (height, width),
            pred_boxes=RotatedBoxes(self.places * scale),
            scores=torch.linspace(0.95, 0.65, count),
            pred_classes=torch.arange(count),
        )


def _turn(folder: Path) -> int:
    """How many processes were here before."""
    turn = 0
    while True:
        with suppress(FileExistsError):
            (folder / str(turn)).touch(exist_ok=False)
            return turn
        turn += 1
