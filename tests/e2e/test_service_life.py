"""A server from its start to its end: what it says while it loads, under load, and when its workers are told to end."""

from __future__ import annotations

import http.client
import io
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from bentoml_detectron import demo
from servers import Server, started, write_service

pytestmark = pytest.mark.slow
IMAGE = demo.images()[3].read_bytes()
WHOLE = "BENTOML_DETECTRON_WHOLE" in os.environ
"""Whether the restart test shall send 1,000 requests across 5 restarts, which takes minutes; otherwise 2 restarts."""


@contextmanager
def starting(folder: Path, home: Path, arguments: str) -> Iterator[Server]:
    """A server of ``get_service(ARGUMENTS)``, which need not be ready."""
    write_service(folder, arguments)
    with started(folder, home) as server:
        yield server


@pytest.fixture(scope="module")
def tight(tmp_path_factory, digits_home) -> Iterator[Server]:
    """A server with one worker and small limits."""
    settings = "max_queue=3, max_held_bytes=3_000_000, max_body_bytes=2_000_000, request_seconds=8, drain_seconds=3"
    with starting(tmp_path_factory.mktemp("tight"), digits_home, f"'digits:latest', settings=Settings({settings})") as server:
        said = set()
        while 200 not in {status for status, _ in said}:
            server.until(lambda: server.ready()[0] != 0)
            said.add(server.ready())
            time.sleep(0.05)
        # The first of the claims about it, since no test sees it again: 503 and why, then 200, and nothing else.
        assert said <= {(0, ""), (503, "the model is still loading; try again soon"), (200, "\n")}
        yield server


def test_beyond_the_queue_503_and_when_to_ask_again(tight):
    before = tight.metrics()["detectron_batch_images_sum"]
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(tight.predict(IMAGE))) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = [each for each in answers if each.status_code == 200]
    refused = [each for each in answers if each.status_code == 503]
    late = [each for each in answers if each.status_code == 504]  # where the machine is busy with other things
    assert len(done) + len(refused) + len(late) == 24
    assert refused, "24 at once are more than 3"
    assert done
    for each in refused:
        assert 1 <= int(each.headers["retry-after"]) <= 60
        assert "are already waiting" in each.json()["error"]
    # What was refused was never at the model.
    assert len(done) <= tight.metrics()["detectron_batch_images_sum"] - before <= len(done) + len(late)
    assert tight.metrics()['detectron_refused_requests_total{reason="OverloadedError",status="503"}'] >= len(refused)


