"""Runs several images through a Detectron2 model at once, each with its own options, and leaves the model as it is.

A model keeps its score threshold in its modules. To use another threshold, a *view* of the model is made: the few modules on
the way to the threshold are shallow copies, and everything else is shared, parameters included. So threads with different
thresholds share one model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from detectron2.layers import CycleBatchNormList
from detectron2.modeling import GeneralizedRCNN, PanopticFPN, SemanticSegmentor
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from torch import nn

from bentoml_detectron.options import Options
from bentoml_detectron.views import view

THRESHOLD = "test_score_thresh"
"""What the box predictors, RetinaNet and FCOS of Detectron2 call their threshold."""
LIMITS = ("test_topk_per_image", "max_detections_per_image")
"""What they call the most detections an image has."""


@dataclass(frozen=True, slots=True)
class Output:
    """What the model made of one image, with what is still to be done for the image's own size.

    Attributes:
        instances: Detections at the size of the image; masks of R-CNNs are still ROI masks, in the field ``roi_masks``.
        logits: (C, h, w) semantic logits; `logits_size` is the part of h, w that the image has, None where they are at the
            image's own size.
        combine: Thresholds for combining both into a panoptic segmentation: overlap, stuff area, instance score.
        panoptic: The (H, W) map and segments that the model itself combined; the segments may be None.
        raw: What the model gave, where it is none of these.
    """

    instances: Instances | None = None
    proposals: Instances | None = None
    logits: torch.Tensor | None = None
    logits_size: tuple[int, int] | None = None
    combine: tuple[float, float, float] | None = None
    panoptic: tuple[torch.Tensor, list[dict[str, Any]] | None] | None = None
    raw: Any = None


def forward(model: nn.Module, inputs: Sequence[dict[str, Any]], options: Sequence[Options]) -> list[Output]:
    """Runs one batch.

    Args:
        model: A Detectron2 model in evaluation mode.
        inputs: One dict an image: "image", (C, h, w) float32, and the "height" and "width" of its results.
        options: What is wanted of each image.

    Returns:
        One an image. Detections under an image's threshold are gone; of models without a panoptic part also those of other
        classes, and all but the best `top_k`.
    """
    settings = _settings(model, options)
    adjusted = _adjusted(model, options, settings)
    if _is_plain(model, PanopticFPN):
        instances, logits = cast(PanopticFPN, adjusted).inference(inputs, do_postprocess=False)
        return [
            Output(
                instances=_at_image_size(_select(each, wanted, settings, whole=True), given),
                logits=logits[i],
                logits_size=tuple(given["image"].shape[-2:]),
                combine=_combine(model, wanted),
            )
            for i, (each, wanted, given) in enumerate(zip(instances, options, inputs, strict=True))
        ]
    if _is_plain(model, GeneralizedRCNN):
        instances = cast(GeneralizedRCNN, adjusted).inference(inputs, do_postprocess=False)
        return [
            Output(instances=_at_image_size(_select(each, wanted, settings), given))
            for each, wanted, given in zip(instances, options, inputs, strict=True)
        ]
    if _is_plain(model, SemanticSegmentor):
        # Without a size it leaves the logits as they are; at an image's own size they may not fit into memory.
        outputs = adjusted([{"image": given["image"]} for given in inputs])
        sizes = [tuple(given["image"].shape[-2:]) for given in inputs]
        return [Output(logits=each["sem_seg"], logits_size=size) for each, size in zip(outputs, sizes, strict=True)]
    return [_recognised(each, wanted, settings) for each, wanted in zip(adjusted(list(inputs)), options, strict=True)]


_INFERENCE = ("__call__", "forward", "inference", "_postprocess")


def _is_plain(model: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a model is of that kind and does its inference as Detectron2 does: its class, and itself, too.

    A hook, or a method that was set on the module, may change what it finds, and runs only where the module itself is called.
    """
    return (
        isinstance(model, kind)
        and all(getattr(type(model), name, None) is getattr(kind, name, None) for name in _INFERENCE)
        and vars(model).keys().isdisjoint(_INFERENCE)
        and not (model._forward_hooks or model._forward_pre_hooks)
    )


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a batch runs at where some of its images want more than the model gives by itself.

    Attributes:
        threshold: Scores at which it runs; None: at the model's own.
        own_threshold: The model's own then.
        limit: Most detections an image then; None: the model's own.
        own_limit: The model's own then.
    """

    threshold: float | None = None
    own_threshold: float | None = None
    limit: int | None = None
    own_limit: int | None = None


def _settings(model: nn.Module, options: Sequence[Options]) -> _Settings:
    """What finds all that any of the images wants."""
    own = _own(model, (THRESHOLD,))
    threshold = None if own is None else min(own if each.score_threshold is None else each.score_threshold for each in options)
    is_other = threshold != own
    found = _own(model, LIMITS)
    own_limit = -1 if found is None else int(found)  # negative as Detectron2 has it: none
    limit = max((each.top_k or 0 for each in options), default=0)
    is_raised = 0 <= own_limit < limit
    return _Settings(
        threshold=threshold if is_other else None,
        own_threshold=own if is_other else None,
        limit=limit if is_raised else None,
        own_limit=own_limit if is_raised else None,
    )


def _own(model: nn.Module, names: Sequence[str]) -> float | None:
    """The value of a setting of the model's; a cascade has it once a stage, and uses the last."""
    values = [getattr(module, name, None) for module in model.modules() for name in names]
    return next((each for each in reversed(values) if isinstance(each, (int, float))), None)


