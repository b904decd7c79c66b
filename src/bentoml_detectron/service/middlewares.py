"""What BentoML's own middlewares do for a request that nobody has anything of, and that is left out here.

- `TimeoutMiddleware` starts a timer for each request and never stops it, so that some 5 KB of each stay in memory until its
  time is over, a minute later or more (``benchmarks/bench_service_cost.py``).
- OpenTelemetry's middleware makes a span for each message of a request, also where no exporter takes any.
"""

from __future__ import annotations

import asyncio
from typing import Any

from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.server.http.traffic import TimeoutMiddleware
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from starlette.responses import JSONResponse


def make_lean(app: Any) -> None:
    """Changes the middlewares in a BentoML app, from the outermost on, each of which has the next one as its ``app``."""
    is_exporting = BentoMLContainer.tracing.exporter_type.get() is not None
    while app is not None:
        following = getattr(app, "app", None)
        if isinstance(following, TimeoutMiddleware):
            app.app = following = Deadline(following.app, following.timeout)
        if isinstance(app, OpenTelemetryMiddleware) and not is_exporting:
            # The request's own span stays: its ids are in the log.
            app.exclude_receive_span = app.exclude_send_span = True
        app = following


class Deadline:
    """As BentoML's `TimeoutMiddleware`: 504 where an answer has not begun in time. Its timer ends with the request."""

    def __init__(self, app: Any, timeout: float) -> None:
        self.app = app
        self.timeout = timeout

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Hands on, or answers 504; see ASGI's specification."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        async def begin(message: Any) -> None:
            timer.reschedule(None)
            await send(message)

        try:
            async with asyncio.timeout(self.timeout) as timer:
                await self.app(scope, receive, begin)
        except TimeoutError:
            if not timer.expired():  # another's
                raise
            answer = JSONResponse({"error": f"Not able to process the request in {self.timeout} seconds"}, 504)
            await answer(scope, receive, send)
