"""What a service spends on a request, waits for and keeps, and which of BentoML's own settings hold for its paths."""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import ClassVar
from weakref import WeakSet

import bentoml
import pytest
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.log import TraceRecordFilter
from bentoml._internal.server.http.traffic import TimeoutMiddleware
from opentelemetry.sdk.trace import SpanProcessor
from prometheus_client import REGISTRY, generate_latest
from simple_di import sentinel
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from bentoml_detectron import demo
from bentoml_detectron.errors import InvalidArgumentError
from bentoml_detectron.service.engine import Engine
from bentoml_detectron.service.front import Front, Settings, Worker
from bentoml_detectron.service.life import give_back_at_rest
from bentoml_detectron.service.middlewares import Deadline

pytestmark = pytest.mark.slow  # each service's model imports PyTorch in a process of its own
IMAGE = demo.images()[3].read_bytes()
CORS = {"enabled": True, "access_control_allow_origins": "http://page.test", "access_control_allow_headers": "authorization"}


@pytest.fixture(scope="module")
def saved(demo_predictor) -> bentoml.Model:
    return bentoml.detectron.save_model("cost", demo_predictor)


@contextmanager
def fresh() -> Iterator[None]:
    """A process has one service: its configuration and its metrics stay. Here, both go."""
    before, collectors = copy.deepcopy(BentoMLContainer.config.get()), set(REGISTRY._collector_to_names)
    BentoMLContainer.access_control_options._cache = sentinel
    yield
    BentoMLContainer.config.set(before)
    BentoMLContainer.access_control_options._cache = sentinel
    for collector in set(REGISTRY._collector_to_names) - collectors:
        REGISTRY.unregister(collector)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh():
        yield


@contextmanager
def served(saved: bentoml.Model, ready: str = "/readyz", **config) -> Iterator[TestClient]:
    """A client of a service in this process, when it is ready."""
    with TestClient(bentoml.detectron.get_service(saved, **config).to_asgi()) as client:
        deadline = time.monotonic() + 60
        while client.get(ready).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield client


@pytest.mark.parametrize("prefix", ["/v1", "v1/", "/a/v1"])
def test_prefix_of_paths_holds_for_ours(prefix, saved):
    path = "/" + prefix.strip("/")
    with served(saved, f"{path}/readyz", path_prefix=prefix) as client:
        answer = client.post(f"{path}/predict", files={"image": IMAGE})
        assert (answer.status_code, len(answer.json()["scores"]) > 0) == (200, True)
        assert client.get(f"{path}/docs.json").json()["servers"] == [{"url": path}]
        assert client.get(f"{path}/predict").headers["allow"] == "POST"
        without = client.post("/predict", files={"image": IMAGE})
        assert (without.status_code, f"{path}/predict" in without.json()["error"]) == (404, True)


def test_token_is_asked_for_below_a_prefix(saved):
    with served(saved, "/v1/readyz", path_prefix="/v1", settings=Settings(token="secret")) as client:
        assert client.get("/v1/info").status_code == 401
        assert client.get("/v1/docs.json").status_code == 200


@pytest.mark.parametrize("prefix", ["/{name}", "/a b", "//a", "/a\n", 7])
def test_what_is_no_path_is_refused_as_a_prefix(prefix, saved):
    with pytest.raises(InvalidArgumentError, match="path_prefix"):
        bentoml.detectron.get_service(saved, path_prefix=prefix)


def test_cors_of_bentoml_holds_for_our_paths(saved):
    origin = {"origin": "http://page.test"}
    with served(saved, http={"cors": CORS}, settings=Settings(token="secret")) as client:
        answers = [
            client.post("/predict", files={"image": IMAGE}, headers={**origin, "authorization": "Bearer secret"}),
            client.get("/info", headers=origin),  # refused, which the page should be told
            client.get("/livez", headers=origin),
        ]
        assert [answer.status_code for answer in answers] == [200, 401, 200]
        for answer in answers:
            assert answer.headers.get_list("access-control-allow-origin") == ["http://page.test"]
        asked = {**origin, "access-control-request-method": "GET", "access-control-request-headers": "authorization"}
        assert client.options("/info", headers=asked).status_code == 200
        assert client.options("/info", headers={**asked, "origin": "http://other.test"}).status_code == 400