def test_server_timing_has_all_stages_also_where_a_request_fails(tight):
    good, bad = tight.predict(IMAGE), tight.predict(IMAGE[: len(IMAGE) // 2])
    assert bad.status_code == 400
    stages = re.findall(r"(\w+);dur=[\d.]+", good.headers["server-timing"])
    assert stages == ["read", "predict", "decode", "preprocess", "queue", "forward", "postprocess", "encode", "total"]
    assert re.findall(r"(\w+);dur=[\d.]+", bad.headers["server-timing"]) == ["read", "total"]
    assert "total;dur=" in httpx.get(f"{tight.url}/info").headers["server-timing"]


def test_slow_senders_hold_no_place_at_the_model(tight):
    connections = [tight.half_sent(IMAGE[:100], len(IMAGE)) for _ in range(30)]
    assert tight.predict(IMAGE).status_code == 200
    # And nothing is lost by being slow.
    connections[0].sendall(IMAGE[100:])
    assert connections[0].recv(100).startswith(b"HTTP/1.1 200")
    for each in connections:
        each.close()


def test_bodies_that_arrive_take_no_more_memory_than_they_may(tight):
    connections = [tight.half_sent(b"\xff" * 1_500_000, 2_000_000) for _ in range(3)]
    refused = [each for each in connections if _answer_within(each, 5.0).startswith(b"HTTP/1.1 503")]
    assert refused, "4.5 MB are more than 3"
    assert len(refused) < 3
    for each in connections:
        each.close()
    tight.until(lambda: tight.predict(IMAGE).status_code == 200, 30)
    assert tight.predict(b"\xff\xd8\xff" + bytes(1_900_000)).status_code == 400  # what they held is free again


def test_answers_that_nobody_reads_take_no_more_memory_than_they_may_and_not_for_ever(tight):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (2400, 2600), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", quality=25)  # its answer has 4 MB, more than the system keeps
    assert buffer.tell() < 2_000_000
    connections = [tight.unread("/render", buffer.getvalue())]
    tight.until(lambda: "other requests and answers already take 3,000,000 bytes" in tight.predict(IMAGE).text, 20)
    tight.until(lambda: tight.predict(IMAGE).status_code == 200, 30)
    assert "a client did not read its answer within 8 seconds; closing its connection" in tight.log
    assert "Traceback" not in tight.log
    assert "ASGI" not in tight.log
    for each in connections:
        each.close()


def _answer_within(connection: socket.socket, seconds: float) -> bytes:
    connection.settimeout(seconds)
    try:
        return connection.recv(100)
    except (TimeoutError, ConnectionError):
        return b""


def test_request_whose_time_runs_out_gets_504(tight):
    reason = 'detectron_refused_requests_total{reason="DeadlineError",status="504"}'
    before = tight.metrics()
    with tight.half_sent(IMAGE[:100], len(IMAGE)) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 504")
    after = tight.metrics()
    assert after[reason] > before.get(reason, 0)
    assert after["detectron_batch_images_sum"] == before["detectron_batch_images_sum"]


def test_labels_are_the_models_classes_and_names_of_errors(tight):
    marks = ("xyzzy", "plugh")
    httpx.post(f"{tight.url}/predict?classes=xyzzy", content=IMAGE, headers={"content-type": "image/jpeg"}, timeout=60)
    httpx.post(f"{tight.url}/predict?plugh=1", content=IMAGE, headers={"content-type": "image/plugh"}, timeout=60)
    httpx.post(f"{tight.url}/xyzzy", content=IMAGE, timeout=60)
    tight.predict(IMAGE)
    text = httpx.get(f"{tight.url}/metrics", timeout=30).text
    assert not [line for line in text.splitlines() for mark in marks if mark in line]
    assert set(re.findall(r'detectron_detections_total{class_name="(.*?)"}', text)) <= set("0123456789")


def test_end_is_said_first_and_what_is_in_flight_is_answered(tight):
    """The last of this server: SIGTERM to all of it, as a container's end is."""
    connection = tight.half_sent(IMAGE[:100], len(IMAGE))
    tight.process.send_signal(signal.SIGTERM)
    tight.until(lambda: tight.ready() == (503, "the server is shutting down"), 3)
    answer = tight.predict(IMAGE)  # who has not heard of it yet
    assert (answer.status_code, answer.headers["connection"]) == (200, "close")
    time.sleep(3.5)  # until it listens no more
    connection.sendall(IMAGE[100:])
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    connection.close()
    assert tight.process.wait(30) == 0


class Client(threading.Thread):
    """Sends one request after the other, and again only where the connection was reset."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.statuses: list[int] = []
        self.resets = 0
        self.error: BaseException | None = None
        self.ended = threading.Event()
        self._port = port

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        while not self.ended.is_set() and self.error is None:
            try:
                connection.request("POST", "/predict", IMAGE, {"content-type": "image/jpeg"})
                answer = connection.getresponse()
                answer.read()
                self.statuses.append(answer.status)
            except ConnectionResetError:  # http.client's word for a connection that ended before its answer, too
                self.resets += 1
                connection.close()
            except BaseException as exc:
                self.error = exc


def test_restart_behind_two_workers_loses_no_request(tmp_path, digits_home):
    with starting(tmp_path, digits_home, "'digits:latest', workers=2") as server:
        server.until(lambda: server.log.count("is ready") == 2)
        clients = [Client(server.port) for _ in range(3)]
        for client in clients:
            client.start()
        restarts = 5 if WHOLE else 2
        for number in range(restarts):
            before = server.workers()
            os.kill(min(before), signal.SIGTERM)
            server.until(lambda number=number: server.log.count("is ready") == 3 + number)
            server.until(lambda: len(server.workers()) == 2)
        server.until(lambda: sum(len(each.statuses) for each in clients) >= (1000 if WHOLE else 50), 600)
        # A worker that is killed, not told, has its successor at once.
        before = server.workers()
        for client in clients:
            client.ended.set()
        for client in clients:
            client.join(90)
        os.kill(min(before), signal.SIGKILL)
        server.until(lambda: bool(server.workers() - before), 3)
        server.until(lambda: server.log.count("is ready") == 3 + restarts)
        # Nothing of the dead one waits any more.
        assert server.metrics()["detectron_requests_waiting"] == 0
        assert [client.error for client in clients] == [None] * len(clients)
        statuses = [status for client in clients for status in client.statuses]
        print(f"{len(statuses)} requests, {sum(each.resets for each in clients)} resets, {restarts} restarts")
        assert set(statuses) == {200}


def test_model_that_cannot_be_loaded_is_said_and_nothing_loops(tmp_path, digits_home):
    broken = tmp_path / "broken"
    shutil.copytree(digits_home, broken)
    (weights,) = broken.glob("models/digits/*/saved_model.pth")
    weights.write_bytes(weights.read_bytes()[:-1000])
    with starting(tmp_path, broken, "'digits:latest'") as server:
        server.until(lambda: "cannot be loaded" in server.ready()[1])
        before = server.workers()
        status, why = server.ready()
        answer = server.predict(IMAGE)
        assert (status, answer.status_code) == (503, 503)
        assert why == answer.json()["error"]
        assert "saved_model.pth" in why
        time.sleep(2)
        assert server.workers() == before
        assert server.log.count("the model cannot be loaded") == 1
