"""The middleware that answers for the model: what it leaves to other threads than the event loop's, and what it holds."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from bentoml_detectron import demo, drawing
from bentoml_detectron.artifact.manifest import Input
from bentoml_detectron.predictor import Predictor
from bentoml_detectron.results import Detections
from bentoml_detectron.service import requests
from bentoml_detectron.service.engine import Engine
from bentoml_detectron.service.front import Front, Settings, Worker
from support import built, tiny_cfg

IMAGE = demo.images()[3].read_bytes()


class Watch:
    """Has a function wait until the event loop has gone on; `found` says for each call whether it has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, whose: Any, step: str, seconds: float = 30) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.found: list[bool] = []
        function: Callable[..., Any] = getattr(whose, step)

        def waiting(*args: Any, **kwargs: Any) -> Any:
            gone_on = threading.Event()
            self.loop.call_soon_threadsafe(gone_on.set)
            self.found.append(gone_on.wait(seconds))
            return function(*args, **kwargs)

        monkeypatch.setattr(whose, step, waiting)


@pytest.fixture(scope="module")
def digits(demo_predictor) -> Predictor:
    return Predictor(demo_predictor.model, Input(format="BGR", min_size_test=192, max_size_test=192))


@pytest.fixture(scope="module")
def semantic() -> Predictor:
    return Predictor(built(tiny_cfg("SemanticSegmentor")), Input(format="BGR", min_size_test=64, max_size_test=96))


async def asked(front: Front, path: str, body: bytes, kind: str = "image/jpeg", query: bytes = b"") -> tuple[int, bytes]:
    """Status and body of the answer to a POST whose body comes in pieces."""
    scope = {
        "type": "http", "method": "POST", "path": path, "query_string": query, "headers": [(b"content-type", kind.encode())],
    }  # fmt: skip
    file = io.BytesIO(body)
    sent: list[Any] = []
    done = asyncio.Event()

    async def receive() -> Any:
        if file.tell() == len(body):
            await done.wait()
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": file.read(1000), "more_body": file.tell() < len(body)}

    async def send(message: Any) -> None:
        sent.append(message)

    async with asyncio.timeout(120):
        await front(scope, receive, send)
    done.set()
    return sent[0]["status"], b"".join(each.get("body", b"") for each in sent[1:])


def answered(
    predictor: Predictor, path: str, body: bytes, settings: Settings | None = None, watch: Watch | None = None, **more: Any
) -> tuple[int, bytes]:
    """Status and body of the answer of a worker with that predictor."""

    async def scenario() -> tuple[int, bytes]:
        if watch is not None:
            watch.loop = asyncio.get_running_loop()
        worker = Worker(settings or Settings())
        worker.engine = Engine(lambda: predictor, lambda stage, value: None, max_queue=4)
        await worker.engine.loaded()
        try:
            return await asked(Front(lambda *given: None, worker), path, body, **more)
        finally:
            worker.engine.close()
            await asyncio.to_thread(worker.engine.join, 10)

    return asyncio.run(scenario())


def form(image: bytes) -> dict[str, Any]:
    return {
        "body": b'--b\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n' + image + b"\r\n--b--\r\n",
        "kind": "multipart/form-data; boundary=b",
    }


def bitmap(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "BMP")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("whose", "step", "path", "given"),
    [
        (Predictor, "prepare", "/predict", {"body": IMAGE}),
        (Predictor, "run", "/predict", {"body": IMAGE}),
        (requests, "_form", "/predict", form(bitmap(700))),
        (Detections, "to_json", "/predict", {"body": IMAGE, "query": b"masks=polygon"}),
        (drawing, "draw", "/render", {"body": IMAGE}),
    ],
    ids=["decode and resize", "model", "large form", "polygons", "picture"],
)
def test_event_loop_goes_on_during(whose, step, path, given, digits, monkeypatch):
    watch = Watch(monkeypatch, whose, step)
    status, _ = answered(digits, path, watch=watch, **given)
    assert (status, watch.found) == (200, [True])


def test_event_loop_goes_on_while_a_map_is_spelled(semantic, monkeypatch):
    watch = Watch(monkeypatch, Detections, "to_json")
    status, body = answered(semantic, "/predict", IMAGE, watch=watch)
    assert (status, watch.found) == (200, [True])
    assert json.loads(body)["semantic"]


def test_watch_above_sees_what_keeps_the_event_loop(digits, monkeypatch):
    """The JSON of boxes and RLEs, which takes a fifth of a millisecond, is written on it."""
    watch = Watch(monkeypatch, Detections, "to_json", seconds=0.1)
    assert answered(digits, "/predict", IMAGE, watch=watch)[0] == 200
    assert watch.found == [False]


def test_a_body_may_be_as_large_as_one_may_be_though_all_may_hold_less(digits):
    """As with `max_body_bytes` of 400 MB and the 320 MB of `max_held_bytes`."""
    settings = Settings(max_body_bytes=len(IMAGE), max_held_bytes=len(IMAGE) // 2)
    assert answered(digits, "/predict", IMAGE, settings)[0] == 200
    assert answered(digits, "/predict", IMAGE + b"0", settings)[0] == 413
