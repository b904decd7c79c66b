"""The RPN's choice of proposals, without the work for anchors that are not chosen.

Detectron2 sorts all scores of a level and decodes the boxes of all its anchors, a quarter of a million of them at 800x1088, to
take a thousand. Here the best are taken first.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def choosing_first(generator: nn.Module) -> nn.Module:
    """A view of an RPN that this module `takes`; proposals are the same, but for the order of equal scores."""
    kind: type[nn.Module] = type(generator.__class__.__name__, (ChoosingFirst, generator.__class__), {})
    view = kind.__new__(kind)
    view.__dict__ = dict(generator.__dict__)
    return view


class ChoosingFirst:
    """Stands before an RPN's class; the limits are the RPN's at each call, so that a view of it may have others."""

    box2box_transform: Box2BoxTransform
    pre_nms_topk: dict[bool, int]
    post_nms_topk: dict[bool, int]
    nms_thresh: float
    min_box_size: float

    def predict_proposals(
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
        best = [each.topk(min(self.pre_nms_topk[False], each.shape[1]), dim=1) for each in logits]
        levels = torch.cat([torch.full_like(each.indices[0], level) for level, each in enumerate(best)])
        found = []
        for image, size in enumerate(image_sizes):
            chosen = [each.indices[image] for each in best]
            boxes = self.box2box_transform.apply_deltas(
                torch.cat([each[image, index] for each, index in zip(deltas, chosen, strict=True)]),
                torch.cat([each.tensor[index] for each, index in zip(anchors, chosen, strict=True)]),
            )
            scores = torch.cat([each.values[image] for each in best])
            found.append(self._best(Boxes(boxes), scores, levels, size))
        return found

    def _best(self, boxes: Boxes, scores: torch.Tensor, levels: torch.Tensor, size: tuple[int, int]) -> Instances:
        """One image's, the best first."""
        finite = torch.isfinite(boxes.tensor).all(dim=1) & torch.isfinite(scores)
        if not bool(finite.all()):
            boxes, scores, levels = boxes[finite], scores[finite], levels[finite]
        boxes.clip(size)
        keep = boxes.nonempty(threshold=self.min_box_size)
        if not bool(keep.all()):
            boxes, scores, levels = boxes[keep], scores[keep], levels[keep]
        kept = batched_nms(boxes.tensor, scores, levels, self.nms_thresh)[: self.post_nms_topk[False]]
        return Instances(size, proposal_boxes=boxes[kept], objectness_logits=scores[kept])