def _adjusted(model: nn.Module, options: Sequence[Options], settings: _Settings) -> nn.Module:
    """A view of the model that runs at these settings, or the model itself."""
    whole = _is_plain(model, PanopticFPN)

    def change(module: nn.Module) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        if settings.threshold is not None and isinstance(getattr(module, THRESHOLD, None), (int, float)):
            changes[THRESHOLD] = settings.threshold
        for name in LIMITS:
            limit = getattr(module, name, None)
            if settings.limit is not None and isinstance(limit, int) and 0 <= limit < settings.limit:
                changes[name] = settings.limit
        if isinstance(module, CycleBatchNormList):  # it counts its calls, and other threads' and failed ones' with them
            changes["_pos"] = 0
        return changes

    adjusted = view(model, change)
    heads = getattr(adjusted, "roi_heads", None)
    if any(each != Options() for each in options) and hasattr(heads, "forward_with_given_boxes"):
        adjusted = view(adjusted, lambda module: _selecting(module, options, settings, whole) if module is heads else {})
    return adjusted


def _selecting(heads: nn.Module, options: Sequence[Options], settings: _Settings, whole: bool) -> dict[str, Any]:
    """Masks and keypoints for the wanted detections alone: ROI heads call this between finding boxes and the rest."""
    masks_and_keypoints = cast(Callable[..., Any], heads.forward_with_given_boxes)

    def forward_with_given_boxes(features: Any, instances: list[Instances], *rest: Any, **more: Any) -> Any:
        if len(instances) == len(options):
            instances = [_select(each, wanted, settings, whole) for each, wanted in zip(instances, options, strict=True)]
        return masks_and_keypoints(features, instances, *rest, **more)  # heads of a user's own may take more

    return {"forward_with_given_boxes": forward_with_given_boxes}


def _select(instances: Instances, wanted: Options, settings: _Settings, whole: bool = False) -> Instances:
    """The wanted ones, in their order; `whole` leaves classes and number to whoever combines them with the rest.

    What the batch has found for other images' sake is taken out first, so that an image has what it would have alone.
    """
    threshold = settings.own_threshold if wanted.score_threshold is None else wanted.score_threshold
    if wanted == Options() and threshold is None and settings.own_limit is None:
        return instances
    scores = scores_of(instances)
    keep = torch.ones_like(scores, dtype=torch.bool) if threshold is None else scores > threshold
    if settings.own_limit is not None:
        keep = _best(scores, keep, max(settings.own_limit, wanted.top_k or 0))
    if not whole:
        keep = chosen(instances, wanted, keep)
    return instances if bool(keep.all()) else instances[keep]


def chosen(instances: Instances, wanted: Options, among: torch.Tensor | None = None) -> torch.Tensor:
    """Which are of the wanted classes and among the best `top_k` of these; (N,) bool."""
    scores = scores_of(instances)
    keep = torch.ones_like(scores, dtype=torch.bool) if among is None else among.clone()
    if wanted.things is not None:
        ids = torch.tensor(sorted(wanted.things), dtype=torch.int64, device=scores.device)
        given = instances.pred_classes if instances.has("pred_classes") else torch.zeros_like(scores, dtype=torch.int64)
        keep &= torch.isin(given, ids)
    return keep if wanted.top_k is None else _best(scores, keep, wanted.top_k)


def _best(scores: torch.Tensor, among: torch.Tensor, most: int) -> torch.Tensor:
    """At most so many of those that are among some, the best; (N,) bool."""
    if int(among.sum()) <= most:
        return among
    best = torch.where(among, scores, -torch.inf).sort(descending=True, stable=True).indices[:most]
    return torch.zeros_like(among).index_fill_(0, best, True)


def scores_of(instances: Instances) -> torch.Tensor:
    """Scores in [0, 1]; of proposals, whose objectness is a logit, its sigmoid."""
    scores: torch.Tensor = instances.objectness_logits.sigmoid() if instances.has("objectness_logits") else instances.scores
    return scores


def _at_image_size(instances: Instances, given: dict[str, Any]) -> Instances:
    """Boxes and keypoints at the size of the image, as Detectron2 scales them; ROI masks stay what they are."""
    fields = instances.get_fields()
    if "pred_masks" in fields:  # under this name they would be pasted into (N, H, W) bitmaps
        fields = {"roi_masks" if name == "pred_masks" else name: value for name, value in fields.items()}
    return detector_postprocess(Instances(instances.image_size, **fields), given["height"], given["width"])


def _combine(model: PanopticFPN, wanted: Options) -> tuple[float, float, float]:
    score = model.combine_instances_score_thresh if wanted.score_threshold is None else wanted.score_threshold
    return model.combine_overlap_thresh, model.combine_stuff_area_thresh, score


def _recognised(output: Any, wanted: Options, settings: _Settings) -> Output:
    """The output of any other model, by the names that Detectron2 gives to the parts."""
    if not isinstance(output, dict):
        return Output(raw=output)
    instances, proposals = output.get("instances"), output.get("proposals")
    panoptic, logits = output.get("panoptic_seg"), output.get("sem_seg")
    if instances is not None and not (instances.has("pred_boxes") and instances.has("scores")):
        return Output(raw=output)
    if all(part is None for part in (instances, proposals, panoptic, logits)):
        return Output(raw=output)
    return Output(
        instances=None if instances is None else _select(instances, wanted, settings, whole=panoptic is not None),
        proposals=None if proposals is None else _select(proposals, wanted, _Settings()),
        panoptic=panoptic,
        logits=logits,
    )
