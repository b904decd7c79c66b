"""The engine of a worker, in one process: what runs together, what is refused, and what never reaches the model."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bentoml_detectron import demo
from bentoml_detectron.artifact.manifest import Dataset, Input
from bentoml_detectron.errors import (
    DetectronError,
    ImageError,
    InvalidModelError,
    ModelEndedError,
    NotReadyError,
    OverloadedError,
)
from bentoml_detectron.predictor import Predictor
from bentoml_detectron.service.engine import Engine

IMAGE = demo.images()[3].read_bytes()
DIGITS = Dataset(name="digits", thing_classes=[str(digit) for digit in range(10)])


def encoded(height: int, width: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


class Held(Predictor):
    """Waits before each batch until it may go on, and notes what came."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.go = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self.groups: list[list[Any]] = []
        self.during: Callable[[list[Any]], None] = lambda group: None

    def run(self, group, observe=lambda stage, seconds: None):
        self.groups.append(list(group))
        self.begun.release()
        assert self.go.acquire(timeout=30)
        self.during(group)
        return super().run(group, observe)


@pytest.fixture
def held(demo_predictor) -> Held:
    return Held(demo_predictor.model, Input(format="BGR", min_size_test=192, max_size_test=192), DIGITS, max_batch_pixels=10**6)


class Told:
    """What the engine told."""

    def __init__(self) -> None:
        self.values: list[tuple[str, float]] = []

    def __call__(self, stage: str, value: float) -> None:
        self.values.append((stage, value))

    def of(self, stage: str) -> list[float]:
        return [value for each, value in self.values if each == stage]


async def started(predictor: Predictor, told: Any = None, **limits: Any) -> Engine:
    engine = Engine(lambda: predictor, told or Told(), **{"max_queue": 32, **limits})
    async with asyncio.timeout(30):
        while engine.predictor is None:
            await asyncio.sleep(0.005)
    return engine


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def begun(held: Held) -> None:
    assert await asyncio.to_thread(held.begun.acquire, timeout=30)


async def busy(engine: Engine, held: Held) -> asyncio.Task[Any]:
    """A request that the model is at until it may go on."""
    task = asyncio.create_task(engine.predict(IMAGE, held.options()))
    await begun(held)
    return task


def queued(engine: Engine, number: int) -> Callable[[], bool]:
    return lambda: len(engine._jobs) == number


def test_what_waits_runs_as_one_batch_whatever_its_options_and_size(held):
    async def main() -> None:
        told = Told()
        engine = await started(held, told)
        first = await busy(engine, held)
        # Both become 192 x 192: sizes differ, the shape in the model does not.
        rest = [
            asyncio.create_task(engine.predict(image, held.options(score_threshold=threshold)))
            for image, threshold in [(IMAGE, 0.1), (encoded(400, 400), 0.9), (IMAGE, 0.95)]
        ]
        await until(queued(engine, 3))
        held.go.release(2)
        found = await asyncio.gather(first, *rest)
        assert told.of("batch_size") == [1, 3]
        assert told.of("batch_pixels") == [192 * 192, 3 * 192 * 192]
        assert found[2].image_size == (400, 400)
        assert len(found[1]) > len(found[3])
        assert (found[3].scores > 0.95).all()
        engine.close()

    asyncio.run(main())


def test_request_that_is_alone_waits_for_no_other(demo_predictor):
    async def main() -> None:
        told = Told()
        engine = await started(Predictor(demo_predictor.model, Input(format="BGR", min_size_test=192, max_size_test=192)), told)
        for _ in range(3):
            await engine.predict(IMAGE, engine.predictor.options())
        assert told.of("batch_size") == [1, 1, 1]
        # The time from its decoding to its batch: some microseconds, but for this machine's other work.
        assert min(told.of("queue")) < 0.05
        engine.close()

    asyncio.run(main())


def test_batch_keeps_to_the_pixel_budget(held):
    held.max_batch_pixels = 2 * 192 * 192

    async def main() -> None:
        told = Told()
        engine = await started(held, told)
        first = await busy(engine, held)
        rest = [asyncio.create_task(engine.predict(IMAGE, held.options())) for _ in range(5)]
        await until(queued(engine, 5))
        held.go.release(10)
        await asyncio.gather(first, *rest)
        assert told.of("batch_size") == [1, 2, 2, 1]
        engine.close()

    asyncio.run(main())


