"""Detectron2's ``preprocess_image`` in two passes over an image, in the layout that is fastest for convolutions.

Detectron2 goes over an image's pixels colour by colour, pads the result, and lays it out in planes, which an engine would have
to turn back into pixels. Here, rows of pixels are normalized as they are stored, right into the backbone's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList
from torch import nn


def takes(model: nn.Module) -> bool:
    """Whether a model normalizes and pads as Detectron2's do, to a multiple and not to a square."""
    if "preprocess_image" in vars(model):  # set on the module itself
        return False
    own = getattr(type(model), "preprocess_image", None)
    # Detectron2's main branch has them also where a backbone, as FPN, asks for no square: {"square_size": 0}.
    constraints = getattr(getattr(model, "backbone", None), "padding_constraints", None) or {}
    return own in (GeneralizedRCNN.preprocess_image, DenseDetector.preprocess_image) and not any(constraints.values())


class Preprocess:
    """Stands where the ``preprocess_image`` of a model on the CPU was; values are the same to the last bit."""

    def __init__(self, model: Any) -> None:
        self._mean, self._std = model.pixel_mean.flatten(), model.pixel_std.flatten()
        self._multiple = max(1, model.backbone.size_divisibility)

    def __call__(self, batched_inputs: Sequence[dict[str, Any]]) -> ImageList:
        """As ``preprocess_image``.

        Args:
            batched_inputs: One dict an image: "image", (C, h, w) float32 or uint8.

        Returns:
            (B, C, H, W) float32, channels-last, zeros at the right and below.
        """
        images = [given["image"] for given in batched_inputs]
        sizes = [(int(each.shape[1]), int(each.shape[2])) for each in images]
        channels = len(images[0])
        height, width = (-(-max(lengths) // self._multiple) * self._multiple for lengths in zip(*sizes, strict=True))
        batch = torch.empty((len(images), height, width * channels), dtype=torch.float32)
        mean, std = (each.expand(channels).repeat(width) for each in (self._mean, self._std))
        for image, rows, (below, right) in zip(images, batch, sizes, strict=True):
            right *= channels
            inside = rows[:below, :right]
            torch.sub(image.permute(1, 2, 0).reshape(below, right), mean[:right], out=inside)
            inside.div_(std[:right])
            rows[below:].zero_()
            rows[:below, right:].zero_()
        return ImageList(batch.view(len(images), height, width, channels).permute(0, 3, 1, 2), sizes)
