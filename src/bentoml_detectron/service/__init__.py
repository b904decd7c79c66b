"""`get_service`: a BentoML service for any saved model."""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import bentoml
from bentoml import Tag
from bentoml.models import BentoModel
from bentoml.validators import ContentType
from starlette.exceptions import HTTPException

from bentoml_detectron import __version__, threads
from bentoml_detectron.errors import InvalidArgumentError
from bentoml_detectron.service import apart, logs
from bentoml_detectron.service.apart import Apart
from bentoml_detectron.service.engine import Engine
from bentoml_detectron.service.front import Front, Settings, Worker
from bentoml_detectron.service.life import drain_on_sigterm, give_back_at_rest, respawn_at_once, share_turns, wait_for_turn
from bentoml_detectron.service.metrics import Metrics
from bentoml_detectron.service.openapi import document

__all__ = ["Settings", "get_service"]

TOKEN_VARIABLE = "BENTOML_DETECTRON_TOKEN"
"""Name of the environment variable with the token that requests must bear."""
SERVED_VARIABLE = "BENTOML_DETECTRON_SERVE"
"""Name of the environment variable that ``bentoml detectron serve`` sets, and `served` reads."""

_CHOSEN = "BENTOML_DETECTRON_CHOSEN_"
"""Begins the name of the environment variable by which a service's workers know the version that they serve."""
_OVER_HTTP = (
    "call the service over HTTP, for example with bentoml.depends(url='http://127.0.0.1:3000') or bentoml.SyncHTTPClient"
)
_LONGEST_NAME = 63  # characters, as bentos' are

