"""The model's process: what it gives is what a predictor gives, and however it ends or fails, the worker hears of it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import bentoml
import numpy as np
import psutil
import pytest
import torch
from detectron2.config import get_cfg

import odd
from bentoml_detectron import demo
from bentoml_detectron.errors import DetectronError, ModelEndedError, NotReadyError
from bentoml_detectron.service import Settings, apart
from bentoml_detectron.service.apart import Apart
from bentoml_detectron.service.engine import Engine
from support import built

pytestmark = pytest.mark.slow  # each process imports PyTorch
IMAGES = [path.read_bytes() for path in demo.images()[:3]]
ORPHAN = """
import sys
import bentoml
from bentoml_detectron.service import Settings, apart

started = apart.start(bentoml.models.get(sys.argv[1]), Settings(), 1)
print(started._process.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def digits(demo_predictor) -> bentoml.Model:
    return bentoml.detectron.save_model("apart", demo_predictor)


@pytest.fixture(scope="module")
def odd_model() -> bentoml.Model:
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE, cfg.INPUT.MIN_SIZE_TEST = "Odd", "cpu", 0
    return bentoml.detectron.save_model("odd", built(cfg), cfg)


@contextmanager
def started(model: bentoml.Model, share: Callable[[int], int] = lambda batch: 1) -> Iterator[Apart]:
    found = apart.start(model, Settings(trusted=("odd",)), 1, share)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def oddly(odd_model) -> Iterator[Apart]:
    with started(odd_model) as found:
        yield found


def run(predictor, *images, **options) -> list:
    """Arrays as they are, numbers as pictures of that height."""
    pictures = [np.zeros((each, 64, 3), np.uint8) if isinstance(each, int) else each for each in images]
    return predictor.run([predictor.prepare(each, predictor.options(**options)) for each in pictures])


def counted(results: list) -> int:
    return int(results[0].class_ids[0])


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_finds_what_a_predictor_finds_and_tells_how_long_it_took(digits):
    here = bentoml.detectron.load_predictor(digits)
    told = []
    with started(digits) as there:
        group = [there.prepare(each, there.options(score_threshold=0.2, classes=["1", "8"])) for each in IMAGES]
        found = there.run(group, lambda stage, seconds: told.append((stage, seconds)))
        assert there.input == here.input
        assert (there.dataset, there.padding, there.limits.max_pixels) == (
            here.dataset,
            here.padding,
            Settings().max_image_pixels,
        )
        assert there.architecture == type(here.model).__name__
        assert there.versions["torch"] == torch.__version__
        assert there.budget() > 0
    due = here(IMAGES, score_threshold=0.2, classes=["1", "8"])
    assert [len(each) for each in found] == [len(each) for each in due]
    for one, other in zip(found, due, strict=True):
        np.testing.assert_allclose(one.boxes, other.boxes, atol=0.05)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-3)
        assert one.class_names == other.class_names
    assert [stage for stage, _ in told] == ["forward", "postprocess"]
    assert all(seconds > 0 for _, seconds in told)


def test_error_of_the_model_comes_with_its_traceback_and_ends_nothing(oddly):
    with pytest.raises(RuntimeError, match="it went wrong") as caught:
        run(oddly, odd.FAILS)
    assert "odd.py" in str(caught.value.__cause__)
    assert len(run(oddly, 50)[0]) == 1


def test_error_that_cannot_be_read_back_comes_by_its_name(oddly):
    with pytest.raises(RuntimeError, match="UnreadableError: it went wrong"):
        run(oddly, odd.FAILS_UNREADABLY)
    assert len(run(oddly, 50)[0]) == 1


def test_what_are_no_detections_is_an_error_in_its_place(oddly):
    (found,) = run(oddly, odd.NO_DETECTIONS)
    assert isinstance(found, DetectronError)
    assert "this service cannot return it as JSON" in str(found)


def test_model_leaves_a_core_to_a_worker_that_is_busy_and_takes_it_back(odd_model, monkeypatch):
    ended = threading.Event()

    def spin() -> None:
        while not ended.is_set():
            pass

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with started(odd_model) as found:
        run(found, odd.COUNTS_THREADS)
        before = counted(run(found, odd.COUNTS_THREADS))
        spinning = threading.Thread(target=spin)
        spinning.start()
        run(found, odd.COUNTS_THREADS)
        during = counted(run(found, odd.COUNTS_THREADS))
        ended.set()
        spinning.join()
        run(found, odd.COUNTS_THREADS)
        assert (before, during, counted(run(found, odd.COUNTS_THREADS))) == (2, 1, 2)


def test_garbage_collector_leaves_alone_what_the_start_has_made(odd_model):
    gc.unfreeze()
    with started(odd_model) as there:
        assert gc.get_freeze_count() > 10_000
        assert counted(run(there, odd.COUNTS_SPARED)) > 10_000
    gc.unfreeze()


@pytest.mark.parametrize(("how", "why"), [("ends", "status 3"), ("killed", "SIGKILL")])
def test_end_of_the_process_is_said(how, why, odd_model):
    with started(odd_model) as found:
        if how == "killed":
            os.kill(found._process.pid, signal.SIGKILL)
        with pytest.raises(ModelEndedError, match=f"the model's process has ended \\({why}\\)"):
            run(found, odd.ENDS if how == "ends" else 50)


