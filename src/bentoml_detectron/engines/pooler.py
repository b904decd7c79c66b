"""Detectron2's ``ROIPooler``, computed by `roi_align`."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels, convert_boxes_to_pooler_format
from detectron2.structures import Boxes
from torch import nn

from bentoml_detectron.engines.quantized import Quantized
from bentoml_detectron.engines.roi_align import roi_align


class Pooler(nn.Module):
    """Stands where a `ROIPooler` of ROIAligns was.

    Args:
        pooler: That one.
        is_channels_last: Whether what takes the result knows tensors that are.
    """

    def __init__(self, pooler: ROIPooler, is_channels_last: bool = True) -> None:
        super().__init__()
        self._is_channels_last = is_channels_last
        self._scales = [float(each.spatial_scale) for each in pooler.level_poolers]
        self._sampling_ratio = pooler.level_poolers[0].sampling_ratio
        self._aligned = pooler.level_poolers[0].aligned
        self._levels = (pooler.min_level, pooler.max_level, pooler.canonical_box_size, pooler.canonical_level)
        self.output_size = pooler.output_size
        self.eval()

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether it is a pooler that can be replaced: Detectron2's own, with nothing hooked on."""
        levels: Any = getattr(module, "level_poolers", ())
        if type(module) is not ROIPooler or not all(type(each) is ROIAlign for each in levels):
            return False
        return not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())

    def forward(self, features: list[torch.Tensor | Quantized], box_lists: list[Boxes]) -> torch.Tensor:
        """As `ROIPooler.forward`; (M, C, *output_size)."""
        boxes = convert_boxes_to_pooler_format(box_lists)
        if len(self._scales) > 1:
            levels = assign_boxes_to_levels([Boxes(boxes[:, 1:])], *self._levels)
        else:
            levels = torch.zeros(len(boxes), dtype=torch.int64)
        known = (levels >= 0) & (levels < len(self._scales))  # boxes with their corners the wrong way round are of no level
        levels = torch.where(known, levels, 0)
        numbers = [each.steps() if isinstance(each, Quantized) else each for each in features]
        gains = [each.scale if isinstance(each, Quantized) else 1.0 for each in features]
        pooled = roi_align(numbers, boxes, levels, self._scales, self.output_size, self._sampling_ratio, self._aligned, gains)
        pooled = pooled if bool(known.all()) else pooled * known[:, None, None, None]
        return pooled if self._is_channels_last else pooled.contiguous()
