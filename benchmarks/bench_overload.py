"""What a server still does at ten times its capacity: useful answers a second against its peak, and how fast it refuses.

    python benchmarks/bench_overload.py [--rounds 3] [--seconds 15] [--times 2 10] [--model demo] [--precision fp32]
        [--model-instances 1]

The demo model, or one of `bench_speed`'s with pictures of 800x1088, behind one worker. Its capacity is what 8 clients get who
wait for each answer. Then h2load sends requests at multiples of that, at a fixed rate, whatever becomes of the others, each on
a connection of its own. The client runs on the same cores; how much of them it takes is in the table. Rates are over the time
from the first request to the last answer; the shares at the end are medians of the rounds', the last of them of rates over the
cores that the client leaves, as with a client elsewhere. Memory is the worker's and its models' together, pages that they share
counted once.

h2load: ``apt-get install nghttp2-client``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import io
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

import bench_speed
import calibrated
import serving
from bentoml_detectron import demo

Answers = list[tuple[float, int, float]]
"""When each was asked for, its status (0: there was none), and the seconds that it took."""


@dataclass(frozen=True)
class Target:
    """A server, and the image that it is asked with."""

    port: int
    image: bytes


async def ask(target: Target, path: str = "/predict") -> tuple[int, str]:
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: image/jpeg\r\n"
    head += f"content-length: {len(target.image)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    try:
        writer.write(head.encode() + target.image)
        status = int((await reader.readline()).split()[1])
        return status, (await reader.read()).decode("latin-1")
    finally:
        writer.close()


async def timed(target: Target, answers: Answers) -> None:
    start = time.perf_counter()
    status = 0
    with contextlib.suppress(OSError, IndexError, TimeoutError):
        status, _ = await asyncio.wait_for(ask(target), 60)
    answers.append((start, status, time.perf_counter() - start))


async def closed_loop(target: Target, clients: int, seconds: float) -> Answers:
    answers: Answers = []
    end = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            await timed(target, answers)

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


def open_loop(target: Target, rate: float, seconds: float) -> Answers:
    """Requests at a fixed rate, by h2load, which begins some each hundredth of a second, or one at a time if they are fewer."""
    together = max(1, round(rate / 100))
    period = max(1, round(1000 * together / rate))
    count = int(seconds * 1000 / period) * together
    with tempfile.TemporaryDirectory() as folder:
        image, log = Path(folder, "image"), Path(folder, "log")
        image.write_bytes(target.image)
        subprocess.run(
            [
                "h2load", "--h1", f"--rate={together}", f"--rate-period={period}ms", f"--clients={count}",
                f"--requests={count}", "--connection-inactivity-timeout=60", f"--data={image}", f"--log-file={log}",
                "--header=content-type: image/jpeg", "--header=connection: close", f"http://127.0.0.1:{target.port}/predict",
            ],
            check=True, capture_output=True, timeout=seconds + 120,
        )  # fmt: skip
        lines = [line.split() for line in log.read_text().splitlines()]
    answers = [(int(start) / 1e6, max(0, int(status)), int(spent) / 1e6) for start, status, spent in lines]
    return answers + [(answers[0][0], 0, 0.0)] * (count - len(answers))


def images_at_the_model(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("detectron_batch_images_sum")))


def row(name: str, target: Target, load: Callable[[], Answers]) -> tuple[float, float]:
    """Prints what a load gave; useful answers a second, and those for each core that the client left."""
    before, start, used = images_at_the_model(target.port), time.perf_counter(), sum(os.times()[:4])
    answers = load()
    used = (sum(os.times()[:4]) - used) / (time.perf_counter() - start)
    seconds = max(start + spent for start, _, spent in answers) - min(start for start, _, _ in answers)
    done = sum(status == 200 for _, status, _ in answers)
    refused = [spent * 1e3 for _, status, spent in answers if status == 503] or [float("nan")]
    others = sorted(status for _, status, _ in answers if status not in (200, 503))
    at_model = images_at_the_model(target.port) - before
    print(f"{name:22} {len(answers) / seconds:10.1f} {done / seconds:10.1f} {np.median(refused):12.1f} "
          f"{np.quantile(refused, 0.99):12.1f} {at_model - done:8} {used:12.2f}   {others or ''}")  # fmt: skip
    return done / seconds, done / seconds / (len(os.sched_getaffinity(0)) - used)


def measure(target: Target, rounds: int, seconds: float, times: list[float]) -> None:
    gc.freeze()  # or the client's garbage collector stops it now and then, while the server's answers wait
    asyncio.run(closed_loop(target, 8, 5))  # warm
    print(f"{'':22} {'asked/s':>10} {'useful/s':>10} {'503 p50 ms':>12} {'503 p99 ms':>12} {'in vain':>8} {'client cores':>12}")
    of_capacity, of_highest, left = [], [], []
    for _ in range(rounds):
        rates = [row("8 clients in turn", target, lambda: asyncio.run(closed_loop(target, 8, seconds)))]
        capacity = rates[0][0]
        rates += [row(f"{each:g} times that", target, partial(open_loop, target, each * capacity, seconds)) for each in times]
        whole, each_core = zip(*rates, strict=True)
        of_capacity.append(whole[-1] / whole[0])
        of_highest.append(whole[-1] / max(whole))
        left.append(each_core[-1] / max(each_core))
    print(
        f"useful rate at {times[-1]:g} times: {spread(of_capacity)} of that of 8 clients, {spread(of_highest)} of the highest, "
        f"{spread(left)} by the cores that the client leaves"
    )


def spread(shares: list[float]) -> str:
    return f"{statistics.median(shares):.0%} ({min(shares):.0%}-{max(shares):.0%})"


def save(model: str, home: str) -> None:
    """Saves one of `bench_speed`'s models, in a process of its own, whose BentoML home this is."""
    os.environ["BENTOML_HOME"] = home
    bench_speed.prepare(model, home, ["800x1088"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--times", type=float, nargs="+", default=[2, 10])
    parser.add_argument("--model", default="demo", choices=bench_speed.MODELS)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--model-instances", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        if options.model == "demo":
            serving.save_demo(home)
            name, image = "digits", demo.images()[3].read_bytes()
        else:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                pool.apply(save, (options.model, home))
            buffer = io.BytesIO()
            Image.fromarray(calibrated.picture(800, 1088)[:, :, ::-1]).save(buffer, "JPEG", quality=90)
            name, image = options.model.lower(), buffer.getvalue()
        command = [sys.executable, "-m", "bentoml", "detectron", "serve", name]
        command += ["--port", "PORT", "--precision", options.precision, "--model-instances", str(options.model_instances)]
        with serving.started(command, serving.environment(home), Path(home) / "log") as server:
            server.wait()
            if options.model_instances > 1:
                server.wait_for_instance()
            measure(Target(server.port, image), options.rounds, options.seconds, options.times)
            processes = psutil.Process(server.process.pid).children(recursive=True)
            print(f"memory: {sum(each.memory_full_info().pss for each in processes) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
