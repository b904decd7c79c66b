"""A BentoML service for any saved model: `get_service`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import bentoml
from bentoml import Tag
from bentoml.models import BentoModel
from bentoml.validators import ContentType

from bentoml_detectron import __version__
from bentoml_detectron.errors import InvalidArgumentError, InvalidModelError
from bentoml_detectron.service.engine import Engine
from bentoml_detectron.service.front import Front, Settings, Worker
from bentoml_detectron.service.metrics import Metrics
from bentoml_detectron.service.openapi import document

if TYPE_CHECKING:
    from bentoml_detectron.predictor import Predictor

__all__ = ["Settings", "get_service"]

TOKEN_VARIABLE = "BENTOML_DETECTRON_TOKEN"
"""Name of the environment variable with the token that requests must bear."""

logger = logging.getLogger("bentoml.detectron")
Image = Annotated[Path, ContentType("image/*")]


def get_service(
    bento_model: str | Tag | bentoml.Model, *, settings: Settings | None = None, **service_config: Any
) -> bentoml.Service[Any]:
    """A service for a saved model, to be assigned to a name in ``service.py``.

    ``bentoml build`` puts the model into the bento. The service answers:

    - ``POST /predict``: a multipart form with the file ``image``, or the image as the body, and optionally ``score_threshold``,
      ``classes``, ``top_k`` and ``masks`` (rle, polygon or none); one `Detections` as JSON.
    - ``POST /render``: the same request; the picture with what was found on it, as JPEG.
    - ``GET /info``: what the model is. ``GET /ui``: a page to try it on. ``GET /docs.json``: the OpenAPI document.
    - BentoML's own ``/livez``, ``/readyz`` (503 until the model is loaded and has passed its self-test) and ``/metrics``.

    Concurrent requests run as one batch, whatever their options and sizes are.

    Args:
        bento_model: The model, or its tag, in BentoML's model store.
        settings: Limits and the device.
        **service_config: BentoML's own configuration: ``name``, ``workers``, ``traffic``, ``resources`` and so on.

    Returns:
        The service.

    Raises:
        InvalidArgumentError: (``ValueError``) `bento_model` is no tag.

    Example::

        # service.py
        import bentoml
        service = bentoml.detectron.get_service("mask_rcnn:latest")
    """
    try:
        model = BentoModel(bento_model.tag if isinstance(bento_model, bentoml.Model) else bento_model)
    except (ValueError, TypeError) as exc:
        raise InvalidArgumentError(f"{bento_model!r} is no tag: {exc}", value=bento_model) from exc
    worker = Worker(_with_token(settings or Settings()))
    service_config.setdefault("name", f"detectron-{model.tag.name}")
    service_config.setdefault("image", container_image())

    @bentoml.service(**service_config)
    class DetectronService:
        """Detection, segmentation and keypoints by a Detectron2 model."""

        bento_model = model

        def __init__(self) -> None:
            _start(worker, self.bento_model)
            worker.openapi = lambda: document(service.name)

        # The middleware answers for these two; they are here for BentoML's clients, which ask the service for its methods.
        @bentoml.api(route="/predict")
        def predict(
            self,
            image: Image,
            score_threshold: float | None = None,
            classes: list[str] | None = None,
            top_k: int | None = None,
            masks: str = "rle",
        ) -> dict[str, Any]:
            raise NotImplementedError

        @bentoml.api(route="/render")
        def render(
            self,
            image: Image,
            score_threshold: float | None = None,
            classes: list[str] | None = None,
            top_k: int | None = None,
            masks: str = "rle",
        ) -> Annotated[Path, ContentType("image/jpeg")]:
            raise NotImplementedError

        async def __is_ready__(self) -> bool:
            return worker.is_ready

        @bentoml.on_shutdown
        def stop(self) -> None:
            if worker.engine is not None:
                worker.engine.close()

    service: bentoml.Service[Any] = DetectronService
    service.add_asgi_middleware(Front, worker=worker)
    return service


def container_image() -> bentoml.images.Image:
    """What a container for the service needs, with Detectron2 built from its own repository.

    Give `get_service` another as ``image=`` for a GPU's base image, or for wheels of your own.
    """
    image = bentoml.images.Image(lock_python_packages=False)
    image.system_packages("git", "g++")
    image.python_packages("torch", "torchvision", "setuptools<81", "supervision", f"bentoml-detectron=={__version__}")
    image.run("pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'")
    return image


def _with_token(settings: Settings) -> Settings:
    return settings if settings.token else replace(settings, token=os.environ.get(TOKEN_VARIABLE) or None)


def _start(worker: Worker, model: bentoml.Model) -> None:
    """Starts a worker: the model is loaded beside the event loop, so that ``/readyz`` can say that it is not there yet."""
    settings = worker.settings
    worker.metrics = Metrics()

    def load() -> Predictor:
        from bentoml_detectron.images import Limits
        from bentoml_detectron.store import load_predictor

        limits = Limits(max_pixels=settings.max_image_pixels, max_bytes=settings.max_body_bytes)
        predictor = load_predictor(
            model, settings.device_id, trust_remote_code=settings.trust_remote_code, trusted=settings.trusted, limits=limits
        )
        _self_test(predictor, model)
        worker.info = lambda: _info(model, predictor, settings)
        logger.info("%s is ready", model.tag)
        return predictor

    worker.engine = Engine(load, worker.metrics.observe, max_queue=settings.max_queue)
    _drain_on_sigterm(worker)


def _self_test(predictor: Predictor, model: bentoml.Model) -> None:
    """Compares what the model finds with what it found when it was saved, where that was recorded.

    Raises:
        InvalidModelError: It finds something else.
    """
    from bentoml_detectron import selftest
    from bentoml_detectron.artifact import manifest

    path = Path(model.path)
    if not (path / manifest.MANIFEST).is_file():  # BentoML's own adapter saved it
        return
    due = manifest.read(path).self_test
    if due is None:
        logger.warning("%s has no self-test; it is served as it is", model.tag)
        return
    got = selftest.record(predictor.model, predictor.input, predictor.dataset)
    problems = selftest.compare(due, got, again=lambda change: selftest.run(predictor.model, predictor.input, None, change))
    if problems:
        raise InvalidModelError(f"{model.tag} fails its self-test: {'; '.join(problems)}", value=problems)


def _info(model: bentoml.Model, predictor: Predictor, settings: Settings) -> dict[str, Any]:
    from bentoml_detectron.artifact import folder

    dataset = predictor.dataset
    return {
        "tag": str(model.tag),
        "architecture": type(predictor.model).__name__,
        "thing_classes": (dataset and dataset.thing_classes) or [],
        "stuff_classes": (dataset and dataset.stuff_classes) or [],
        "keypoint_names": (dataset and dataset.keypoint_names) or [],
        "input": predictor.input.model_dump(),
        "precision": "fp32",
        "device": settings.device_id,
        "limits": {"max_body_bytes": settings.max_body_bytes, "max_image_pixels": settings.max_image_pixels},
        "labels": dict(model.info.labels),
        "versions": folder.versions(),
    }


def _drain_on_sigterm(worker: Worker) -> None:
    """On SIGTERM says at ``/readyz`` first that no more requests should come, and lets the server end a little later.

    The server's own handler stops listening at once, so that whoever balances the load learns it from refused connections.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # outside a server: a test made the instance
        return
    ended = signal.getsignal(signal.SIGTERM)
    if not callable(ended):
        return

    def drain(number: int, frame: Any) -> None:
        worker.draining = True
        loop.call_soon_threadsafe(loop.call_later, worker.settings.drain_seconds, ended, number, None)

    try:
        signal.signal(signal.SIGTERM, drain)
    except ValueError:  # not the main thread: the server does not take signals either
        return
