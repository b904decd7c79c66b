"""The HTTP side of a worker: a middleware that answers for the model's own paths, and leaves all others to BentoML."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from bentoml.exceptions import BentoMLException

from bentoml_detectron.errors import DetectronError, NotReadyError, OverloadedError
from bentoml_detectron.service.engine import Engine
from bentoml_detectron.service.metrics import Metrics
from bentoml_detectron.service.requests import Call, DisconnectedError, read

logger = logging.getLogger("bentoml.detectron")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

RETRY_AFTER = b"1"  # seconds
_PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a service takes and does.

    Attributes:
        device_id: Where the model lives.
        max_body_bytes: Largest body.
        max_image_pixels: Largest image; a larger one is refused before it is decoded.
        max_queue: Most requests that wait in a worker; further ones are refused at once.
        body_seconds: Most seconds that a body may take to arrive.
        drain_seconds: For how long a worker that was told to end says so at ``/readyz`` before it takes no more requests.
        token: What requests must bear as ``Authorization: Bearer ...``; None: nothing.
        trust_remote_code: As in `load_model`.
        trusted: As in `load_model`.
    """

    device_id: str = "cpu"
    max_body_bytes: int = 20 << 20
    max_image_pixels: int = 25_000_000
    max_queue: int = 32
    body_seconds: float = 30.0
    drain_seconds: float = 1.0
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    trusted: tuple[str, ...] = ()


@dataclass(slots=True)
class Worker:
    """What a worker's middleware and service share; empty where the service is only imported."""

    settings: Settings
    info: Callable[[], dict[str, Any]] = dict
    openapi: Callable[[], dict[str, Any]] = dict
    engine: Engine | None = None
    metrics: Metrics | None = None
    draining: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether requests should come here."""
        return self.engine is not None and self.engine.predictor is not None and not self.draining


class Front:
    """Answers ``/predict``, ``/render``, ``/info``, ``/ui`` and ``/docs.json``."""

    def __init__(self, app: App, worker: Worker) -> None:
        self.app = app
        self.worker = worker
        self._routes: dict[tuple[str, str], Callable[[Scope, Receive], Awaitable[_Answer]]] = {
            ("POST", "/predict"): self._predict,
            ("POST", "/render"): self._render,
            ("GET", "/info"): self._info,
            ("GET", "/ui"): self._ui,
            ("GET", "/docs.json"): self._docs,
        }
        self._paths = {path for _, path in self._routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or hands on; see ASGI's specification."""
        if scope["type"] != "http" or scope["path"] not in self._paths:
            await self.app(scope, receive, send)
            return
        try:
            answer = await self._answer(scope, receive)
        except DisconnectedError:
            self._count_refusal("DisconnectedError")
            return
        await _send(send, answer, head=scope["method"] == "HEAD")

    async def _answer(self, scope: Scope, receive: Receive) -> _Answer:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        route = self._routes.get((method, scope["path"]))
        if route is None:
            allowed = ", ".join(m for m, path in self._routes if path == scope["path"])
            return _error(HTTPStatus.METHOD_NOT_ALLOWED, f"{scope['path']} takes {allowed}", [(b"allow", allowed.encode())])
        if not self._is_authorized(scope):
            self._count_refusal("Unauthorized")
            return _error(
                HTTPStatus.UNAUTHORIZED, "send the service's token as 'Authorization: Bearer TOKEN'",
                [(b"www-authenticate", b"Bearer")],
            )  # fmt: skip
        try:
            return await route(scope, receive)
        except (OverloadedError, NotReadyError) as exc:
            self._count_refusal(type(exc).__name__)
            return _error(exc.error_code, str(exc), [(b"retry-after", RETRY_AFTER)])
        except BentoMLException as exc:
            self._count_refusal(type(exc).__name__)
            return _error(exc.error_code, str(exc))
        except (DisconnectedError, asyncio.CancelledError):
            raise
        except Exception:
            logger.exception("%s failed", scope["path"])
            return _error(HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed; its log says why")

    def _is_authorized(self, scope: Scope) -> bool:
        token = self.worker.settings.token
        if token is None or scope["path"] in ("/ui", "/docs.json"):
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, b"Bearer " + token.encode())

    def _count_refusal(self, reason: str) -> None:
        if self.worker.metrics is not None:
            self.worker.metrics.refused(reason)

    async def _predict(self, scope: Scope, receive: Receive) -> _Answer:
        call, result, timing = await self._found(scope, receive)
        start = time.perf_counter()
        if not hasattr(result, "to_json"):
            raise DetectronError("the model's output is none that this service can spell as JSON")
        if call.masks == "polygon":
            text = await self._engine().run(lambda: result.to_json(masks="polygon"))
        else:
            text = result.to_json(masks=call.masks)
        timing.append(("encode", time.perf_counter() - start))
        return self._timed(_Answer(HTTPStatus.OK, text.encode(), b"application/json"), timing)

    async def _render(self, scope: Scope, receive: Receive) -> _Answer:
        call, result, timing = await self._found(scope, receive)
        start = time.perf_counter()
        content = await self._engine().run(_rendered, call.image, result, self._limits())
        timing.append(("encode", time.perf_counter() - start))
        return self._timed(_Answer(HTTPStatus.OK, content, b"image/jpeg"), timing)

    async def _found(self, scope: Scope, receive: Receive) -> tuple[Call, Any, list[tuple[str, float]]]:
        """Reads a request and predicts on its image; stops where the client leaves."""
        engine, settings, metrics = self._engine(), self.worker.settings, self.worker.metrics
        engine.admit()
        start = time.perf_counter()
        if metrics is not None:
            metrics.wait(1)
        try:
            call = await read(
                dict(scope["headers"]), scope["query_string"], receive, settings.max_body_bytes, settings.body_seconds
            )
            if engine.predictor is None:
                raise NotReadyError("the model is not loaded")
            wanted = engine.predictor.options(**call.options)
            between = time.perf_counter()
            result = await _while_connected(engine.predict(call.image, wanted), receive)
            if metrics is not None:
                metrics.found(result)
            return call, result, [("read", between - start), ("predict", time.perf_counter() - between)]
        finally:
            if metrics is not None:
                metrics.wait(-1)

    def _timed(self, answer: _Answer, timing: list[tuple[str, float]]) -> _Answer:
        if self.worker.metrics is not None:
            self.worker.metrics.observe("encode", timing[-1][1])
        spelled = ", ".join(f"{stage};dur={seconds * 1e3:.1f}" for stage, seconds in timing)
        answer.headers.append((b"server-timing", spelled.encode()))
        return answer

    async def _info(self, scope: Scope, receive: Receive) -> _Answer:
        self._engine()
        return _json(HTTPStatus.OK, self.worker.info())

    async def _ui(self, scope: Scope, receive: Receive) -> _Answer:
        return _Answer(HTTPStatus.OK, _PAGE.read_bytes(), b"text/html; charset=utf-8", [
            (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
             b"img-src blob: data:; connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"),
        ])  # fmt: skip

    async def _docs(self, scope: Scope, receive: Receive) -> _Answer:
        return _json(HTTPStatus.OK, self.worker.openapi())

    def _engine(self) -> Engine:
        engine = self.worker.engine
        if engine is None or engine.predictor is None:
            raise NotReadyError((engine and engine.failure) or "the model is being loaded; ask again soon")
        return engine

    def _limits(self) -> Any:
        predictor = self._engine().predictor
        return predictor.limits if predictor is not None else None


