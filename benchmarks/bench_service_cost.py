"""What a worker spends on one request beside the model, from the multipart form to the bytes of the JSON, and what it keeps.

The service is the one of ``canned.py``, whose model gives the same `Detections` for each image at once. Beside it is that of
``bare.py``, which does nothing but read a body, decode the image by Pillow and answer as much: what BentoML and decoding take.
The client is wrk, on 127.0.0.1; each row is the median of some rounds. The image is a photograph of 640x480 as JPEG. What the
worker and the model's process spend is added up, and contains decoding and, for the first, the resize to the model's size;
both are also printed for themselves, as timed in a process that does nothing else.

Usage::

    python benchmarks/bench_service_cost.py [--rounds 5] [--seconds 4] [--image FILE]
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import sys
import tempfile
import warnings
from itertools import product
from pathlib import Path

os.environ["BENTOML_HOME"] = (home := tempfile.TemporaryDirectory(prefix="bench-service-cost-")).name
os.environ["BENTOML_DO_NOT_TRACK"] = "True"
warnings.simplefilter("ignore")

import psutil

import serving
import wrk
from bentoml_detectron import load_predictor

SERVICES = ("canned", "bare")
FOUND = (100, 10)
"""Detections, with masks, in an answer."""


def photograph() -> bytes:
    """A JPEG of 640x480: scikit-learn's photograph of a temple, scaled."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    buffer = io.BytesIO()
    Image.fromarray(load_sample_image("china.jpg")).resize((640, 480)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def spent(server: serving.Server) -> float:
    """CPU seconds of a server's workers so far, user and system."""
    workers = psutil.Process(server.process.pid).children(recursive=True)
    return sum(sum(each.cpu_times()[:2]) for each in workers)


def megabytes(server: serving.Server) -> float:
    """Resident memory of a server's workers."""
    return sum(each.memory_info().rss for each in psutil.Process(server.process.pid).children(recursive=True)) / 1e6


def report(folder: Path, image: bytes, rounds: int, seconds: float) -> None:
    print("CPU of the worker and its model's processes for one request, ms; and what their memory grew by meanwhile")
    print(
        "| service | found | connections | median | least | largest | requests | MB more |\n|---|---|---|---|---|---|---|---|"
    )
    script = wrk.write_script(folder, [image])
    for name, count in product(SERVICES, FOUND):
        command = [sys.executable, "-m", "bentoml", "serve", f"{name}:service", "--host", "127.0.0.1", "--port", "PORT"]
        given = {**serving.environment(home.name), "CANNED": str(count)}
        with serving.started(command, given, folder / f"{name}-{count}.log", Path(__file__).parent) as server:
            url = f"{server.wait()}/predict"
            if name == "canned":
                server.wait_for_instance()
            wrk.load(url, script, 2)
            for connections in (1, wrk.CONNECTIONS):
                row = measure(server, url, script, connections, rounds, seconds)
                print(f"| {name} | {count} | {connections} | {row} |", flush=True)


def measure(server: serving.Server, url: str, script: Path, connections: int, rounds: int, seconds: float) -> str:
    """The rest of a row."""
    found, requests, before = [], 0, megabytes(server)
    for _ in range(rounds):
        start = spent(server)
        answers = wrk.load(url, script, seconds, connections).answers
        found.append((spent(server) - start) / answers * 1e3)
        requests += answers
    grown = megabytes(server) - before
    return f"{statistics.median(found):.2f} | {min(found):.2f} | {max(found):.2f} | {requests} | {grown:+.1f}"


def report_parts(image: bytes) -> None:
    """Decoding and resizing in this process, medians of 100."""
    predictor = load_predictor("digits")
    found: dict[str, list[float]] = {}
    for _ in range(100):
        predictor.prepare(image, predictor.options(), 0, lambda stage, value: found.setdefault(stage, []).append(value))
    decode, resize = (statistics.median(found[stage]) * 1e3 for stage in ("decode", "preprocess"))
    print(f"of it decoding {len(image):,} bytes {decode:.2f}, the model's resize {resize:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--image", type=Path, help="another image")
    options = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("missing: wrk: apt-get install wrk")
    serving.save_demo(home.name)
    image = options.image.read_bytes() if options.image else photograph()
    report(Path(home.name), image, options.rounds, options.seconds)
    report_parts(image)


if __name__ == "__main__":
    main()