logger = logging.getLogger("bentoml.detectron")
DETECTRON2 = "uv pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
"""Installs Detectron2 against the PyTorch that is installed; by uv, since the environment of BentoML's images has no pip."""
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

    Requests that wait together run as one batch if their images have the same padded shape, whatever their options.

    Args:
        bento_model: The model, or its tag, in BentoML's model store.
        settings: Limits, the device and the precision.
        **service_config: BentoML's own configuration: ``name``, ``workers``, ``traffic``, ``path_prefix``, ``http`` and so on.

    Returns:
        The service.

    Raises:
        InvalidArgumentError: (``ValueError``) `bento_model` is not a tag, ``path_prefix`` is not a path, or one of the settings
            is given beside `settings`.

    Example::

        # service.py
        import bentoml
        service = bentoml.detectron.get_service("mask_rcnn:latest")
    """
    try:
        model = BentoModel(bento_model.tag if isinstance(bento_model, bentoml.Model) else bento_model)
    except (ValueError, TypeError) as exc:
        raise InvalidArgumentError(f"{bento_model!r} is not a valid tag: {exc}", value=bento_model) from exc
    if not isinstance(settings, Settings | None):
        raise InvalidArgumentError(f"settings must be Settings(...), not {type(settings).__name__}", value=settings)
    worker = Worker(_with_token(settings or Settings()))
    prefix = _prefix(service_config.get("path_prefix"))

    @bentoml.service(**_configuration(service_config, model.tag.name, prefix, worker.settings))
    class DetectronService:
        """Detection, segmentation and keypoints by a Detectron2 model."""

        bento_model = model

        def __init__(self) -> None:
            if type(self) is not service.inner:
                raise InvalidArgumentError(
                    f"{type(self).__name__} is derived from {service.name}, and would bypass its limits and its token; extend "
                    "that service with its mount_asgi_app, or call it over HTTP",
                    value=type(self),
                )
            _start(worker, lambda: _chosen(service, model) or self.bento_model, service_config.get("workers") or 1, prefix)
            worker.openapi = lambda: document(service.name, prefix)

        # The middleware answers for these two; they are here for BentoML's clients, which ask the service for its methods.
        @bentoml.api(route="/predict")  # type: ignore[untyped-decorator]
        def predict(
            self,
            image: Image,
            score_threshold: float | None = None,
            classes: list[str] | None = None,
            top_k: int | None = None,
            masks: str = "rle",
        ) -> dict[str, Any]:
            raise InvalidArgumentError(_OVER_HTTP)

        @bentoml.api(route="/render")  # type: ignore[untyped-decorator]
        def render(
            self,
            image: Image,
            score_threshold: float | None = None,
            classes: list[str] | None = None,
            top_k: int | None = None,
            masks: str = "rle",
        ) -> Annotated[Path, ContentType("image/jpeg")]:
            raise InvalidArgumentError(_OVER_HTTP)

        async def __is_ready__(self) -> bool:
            if worker.reason is not None:
                raise HTTPException(503, worker.reason)  # for False, BentoML would give no reason
            return True

        @bentoml.on_deployment  # type: ignore[untyped-decorator]
        def supervise() -> None:  # BentoML makes it a static method, and calls it where the workers are started
            _choose(service, model)
            share_turns(service.name)
            respawn_at_once()

        @bentoml.on_startup  # type: ignore[untyped-decorator]
        async def start(self) -> None:
            if worker.engine is None:
                return
            worker.rest = asyncio.create_task(give_back_at_rest(worker.engine))
            await wait_for_turn(service.name, worker.engine, lambda: worker.draining)

        @bentoml.on_shutdown  # type: ignore[untyped-decorator]
        async def stop(self) -> None:
            if worker.rest is not None:
                worker.rest.cancel()
            if worker.engine is not None:
                worker.engine.close()
                await asyncio.to_thread(worker.engine.join, 10.0)

    service: bentoml.Service[Any] = DetectronService
    service.add_asgi_middleware(Front, worker=worker, prefix=prefix)
    return service


def _configuration(given: Mapping[str, Any], model_name: str, prefix: str, settings: Settings) -> dict[str, Any]:
    """BentoML's configuration of the service: what was given, and this package's own where nothing was.

    Raises:
        InvalidArgumentError: One of the settings is among it.
    """
    for each in fields(Settings):  # BentoML takes names that it does not know without a word: a token would ask for none
        if each.name in given:
            raise InvalidArgumentError(
                f"{each.name} belongs to the settings; give settings=Settings({each.name}=...)", value=each.name
            )
    envs = given.get("envs") or []
    return {
        "name": f"detectron-{model_name}"[:_LONGEST_NAME].rstrip("-._"),
        "image": container_image(),
        **given,
        **({"path_prefix": prefix} if prefix else {}),
        "envs": [*envs, *_environment(envs)],
        # BentoML's own deadline comes after this package's, which counts what it ends.
        "traffic": {"timeout": settings.request_seconds + 10, **(given.get("traffic") or {})},
    }


class ContainerImage(bentoml.images.Image):  # type: ignore[misc]
    """What a container for the service needs, with Detectron2 built from its own repository after all Python packages.

    That comes last when a bento is built, also after what a project's own build options add: BentoML refuses packages after
    commands. Give `get_service` another as ``image=`` for a GPU's base image, or for wheels of your own.
    """

    def freeze(self, *args: Any, **kwargs: Any) -> Any:
        """As BentoML's; the image stays as it is."""
        whole = copy.copy(self)
        whole.commands, whole.post_commands = [*self.commands], [DETECTRON2, *self.post_commands]
        whole.system_packages("git", "g++")
        return super(ContainerImage, whole).freeze(*args, **kwargs)


def container_image() -> ContainerImage:
    """What a container needs for the service, but for what a project's own options add."""
    image = ContainerImage(lock_python_packages=False)
    image.python_packages("torch", "torchvision", "setuptools<81", "supervision", f"bentoml-detectron=={__version__}")
    return image


def _prefix(given: object) -> str:
    """What stands before all paths: "" or "/v1", as BentoML's routes have it for "v1", "/v1" and "/v1/".

    Raises:
        InvalidArgumentError: It is no path; Starlette would take braces for parameters.
    """
    if not given:
        return ""
    if not isinstance(given, str) or not re.fullmatch(r"/?[\w.~-]+(/[\w.~-]+)*/?", given, re.ASCII):
        raise InvalidArgumentError(f"path_prefix is {given!r}; give a path such as '/v1'", value=given)
    return "/" + given.strip("/")


