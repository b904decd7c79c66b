"""The model's side of a worker: requests wait in one queue, and one thread per model instance takes batches from it.

When an instance is free, its next batch is what waits, or its share of that if other instances are free too. A request that is
alone does not wait. After a batch, an instance waits for a fraction of that batch's time, so that clients that were just
answered can ask again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from bentoml_detectron.errors import DetectronError, ModelEndedError, NotReadyError, OverloadedError
from bentoml_detectron.image_headers import claimed_size
from bentoml_detectron.options import Options
from bentoml_detectron.preparation import Observe, Prepared

if TYPE_CHECKING:
    from bentoml_detectron.predictor import Predictor
    from bentoml_detectron.service.apart import Apart

    AnyPredictor: TypeAlias = Predictor | Apart

logger = logging.getLogger("bentoml.detectron")

Timing = MutableMapping[str, float]
"""Seconds by stage, of one request. Other threads write to it, also when the request is over: do not iterate."""

BATCHES = 8
"""Batches that may wait where no other bound on pixels is given, or `PIXELS`, if these are more."""
PIXELS = 32_000_000  # some 30 images of 800x1333, 100 MB
_GATHER = 0.4
"""Longest wait after a batch, in that batch's time, until as many requests are there as were before its answers."""
_LONGEST_WAIT = 60  # seconds that Retry-After says at most
_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
"""Seconds, the first and the longest, between two tries to load a model again whose process ended, as by a full memory."""


@dataclass(slots=True, eq=False)
class _Job:
    """A request; `counted` are the pixels that the engine has counted for it, `arrived` is when it was prepared."""

    future: asyncio.Future[Any]
    timing: Timing
    counted: int
    arrived: float = 0.0
    _prepared: Prepared | None = None

    @property
    def prepared(self) -> Prepared:
        if self._prepared is None:
            raise RuntimeError("the job was not prepared")
        return self._prepared

    def take(self, prepared: Prepared) -> None:
        self._prepared, self.arrived = prepared, time.perf_counter()

    @property
    def pixels(self) -> int:
        return self.prepared.shape[0] * self.prepared.shape[1]


@dataclass(slots=True, eq=False)
class _Instance:
    """A loaded predictor; `running` are the images in its batch, `company` those that it may wait for after that."""

    predictor: AnyPredictor
    running: int = 0
    company: int = 0
    gather_until: float = 0.0


