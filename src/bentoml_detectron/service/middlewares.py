"""Replaces work of BentoML's own middlewares whose results nobody uses.

- `TimeoutMiddleware` starts a timer for each request and never stops it, so that some 5 KB of each request stay in memory
  until its time is over, a minute later or more (``benchmarks/bench_service_cost.py``).
- OpenTelemetry's middleware makes a span for each request and each of its messages, with a dozen attributes, even if no
  exporter takes them.
- A request that is refused because too many wait still gets a trace, a line in the log, a timer and five metrics. A server
  that is asked for ten times what it can do spends most of its time on these, which the model lacks
  (``benchmarks/bench_overload.py``). So such a request passes by all middlewares, a user's own included; it is counted in the
  log and in BentoML's counter once a second.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from http import HTTPStatus
from typing import Any

from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.context import server_context, trace_context
from bentoml._internal.server.http.instruments import RunnerTrafficMetricsMiddleware
from bentoml._internal.server.http.traffic import TimeoutMiddleware
from opentelemetry import context, propagate, trace
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from starlette.responses import JSONResponse

access = logging.getLogger("bentoml.access")


def make_lean(app: Any) -> None:
    """Changes the middlewares in a BentoML app, from the outermost on, each of which has the next one as its ``app``."""
    is_exporting = BentoMLContainer.tracing.exporter_type.get() is not None
    while app is not None:
        following = getattr(app, "app", None)
        if isinstance(following, TimeoutMiddleware):
            app.app = following = Deadline(following.app, following.timeout)
        if isinstance(following, OpenTelemetryMiddleware) and not is_exporting:
            app.app = following = TraceIds(following.app)
        app = following


class Refusals:
    """Tells once a second, in BentoML's counter and in the log, what was refused as too many wait."""

    def __init__(self, app: Any) -> None:
        while app is not None and not isinstance(app, RunnerTrafficMetricsMiddleware):
            app = getattr(app, "app", None)
        self._metrics = app
        self._found: Counter[str] = Counter()

    def add(self, path: str) -> None:
        """One more."""
        if not self._found:
            asyncio.get_running_loop().call_later(1, self._tell)
        self._found[path] += 1

    def _tell(self) -> None:
        total = getattr(self._metrics, "metrics_request_total", None)  # made with the first request; None: not wanted
        if total is not None:
            for path, number in self._found.items():
                total.labels(
                    endpoint=path, service_name=server_context.bento_name, service_version=server_context.bento_version,
                    http_response_code=int(HTTPStatus.SERVICE_UNAVAILABLE), runner_name=server_context.service_name,
                ).inc(number)  # fmt: skip
        access.info("%d requests were refused within one second, because too many were waiting", self._found.total())
        self._found.clear()


class TraceIds:
    """As OpenTelemetry's middleware, where nobody takes spans: a request has the ids of a trace and a span, for the log."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._ids = RandomIdGenerator()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Hands on, within the caller's trace if it sent one; see ASGI's specification."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        given = propagate.extract({name.decode(): value.decode() for name, value in scope["headers"]})
        caller = trace.get_current_span(given).get_span_context()
        number = caller.trace_id if caller.is_valid else self._ids.generate_trace_id()
        own = trace.SpanContext(number, self._ids.generate_span_id(), False, caller.trace_flags, caller.trace_state)
        trace_context.request_id = own.span_id
        token = context.attach(trace.set_span_in_context(trace.NonRecordingSpan(own), given))
        try:
            await self.app(scope, receive, send)
        finally:
            context.detach(token)


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
