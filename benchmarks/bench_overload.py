"""What a server still does at ten times its capacity: useful answers a second against its peak, and how fast it refuses.

    python benchmarks/bench_overload.py [--seconds 15] [--times 10]

The demo model behind one worker, the clients in this process. The peak is what 8 clients get who wait for each answer. Then
requests arrive at a fixed rate, whatever becomes of the others, each on a connection of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

import serving
from bentoml_detectron import demo

IMAGE = demo.images()[3].read_bytes()
Answers = list[tuple[int, float]]


async def ask(port: int, path: str = "/predict") -> tuple[int, str]:
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: image/jpeg\r\n"
    head += f"content-length: {len(IMAGE)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + IMAGE)
        status = int((await reader.readline()).split()[1])
        return status, (await reader.read()).decode("latin-1")
    finally:
        writer.close()


async def timed(port: int, answers: Answers) -> None:
    start = time.perf_counter()
    try:
        status, _ = await asyncio.wait_for(ask(port), 60)
    except (OSError, IndexError, TimeoutError):
        status = 0
    answers.append((status, time.perf_counter() - start))


async def closed_loop(port: int, clients: int, seconds: float) -> Answers:
    answers: Answers = []
    end = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            await timed(port, answers)

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def open_loop(port: int, rate: float, seconds: float) -> Answers:
    answers: Answers = []
    start = time.perf_counter()
    tasks = []
    while (now := time.perf_counter() - start) < seconds:
        tasks += [asyncio.create_task(timed(port, answers)) for _ in range(int(now * rate) - len(tasks))]
        await asyncio.sleep(0.005)
    await asyncio.gather(*tasks)
    return answers


def images_at_the_model(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("detectron_batch_images_sum")))


def row(name: str, port: int, answers: Answers, seconds: float, before: int) -> float:
    done = [spent for status, spent in answers if status == 200]
    refused = [spent * 1e3 for status, spent in answers if status == 503] or [float("nan")]
    others = sum(status not in (200, 503) for status, _ in answers)
    print(f"{name:22} {len(answers) / seconds:10.1f} {len(done) / seconds:10.1f} {np.median(refused):12.1f} "
          f"{np.quantile(refused, 0.99):12.1f} {others:7} {images_at_the_model(port) - before - len(done):10}")  # fmt: skip
    return len(done) / seconds


def measure(port: int, seconds: float, times: float) -> None:
    asyncio.run(closed_loop(port, 8, 5))  # warm
    print(f"{'':22} {'asked/s':>10} {'useful/s':>10} {'503 p50 ms':>12} {'503 p99 ms':>12} {'others':>7} {'in vain':>10}")
    before = images_at_the_model(port)
    peak = row("8 clients in turn", port, asyncio.run(closed_loop(port, 8, seconds)), seconds, before)
    before = images_at_the_model(port)
    over = row(f"{times:g} times the peak", port, asyncio.run(open_loop(port, times * peak, seconds)), seconds, before)
    print(f"useful rate: {over / peak:.0%} of the peak")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--times", type=float, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        serving.save_demo(home)
        command = [sys.executable, "-m", "bentoml", "detectron", "serve", "digits", "--port", "PORT"]
        with serving.started(command, serving.environment(home), Path(home) / "log") as server:
            server.wait()
            measure(server.port, options.seconds, options.times)


if __name__ == "__main__":
    main()
