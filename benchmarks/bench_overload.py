"""What a server still does at ten times its capacity: useful answers a second against its peak, and how fast it refuses.

    python benchmarks/bench_overload.py [--seconds 15] [--times 10] [--model demo] [--precision fp32]

The demo model, or one of `bench_speed`'s with pictures of 800x1088, behind one worker; the clients in this process. The peak is
what 8 clients get who wait for each answer. Then requests arrive at a fixed rate, whatever becomes of the others, each on a
connection of its own. Rates are over the time until the last answer.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import io
import multiprocessing
import os
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import bench_speed
import calibrated
import serving
from bentoml_detectron import demo

Answers = list[tuple[int, float]]


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
    try:
        status, _ = await asyncio.wait_for(ask(target), 60)
    except (OSError, IndexError, TimeoutError):
        status = 0
    answers.append((status, time.perf_counter() - start))


async def closed_loop(target: Target, clients: int, seconds: float) -> Answers:
    answers: Answers = []
    end = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            await timed(target, answers)

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def open_loop(target: Target, rate: float, seconds: float) -> Answers:
    answers: Answers = []
    start = time.perf_counter()
    tasks = []
    while (now := time.perf_counter() - start) < seconds:
        tasks += [asyncio.create_task(timed(target, answers)) for _ in range(int(now * rate) - len(tasks))]
        await asyncio.sleep(0.005)
    await asyncio.gather(*tasks)
    return answers


def images_at_the_model(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("detectron_batch_images_sum")))


def row(name: str, target: Target, answers: Answers, seconds: float, before: int) -> float:
    done = [spent for status, spent in answers if status == 200]
    refused = [spent * 1e3 for status, spent in answers if status == 503] or [float("nan")]
    others = sorted(status for status, _ in answers if status not in (200, 503))
    at_model = images_at_the_model(target.port) - before
    print(f"{name:22} {len(answers) / seconds:10.1f} {len(done) / seconds:10.1f} {np.median(refused):12.1f} "
          f"{np.quantile(refused, 0.99):12.1f} {at_model - len(done):8}   {others or ''}")  # fmt: skip
    return len(done) / seconds


def measure(target: Target, seconds: float, times: float) -> None:
    gc.freeze()  # or the client's garbage collector stops it now and then, while the server's answers wait
    asyncio.run(closed_loop(target, 8, 5))  # warm
    print(f"{'':22} {'asked/s':>10} {'useful/s':>10} {'503 p50 ms':>12} {'503 p99 ms':>12} {'in vain':>8}   others")
    before, start = images_at_the_model(target.port), time.perf_counter()
    answers = asyncio.run(closed_loop(target, 8, seconds))
    peak = row("8 clients in turn", target, answers, time.perf_counter() - start, before)
    before, start = images_at_the_model(target.port), time.perf_counter()
    answers = asyncio.run(open_loop(target, times * peak, seconds))
    over = row(f"{times:g} times the peak", target, answers, time.perf_counter() - start, before)
    print(f"useful rate: {over / peak:.0%} of the peak")


def save(model: str, home: str) -> None:
    """Saves one of `bench_speed`'s models, in a process of its own, whose BentoML home this is."""
    os.environ["BENTOML_HOME"] = home
    bench_speed.prepare(model, home, ["800x1088"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--times", type=float, default=10)
    parser.add_argument("--model", default="demo", choices=bench_speed.MODELS)
    parser.add_argument("--precision", default="fp32")
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
        command += ["--port", "PORT", "--precision", options.precision]
        with serving.started(command, serving.environment(home), Path(home) / "log") as server:
            server.wait()
            measure(Target(server.port, image), options.seconds, options.times)


if __name__ == "__main__":
    main()
