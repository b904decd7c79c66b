"""What stands around all of BentoML's own middlewares, some of which fail on what any client may send.

- OpenTelemetry's and the access log's decode headers as UTF-8, and fail if they are not.
- Each path that is asked for becomes a label of BentoML's metrics, and stays one.
- Starlette's routes also match a path with a line end behind it, so that ``/predict%0a`` would pass by this package's
  middleware and reach BentoML's handler, which fetches URLs. The handlers are taken out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Match

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

OURS = frozenset(["predict", "render", "openapi-spec"])
"""Names of BentoML's routes that this package's middleware answers in place of."""

access = logging.getLogger("bentoml.access")


class Gate:
    """Lets through what some route takes, with headers that can be decoded."""

    def __init__(self, app: App, router: Starlette, paths: Collection[str]) -> None:
        self._app = app
        self._router = router
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answers 404, or hands on; see ASGI's specification."""
        if scope["type"] in ("http", "websocket"):
            scope["headers"] = [(name, _utf8(value)) for name, value in scope["headers"]]
        if scope["type"] == "http" and not self._is_known(scope):
            await self._refuse(scope, send)
            return
        await self._app(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        if scope["path"] in self._paths:
            return True
        return scope["path"].isprintable() and any(route.matches(scope)[0] != Match.NONE for route in self._router.routes)

    async def _refuse(self, scope: Scope, send: Any) -> None:
        known = ", ".join(sorted(self._paths))
        body = json.dumps({"error": f"there is no {scope['path']!r:.200}; there are {known}"}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 404, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
        client = "{}:{}".format(*scope["client"]) if scope.get("client") else "_"
        access.info("%s (scheme=%s,method=%s,path=%s) (status=404)", client, scope["scheme"], scope["method"], scope["path"])


def install(router: Any, paths: Collection[str]) -> None:
    """Puts a gate around a BentoML app whose middlewares are made already, as they are when it starts.

    Args:
        router: BentoML's app.
        paths: Those that this package's middleware answers.
    """
    if isinstance(router, Starlette) and router.middleware_stack is not None:
        router.router.routes = [route for route in router.routes if getattr(route, "name", None) not in OURS]
        router.middleware_stack = Gate(router.middleware_stack, router, paths)


def _utf8(value: bytes) -> bytes:
    """A header as it came, if it is UTF-8; otherwise HTTP's old Latin-1 in UTF-8."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1").encode()
    return value