@dataclass(slots=True)
class _Answer:
    status: int
    body: bytes
    content_type: bytes
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)


def _json(status: int, content: Any) -> _Answer:
    return _Answer(status, json.dumps(content, ensure_ascii=False).encode(), b"application/json")


def _error(status: int, message: str, headers: list[tuple[bytes, bytes]] | None = None) -> _Answer:
    answer = _json(status, {"error": message.encode("utf-8", "replace").decode()})
    answer.headers += headers or []
    return answer


async def _send(send: Send, answer: _Answer, head: bool) -> None:
    headers = [
        (b"content-type", answer.content_type),
        (b"content-length", str(len(answer.body)).encode()),
        (b"x-content-type-options", b"nosniff"),
        *answer.headers,
    ]
    await send({"type": "http.response.start", "status": int(answer.status), "headers": headers})
    await send({"type": "http.response.body", "body": b"" if head else answer.body})


async def _while_connected(work: Any, receive: Receive) -> Any:
    """The result of work; where the client leaves before, the work is cancelled.

    Raises:
        DisconnectedError: It left.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise DisconnectedError
    finally:
        for each in (task, gone):
            each.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _rendered(image: bytes, result: Any, limits: Any) -> bytes:
    """The picture with what was found on it, as JPEG."""
    import io

    from PIL import Image

    from bentoml_detectron import images
    from bentoml_detectron.drawing import draw

    picture = draw(images.load(image, limits), result)
    buffer = io.BytesIO()
    Image.fromarray(picture[:, :, ::-1]).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
