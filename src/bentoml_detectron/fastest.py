"""``precision="auto"``: the fastest precision on this machine whose results agree with those in float32."""

from __future__ import annotations

import logging
import statistics
import time
from dataclasses import dataclass
from typing import Any

from torch import nn

from bentoml_detectron import engines, selftest
from bentoml_detectron.artifact.manifest import Input
from bentoml_detectron.engines import Precision
from bentoml_detectron.engines.int8 import Calibration
from bentoml_detectron.model import device_of
from bentoml_detectron.predictor import Predictor

logger = logging.getLogger(__name__)

MULTIPLE = 40
"""How many times as far as in fp32 boxes (0.05 pixels) and scores (1e-3) may be."""
TOLERANCE = selftest.Tolerance(
    box=0.05 * MULTIPLE, score=1e-3 * MULTIPLE, keypoint=0.05 * MULTIPLE, mask_iou=0.8, matched=0.75, labels=0.95
)
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was chosen.

    Attributes:
        precision: Its name.
        model: The model's view in it.
        seconds: What the self-test's image took, resized as images are, by precision; of those that were tried.
    """

    precision: Precision
    model: nn.Module
    seconds: dict[Precision, float]


def _finds(due: Any, precision: Precision, view: nn.Module, image_input: Input) -> bool:
    """Whether a view finds the same; not where it fails, as a model of one's own may in another precision."""
    try:
        return selftest.is_alike(due, selftest.run(view, image_input, None), TOLERANCE)
    except Exception:
        logger.warning("the model does not run in %s", precision, exc_info=True)
        return False


def fastest(model: nn.Module, image_input: Input, calibration: Calibration | None) -> Chosen:
    """Tries the precisions that there are on the self-test's image.

    Args:
        model: In evaluation mode; it is left as it is.
        image_input: How an image gets to it.
        calibration: What int8 needs; None: int8 is not tried.

    Returns:
        The fastest, timed in turn, of those whose results are within `TOLERANCE` of the model's; fp32 always is.
    """
    candidates: list[Precision] = ["fp32"]
    device = device_of(model)
    candidates += ["bf16"] if engines.has_bf16(device) else []
    candidates += ["fp16"] if device.type == "cuda" else []
    candidates += ["int8"] if device.type == "cpu" and engines.has_int8() and calibration is not None else []
    views: dict[Precision, nn.Module] = {each: engines.accelerated(model, each, calibration) for each in candidates}
    if len(views) > 1:
        due = selftest.run(model, image_input, None)
        views = {each: view for each, view in views.items() if each == "fp32" or _finds(due, each, view, image_input)}
    predictors = {each: Predictor(view, image_input, batch="exact") for each, view in views.items()}
    seconds: dict[Precision, list[float]] = {each: [] for each in predictors}
    image = selftest.image()
    for _ in range(ROUNDS + 1 if len(views) > 1 else 0):
        for each, predictor in predictors.items():
            start = time.perf_counter()
            predictor([image], score_threshold=0.0)
            seconds[each].append(time.perf_counter() - start)
    medians = {each: statistics.median(found[1:]) for each, found in seconds.items() if found}  # the first makes kernels
    best = min(medians, key=lambda each: medians[each], default=candidates[0])
    logger.info("the fastest precision is %s; seconds by precision: %s", best, medians)
    return Chosen(best, views[best], medians)
