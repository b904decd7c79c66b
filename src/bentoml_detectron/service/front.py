"""The HTTP side of a worker: a middleware that answers for the service's own paths, and leaves all others to BentoML."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from bentoml.exceptions import BentoMLException

from bentoml_detectron.artifact.code import check_trusted
from bentoml_detectron.errors import DetectronError, InvalidArgumentError, NotReadyError, OverloadedError, reason
from bentoml_detectron.options import PRECISIONS
from bentoml_detectron.service import gate
from bentoml_detectron.service.engine import Engine, too_many
from bentoml_detectron.service.metrics import STAGES, Metrics
from bentoml_detectron.service.page import page
from bentoml_detectron.service.requests import Call, DisconnectedError, read

if TYPE_CHECKING:
    from bentoml_detectron.engines import Precision

logger = logging.getLogger("bentoml.detectron")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TIMED = ("read", "predict", *STAGES)
"""Stages in ``Server-Timing``; "predict" is all from "decode" to "postprocess", waits for threads included."""
_OPEN = frozenset(["/ui", "/ui/sample", "/docs.json"])
"""Paths that need no token: a browser's own requests bear none."""
CLIENT_CLOSED = 499
"""Status of a request whose client left before its answer, in metrics and the log: nginx's, which HTTP does not have."""


_COUNTS = ("model_instances", "max_body_bytes", "max_image_pixels", "max_queue", "max_queue_pixels", "max_held_bytes")
_SECONDS = {"body_seconds": 0.001, "request_seconds": 0.001, "drain_seconds": 0}
"""What `Settings` has of each, with the least of seconds."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a service takes and does.

    Attributes:
        device_id: Where the model lives.
        precision: As in `load_predictor`.
        model_instances: Processes with the model in each worker. None: two on the CPU, where there are cores and memory for
            both, as two with half of the threads do more than one; otherwise one.
        max_body_bytes: Largest body.
        max_image_pixels: Largest image; a larger one is refused before it is decoded.
        max_queue: Most requests that wait or run in a worker; further ones are refused at once.
        max_queue_pixels: Most pixels that they may have in the model, padding included; one image alone may have more. None:
            as many as 8 batches take, or 32 megapixels if that is more.
        max_held_bytes: Most bytes of bodies that a worker holds, those still arriving included, and answers that their clients
            have not read; at least one body's. Beyond it a request whose body arrives is refused.
        body_seconds: Most seconds that a body may take to arrive.
        request_seconds: Most seconds from a request's head to its answer; what is still waiting then never reaches the model. A
            client has as long again to read the answer.
        drain_seconds: For how long a worker that was told to end says so at ``/readyz`` before it takes no more requests.
        token: What requests must bear as ``Authorization: Bearer ...``; None: nothing.
        trust_remote_code: As in `load_model`.
        trusted: As in `load_model`.
    """

    device_id: str = "cpu"
    precision: Precision = "fp32"
    model_instances: int | None = None
    max_body_bytes: int = 20 << 20
    max_image_pixels: int = 25_000_000
    max_queue: int = 32
    max_queue_pixels: int | None = None
    max_held_bytes: int = 320 << 20
    body_seconds: float = 30.0
    request_seconds: float = 60.0
    drain_seconds: float = 1.0
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    trusted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks them, as far as that can be done without the model.

        Raises:
            InvalidArgumentError: (``ValueError``) One is out of range.
        """
        if self.precision not in PRECISIONS:
            raise InvalidArgumentError(
                f"precision={self.precision!r}; give one of {', '.join(PRECISIONS)}", value=self.precision
            )
        object.__setattr__(self, "trusted", check_trusted(self.trusted))
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= 1):
                raise InvalidArgumentError(f"{name} is {value!r}; it must be a whole number of at least 1", value=value)
        for name, least in _SECONDS.items():
            value = getattr(self, name)
            if type(value) not in (int, float) or not least <= value < math.inf:
                raise InvalidArgumentError(f"{name} is {value!r}; it must be at least {least} seconds", value=value)
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.strip()):
            raise InvalidArgumentError("the token is blank, or has characters that a header cannot hold; use another")


@dataclass(slots=True)
class Worker:
    """What a worker's middleware and service share; empty where the service is only imported."""

    settings: Settings
    info: Callable[[], dict[str, Any]] = dict
    samples: Mapping[str, Path] = field(default_factory=dict)  # JPEG, by their names
    openapi: Callable[[], dict[str, Any]] = dict
    engine: Engine | None = None
    metrics: Metrics | None = None
    rest: asyncio.Task[None] | None = None
    draining: bool = False

    def drain(self) -> None:
        """Says from now on that no more requests should come."""
        self.draining = True

    @property
    def reason(self) -> str | None:
        """Why no requests should come here; None where they should."""
        if self.draining:
            return "the server is shutting down"
        if self.engine is not None and self.engine.failure is not None:
            return self.engine.failure
        if self.engine is None or self.engine.predictor is None:
            return "the model is still loading; try again soon"
        return None


