"""Which of several workers listens: real processes and the real lock, with models that come and go at a word."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from bentoml_detectron.service.life import share_turns

WORKER = """
import asyncio, signal, sys
from types import SimpleNamespace
from bentoml_detectron.service.life import wait_for_turn

async def main():
    engine, ending = SimpleNamespace(predictor=None, failure=None), asyncio.Event()

    async def loaded():
        while engine.predictor is None and engine.failure is None:
            await asyncio.sleep(0.01)

    def obey():
        word = sys.stdin.readline().strip()
        engine.predictor = True if word == "load" else None if word in ("lose", "fail") else engine.predictor
        engine.failure = "cannot be loaded" if word == "fail" else None

    engine.loaded = loaded
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin, obey)
    loop.add_signal_handler(signal.SIGTERM, lambda: (print("ends", flush=True), ending.set()))
    print("starts", flush=True)
    await wait_for_turn(sys.argv[1], engine, ending.is_set)
    print("listens", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
LONG = 2.5
"""Seconds in which a worker looks at least twice whether it should go on."""


class Worker:
    """A process that takes its turn, and what it has said of it."""

    def __init__(self, service: str) -> None:
        command = [sys.executable, "-c", WORKER, service]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        os.set_blocking(self.process.stdout.fileno(), False)
        self._said: list[str] = []
        self.until("starts")

    def tell(self, word: str) -> None:
        print(word, file=self.process.stdin, flush=True)

    def said(self) -> list[str]:
        while line := self.process.stdout.readline():
            self._said.append(line.strip())
        return self._said

    def until(self, word: str) -> None:
        deadline = time.monotonic() + 30
        while word not in self.said():
            assert self.process.poll() is None
            assert time.monotonic() < deadline, (word, self._said)
            time.sleep(0.02)

    def does_not(self, word: str) -> None:
        time.sleep(LONG)
        assert word not in self.said()


@pytest.fixture
def start() -> Iterator[Callable[[], Worker]]:
    service = uuid.uuid4().hex
    with ExitStack() as stack:
        stack.callback(os.close, share_turns(service))

        def started() -> Worker:
            worker = Worker(service)
            stack.callback(worker.process.wait)
            stack.callback(worker.process.kill)
            return worker

        yield started


def ready(start: Callable[[], Worker]) -> Worker:
    worker = start()
    worker.tell("load")
    worker.until("listens")
    return worker


def test_of_those_that_load_one_listens(start):
    first = start()
    first.until("listens")
    second = start()
    second.does_not("listens")
    second.tell("load")
    second.does_not("listens")  # until the first, which says that it is loading, is ready, too
    first.tell("load")
    second.until("listens")


def test_one_whose_model_ended_ends_where_another_is_ready(start):
    first, second = ready(start), ready(start)
    first.tell("lose")
    first.until("ends")
    second.does_not("ends")


def test_one_whose_model_ended_stays_where_none_is_ready(start):
    """And is one that others wait for again, when it is loaded again."""
    first, second = ready(start), ready(start)
    second.process.kill()
    second.process.wait()
    first.tell("lose")
    first.does_not("ends")
    first.tell("load")
    first.does_not("ends")
    third = start()
    third.does_not("listens")


def test_one_whose_model_ended_stays_where_the_other_is_about_to_end(start):
    """Which may take as long as its clients take to read."""
    first, second = ready(start), ready(start)
    second.process.terminate()
    second.until("ends")
    time.sleep(LONG)  # it looks once a second
    first.tell("lose")
    first.does_not("ends")


def test_one_that_cannot_load_ends_where_another_is_ready_and_is_the_only_one_to_say_why_where_none_is(start):
    alone = start()
    alone.tell("fail")
    alone.does_not("ends")
    other = start()
    other.tell("load")
    other.until("listens")
    alone.until("ends")
