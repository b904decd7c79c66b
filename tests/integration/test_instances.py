"""Several instances of a model in one worker: they share what waits, and one that is lost takes no other with it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from bentoml_detectron import demo
from bentoml_detectron.artifact.manifest import Input
from bentoml_detectron.errors import DetectronError, ModelEndedError, NotReadyError
from bentoml_detectron.predictor import Predictor
from bentoml_detectron.service.engine import Engine

IMAGE = demo.images()[3].read_bytes()


class Held(Predictor):
    """Runs a batch when it is told to; fails at once where it has an error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.go = threading.Semaphore(0)
        self.sizes: list[int] = []
        self.error: BaseException | None = None

    def run(self, group, observe=lambda stage, seconds: None):
        self.sizes.append(len(group))
        if self.error is not None:
            raise self.error
        assert self.go.acquire(timeout=60)
        return super().run(group, observe)


@pytest.fixture
def make(demo_predictor) -> Callable[[], Held]:
    taken = Input(format="BGR", min_size_test=192, max_size_test=192)
    return lambda: Held(demo_predictor.model, taken, None, max_batch_pixels=10**6)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def in_engine(load: Callable[[], Held], main: Callable[[Engine], Awaitable[None]], count: int = 2) -> None:
    async def whole() -> None:
        engine = Engine(load, lambda stage, value: None, max_queue=64, instances=lambda first: count)
        try:
            await main(engine)
        finally:
            engine.close()
            await asyncio.to_thread(engine.join, 60)

    asyncio.run(whole())


def run(make: Callable[[], Held], main: Callable[..., Awaitable[None]], count: int = 2) -> list[Held]:
    """Runs `main` with an engine and its instances, when all are there."""
    made: list[Held] = []

    def load() -> Held:
        made.append(make())
        return made[-1]

    async def whole(engine: Engine) -> None:
        await until(lambda: len(engine._instances) == count)
        await main(engine, *made)

    in_engine(load, whole, count)
    return made


def ask(engine: Engine, count: int) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(engine.predict(IMAGE, engine.predictor.options())) for _ in range(count)]


def at_work(*instances: Held) -> Callable[[], bool]:
    return lambda: all(len(each.sizes) for each in instances)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_are_loaded_as_there_should_be(make, count):
    async def main(engine: Engine, *instances: Held) -> None:
        await asyncio.sleep(0.1)

    assert len(run(make, main, count)) == count


def test_first_answers_before_others_are_loaded(make):
    made: list[Held] = []
    loads = threading.Semaphore(1)

    def load() -> Held:
        assert loads.acquire(timeout=60)
        made.append(make())
        return made[-1]

    async def main(engine: Engine) -> None:
        await engine.loaded()
        made[0].go.release()
        assert len(await ask(engine, 1)[0])
        assert len(made) == 1
        loads.release()
        await until(lambda: len(made) == 2)

    in_engine(load, main)


def test_second_runs_what_comes_while_the_first_is_at_work(make):
    async def main(engine: Engine, one: Held, other: Held) -> None:
        first = ask(engine, 1)
        await until(lambda: one.sizes or other.sizes)
        second = ask(engine, 1)
        await until(at_work(one, other))
        for each in (one, other):
            each.go.release()
        await asyncio.gather(*first, *second)
        assert one.sizes == other.sizes == [1]

    run(make, main)


def test_what_waits_for_both_is_shared(make):
    """They are held by one image each; when both are free, the eight that wait are two batches of four."""

    async def main(engine: Engine, one: Held, other: Held) -> None:
        first = ask(engine, 1)
        await until(lambda: one.sizes or other.sizes)
        first += ask(engine, 1)
        await until(at_work(one, other))
        rest = ask(engine, 8)
        await until(lambda: len(engine._jobs) == 8)
        both, own = threading.Barrier(2), engine._rest

        def rests(*args: Any) -> None:
            own(*args)
            both.wait(60)

        engine._rest = rests
        for each in (one, other):
            each.go.release(2)
        await asyncio.gather(*first, *rest)
        assert sorted(one.sizes + other.sizes) == [1, 1, 4, 4]

    run(make, main)


def test_cores_are_shared_unless_a_batch_is_all_there_is(make):
    async def main(engine: Engine, *instances: Held) -> None:
        assert engine.share(1) == 1
        tasks = ask(engine, 5)
        await until(lambda: engine.waiting == 5)
        assert (engine.share(1), engine.share(4), engine.share(5)) == (2, 2, 1)
        for each in instances:
            each.go.release(5)
        await asyncio.gather(*tasks)

    run(make, main)


def test_one_that_ends_is_loaded_again_while_the_other_answers(make):
    async def main(engine: Engine, one: Held, other: Held) -> None:
        one.error = other.error = ModelEndedError("the model's process has ended; ask again soon")
        (lost,) = ask(engine, 1)
        with pytest.raises(NotReadyError, match="has ended"):
            await lost
        ended, stays = (one, other) if one.sizes else (other, one)
        stays.error = None
        engine.admit()  # it is as ready as before
        stays.go.release(9)
        await until(lambda: len(engine._instances) == 2 and not any(each.predictor is ended for each in engine._instances))
        assert engine.failure is None

    assert len(run(make, main)) == 3


@pytest.mark.parametrize("error", [DetectronError("no memory"), SystemExit(3)])
def test_one_that_cannot_be_loaded_is_missed_and_no_more(make, error, caplog):
    made: list[Held] = []

    def load() -> Held:
        if made:
            raise error
        made.append(make())
        return made[-1]

    async def main(engine: Engine) -> None:
        await until(lambda: "one instance is lost: the model cannot be loaded" in caplog.text)
        assert engine.failure is None
        made[0].go.release()
        assert len(await ask(engine, 1)[0])

    log = logging.getLogger("bentoml.detectron")
    log.addHandler(caplog.handler)  # BentoML's own logger hands nothing on to pytest's
    try:
        in_engine(load, main)
    finally:
        log.removeHandler(caplog.handler)


def test_last_one_that_fails_is_the_engines_failure(make):
    async def main(engine: Engine, one: Held, other: Held) -> None:
        one.error = other.error = SystemExit("out")
        for _ in range(2):
            assert engine.failure is None
            (lost,) = ask(engine, 1)
            with pytest.raises(NotReadyError, match="thread has ended"):
                await lost
            await until(lambda: len(engine._instances) < 2)
        await until(lambda: engine.failure)
        with pytest.raises(NotReadyError, match="restart the server: out"):
            engine.admit()

    run(make, main)