def test_signals_for_the_worker_do_not_end_the_model_before_it(oddly):
    for each in (signal.SIGINT, signal.SIGTERM):
        os.kill(oddly._process.pid, each)
    assert len(run(oddly, 50)[0]) == 1


def test_close_ends_the_process(odd_model):
    with started(odd_model) as found:
        pid = found._process.pid
        assert psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid)


def test_process_ends_with_a_worker_that_is_killed(digits):
    worker = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", ORPHAN, str(digits.tag)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with worker:
        pid = int(worker.stdout.readline())
        worker.kill()
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 10)


def test_model_that_cannot_be_loaded_is_an_error_that_says_why(odd_model):
    with pytest.raises(DetectronError, match="trust"):
        apart.start(odd_model, Settings(), 1)


def test_model_that_ends_its_process_as_it_is_loaded_is_an_error(odd_model, monkeypatch):
    monkeypatch.setenv("ODD", "ends")
    with pytest.raises(DetectronError, match="it does not want to"):
        apart.start(odd_model, Settings(trusted=("odd",)), 1)


def test_process_that_a_signal_ends_as_it_loads_may_be_started_again(odd_model, monkeypatch):
    monkeypatch.setattr(apart, "START", "import os; os.kill(os.getpid(), 9)  # {}")
    with pytest.raises(ModelEndedError, match=r"while it was loading \(SIGKILL\)"):
        apart.start(odd_model, Settings(trusted=("odd",)), 1)


def test_process_that_says_why_and_does_not_end_is_no_signal_s(odd_model, monkeypatch):
    """It is killed then, and would say the same again."""
    monkeypatch.setattr(apart, "_END_SECONDS", 0.2)
    says = "c = Connection({}); c.recv(); c.send('it does not want to'); time.sleep(60)"
    start = f"import sys, time; sys.path[:] = sys.argv[1:]; from multiprocessing.connection import Connection; {says}"
    monkeypatch.setattr(apart, "START", start)
    with pytest.raises(DetectronError, match="it does not want to") as caught:
        apart.start(odd_model, Settings(trusted=("odd",)), 1)
    assert not isinstance(caught.value, ModelEndedError)


def test_process_that_is_no_more_before_the_model_is_loaded_is_an_error(odd_model, monkeypatch):
    monkeypatch.setattr(apart, "START", "import os; os.close({}); os._exit(7)")
    with pytest.raises(DetectronError, match=r"ended while it was loading \(status 7\)"):
        apart.start(odd_model, Settings(), 1)


def test_engine_loads_a_model_again_whose_process_has_ended(digits):
    """Who waits for its answer is told to ask again, and who asks after it is answered."""
    made = []

    def load() -> Apart:
        made.append(apart.start(digits, Settings(), 1))
        return made[-1]

    async def main() -> None:
        engine = Engine(load, lambda stage, seconds: None, max_queue=4)
        async with asyncio.timeout(120):
            await engine.loaded()
            first = await engine.predict(IMAGES[0], engine.predictor.options())
            os.kill(made[0]._process.pid, signal.SIGKILL)
            with pytest.raises(NotReadyError, match="SIGKILL"):
                await engine.predict(IMAGES[0], engine.predictor.options())
            while engine.predictor is not None and engine.predictor is made[0]:
                await asyncio.sleep(0.01)
            with pytest.raises(NotReadyError, match="still loading"):
                engine.admit()
            await engine.loaded()
            assert len(await engine.predict(IMAGES[0], engine.predictor.options())) == len(first)
        assert engine.failure is None
        engine.close()
        await asyncio.to_thread(engine.join, 30)

    asyncio.run(main())
    assert len(made) == 2
    until(lambda: not any(psutil.pid_exists(each._process.pid) for each in made), 10)


def test_batch_has_its_share_of_the_threads_and_two_instances_are_worth_two(odd_model, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    shares = iter([1, 2, 3])
    with started(odd_model, lambda batch: next(shares)) as found:
        assert [counted(run(found, odd.COUNTS_THREADS)) for _ in range(3)] == [2, 1, 1]
        assert found.instances == 2


@pytest.mark.parametrize(("threads", "instances"), [(1, 1), (16, 2)])
def test_two_instances_are_worth_it_where_each_has_a_thread(odd_model, monkeypatch, threads, instances):
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    with started(odd_model) as found:
        assert found.instances == instances


def test_one_instance_is_all_where_memory_is_short(demo_predictor, monkeypatch):
    predictor = bentoml.detectron.load_predictor(bentoml.detectron.save_model("short", demo_predictor))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    taken = psutil.Process().memory_info().rss
    for free, instances in [(taken, 1), (1.9 * taken, 1), (3 * taken, 2)]:
        monkeypatch.setattr("bentoml_detectron.predictor.free_memory", lambda device, free=free: free)
        assert apart._instances(predictor, 1) == instances
        assert apart._instances(predictor, 2) == 1


def test_model_that_is_not_wanted_any_more_is_not_loaded_to_its_end(odd_model, monkeypatch):
    monkeypatch.setattr(apart, "START", "import time; time.sleep(600)  # {}")
    start = time.monotonic()
    with pytest.raises(DetectronError, match="ended while it was loading"):
        apart.start(odd_model, Settings(), 1, is_closed=lambda: time.monotonic() > start + 1)
    assert time.monotonic() < start + 60