@dataclass(slots=True, eq=False)
class _Request:
    """A request, what is known of its stages, and how many bytes of its body are held."""

    scope: Scope
    receive: Receive
    timing: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)
    held: int = 0


class Front:
    """Answers ``/predict``, ``/render``, ``/info``, ``/ui``, ``/ui/sample`` and ``/docs.json``, below a prefix."""

    def __init__(self, app: App, worker: Worker, prefix: str = "") -> None:
        self.app = app
        self.worker = worker
        self._prefix = prefix
        self._held = 0
        self._serve = _with_cors(self._respond)
        self._routes: dict[tuple[str, str], Callable[[_Request], Awaitable[_Answer]]] = {
            ("POST", "/predict"): self._predict,
            ("POST", "/render"): self._render,
            ("GET", "/info"): self._info,
            ("GET", "/ui"): self._ui,
            ("GET", "/ui/sample"): self._sample,
            ("GET", "/docs.json"): self._docs,
        }
        self._paths = {prefix + path for _, path in self._routes}
        self._modelled = {prefix + path for path in ("/predict", "/render")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or hands on; see ASGI's specification."""
        if scope["type"] == "lifespan":
            seconds = self.worker.settings.request_seconds
            gate.install(scope.get("app"), self._paths, _with_cors(self._refuse), self._is_full, seconds)
            gate.parse_by_h11(receive)
        if scope["type"] != "http" or gate.path_of(scope) not in self._paths:
            await self.app(scope, receive, send)
            return
        await self._serve(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As `_respond` for a request for which `_is_full`, with most of the answer made beforehand."""
        engine = self._engine()
        answer = _refusal(engine.waiting, engine.retry_after)
        self._count_refusal(OverloadedError.__name__, answer.status)
        more = [(b"connection", b"close")] if self.worker.draining else []
        await _send(send, _Answer(answer.status, answer.body, answer.content_type, [*answer.headers, *more]), head=False)

    def _is_full(self, scope: Scope) -> bool:
        """Whether a request will be refused as too many wait, and for no other reason."""
        engine = self.worker.engine
        is_full = engine is not None and engine.predictor is not None and engine.is_full
        return is_full and scope["method"] == "POST" and gate.path_of(scope) in self._modelled and self._is_authorized(scope)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = _Request(scope, receive)
        try:
            answer = await self._answer(request)
        except DisconnectedError:
            self._count_refusal("DisconnectedError", CLIENT_CLOSED)
            # Nobody reads it, but BentoML's TimeoutMiddleware waits for an answer, and the server's end for that.
            answer = _error(CLIENT_CLOSED, "the client disconnected")
        finally:
            self._held -= request.held
        answer.headers.append((b"server-timing", _server_timing(request)))
        if self.worker.draining:  # so that the client's next request finds another worker, and no connection that ends
            answer.headers.append((b"connection", b"close"))
        self._held += len(answer.body)
        try:
            await _send(send, answer, head=scope["method"] == "HEAD")
        finally:
            self._held -= len(answer.body)

    async def _answer(self, request: _Request) -> _Answer:
        scope = request.scope
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        own = gate.path_of(scope).removeprefix(self._prefix)
        route = self._routes.get((method, own))
        if route is None:
            allowed = ", ".join(m for m, path in self._routes if path == own)
            return _error(
                HTTPStatus.METHOD_NOT_ALLOWED, f"{scope['path']} allows only {allowed}", [(b"allow", allowed.encode())]
            )
        if not self._is_authorized(scope):
            self._count_refusal("Unauthorized", HTTPStatus.UNAUTHORIZED)
            return _error(
                HTTPStatus.UNAUTHORIZED, "send the service's token as 'Authorization: Bearer TOKEN'",
                [(b"www-authenticate", b"Bearer")],
            )  # fmt: skip
        seconds = self.worker.settings.request_seconds
        try:
            if gate.path_of(scope) in self._modelled:
                self._engine().admit()
            async with asyncio.timeout(seconds):
                return await route(request)
        except TimeoutError:
            self._count_refusal("DeadlineError", HTTPStatus.GATEWAY_TIMEOUT)
            return _error(HTTPStatus.GATEWAY_TIMEOUT, f"no answer within {seconds:g} seconds; try again", self._retry_after())
        except (OverloadedError, NotReadyError) as exc:
            self._count_refusal(type(exc).__name__, exc.error_code)
            return _error(exc.error_code, str(exc), self._retry_after())
        except BentoMLException as exc:
            self._count_refusal(type(exc).__name__, exc.error_code)
            return _error(exc.error_code, reason(exc) if isinstance(exc, DetectronError) else str(exc))
        except (DisconnectedError, asyncio.CancelledError):
            raise
        except Exception:
            logger.exception("%s failed", scope["path"])
            return _error(HTTPStatus.INTERNAL_SERVER_ERROR, "internal server error; see the server's log")

    def _is_authorized(self, scope: Scope) -> bool:
        token = self.worker.settings.token
        if token is None or gate.path_of(scope).removeprefix(self._prefix) in _OPEN:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, b"Bearer " + token.encode())

    def _retry_after(self) -> list[tuple[bytes, bytes]]:
        engine = self.worker.engine
        return [(b"retry-after", str(1 if engine is None else engine.retry_after).encode())]

    def _count_refusal(self, reason: str, status: int) -> None:
        if self.worker.metrics is not None:
            self.worker.metrics.refused(reason, int(status))

    async def _predict(self, request: _Request) -> _Answer:
        call, result = await self._found(request)
        start = time.perf_counter()
        if call.masks == "polygon" or result.panoptic is not None or result.semantic is not None:  # these take long
            text = await self._engine().run(lambda: result.to_json(masks=call.masks))
        else:
            text = result.to_json(masks=call.masks)
        self._encoded(request, start)
        return _Answer(HTTPStatus.OK, text.encode(), b"application/json")

    async def _render(self, request: _Request) -> _Answer:
        call, result = await self._found(request)
        start = time.perf_counter()
        content = await self._engine().run(_rendered, call.image, result, self._limits())
        self._encoded(request, start)
        return _Answer(HTTPStatus.OK, content, b"image/jpeg")

    async def _found(self, request: _Request) -> tuple[Call, Any]:
        """Reads a request and predicts on its image; stops where the client leaves."""
        engine, settings, metrics = self._engine(), self.worker.settings, self.worker.metrics
        scope = request.scope
        if metrics is not None:
            metrics.wait(1)
        try:
            call = await read(
                dict(scope["headers"]), scope["query_string"], lambda: self._received(request), settings.max_body_bytes,
                settings.body_seconds,
            )  # fmt: skip
            request.timing["read"] = time.perf_counter() - request.start
            if engine.predictor is None:
                raise NotReadyError("the model is not loaded")
            wanted = engine.predictor.options(**call.options)
            between = time.perf_counter()
            result = await _while_connected(engine.predict(call.image, wanted, request.timing), request.receive)
            request.timing["predict"] = time.perf_counter() - between
            if metrics is not None:
                metrics.found(result)
            return call, result
        finally:
            if metrics is not None:
                metrics.wait(-1)

    async def _received(self, request: _Request) -> Mapping[str, Any]:
        """The next part of a body; many senders together, however slow, cannot take the memory.

        Raises:
            OverloadedError: Bodies take too much of it already.
        """
        message = await request.receive()
        size = len(message.get("body", b""))
        settings = self.worker.settings
        limit = max(settings.max_held_bytes, settings.max_body_bytes)
        # A body that is too large by itself is refused for that, as it would be at any time.
        if self._held + size > limit and request.held + size <= settings.max_body_bytes:
            raise OverloadedError(f"other requests and answers already take {limit:,} bytes; try again soon", value=self._held)
        self._held += size
        request.held += size
        return message

    def _encoded(self, request: _Request, start: float) -> None:
        request.timing["encode"] = time.perf_counter() - start
        if self.worker.metrics is not None:
            self.worker.metrics.observe("encode", request.timing["encode"])

    async def _info(self, request: _Request) -> _Answer:
        self._engine()
        return _json(HTTPStatus.OK, self.worker.info())

    async def _ui(self, request: _Request) -> _Answer:
        content, policy = page()
        return _Answer(HTTPStatus.OK, content, b"text/html; charset=utf-8", [(b"content-security-policy", policy)])

    async def _sample(self, request: _Request) -> _Answer:
        samples = self.worker.samples
        name = parse_qs(request.scope["query_string"].decode("latin-1")).get("name", [""])[0]
        if name not in samples:
            there = f"available: {', '.join(samples)}" if samples else "this model has none"
            return _error(HTTPStatus.NOT_FOUND, f"there is no sample {name!r:.100}; {there}")
        return _Answer(HTTPStatus.OK, samples[name].read_bytes(), b"image/jpeg")

    async def _docs(self, request: _Request) -> _Answer:
        return _json(HTTPStatus.OK, self.worker.openapi())

    def _engine(self) -> Engine:
        engine = self.worker.engine
        if engine is None or engine.predictor is None:
            raise NotReadyError(self.worker.reason or "the model is not loaded")
        return engine

    def _limits(self) -> Any:
        predictor = self._engine().predictor
        return predictor.limits if predictor is not None else None


def _with_cors(app: App) -> App:
    """The same with BentoML's CORS, if that is configured; BentoML's own stands behind this middleware."""
    from bentoml._internal.configuration.containers import BentoMLContainer
    from starlette.middleware.cors import CORSMiddleware

    if not BentoMLContainer.http.cors.enabled.get():
        return app
    return CORSMiddleware(app, **BentoMLContainer.access_control_options.get())  # type: ignore[return-value]


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


@lru_cache(maxsize=64)
def _refusal(waiting: int, seconds: int) -> _Answer:
    headers = [(b"retry-after", str(seconds).encode()), (b"server-timing", b"total;dur=0.0")]
    return _error(HTTPStatus.SERVICE_UNAVAILABLE, str(too_many(waiting)), headers)


def _server_timing(request: _Request) -> bytes:
    known = [(stage, request.timing[stage]) for stage in TIMED if stage in request.timing]
    known.append(("total", time.perf_counter() - request.start))
    return ", ".join(f"{stage};dur={seconds * 1e3:.1f}" for stage, seconds in known).encode()


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
        task.cancel()
        gone.cancel()
        # Otherwise an error holds this frame, which holds the error's task: the image would stay until it is found as garbage.
        del task, gone


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
