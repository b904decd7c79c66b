"""The RPN's choice of proposals, without the work for anchors that are not chosen.

To take a thousand proposals, Detectron2 sorts all scores of a level and decodes the boxes of all its anchors, a quarter of a
million of them at 800x1088. Here the best anchors are taken first, and NMS compares only as many of them as it needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances
from torch import nn

_FEW = 1000
"""Boxes that are compared all at once."""


def takes(generator: nn.Module | None) -> bool:
    """Whether it is an RPN that chooses as Detectron2's does."""
    return (
        isinstance(generator, RPN)
        and vars(generator).keys().isdisjoint(("predict_proposals", "_decode_proposals"))  # set on the module itself
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
        scores = torch.cat([each.values for each in best], dim=1)
        chosen = [each.gather(1, top.indices[:, :, None].expand(-1, -1, 4)) for each, top in zip(deltas, best, strict=True)]
        places = [each.tensor[top.indices] for each, top in zip(anchors, best, strict=True)]
        boxes = self.box2box_transform.apply_deltas(torch.cat(chosen, dim=1).view(-1, 4), torch.cat(places, dim=1).view(-1, 4))
        boxes = boxes.view(*scores.shape, 4)
        good = torch.isfinite(boxes).all(dim=2) & torch.isfinite(scores)
        corners = boxes.new_tensor([(width, height, width, height) for height, width in image_sizes])
        boxes = boxes.clamp(min=0).minimum(corners[:, None])
        good &= (boxes[:, :, 2:] - boxes[:, :, :2] > self.min_box_size).all(dim=2)
        all_good = bool(good.all())
        found = []
        for image, size in enumerate(image_sizes):
            those = slice(None) if all_good else good[image]
            found.append(self._best(boxes[image, those], scores[image, those], levels[those], size))
        return found

    def _best(self, boxes: torch.Tensor, scores: torch.Tensor, levels: torch.Tensor, size: tuple[int, int]) -> Instances:
        """One image's, the best first.

        Whether a box is kept depends on better ones alone, and what comparing takes grows with the square of their number.
        """
        most = self.post_nms_topk[False]
        order = scores.argsort(descending=True, stable=True)
        boxes, scores, levels = boxes[order], scores[order], levels[order]
        some = max(_FEW, most * 3 // 2)
        kept = batched_nms(boxes[:some], scores[:some], levels[:some], self.nms_thresh)
        while len(kept) < most and some < len(boxes):
            some = max(2 * some, int(1.2 * some * most / len(kept)))
            kept = batched_nms(boxes[:some], scores[:some], levels[:some], self.nms_thresh)
        kept = kept[:most]
        return Instances(size, proposal_boxes=Boxes(boxes[kept]), objectness_logits=scores[kept])
