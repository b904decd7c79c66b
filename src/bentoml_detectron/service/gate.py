"""Stands around all of BentoML's own middlewares, to fix what they, and the server, do with some requests.

- OpenTelemetry's middleware and the access log's decode headers as UTF-8, and fail if they are not.
- Each requested path becomes a label of BentoML's metrics for good, also that of a static file that is not there.
- A request with both a length and chunks may end elsewhere for a proxy than for the server, which would then take the rest for
  another request.
- What a client does not read of its answer stays in memory, for as long as the client likes.
- Which HTTP parser uvicorn uses depends on what else is installed.
- Starlette's routes also match a path that ends with a line break. ``/predict%0a`` would pass by this package's middleware and
  reach BentoML's handler, which fetches URLs. So these handlers are removed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, MutableMapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.routing import BaseRoute, Match, Mount
from starlette.staticfiles import StaticFiles

from bentoml_detectron.service import middlewares
from bentoml_detectron.service.sending import Patience

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

OURS = frozenset(["predict", "render", "openapi-spec"])
"""Names of BentoML's routes that this package's middleware answers in place of."""

access = logging.getLogger("bentoml.access")


class Gate:
    """Lets through what some route takes, where it ends for certain, with headers that can be decoded.

    What will be refused as too many wait goes straight to who refuses it.
    """

    def __init__(
        self,
        app: App,
        router: Starlette,
        paths: Collection[str],
        refusal: App,
        is_full: Callable[[Scope], bool],
        seconds: float,
    ) -> None:
        self._app = app
        self._router = router
        self._paths = paths
        self._refusal = refusal
        self._is_full = is_full
        self._patience = Patience(seconds)
        self._refusals = middlewares.Refusals(app)
        self._files = {file for route in router.routes for file in _static_files(route)}

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answers 404, or hands on; see ASGI's specification."""
        if scope["type"] == "http":
            send = self._patience.of(send)
        if scope["type"] == "http" and {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
            reason = "the request has both Content-Length and Transfer-Encoding; send one of them"
            await self._refuse(scope, send, HTTPStatus.BAD_REQUEST, reason, [(b"connection", b"close")])
            return
        if scope["type"] == "http" and self._is_full(scope):
            self._refusals.add(scope["path"])
            await self._refusal(scope, receive, send)
            return
        if scope["type"] in ("http", "websocket"):
            scope["headers"] = [(name, _utf8(value)) for name, value in scope["headers"]]
        if scope["type"] == "http" and not self._is_known(scope):
            known = ", ".join(sorted(self._paths))
            await self._refuse(scope, send, HTTPStatus.NOT_FOUND, f"{scope['path']!r:.200} does not exist; available: {known}")
            return
        await self._app(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        if path_of(scope) in self._paths or path_of(scope) in self._files:
            return True
        routes = (route for route in self._router.routes if not _is_static(route))
        return scope["path"].isprintable() and any(route.matches(scope)[0] != Match.NONE for route in routes)

    async def _refuse(
        self, scope: Scope, send: Any, status: int, reason: str, more: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        body = json.dumps({"error": reason}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
        await send({"type": "http.response.start", "status": int(status), "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
        client = "{}:{}".format(*scope["client"]) if scope.get("client") else "_"
        told = (client, scope["scheme"], scope["method"], scope["path"], status)
        access.info("%s (scheme=%s,method=%s,path=%s) (status=%d)", *told)


def path_of(scope: Scope) -> str:
    """A request's path, without that which the app is mounted at in another."""
    path: str = scope["path"]
    root = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root) else path


def install(router: Any, paths: Collection[str], refusal: App, is_full: Callable[[Scope], bool], seconds: float) -> None:
    """Puts a gate around a BentoML app whose middlewares are made already, as they are when it starts.

    Args:
        router: BentoML's app.
        paths: Those that this package's middleware answers.
        refusal: Answers a request with 503 as that middleware would, where too many wait already.
        is_full: Whether that is so, and the middleware would refuse the request for no other reason.
        seconds: Most that a client may take to read its answer.
    """
    if isinstance(router, Starlette) and router.middleware_stack is not None:
        middlewares.make_lean(router.middleware_stack)
        router.router.routes = [route for route in router.routes if getattr(route, "name", None) not in OURS]
        router.middleware_stack = Gate(router.middleware_stack, router, paths, refusal, is_full, seconds)


def parse_by_h11(receive: Any) -> None:
    """Has uvicorn read requests by h11, by which it would where nothing has brought httptools along.

    httptools makes a refusal cheaper, but sets no limit to the size of a head, and takes requests of two hosts or of none, and
    bodies whose end is not clear (``tests/security/test_odd_http.py``). BentoML has no setting for it; uvicorn looks at its
    configuration when it begins to listen, after the app's start.

    Args:
        receive: The lifespan's, as the server made it.
    """
    from uvicorn import Config
    from uvicorn.protocols.http.h11_impl import H11Protocol

    config = getattr(getattr(receive, "__self__", None), "config", None)
    if isinstance(config, Config) and config.http == "auto":
        config.http_protocol_class = H11Protocol


def _is_static(route: BaseRoute) -> bool:
    return isinstance(route, Mount) and isinstance(route.app, StaticFiles)


def _static_files(route: BaseRoute) -> Iterator[str]:
    """Paths of the files that a route serves, if it serves files."""
    if isinstance(route, Mount) and isinstance(route.app, StaticFiles):
        for folder in map(Path, route.app.all_directories):
            yield from (f"{route.path}/{file.relative_to(folder).as_posix()}" for file in folder.rglob("*") if file.is_file())


def _utf8(value: bytes) -> bytes:
    """A header as it came, if it is UTF-8; otherwise HTTP's old Latin-1 in UTF-8."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1").encode()
    return value
