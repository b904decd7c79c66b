"""What a service spends on a request, waits for and keeps, and which of BentoML's own settings hold for its paths."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager

import bentoml
import pytest
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.server.http.traffic import TimeoutMiddleware
from prometheus_client import REGISTRY, generate_latest
from simple_di import sentinel
from starlette.testclient import TestClient

from bentoml_detectron import demo
from bentoml_detectron.errors import InvalidArgumentError
from bentoml_detectron.service.engine import Engine
from bentoml_detectron.service.front import Front, Settings, Worker

IMAGE = demo.images()[3].read_bytes()
CORS = {"enabled": True, "access_control_allow_origins": "http://page.test", "access_control_allow_headers": "authorization"}


@pytest.fixture(scope="module")
def saved(demo_predictor) -> bentoml.Model:
    return bentoml.detectron.save_model("cost", demo_predictor)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """A process has one service: its configuration and its metrics stay. Here, both go with the test."""
    before, collectors = copy.deepcopy(BentoMLContainer.config.get()), set(REGISTRY._collector_to_names)
    BentoMLContainer.access_control_options._cache = sentinel
    yield
    BentoMLContainer.config.set(before)
    BentoMLContainer.access_control_options._cache = sentinel
    for collector in set(REGISTRY._collector_to_names) - collectors:
        REGISTRY.unregister(collector)


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