def test_shape_that_is_rare_is_not_passed_over(held):
    """What waits longest is in the next batch, however many of another shape there are."""

    async def main() -> None:
        engine = await started(held)
        first = await busy(engine, held)
        rare = asyncio.create_task(engine.predict(encoded(100, 190), held.options()))
        await until(queued(engine, 1))
        many = [asyncio.create_task(engine.predict(IMAGE, held.options())) for _ in range(6)]
        await until(queued(engine, 7))
        held.go.release(10)
        await asyncio.gather(first, rare, *many)
        assert [len(group) for group in held.groups] == [1, 1, 6]
        assert held.groups[1][0].size == (100, 190)
        engine.close()

    asyncio.run(main())


def test_full_queue_refuses_at_once(held):
    async def main() -> None:
        engine = await started(held, max_queue=2)
        tasks = [await busy(engine, held), asyncio.create_task(engine.predict(IMAGE, held.options()))]
        await until(queued(engine, 1))
        with pytest.raises(OverloadedError, match="2 requests are already waiting"):
            engine.admit()
        with pytest.raises(OverloadedError):
            await engine.predict(IMAGE, held.options())
        held.go.release(2)
        await asyncio.gather(*tasks)
        engine.admit()
        assert (engine.waiting, engine.waiting_pixels) == (0, 0)
        engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_pixels_are_counted_before_an_image_is_decoded(held, kind):
    held.input = Input(format="BGR", min_size_test=0, max_size_test=0)

    async def main() -> None:
        engine = await started(held, max_pixels=300_000)
        first = await busy(engine, held)
        second = asyncio.create_task(engine.predict(encoded(400, 600, kind), held.options()))
        await until(queued(engine, 1))
        assert engine.waiting_pixels == 192 * 192 + 416 * 608
        held.prepare = None  # to decode the next would be an error
        with pytest.raises(OverloadedError, match="289,792 pixels are already waiting"):
            await engine.predict(encoded(400, 600, kind), held.options())
        del held.prepare
        held.go.release(2)
        await asyncio.gather(first, second)
        engine.close()

    asyncio.run(main())


def test_single_image_is_not_refused_for_its_pixels(held):
    async def main() -> None:
        engine = await started(held, max_pixels=1)
        held.go.release(2)
        assert len(await engine.predict(IMAGE, held.options())) > 0
        assert len(await engine.predict(IMAGE, held.options())) > 0
        engine.close()

    asyncio.run(main())


def test_bound_on_pixels_comes_from_the_predictors_budget(held):
    async def main() -> None:
        for budget, most in ((10_000_000, 80_000_000), (1000, 32_000_000)):
            held.budget = lambda budget=budget: budget
            engine = await started(held)
            assert engine.max_pixels == most
            engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("header", [b"\x89PNG", b"RIFF", b"BM", b"\xff\xd8\xff\xe0\0\0" * 1000, b"", b"\xff\xd8\xff\xd8"])
def test_header_that_makes_no_sense_is_left_to_the_decoder(held, header):
    async def main() -> None:
        engine = await started(held)
        with pytest.raises(ImageError):
            await engine.predict(header, held.options())
        assert (engine.waiting, engine.waiting_pixels) == (0, 0)
        engine.close()

    asyncio.run(main())


def test_what_nobody_waits_for_never_reaches_the_model(held):
    async def main() -> None:
        engine = await started(held)
        first = await busy(engine, held)
        gone = [asyncio.create_task(engine.predict(IMAGE, held.options())) for _ in range(3)]
        stays = asyncio.create_task(engine.predict(IMAGE, held.options()))
        await until(queued(engine, 4))
        for task in gone:
            task.cancel()
        await asyncio.sleep(0)
        held.go.release(5)
        await asyncio.gather(first, stays)
        assert sum(map(len, held.groups)) == 2
        assert (engine.waiting, engine.waiting_pixels) == (0, 0)
        engine.close()

    asyncio.run(main())