def test_no_cors_unless_it_is_configured(saved):
    with served(saved) as client:
        answer = client.get("/info", headers={"origin": "http://page.test"})
        assert (answer.status_code, "access-control-allow-origin" in answer.headers) == (200, False)


def test_static_files_that_are_not_there_are_no_labels(saved):
    with served(saved) as client:
        page = client.get("/").text
        assert "/static_content/" in page
        assert client.get("/static_content/swagger-ui.css").status_code == 200
        assert client.get("/static_content/made-up").status_code == 404
        assert client.get("/static_content//swagger-ui.css").status_code == 404
        metrics = generate_latest(REGISTRY).decode()
        assert "/static_content/swagger-ui.css" in metrics
        assert "made-up" not in metrics
        assert "/static_content//" not in metrics


def test_client_that_leaves_is_not_waited_for(demo_predictor):
    """BentoML's TimeoutMiddleware waits for an answer, whoever is there to read it, and the server's end waits for it."""

    async def scenario() -> None:
        worker = Worker(Settings())
        worker.engine = Engine(lambda: bentoml.detectron.load_predictor("cost"), lambda stage, value: None, max_queue=4)
        await worker.engine.loaded()
        scope = {
            "type": "http", "method": "POST", "path": "/predict", "query_string": b"",
            "headers": [(b"content-type", b"image/jpeg")],
        }  # fmt: skip
        messages = iter([{"type": "http.request", "body": IMAGE, "more_body": True}, {"type": "http.disconnect"}])
        sent = []

        async def receive():
            return next(messages)

        async def send(message) -> None:
            sent.append(message)

        app = TimeoutMiddleware(Front(lambda *given: None, worker), timeout=3600)
        async with asyncio.timeout(60):
            await app(scope, receive, send)
        worker.engine.close()
        worker.engine.join(10)
        assert sent[0]["status"] == 499

    bentoml.detectron.save_model("cost", demo_predictor)
    asyncio.run(scenario())


def test_deadline_ends_its_timer_with_the_request():
    """BentoML's keeps what belongs to each request until its time is over; the loop drops ended timers by and by."""
    kept: ContextVar[object] = ContextVar("kept")

    class Mark:
        pass

    async def answer(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def sink(message) -> None:
        pass

    async def held_after_1000(middleware) -> int:
        app = middleware(answer, timeout=3600)
        marks: WeakSet[Mark] = WeakSet()

        async def ask() -> None:
            kept.set(mark := Mark())
            marks.add(mark)
            await app({"type": "http"}, None, sink)

        for _ in range(1000):
            await asyncio.create_task(ask())
        gc.collect()
        return len(marks)

    assert asyncio.run(held_after_1000(Deadline)) < 300
    assert asyncio.run(held_after_1000(TimeoutMiddleware)) == 1000


@pytest.mark.parametrize(("begins", "status"), [(False, 504), (True, 200)])
def test_deadline_holds_until_an_answer_begins(begins, status):
    async def slow(scope, receive, send) -> None:
        if begins:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(0.2)
        await send({"type": "http.response.body", "body": b""})

    sent = []

    async def keep(message) -> None:
        sent.append(message)

    asyncio.run(Deadline(slow, timeout=0.05)({"type": "http", "method": "GET"}, None, keep))
    assert (sent[0]["status"], len(sent)) == (status, 2)


def test_deadline_stands_for_bentomls(saved):
    """With the user's own time, for all paths."""
    with served(saved, traffic={"timeout": 77}) as client:
        app, found = client.app.middleware_stack._app, []
        while app is not None:
            found.append(app)
            app = getattr(app, "app", None)
    assert [each.timeout for each in found if isinstance(each, Deadline)] == [77]
    assert not any(isinstance(each, TimeoutMiddleware) for each in found)


@pytest.mark.parametrize("exporter", [None, "in_memory"])
def test_spans_are_made_where_they_are_exported(exporter, saved):
    class Names(SpanProcessor):
        found: ClassVar[list[str]] = []

        def on_end(self, span) -> None:
            self.found.append(span.name)

    with served(saved, tracing={"exporter_type": exporter}) as client:
        BentoMLContainer.tracer_provider.get().add_span_processor(names := Names())
        names.found.clear()
        assert client.post("/predict", files={"image": IMAGE}).status_code == 200
        found = [name for name in names.found if name.startswith("POST /predict")]
    assert found.count("POST /predict") == (exporter is not None)
    assert (len(found) > 1) == (exporter is not None)


def told(caplog) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == "bentoml.access"]


