"""The RPN's choice of proposals, without the work for anchors that are not chosen.

Detectron2 sorts all scores of a level and decodes the boxes of all its anchors, a quarter of a million of them at 800x1088, to
take a thousand. Here the best are taken first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances
from torch import nn


def takes(generator: nn.Module | None) -> bool:
    """Whether it is an RPN that chooses as Detectron2's does."""
    return (
        isinstance(generator, RPN)
        and type(generator).predict_proposals is RPN.predict_proposals
        and type(generator)._decode_proposals is RPN._decode_proposals
        and isinstance(generator.box2box_transform, Box2BoxTransform)
    )


class PredictProposals:
    """Stands where ``RPN.predict_proposals`` was; proposals are the same, but for the order of equal scores."""

    def __init__(self, rpn: Any) -> None:
        self._decode = rpn.box2box_transform.apply_deltas
        self._threshold = rpn.nms_thresh
        self._before, self._after = rpn.pre_nms_topk[False], rpn.post_nms_topk[False]
        self._least = rpn.min_box_size

    def __call__(
        self,
        anchors: Sequence[Boxes],
        logits: Sequence[torch.Tensor],
        deltas: Sequence[torch.Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """As ``RPN.predict_proposals``.

        Args:
            anchors: A level's, (A, 4).
            logits: A level's, (B, A).
            deltas: A level's, (B, A, 4).
            image_sizes: Height and width of each of the B images.
        """
        best = [each.topk(min(self._before, each.shape[1]), dim=1) for each in logits]
        levels = torch.cat([torch.full_like(each.indices[0], level) for level, each in enumerate(best)])
        found = []
        for image, size in enumerate(image_sizes):
            chosen = [each.indices[image] for each in best]
            boxes = self._decode(
                torch.cat([each[image, index] for each, index in zip(deltas, chosen, strict=True)]),
                torch.cat([each.tensor[index] for each, index in zip(anchors, chosen, strict=True)]),
            )
            scores = torch.cat([each.values[image] for each in best])
            found.append(self._proposals(Boxes(boxes), scores, levels, size))
        return found

    def _proposals(self, boxes: Boxes, scores: torch.Tensor, levels: torch.Tensor, size: tuple[int, int]) -> Instances:
        """One image's, the best first."""
        finite = torch.isfinite(boxes.tensor).all(dim=1) & torch.isfinite(scores)
        if not bool(finite.all()):
            boxes, scores, levels = boxes[finite], scores[finite], levels[finite]
        boxes.clip(size)
        keep = boxes.nonempty(threshold=self._least)
        if not bool(keep.all()):
            boxes, scores, levels = boxes[keep], scores[keep], levels[keep]
        kept = batched_nms(boxes.tensor, scores, levels, self._threshold)[: self._after]
        return Instances(size, proposal_boxes=boxes[kept], objectness_logits=scores[kept])