def test_request_cancelled_while_it_is_decoded_never_reaches_the_model(held):
    decoding, go_on = threading.Event(), threading.Event()
    prepare = held.prepare

    def slowly(*args: Any) -> Any:
        decoding.set()
        assert go_on.wait(30)
        return prepare(*args)

    async def main() -> None:
        engine = await started(held)
        held.prepare = slowly
        task = asyncio.create_task(engine.predict(IMAGE, held.options()))
        await asyncio.to_thread(decoding.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (engine.waiting, engine.waiting_pixels) == (0, 0)
        go_on.set()
        held.go.release(1)
        assert len(await engine.predict(IMAGE, held.options())) > 0
        assert sum(map(len, held.groups)) == 1
        engine.close()

    asyncio.run(main())


def test_image_whose_client_left_before_it_was_decoded_is_not_decoded(held):
    decoding, go_on, decoded = threading.Event(), threading.Event(), []
    prepare = held.prepare

    def slowly(image: bytes, *args: Any) -> Any:
        decoding.set()
        assert go_on.wait(30)
        decoded.append(image)
        return prepare(image, *args)

    async def main() -> None:
        engine = await started(held)
        held.prepare = slowly
        keeping = [asyncio.create_task(engine.predict(IMAGE, held.options())) for _ in range(8)]  # all decoders are busy
        await asyncio.to_thread(decoding.wait, 30)
        left = [asyncio.create_task(engine.predict(IMAGE + b" ", held.options())) for _ in range(20)]
        await asyncio.sleep(0.05)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        go_on.set()
        held.go.release(8)
        await asyncio.gather(*keeping)
        await until(lambda: not engine._encoded)
        engine.close()

    asyncio.run(main())
    assert decoded == [IMAGE] * 8


def test_model_that_cannot_be_loaded_again_at_once_is_loaded_later(held, monkeypatch):
    """As where the memory is full for a while; the server would be there, and would never answer."""
    monkeypatch.setattr("bentoml_detectron.service.engine._PAUSE", 0.05)
    loads = []

    def load() -> Predictor:
        loads.append(None)
        if len(loads) in (2, 3):
            raise DetectronError("its process ended while it was loading")
        return held

    def ends(group: list[Any]) -> None:
        held.during = lambda group: None
        raise ModelEndedError("killed")

    held.during = ends

    async def main() -> None:
        engine = Engine(load, Told(), max_queue=4)
        async with asyncio.timeout(30):
            await engine.loaded()
            held.go.release(2)
            with pytest.raises(NotReadyError):
                await engine.predict(IMAGE, held.options())
            while len(loads) < 4 or engine.predictor is None:
                await asyncio.sleep(0.01)
            assert len(await engine.predict(IMAGE, held.options())) > 0
        assert engine.failure is None
        engine.close()

    asyncio.run(main())
    assert len(loads) == 4


def test_close_tells_those_who_wait_and_those_who_come(held):
    async def main() -> None:
        engine = await started(held)
        first = await busy(engine, held)
        waits = asyncio.create_task(engine.predict(IMAGE, held.options()))
        await until(queued(engine, 1))
        engine.close()
        with pytest.raises(NotReadyError, match="shutting down"):
            await waits
        with pytest.raises(NotReadyError, match="shutting down"):
            await engine.predict(IMAGE, held.options())
        held.go.release(1)
        assert len(await first) > 0  # what the model was at is answered
        engine.join(30)
        assert not any(each.is_alive() for each in engine._threads)

    asyncio.run(main())


def test_request_that_is_decoded_while_the_engine_closes_gets_an_answer(held):
    prepare = held.prepare

    async def main() -> None:
        engine = await started(held)

        def closing(*args: Any) -> Any:
            prepared = prepare(*args)
            engine.close()
            return prepared

        held.prepare = closing
        with pytest.raises(NotReadyError, match="shutting down"):
            async with asyncio.timeout(30):
                await engine.predict(IMAGE, held.options())

    asyncio.run(main())


def test_observer_that_fails_stops_nothing(held):
    def observe(stage: str, value: float) -> None:
        raise OSError("disk full")

    async def main() -> None:
        engine = await started(held, observe)
        held.go.release(2)
        for _ in range(2):
            assert len(await engine.predict(IMAGE, held.options())) > 0
        engine.close()

    asyncio.run(main())


def test_image_on_which_the_model_fails_takes_no_other_with_it(held):
    def fails(group: list[Any]) -> None:
        if any(each.size == (40, 40) for each in group):
            raise RuntimeError("not this one")

    held.during = fails

    async def main() -> None:
        engine = await started(held)
        first = await busy(engine, held)
        images = [IMAGE, encoded(40, 40), IMAGE]
        tasks = [asyncio.create_task(engine.predict(image, held.options())) for image in images]
        await until(queued(engine, 3))
        held.go.release(10)
        found = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert [isinstance(each, DetectronError) for each in found] == [False, False, True, False]
        engine.close()

    asyncio.run(main())


def test_end_of_the_models_thread_is_said_and_nobody_waits_for_ever(held):
    def ends(group: list[Any]) -> None:
        raise SystemExit("out")

    held.during = ends

    async def main() -> None:
        engine = await started(held)
        tasks = [await busy(engine, held), asyncio.create_task(engine.predict(IMAGE, held.options()))]
        await until(queued(engine, 1))
        held.go.release(1)
        for task in tasks:
            with pytest.raises(NotReadyError, match="the model's thread has ended"):
                async with asyncio.timeout(30):
                    await task
        assert engine.predictor is None
        assert "restart the server" in engine.failure
        with pytest.raises(NotReadyError, match="restart the server: out"):
            engine.admit()

    asyncio.run(main())


@pytest.mark.parametrize("error", [InvalidModelError("fails its\n self-test"), KeyError("x"), SystemExit(3)])
def test_model_that_cannot_be_loaded_is_said_once(error, caplog):
    def load() -> Predictor:
        raise error

    async def main() -> None:
        engine = Engine(load, Told(), max_queue=1)
        await until(lambda: engine.failure is not None)
        assert engine.failure.startswith("the model cannot be loaded: ")
        assert "\n" not in engine.failure
        for _ in range(3):
            with pytest.raises(NotReadyError, match="the model cannot be loaded"):
                engine.admit()
            with pytest.raises(NotReadyError, match="the model cannot be loaded"):
                await engine.predict(IMAGE, None)

    log = logging.getLogger("bentoml.detectron")
    log.addHandler(caplog.handler)  # BentoML's own logger hands nothing on to pytest's
    try:
        asyncio.run(main())
    finally:
        log.removeHandler(caplog.handler)
    assert len({id(each) for each in caplog.records if "cannot be loaded" in each.getMessage()}) == 1


def test_timing_has_each_stage_of_the_request(held):
    async def main() -> None:
        engine = await started(held)
        held.go.release(1)
        timing: dict[str, float] = {}
        await engine.predict(IMAGE, held.options(), timing)
        assert set(timing) == {"decode", "preprocess", "queue", "forward", "postprocess"}
        assert all(seconds >= 0 for seconds in timing.values())
        engine.close()

    asyncio.run(main())


def test_retry_after_is_what_the_queue_takes(held):
    async def main() -> None:
        engine = await started(held)
        assert engine.retry_after == 1
        engine._seconds_per_image = 0.5
        first = await busy(engine, held)
        rest = [asyncio.create_task(engine.predict(IMAGE, held.options())) for _ in range(9)]
        await until(queued(engine, 9))
        assert engine.retry_after == 5
        engine._seconds_per_image = 100.0
        assert engine.retry_after == 60
        held.go.release(20)
        await asyncio.gather(first, *rest)
        engine.close()

    asyncio.run(main())


def test_nothing_is_left_of_a_batch_that_is_done(held):
    import gc
    import weakref

    async def main() -> None:
        engine = await started(held)
        held.go.release(1)
        await engine.predict(IMAGE, held.options())
        pixels = weakref.ref(held.groups.pop()[0].pixels)
        with suppress(TimeoutError):
            async with asyncio.timeout(5):
                while pixels() is not None:
                    await asyncio.sleep(0.02)
                    gc.collect()
        assert pixels() is None
        engine.close()

    asyncio.run(main())


def test_model_whose_process_was_killed_as_it_loaded_is_loaded_again(held, monkeypatch, caplog):
    """As by the system, for want of memory; meanwhile others may be ready, and it is said why this one is not."""
    monkeypatch.setattr("bentoml_detectron.service.engine._PAUSE", 0.2)
    failures = [ModelEndedError("its process ended while it was loading (SIGKILL)")] * 2

    def load() -> Held:
        if failures:
            raise failures.pop()
        return held

    async def main() -> None:
        engine = Engine(load, Told(), max_queue=1)
        async with asyncio.timeout(30):
            await engine.loaded()
        assert engine.failure.endswith("ended while it was loading (SIGKILL); loading will be retried")
        with pytest.raises(NotReadyError, match="SIGKILL"):
            engine.admit()
        await until(lambda: engine.predictor is not None)
        assert engine.failure is None
        engine.admit()
        engine.close()

    asyncio.run(main())
