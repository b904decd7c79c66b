"""The wait after a batch for clients that were just answered: how long it may last, and whom it serves.

A batch's time is that of a predictor that sleeps, long against what threads and events take, so that ratios of times in one run
tell.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from bentoml_detectron import demo
from bentoml_detectron.artifact.manifest import Dataset, Input
from bentoml_detectron.predictor import Predictor
from bentoml_detectron.service.engine import Engine

pytestmark = pytest.mark.slow  # its batches take a second
IMAGE = demo.images()[3].read_bytes()
DIGITS = Dataset(name="digits", thing_classes=[str(digit) for digit in range(10)])
BATCH_SECONDS = 1.0
BOUND = 0.4
"""The longest wait, in the time of the batch before; docs/service.md promises two fifths."""


class Slow(Predictor):
    """Takes the same time for each batch, and notes when each began and ended, and how many images it had."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sizes: list[int] = []
        self.begins: list[float] = []
        self.ends: list[float] = []

    def run(self, group, observe=lambda stage, seconds: None):
        self.begins.append(time.perf_counter())
        self.sizes.append(len(group))
        results = super().run(group, observe)
        time.sleep(max(0.0, self.begins[-1] + BATCH_SECONDS - time.perf_counter()))
        self.ends.append(time.perf_counter())
        return results


@pytest.fixture
def slow(demo_predictor) -> Slow:
    taken = Input(format="BGR", min_size_test=192, max_size_test=192)
    return Slow(demo_predictor.model, taken, DIGITS, max_batch_pixels=10**6)


def in_engine(slow: Slow, main: Callable[[Engine], Awaitable[None]]) -> None:
    async def whole() -> None:
        engine = Engine(lambda: slow, lambda stage, value: None, max_queue=32)
        async with asyncio.timeout(60):
            await engine.loaded()
            await main(engine)
        engine.close()

    asyncio.run(whole())


async def ask(engine: Engine, times: int = 1, pause: float = 0.0) -> None:
    """Asks again and again, a while after each answer."""
    for _ in range(times):
        await engine.predict(IMAGE, engine.predictor.options())
        await asyncio.sleep(pause)


async def queued(engine: Engine, number: int) -> None:
    while len(engine._jobs) < number:
        await asyncio.sleep(0.001)


def test_clients_that_ask_again_are_not_served_in_two_halves(slow):
    """Two halves, each waiting while the other is run, are what comes of it without the wait."""

    async def main(engine: Engine) -> None:
        first = asyncio.create_task(ask(engine, 4, pause=BATCH_SECONDS * BOUND / 10))
        while not slow.begins:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(ask(engine, 3, pause=BATCH_SECONDS * BOUND / 10)) for _ in range(3)]
        await asyncio.gather(first, *others)

    in_engine(slow, main)
    assert slow.sizes == [1, 4, 4, 4]


def test_wait_for_those_who_do_not_ask_again_ends_after_two_fifths(slow):
    """One of two clients asks again; the other is waited for, and not for longer than the batch's time allows."""

    async def main(engine: Engine) -> None:
        first = asyncio.create_task(ask(engine))
        while not slow.begins:
            await asyncio.sleep(0.001)
        pair = [asyncio.create_task(ask(engine, 2)), asyncio.create_task(ask(engine, 1))]
        await asyncio.gather(first, *pair)

    in_engine(slow, main)
    assert slow.sizes == [1, 2, 1]
    batch = slow.ends[1] - slow.begins[1]
    waited = slow.begins[2] - slow.ends[1]
    assert waited / batch > 0.7 * BOUND
    assert waited / batch < 1.5 * BOUND


def test_request_that_is_alone_does_not_wait_after_its_own_batch(slow):
    in_engine(slow, lambda engine: ask(engine, 3))
    assert slow.sizes == [1, 1, 1]
    for before, end, begin in zip(slow.begins, slow.ends, slow.begins[1:], strict=False):
        assert (begin - end) / (end - before) < 0.5 * BOUND


def test_request_that_comes_when_the_wait_would_be_over_does_not_wait(slow):
    """The wait counts from the end of the batch, not from the request's coming."""

    async def main(engine: Engine) -> None:
        first = asyncio.create_task(ask(engine))
        while not slow.begins:
            await asyncio.sleep(0.001)
        await asyncio.gather(first, ask(engine), ask(engine))
        await asyncio.sleep(BATCH_SECONDS * BOUND)
        came.append(time.perf_counter())
        await ask(engine)

    came: list[float] = []
    in_engine(slow, main)
    assert slow.sizes == [1, 2, 1]
    assert (slow.begins[-1] - came[0]) / BATCH_SECONDS < 0.5 * BOUND


def test_nobody_is_waited_for_whom_the_next_batch_could_not_take(slow):
    """Where two fit into a batch, two that are there are enough."""
    slow.max_batch_pixels = 2 * 192 * 192

    async def main(engine: Engine) -> None:
        first = asyncio.create_task(ask(engine))
        while not slow.begins:
            await asyncio.sleep(0.001)
        rest = [asyncio.create_task(ask(engine)) for _ in range(6)]
        await queued(engine, 6)
        await asyncio.gather(first, *rest)

    in_engine(slow, main)
    assert slow.sizes == [1, 2, 2, 2]
    for end, begin in zip(slow.ends, slow.begins[1:], strict=False):
        assert (begin - end) / BATCH_SECONDS < 0.5 * BOUND