def counted(pattern: str) -> float:
    """The value of the one metric whose line begins so; 0 where there is none."""
    found = re.search(rf"^{pattern} ([\d.]+)$", generate_latest(REGISTRY).decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.fixture(scope="class")
def without_room(saved) -> Iterator[TestClient]:
    """A client of a service where no request may wait."""
    settings = Settings(token="secret")
    object.__setattr__(settings, "max_queue", 0)  # which they refuse, as nothing would be answered
    with fresh(), served(saved, http={"cors": CORS}, settings=settings) as client:
        yield client


@pytest.fixture
def full(without_room, caplog) -> TestClient:
    caplog.set_level(logging.INFO, "bentoml.access")
    caplog.clear()
    return without_room


class TestFullQueue:
    @pytest.mark.parametrize("path", ["/predict", "/render"])
    def test_refusal_is_a_whole_answer_though_it_is_short_of_middlewares(self, path, full):
        asked = {"authorization": "Bearer secret", "origin": "http://page.test"}
        answer = full.post(path, files={"image": IMAGE}, headers=asked)
        assert (answer.status_code, "are already waiting" in answer.json()["error"]) == (503, True)
        assert int(answer.headers["retry-after"]) >= 1
        assert "total;dur=" in answer.headers["server-timing"]
        assert answer.headers["access-control-allow-origin"] == "http://page.test"

    def test_refusals_are_counted_and_logged_together(self, full, caplog):
        of_ours = r'detectron_refused_requests_total\{reason="OverloadedError",status="503"\}'
        of_bentoml = r'bentoml_service_request_total\{endpoint="/predict",http_response_code="503",.*\}'

        def told_of() -> int:
            return sum(int(line.partition(" requests were refused within one second")[0]) for line in refusals())

        def refusals() -> list[str]:
            return [line for line in told(caplog) if "were refused" in line]

        def ask(count: int) -> None:
            for _ in range(count):
                answer = full.post("/predict", files={"image": IMAGE}, headers={"authorization": "Bearer secret"})
                assert answer.status_code == 503

        ask(1)  # begins a second of the log, in which those of the tests before may be told, too
        until = time.monotonic() + 10
        while not refusals():
            assert time.monotonic() < until
            time.sleep(0.05)
        caplog.clear()
        before = counted(of_ours), counted(of_bentoml)
        ask(5)
        while told_of() < 5:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert len(told(caplog)) < 5
        assert (counted(of_ours), counted(of_bentoml)) == (before[0] + 5, before[1] + 5)

    def test_it_is_told_to_none_without_the_token_and_hinders_no_other_path(self, full, caplog):
        bearer = {"authorization": "Bearer secret"}
        assert full.post("/predict", files={"image": IMAGE}).status_code == 401
        assert full.get("/predict", headers=bearer).status_code == 405
        assert full.get("/info", headers=bearer).status_code == 200
        assert full.get("/readyz").status_code == 200
        statuses = [line.partition("status=")[2][:3] for line in told(caplog) if "status=" in line and "readyz" not in line]
        assert statuses == ["401", "405", "200"]

    def test_framing_is_looked_at_all_the_same(self, full):
        headers = {"authorization": "Bearer secret", "content-length": "4", "transfer-encoding": "chunked"}
        assert full.post("/predict", content=b"0\r\n\r\n", headers=headers).status_code == 400


TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize("exporter", [None, "in_memory"])
def test_log_has_the_callers_trace_and_a_span_of_its_own(exporter, saved, caplog):
    """Whether a span is made for the exporter or not."""
    found = []

    class Keep(TraceRecordFilter):
        def filter(self, record) -> bool:
            super().filter(record)
            found.append(record.trace_msg)
            return True

    logger = logging.getLogger("bentoml.access")
    caplog.set_level(logging.INFO, logger.name)
    with served(saved, tracing={"exporter_type": exporter}) as client:
        logger.addFilter(keep := Keep())
        try:
            for sampled in ("00", "01"):
                client.get("/info", headers={"traceparent": f"00-{TRACE}-{SPAN}-{sampled}"})
            client.get("/info")
            client.get("/info")
        finally:
            logger.removeFilter(keep)
    ids = [re.search(r"trace=(\w+),span=(\w+),sampled=(\d)", each).groups() for each in found]
    assert [(trace, sampled) for trace, _, sampled in ids[:2]] == [(TRACE, "0"), (TRACE, "1")]
    assert len({trace for trace, _, _ in ids}) == 3
    assert len({SPAN, *(span for _, span, _ in ids)}) == 5


def test_refused_image_is_not_kept_by_its_error(saved):
    """No frame of this package may be garbage that only a search for cycles frees: it would hold the image."""

    async def scenario() -> list[str]:
        worker = Worker(Settings())
        worker.engine = Engine(lambda: bentoml.detectron.load_predictor(saved.tag), lambda stage, value: None, max_queue=4)
        await worker.engine.loaded()
        sent = []

        async def send(message) -> None:
            sent.append(message)

        for content in (IMAGE[:3000], b"GIF89a"):
            scope = {
                "type": "http", "method": "POST", "path": "/predict", "query_string": b"",
                "headers": [(b"content-type", b"image/jpeg")],
            }  # fmt: skip
            messages = iter([{"type": "http.request", "body": content}])
            await Front(lambda *given: None, worker)(scope, lambda messages=messages: _next(messages), send)
        worker.engine.close()
        worker.engine.join(10)
        assert [each["status"] for each in sent if "status" in each] == [400, 415]
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return [each.f_code.co_qualname for each in gc.garbage if isinstance(each, FrameType) and _is_ours(each)]

    gc.collect()
    gc.disable()
    try:
        assert asyncio.run(scenario()) == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def _next(messages):
    for message in messages:
        return message
    await asyncio.Event().wait()


def _is_ours(frame: FrameType) -> bool:
    return "bentoml_detectron" in Path(frame.f_code.co_filename).parts


def test_memory_is_given_back_once_when_no_request_came_for_a_while(monkeypatch):
    class Counts:
        admitted, waiting = 0, 0

    given = []
    monkeypatch.setattr("bentoml_detectron.memory.give_back_freed_memory", lambda: given.append(Counts.admitted))

    async def scenario() -> None:
        task = asyncio.create_task(give_back_at_rest(Counts(), 0.02))
        await asyncio.sleep(0.1)
        assert given == []  # nothing was asked
        Counts.admitted, Counts.waiting = 3, 1
        await asyncio.sleep(0.1)
        assert given == []  # it is still at it
        Counts.waiting = 0
        await asyncio.sleep(0.2)
        assert given == [3]
        task.cancel()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "values",
    [
        {"precision": "fp99"}, {"max_queue": 0}, {"max_queue": True}, {"max_body_bytes": 1.5}, {"max_queue_pixels": -1},
        {"model_instances": 0}, {"request_seconds": -1}, {"body_seconds": 0}, {"drain_seconds": float("nan")},
        {"request_seconds": "60"}, {"token": "a\nb"}, {"token": " "},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_before_anything_is_served(values):
    with pytest.raises(InvalidArgumentError, match=next(iter(values))):
        Settings(**values)


def test_modules_to_trust_are_a_list():
    with pytest.raises(InvalidArgumentError, match="trusted is 'my_package'; give a list of modules"):
        Settings(trusted="my_package")
    assert Settings(trusted=["my_package"]).trusted == ("my_package",)


def test_settings_of_another_type_are_refused(saved):
    with pytest.raises(InvalidArgumentError, match="settings must be Settings"):
        bentoml.detectron.get_service(saved, settings={"precision": "fp32"})


@pytest.mark.parametrize("given", [{"token": "secret"}, {"precision": "int8"}, {"max_queue": 4}], ids=str)
def test_settings_beside_settings_are_refused_and_not_ignored(saved, given):
    with pytest.raises(InvalidArgumentError, match=rf"{next(iter(given))} belongs to the settings; give settings=Settings\("):
        bentoml.detectron.get_service(saved, **given)


def test_token_from_a_file_is_without_its_line_s_end(saved, monkeypatch):
    """As Kubernetes's secrets are written."""
    monkeypatch.setenv("BENTOML_DETECTRON_TOKEN", "secret\n")
    with served(saved) as client:
        assert client.get("/info", headers={"authorization": "Bearer secret"}).status_code == 200
        assert client.get("/info", headers={"authorization": "Bearer other"}).status_code == 401


def test_configuration_may_say_none_and_a_long_name_is_cut():
    service = bentoml.detectron.get_service("a" * 63, envs=None, traffic=None)
    assert len(service.name) == 63


def test_service_made_of_this_one_is_refused(saved):
    """BentoML would give it the class, and none of the middleware: no limits, no token, and handlers that answer nothing."""
    base = bentoml.detectron.get_service(saved)

    @bentoml.service
    class Mine(base.inner):
        pass

    with pytest.raises(InvalidArgumentError, match="Mine is derived from detectron-cost"):
        Mine()
    with pytest.raises(InvalidArgumentError, match="over HTTP"):
        base.inner.predict.func(None, None)


def test_paths_hold_where_the_app_is_mounted_in_another(saved):
    app = bentoml.detectron.get_service(saved, settings=Settings(token="secret")).to_asgi()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with app.router.lifespan_context(app):
            yield

    with TestClient(Starlette(routes=[Mount("/det", app=app)], lifespan=lifespan)) as client:
        deadline = time.monotonic() + 60
        while client.get("/det/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert client.post("/det/predict", files={"image": IMAGE}).status_code == 401
        assert client.get("/det/ui").status_code == 200  # open to all
        assert client.get("/det/predict/more").status_code == 404
        client.headers["authorization"] = "Bearer secret"
        answer = client.post("/det/predict", files={"image": IMAGE})
        assert (answer.status_code, len(answer.json()["scores"]) > 0) == (200, True)
        assert client.get("/det/info").json()["tag"] == str(saved.tag)
        assert client.get("/det/predict").headers["allow"] == "POST"


@pytest.mark.parametrize("built", [False, True], ids=["in the store", "in a bento"])
def test_latest_is_the_version_that_it_was_when_the_server_started(built, demo_predictor, monkeypatch):
    """Each worker looks for the model, also one that takes another's place later."""
    name = f"pinned-{built}".lower()
    first = bentoml.detectron.save_model(name, demo_predictor)
    service = bentoml.detectron.get_service(name, name=name)
    if built:
        info = SimpleNamespace(all_models=[SimpleNamespace(tag=bentoml.Tag("other", "1")), SimpleNamespace(tag=first.tag)])
        monkeypatch.setattr(type(service), "bento", SimpleNamespace(info=info), raising=False)
        bentoml.detectron.save_model(name, demo_predictor)
    monkeypatch.setenv(f"BENTOML_DETECTRON_CHOSEN_{name}", "")  # gone after the test
    service.inner.supervise()
    bentoml.detectron.save_model(name, demo_predictor)
    monkeypatch.setattr(type(service), "bento", None, raising=False)
    with TestClient(service.to_asgi()) as client:
        deadline = time.monotonic() + 60
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert client.get("/info").json()["tag"] == str(first.tag)
