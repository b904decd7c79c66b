"""The start of a server with two workers that do not load their models in the same time.

From the first good answer on, no answer may be that a model is being loaded.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from bentoml_detectron import demo
from servers import Server, environment, started, write_service

pytestmark = pytest.mark.slow
IMAGE = demo.images()[3].read_bytes()
PATHS = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
SAVE = """
import bentoml
from detectron2.config import get_cfg
import turned
from support import built

cfg = get_cfg()
cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "TurnedBoxes", "cpu"
bentoml.detectron.save_model("turned", built(cfg), cfg)
"""
SECONDS = 6


@pytest.fixture(scope="module")
def turned_home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("turned")
    command = [sys.executable, "-W", "ignore", "-c", SAVE]
    subprocess.run(command, env=environment(home, PYTHONPATH=PATHS), check=True, timeout=300, cwd=sys.prefix)
    return home


@contextmanager
def several_workers(folder: Path, home: Path, slow: int | str, seconds: int = SECONDS, count: int = 2) -> Iterator[Server]:
    """A server that starts; the `slow`-th of its workers to build the model needs some seconds more for it, or fails."""
    (folder / "turns").mkdir()
    write_service(folder, f"'turned:latest', workers={count}, settings=Settings(trusted=('turned',))")
    with started(folder, home, PYTHONPATH=PATHS, TURNED_SLOW=f"{folder / 'turns'} {slow} {seconds}") as server:
        yield server


def answers(server: Server, until: int) -> list[tuple[int, int]]:
    """Statuses of ``/readyz`` and ``/predict``, each on connections of their own, until so many workers have been ready."""
    seen = []
    deadline = time.monotonic() + 120
    while server.log.count("is ready") < until or seen[-1][0] != 200:
        assert time.monotonic() < deadline, server.log
        ready = server.ready()[0]
        seen.append((ready, server.predict(IMAGE).status_code if ready else 0))
    return seen


def is_ready_for(server: Server, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.ready()[0] != 200:
            return False
        time.sleep(0.02)
    return True


def assert_no_503_after_200(seen: list[tuple[int, int]]) -> None:
    first = next(index for index, (ready, _) in enumerate(seen) if ready == 200)
    assert {ready for ready, _ in seen[:first]} <= {0, 503}
    assert set(seen[first:]) == {(200, 200)}


def assert_all_answer(server: Server, count: int = 2) -> None:
    """Each while the others are stopped."""
    workers = server.workers()
    assert len(workers) == count
    for left in workers:
        stopped = [each for each in workers if each != left]
        for each in stopped:
            os.kill(each, signal.SIGSTOP)
        try:
            assert server.predict(IMAGE).status_code == 200
        finally:
            for each in stopped:
                os.kill(each, signal.SIGCONT)


@pytest.mark.parametrize("slow", [0, 1])
def test_worker_that_loads_answers_only_while_none_is_ready(tmp_path, turned_home, slow):
    with several_workers(tmp_path, turned_home, slow) as server:
        assert_no_503_after_200(answers(server, 2))
        assert_all_answer(server)


def test_worker_that_is_killed_while_it_loads_keeps_the_other_from_nothing(tmp_path, turned_home):
    with several_workers(tmp_path, turned_home, 0) as server:
        server.until(lambda: server.ready()[0] == 503)
        before = server.workers()
        # One of these is the one that says so.
        os.kill(min(before), signal.SIGKILL)
        seen = answers(server, 2)
        first = next(index for index, (ready, _) in enumerate(seen) if ready == 200)
        assert set(seen[first:]) == {(200, 200)}
        assert_all_answer(server)


@pytest.mark.parametrize("failing", ["0", "0,1"])
def test_workers_that_cannot_load_make_room(tmp_path, turned_home, failing):
    """They alone say why, until another is ready; if they listened until then, others are started in their place."""
    count = len(failing.split(",")) + 1
    with several_workers(tmp_path, turned_home, failing, -1, count) as server:
        # Several listen; which of them answers is chance. One without a model looks for a ready one each second, then drains.
        server.until(lambda: is_ready_for(server, 5))
        assert server.log.count("the model cannot be loaded") == count - 1
        assert {server.predict(IMAGE).status_code for _ in range(20)} == {200}


def test_worker_whose_model_ended_makes_room(tmp_path, turned_home):
    """Until it has loaded it again it would say that it loads, to half of the clients; one in its place does not listen yet."""
    with several_workers(tmp_path, turned_home, 2) as server:
        server.until(lambda: server.log.count("is ready") == 2)
        before = server.workers()
        (model,) = psutil.Process(min(before)).children()
        model.kill()
        server.until(lambda: server.predict(IMAGE).status_code == 503)  # it is noticed by a request
        server.until(lambda: not before <= server.workers())
        server.until(lambda: is_ready_for(server, 3))
        server.until(lambda: server.log.count("is ready") == 3)
        assert_all_answer(server)
