"""The model's side of a worker: requests wait in one queue, and one thread takes as many as fit into a batch.

There is no timer: what waits when the model is free is the next batch, so a request that is alone does not wait.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from bentoml_detectron.errors import DetectronError, NotReadyError, OverloadedError
from bentoml_detectron.options import Options
from bentoml_detectron.predictor import Observe, Predictor, Prepared

logger = logging.getLogger("bentoml.detectron")


@dataclass(slots=True, eq=False)
class _Job:
    prepared: Prepared
    future: asyncio.Future[Any]
    arrived: float = field(default_factory=time.perf_counter)

    @property
    def pixels(self) -> int:
        return self.prepared.shape[0] * self.prepared.shape[1]


class Engine:
    """Loads a predictor in the background, and runs requests through it in batches.

    Attributes:
        predictor: None until it is loaded.
        failure: Why it could not be loaded, if so.
    """

    def __init__(self, load: Callable[[], Predictor], observe: Observe, *, max_queue: int, decoders: int = 2) -> None:
        """Starts loading.

        Args:
            load: Loads and tries the predictor; runs in the model's thread.
            observe: Is told of stages in seconds, "batch_size" and "batch_pixels".
            max_queue: Most requests that may wait, decoding included.
            decoders: Threads that decode images.
        """
        self.predictor: Predictor | None = None
        self.failure: str | None = None
        self._load = load
        self._observe = observe
        self._max_queue = max_queue
        self._entered = 0
        self._jobs: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._decoders = ThreadPoolExecutor(decoders, thread_name_prefix="decode")
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that were admitted and are not done."""
        return self._entered

    def close(self) -> None:
        """Ends the thread after the batch that it is at; what waits gets an error."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def admit(self) -> None:
        """Refuses what would wait too long, before anything is done for it.

        Raises:
            NotReadyError: The model is not loaded.
            OverloadedError: Too many wait.
        """
        if self.predictor is None:
            raise NotReadyError(self.failure or "the model is being loaded; ask again soon")
        if self._entered >= self._max_queue:
            raise OverloadedError(f"{self._entered} requests wait already; ask again soon", value=self._entered)

    async def predict(self, image: bytes, wanted: Options) -> Any:
        """One image's `Detections`; if the task is cancelled before its batch begins, the model never sees the image.

        Raises:
            DetectronError: The image cannot be used, or the model cannot take it.
        """
        self.admit()
        predictor = self.predictor
        if predictor is None:  # admit has said so
            raise NotReadyError("the model is not loaded")
        loop = asyncio.get_running_loop()
        self._entered += 1
        try:
            start = time.perf_counter()
            prepared = await loop.run_in_executor(self._decoders, predictor.prepare, image, wanted)
            self._observe("decode", time.perf_counter() - start)
            job = _Job(prepared, loop.create_future())
            with self._wake:
                self._jobs.append(job)
                self._wake.notify()
            result = await job.future
        finally:
            self._entered -= 1
        if isinstance(result, Exception):
            raise result
        return result

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs what takes a while and is not the model's, in the decoders' threads."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, function, *args)

    def _work(self) -> None:
        try:
            predictor = self._load()
        except Exception as exc:
            logger.exception("the model cannot be loaded")
            self.failure = f"the model cannot be loaded: {exc}"
            return
        self.predictor = predictor
        while jobs := self._next(predictor):
            self._observe("batch_size", len(jobs))
            self._observe("batch_pixels", sum(job.pixels for job in jobs))
            for job in jobs:
                self._observe("queue", time.perf_counter() - job.arrived)
            try:
                results = predictor.run([job.prepared for job in jobs], self._observe)
            except Exception as exc:
                logger.exception("the model failed on a batch of %d images", len(jobs))
                results = [DetectronError(f"the model failed: {type(exc).__name__}")] * len(jobs)
            for job, result in zip(jobs, results, strict=True):
                _deliver(job, result)

    def _next(self, predictor: Predictor) -> list[_Job]:
        """The next batch: the request that waits longest, and others of its shape within the budget; none at the end."""
        with self._wake:
            while True:
                # What nobody waits for any more never reaches the model.
                self._jobs = deque(job for job in self._jobs if not job.future.cancelled())
                if self._closed:
                    for job in self._jobs:
                        _deliver(job, NotReadyError("the server is shutting down; ask again"))
                    return []
                if self._jobs:
                    break
                self._wake.wait()
            first = self._jobs[0]
            most = 1 if predictor.batch == "exact" else max(1, predictor.budget() // first.pixels)
            batch = [job for job in self._jobs if job.prepared.shape == first.prepared.shape][:most]
            taken = set(map(id, batch))
            self._jobs = deque(job for job in self._jobs if id(job) not in taken)
            return batch


def _deliver(job: _Job, result: Any) -> None:
    def set_result() -> None:
        if not job.future.done():
            job.future.set_result(result)

    with suppress(RuntimeError):  # the loop is closed: the server is gone
        job.future.get_loop().call_soon_threadsafe(set_result)
