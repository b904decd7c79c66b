"""A worker with two instances of the model: both answer, and a worker that has lost one goes on with the other."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from bentoml_detectron import demo
from servers import Server, served, two_instances, write_service

pytestmark = pytest.mark.slow
IMAGE = demo.images()[3].read_bytes()


@pytest.fixture(scope="module")
def server(tmp_path_factory, digits_home) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("instances")
    write_service(folder)
    with two_instances(folder, digits_home) as found:
        yield found


def models(server: Server) -> list[psutil.Process]:
    (worker,) = server.workers()
    return [each for each in psutil.Process(worker).children() if each.status() != psutil.STATUS_ZOMBIE]


def seconds_of_work(server: Server) -> list[float]:
    return [each.cpu_times().user for each in models(server)]


def test_both_answer_and_find_the_same(server):
    before = seconds_of_work(server)
    with ThreadPoolExecutor(8) as pool:
        answers = [each.json() for each in pool.map(lambda _: server.predict(IMAGE), range(80))]
    assert all(now > then + 0.05 for now, then in zip(seconds_of_work(server), before, strict=True))
    assert answers[0]["boxes"]
    for each in answers[1:]:
        assert each["class_ids"] == answers[0]["class_ids"]
        assert each["scores"] == pytest.approx(answers[0]["scores"], abs=1e-3)


def test_worker_goes_on_while_one_is_loaded_again(server):
    """What the lost one was at is refused, as it would be of one alone; no other request is, and ``/readyz`` stays good."""
    lost, _ = models(server)
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda _: server.predict(IMAGE).status_code, range(400))
        server.until(lambda: server.metrics()["detectron_batch_images_sum"] > 90)
        os.kill(lost.pid, signal.SIGKILL)
        deadline = time.monotonic() + 120
        while "SIGKILL" not in server.log:
            assert server.ready()[0] == 200
            assert time.monotonic() < deadline
        statuses = list(answers)
    assert set(statuses) <= {200, 503}
    assert statuses.count(503) <= 8  # at most its batch
    assert server.ready()[0] == 200
    server.until(lambda: server.log.count("has one more instance") == 2)
    assert len(models(server)) == 2
    assert {server.predict(IMAGE).status_code for _ in range(20)} == {200}


def test_as_many_as_are_asked_for(tmp_path, digits_home):
    write_service(tmp_path, "'digits:latest', settings=Settings(model_instances=1)")
    with served(tmp_path, digits_home, OMP_NUM_THREADS="2") as alone:
        for _ in range(10):
            assert alone.predict(IMAGE).status_code == 200
        assert len(models(alone)) == 1