class Engine:
    """Loads a predictor in the background, and runs requests through it in batches; where told, through several of it.

    All methods but `join` and `share` are for the event loop's thread.

    Attributes:
        failure: Why there is no predictor, and will be none unless it is tried again, if so.
        max_pixels: Most pixels, padding included, that wait or run; one image alone may have more.
        admitted: Requests so far.
    """

    def __init__(
        self,
        load: Callable[[], AnyPredictor],
        observe: Observe,
        *,
        max_queue: int,
        max_pixels: int | None = None,
        decoders: int = 2,
        instances: Callable[[Any], int] = lambda first: 1,
    ) -> None:
        """Starts loading.

        Args:
            load: Loads and tries a predictor; runs in its thread.
            observe: Is told of stages in seconds, "batch_size" and "batch_pixels", by several threads.
            max_queue: Most requests that may wait or run, decoding included.
            max_pixels: Most pixels that may; None: as `BATCHES` and `PIXELS` say.
            decoders: Threads that decode images.
            instances: How many predictors there should be, by the first. The others are loaded when that answers; where one
                cannot be, or ends, there are fewer.
        """
        self.failure: str | None = None
        self.max_pixels = max_pixels
        self.admitted = 0
        self._load = load
        self._observe = observe
        self._max_queue = max_queue
        self._entered = 0
        self._pixels = 0
        self._seconds_per_image = 0.0
        self._encoded: deque[tuple[AnyPredictor, bytes, Options, _Job]] = deque()
        self._jobs: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._wanted = instances
        self._missing: int | None = None  # instances that were not begun; None until the first says how many there should be
        self._instances: list[_Instance] = []
        self._ended: str | None = None
        self._decoders = ThreadPoolExecutor(decoders, thread_name_prefix="decode")
        self._threads: list[threading.Thread] = []
        self._start_thread()

    @property
    def predictor(self) -> AnyPredictor | None:
        """One that is loaded; None before the first is, and where none is any more."""
        instances = self._instances[:1]
        return instances[0].predictor if instances else None

    @property
    def waiting(self) -> int:
        """Requests that were admitted and are not done."""
        return self._entered

    @property
    def waiting_pixels(self) -> int:
        """Their pixels in the model, padding included."""
        return self._pixels

    @property
    def is_full(self) -> bool:
        """Whether as many requests wait as may."""
        return self._entered >= self._max_queue

    @property
    def retry_after(self) -> int:
        """Whole seconds until what is here now is done, as far as the last batches tell."""
        seconds = self._entered * self._seconds_per_image / max(1, len(self._instances))
        return min(max(1, math.ceil(seconds)), _LONGEST_WAIT)

    @property
    def is_closed(self) -> bool:
        """Whether no batch will begin any more."""
        return self._ended is not None

    def close(self) -> None:
        """Ends the thread after the batch that it is at; what waits, and what comes, gets an error."""
        self._end("the server is shutting down; try again")
        # What is being decoded ends by itself, and finds that nobody will run it.
        self._decoders.shutdown(wait=False)

    def join(self, seconds: float) -> None:
        """Waits for the model's threads, so that no interpreter ends under them."""
        deadline = time.monotonic() + seconds
        for thread in list(self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))

    def share(self, batch: int) -> int:
        """Among how many instances a batch of so many has to share the cores: with no other, where it is all there is."""
        with self._wake:
            here = max(self._entered, sum(each.running for each in self._instances))
            return 1 if here <= batch else max(1, len(self._instances))

    async def loaded(self) -> None:
        """Waits until the model is loaded, or cannot be."""
        while self.predictor is None and self._ended is None and self.failure is None:
            await asyncio.sleep(0.02)

    def admit(self, pixels: int = 1) -> None:
        """Refuses what would wait too long, before anything is done for it.

        Args:
            pixels: What it has in the model, where that is known. A single image is not refused for its size.

        Raises:
            NotReadyError: The model is not loaded, or no more.
            OverloadedError: Too many requests, or pixels, wait.
        """
        if self.failure or self._ended:
            raise NotReadyError(self.failure or self._ended or "")
        if self.predictor is None or self.max_pixels is None:
            raise NotReadyError("the model is still loading; try again soon")
        if self.is_full:
            raise too_many(self._entered)
        if self._pixels and self._pixels + pixels > self.max_pixels:
            raise OverloadedError(f"{self._pixels:,} pixels are already waiting; try again soon", value=self._pixels)

    async def predict(self, image: bytes, wanted: Options, timing: Timing | None = None) -> Any:
        """One image's `Detections`; if the task is cancelled before its batch begins, the model never sees the image.

        Args:
            image: Encoded.
            wanted: From `Predictor.options`.
            timing: Gets the seconds of the stages that this request went through; forward and postprocess are its batch's.

        Raises:
            DetectronError: The image cannot be used, or the model cannot take it.
        """
        timing = {} if timing is None else timing
        self.admit()
        predictor = self.predictor
        if predictor is None:  # admit has refused it
            raise NotReadyError("the model is not loaded")
        pixels = _claimed_pixels(predictor, image)
        self.admit(max(1, pixels))
        job = _Job(asyncio.get_running_loop().create_future(), timing, pixels)
        self.admitted += 1
        self._entered += 1
        self._pixels += job.counted
        try:
            self._encoded.append((predictor, image, wanted, job))
            self._decoders.submit(self._prepare)
            result = await job.future
        finally:
            self._entered -= 1
            self._pixels -= job.counted
        if isinstance(result, Exception):
            try:
                raise result
            finally:  # or it holds this frame, which holds it and the image
                del result, job
        return result

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs what takes a while and is not the model's, in the decoders' threads."""
        if self._ended:
            raise NotReadyError(self._ended)
        return await asyncio.get_running_loop().run_in_executor(self._decoders, function, *args)

    def _prepare(self) -> None:
        """Prepares a request in a decoder's thread, which hands on to the model's, so that none waits for the event loop."""
        predictor, image, wanted, job = self._encoded.popleft()  # no arguments: an error's frames would hold them
        if job.future.done():  # its client left
            return
        try:
            job.take(predictor.prepare(image, wanted, 0, self._told(job.timing)))
            if job.pixels != job.counted:
                job.future.get_loop().call_soon_threadsafe(self._count, job)
            self._append(job)
        except Exception as exc:
            _deliver(job, exc)
        finally:
            del job  # or an error holds this frame, which holds the job that has the error

    def _count(self, job: _Job) -> None:
        """Counts the pixels that a job has in fact, which its header did not say."""
        if not job.future.done():
            self._pixels += job.pixels - job.counted
            job.counted = job.pixels

    def _append(self, job: _Job) -> None:
        with self._wake:
            if self._ended:  # while it was decoded; no thread would take it
                raise NotReadyError(self._ended)
            self._jobs.append(job)
            self._wake.notify_all()  # one alone may be one that waits for more

    def _told(self, timing: Timing) -> Observe:
        """Tells of a stage, and puts it down for a request; halves of a batch add up."""

        def observe(stage: str, value: float) -> None:
            timing[stage] = timing.get(stage, 0.0) + value
            self._tell(stage, value)

        return observe

    def _tell(self, stage: str, value: float) -> None:
        try:
            self._observe(stage, value)
        except Exception:  # such as a full disk under Prometheus's files; that must not end the model's thread
            logger.exception("the metric %s cannot be recorded", stage)

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name="model", daemon=True)
        with self._wake:  # nobody joins one that has not begun
            thread.start()
            self._threads.append(thread)

    def _work(self) -> None:
        pause = 0.0  # until it is loaded again where that failed; 0 where it was never loaded
        while not self._ended:
            try:
                predictor = self._load()
                if self.max_pixels is None:
                    self.max_pixels = max(BATCHES * predictor.budget(), PIXELS)
                if self._missing is None:
                    self._missing = self._wanted(predictor) - 1
            except BaseException as exc:  # a model's own code may raise SystemExit
                if self.is_closed:  # it was not wanted any more
                    return
                if not pause and not isinstance(exc, ModelEndedError):  # as by the system, for want of memory
                    self._fail("the model cannot be loaded", exc)
                    return
                if not pause and self.predictor is None:
                    self.failure = f"the model cannot be loaded: {exc}; loading will be retried"
                pause = pause or _PAUSE
                logger.error("the model cannot be loaded (%s); retrying in %.0f s", exc, pause)
                with self._wake:
                    self._wake.wait_for(lambda: self._ended, pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            pause, self.failure = _PAUSE, None
            try:
                self._serve(_Instance(predictor))
            except ModelEndedError as exc:
                logger.error("%s; loading the model again", exc)
            except BaseException as exc:
                self._fail("the model's thread has ended; restart the server", exc)
                return
            finally:
                predictor.close()

    def _serve(self, instance: _Instance) -> None:
        """Runs batch after batch, from here on as one of those that are ready; has a further one loaded, if one is missing."""
        with self._wake:
            self._instances.append(instance)
            is_missing, self._missing = bool(self._missing), max(0, (self._missing or 0) - 1)
        try:
            if is_missing:
                self._start_thread()
            while self._step(instance):
                pass
        finally:
            with self._wake:
                self._instances.remove(instance)

    def _fail(self, what: str, exc: BaseException) -> None:
        """Ends this thread, and the engine with the last one."""
        reason = f"{what}: {' '.join(str(exc).split())[:1000] or type(exc).__name__}"
        with self._wake:
            self._threads.remove(threading.current_thread())
            is_last = not self._threads
        # A DetectronError says what to do; where another came from helps to find out.
        logger.error(
            reason if is_last else f"one instance is lost: {reason}", exc_info=None if isinstance(exc, DetectronError) else exc
        )
        if is_last:
            self.failure = reason
            self._end(reason)

    def _end(self, reason: str) -> None:
        with self._wake:
            self._ended = self._ended or reason
            for job in self._jobs:
                _deliver(job, NotReadyError(self._ended))
            self._jobs.clear()
            self._wake.notify_all()

    def _step(self, instance: _Instance) -> bool:
        """Runs the next batch; False at the end."""
        jobs = self._next(instance)
        if not jobs:
            return False
        start = time.perf_counter()
        self._tell("batch_size", len(jobs))
        self._tell("batch_pixels", sum(job.pixels for job in jobs))
        for job in jobs:
            self._told(job.timing)("queue", start - job.arrived)
        spent: dict[str, float] = {}
        try:
            results = self._results(instance.predictor, [job.prepared for job in jobs], self._told(spent))
        except BaseException as exc:
            for job in jobs:
                _deliver(job, NotReadyError(str(exc) if isinstance(exc, ModelEndedError) else "the model's thread has ended"))
            raise
        end = time.perf_counter()
        self._rest(instance, end + _GATHER * (end - start))
        each = (end - start) / len(jobs)
        self._seconds_per_image = 0.8 * self._seconds_per_image + 0.2 * each if self._seconds_per_image else each
        for job, result in zip(jobs, results, strict=True):
            job.timing.update(spent)
            _deliver(job, result)
        return True

    def _results(self, predictor: AnyPredictor, group: Sequence[Prepared], observe: Observe) -> list[Any]:
        """One result an image. Where a batch fails, its images run alone, so that none is lost for another's sake."""
        try:
            results = predictor.run(group, observe)
            if len(results) != len(group):
                raise RuntimeError(f"the predictor gave {len(results)} results for {len(group)} images")
            return results
        except ModelEndedError:
            raise
        except Exception as exc:
            logger.exception("the model failed on a batch of %d", len(group))
            if len(group) == 1:
                return [DetectronError(f"the model failed: {type(exc).__name__}")]
        return [result for each in group for result in self._results(predictor, [each], observe)]

    def _rest(self, instance: _Instance, gather_until: float) -> None:
        """After its batch: it may wait for its share of those that are here and in no other's batch."""
        with self._wake:
            instance.running = 0
            here = self._entered - sum(each.running for each in self._instances)
            instance.company, instance.gather_until = math.ceil(here / self._idle()), gather_until

    def _idle(self) -> int:
        """Instances that have no batch."""
        return sum(not each.running for each in self._instances)

    def _next(self, instance: _Instance) -> list[_Job]:
        """The next batch: the request that waits longest, and others of its shape within the budget; none at the end."""
        with self._wake:
            while True:
                self._wake.wait_for(lambda: self._ended or self._drop_cancelled())
                budget = 0 if instance.predictor.batch == "exact" else instance.predictor.budget()
                self._gather(instance, budget)
                if self._drop_cancelled():
                    break
                if self._ended:
                    return []
                # Meanwhile all have left, or another instance has taken them.
            first = self._jobs[0]
            alike = [job for job in self._jobs if job.prepared.shape == first.prepared.shape]
            batch = alike[: max(1, min(budget // first.pixels, math.ceil(len(alike) / self._idle())))]
            instance.running = len(batch)
            taken = set(map(id, batch))
            self._jobs = deque(job for job in self._jobs if id(job) not in taken)
            self._wake.notify_all()  # for the rest
            return batch

    def _gather(self, instance: _Instance, budget: int) -> None:
        """Waits a little for clients that were just answered and ask again, where they would fit into the next batch.

        Without it, clients that ask again and again would be served in two halves, each waiting while the other is run.
        """
        if self._jobs:
            most = min(instance.company, budget // max(1, self._jobs[0].pixels))
            seconds = instance.gather_until - time.perf_counter()
            self._wake.wait_for(
                lambda: self._ended or not self._jobs or len(self._jobs) >= most, max(0.0, seconds)
            )  # fmt: skip

    def _drop_cancelled(self) -> bool:
        """Drops what nobody waits for any more, so that it never reaches the model; whether any are left."""
        self._jobs = deque(job for job in self._jobs if not job.future.cancelled())
        return bool(self._jobs)


def too_many(waiting: int) -> OverloadedError:
    """The error for a request that comes while as many wait as may."""
    return OverloadedError(f"{waiting} requests are already waiting; try again soon", value=waiting)


def _deliver(job: _Job, result: Any) -> None:
    def set_result() -> None:
        if not job.future.done():
            job.future.set_result(result)

    with suppress(RuntimeError):  # the loop is closed: the server is gone
        job.future.get_loop().call_soon_threadsafe(set_result)


def _claimed_pixels(predictor: AnyPredictor, image: bytes) -> int:
    """Pixels that an image will have in the model, by the size that its header claims; 0 for what will be refused.

    It is looked up on the event loop, so that a refusal need not wait for a decoder.
    """
    width, height = claimed_size(image)
    if min(width, height) < 1 or width * height > predictor.limits.max_pixels:
        return 0
    return predictor.pixels_of(height, width)
