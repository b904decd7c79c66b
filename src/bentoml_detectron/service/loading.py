"""Loads a worker's predictor: tested before and after it is made faster, and warmed up before the first request."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import bentoml
import torch
from torch import nn

from bentoml_detectron import selftest, threads
from bentoml_detectron.artifact import manifest
from bentoml_detectron.errors import InvalidModelError
from bentoml_detectron.images import Limits
from bentoml_detectron.predictor import Predictor
from bentoml_detectron.store import load_both, open_model

if TYPE_CHECKING:
    from bentoml_detectron.service.front import Settings

logger = logging.getLogger("bentoml.detectron")


def load_tested(model: bentoml.Model, settings: Settings) -> Predictor:
    """As `store.load_predictor`, of a model that finds what it found when it was saved.

    Raises:
        InvalidArgumentError: This machine does not compute in the precision.
        InvalidModelError: The model finds something else.
        DetectronError: Any other error that `load_predictor` raises.
    """
    saved = open_model(model, trust_remote_code=settings.trust_remote_code, trusted=settings.trusted)
    limits = Limits(max_pixels=settings.max_image_pixels, max_bytes=settings.max_body_bytes)
    module, predictor = load_both(saved, settings.device_id, settings.precision, limits=limits)
    problems = _self_test(model, module, predictor, is_same=settings.precision == "fp32")
    if problems:
        raise InvalidModelError(f"{model.tag} fails its self-test: {'; '.join(problems)}", value=problems)
    return predictor


def share_cores(workers: int | str) -> None:
    """Gives this thread's PyTorch its share of the cores: workers that take all of them each wait for one another.

    It holds for the thread that calls it, the model's.
    """
    if threads.is_count_decided():
        return
    own = threads.cores() // workers if isinstance(workers, int) else 1
    torch.set_num_threads(max(1, min(own, torch.get_num_threads())))


def warm_up(predictor: Predictor) -> None:
    """Runs the model at its size, so that the first requests do not wait until kernels are made."""
    image = selftest.image()
    square = image[:, : image.shape[0]]
    wanted = predictor.options(score_threshold=0.0)  # so that there are boxes for the heads
    try:
        for _ in range(2):
            predictor.predict([square], [wanted])
    except Exception:  # whatever the model raises; requests will tell
        logger.warning("the model fails on a warm-up image", exc_info=True)


def _self_test(model: bentoml.Model, module: nn.Module, predictor: Predictor, *, is_same: bool) -> list[str]:
    """Compares what a model finds with what it found when it was saved, where that was recorded.

    Args:
        model: Where it was.
        module: As Detectron2 runs it.
        predictor: As it is served.
        is_same: Whether the predictor is to find the same, too.

    Returns:
        Where it finds something else, a line each.
    """
    path = Path(model.path)
    if not (path / manifest.MANIFEST).is_file():  # BentoML's own adapter saved it
        return []
    due = manifest.read(path).self_test
    if due is None:
        logger.warning("%s has no self-test; it is served as it is", model.tag)
        return []
    _, problems = selftest.check(due, module, predictor.input, predictor.dataset)
    if not problems and is_same and due.detections is not None:
        got = selftest.record(predictor.model, predictor.input, predictor.dataset)
        found = due.model_copy(update={"detections": got.detections})  # modules, and so settings and features, are others
        again = selftest.again(predictor.model, predictor.input)
        problems = [f"accelerated, {each}" for each in selftest.compare(due, found, again=again)]
    return problems