def _environment(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Variables for the workers beside those given, as BentoML's ``envs``."""
    known = {each["name"] for each in given}
    return [{"name": name, "value": value} for name, value in threads.environment().items() if name not in known]


def _choose(service: bentoml.Service[Any], model: BentoModel) -> None:
    """Has all workers of a server, also those that replace others, serve the version that "latest" is when it starts.

    In a bento that is the version that it was built with, whatever else is in the store.
    """
    if model.tag.version not in (None, "latest"):
        return
    built = [] if service.bento is None else [each.tag for each in service.bento.info.all_models]
    tag = next((each for each in built if each.name == model.tag.name), None) or model.resolve().tag
    os.environ[_CHOSEN + service.name] = str(tag)


def _chosen(service: bentoml.Service[Any], model: BentoModel) -> bentoml.Model | None:
    """The model that `_choose` chose; None where a version was asked for, or that has not run."""
    name, _, version = os.environ.get(_CHOSEN + service.name, "").partition(":")
    if model.tag.version not in (None, "latest") or name != model.tag.name:
        return None
    found: bentoml.Model = BentoModel(Tag(name, version)).resolve()
    return found


def _with_token(settings: Settings) -> Settings:
    """The same, with the environment's token where they have none; a line's end, as of a file's, is none of it."""
    return settings if settings.token else replace(settings, token=os.environ.get(TOKEN_VARIABLE, "").strip() or None)


def _start(worker: Worker, find: Callable[[], bentoml.Model], workers: int | str, prefix: str) -> None:
    """Starts a worker: the model is loaded beside the event loop, so that ``/readyz`` can say that it is not there yet."""
    from bentoml_detectron.memory import keep_freed_memory

    keep_freed_memory()  # before there are threads that allocate
    settings = worker.settings
    logs.install()
    worker.metrics = Metrics()

    def load() -> Apart:
        model = find()  # here, since a worker that cannot begin would be started again and again
        predictor = apart.start(model, settings, workers, share, lambda: worker.engine is not None and worker.engine.is_closed)
        worker.samples = _samples(predictor)
        worker.info = lambda: {**_info(model, predictor, settings), "path_prefix": prefix, "samples": list(worker.samples)}
        is_first = worker.engine is None or worker.engine.predictor is None
        logger.info("%s is ready" if is_first else "%s has one more instance", model.tag)
        return predictor

    def share(batch: int) -> int:
        return 1 if worker.engine is None else worker.engine.share(batch)

    worker.engine = Engine(
        load, worker.metrics.observe, max_queue=settings.max_queue, max_pixels=settings.max_queue_pixels,
        instances=lambda first: settings.model_instances or first.instances,
    )  # fmt: skip
    drain_on_sigterm(worker.drain, settings.drain_seconds)


def _samples(predictor: Apart) -> dict[str, Path]:
    """Sample images for the page, by their names: the demo's, where the model is for what is on these."""
    from bentoml_detectron import demo

    dataset = predictor.dataset
    if dataset is None or (dataset.name, tuple(dataset.thing_classes or ())) != (demo.DATASET, demo.CLASSES):
        return {}
    return {path.name: path for path in demo.images()[:6]}


def _info(model: bentoml.Model, predictor: Apart, settings: Settings) -> dict[str, Any]:
    dataset = predictor.dataset
    return {
        "tag": str(model.tag),
        "architecture": predictor.architecture,
        "thing_classes": (dataset and dataset.thing_classes) or [],
        "stuff_classes": (dataset and dataset.stuff_classes) or [],
        "keypoint_names": (dataset and dataset.keypoint_names) or [],
        "input": predictor.input.model_dump(),
        "precision": settings.precision,
        "device": settings.device_id,
        "limits": {"max_body_bytes": settings.max_body_bytes, "max_image_pixels": settings.max_image_pixels},
        "labels": dict(model.info.labels),
        "versions": predictor.versions,
    }
