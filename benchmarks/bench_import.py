"""What this package costs whoever starts Python beside it: the plug, ``import bentoml_detectron``, and what a model needs.

The plug is measured in two fresh virtual environments, alike but for the plug's two files: ``python -c pass`` in turn, the
median of the differences. Then the imports that come with the first model that a process loads, PyTorch's and Detectron2's
among them, in turn with and without Python's garbage collector, which rests there (`memory.without_collection`).

Usage::

    python benchmarks/bench_import.py [--pairs 100] [--model-pairs 9]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import timing

IMPORT = """
import sys, time
start = time.perf_counter_ns()
import bentoml_detectron
elapsed = time.perf_counter_ns() - start
assert not {"torch", "detectron2", "bentoml"} & set(sys.modules)
print(elapsed)
"""
MODEL = """
import contextlib, sys, time
from bentoml_detectron.memory import without_collection
start = time.process_time_ns()
with without_collection() if sys.argv[1] == "rest" else contextlib.nullcontext():
    import bentoml_detectron.model
print(time.process_time_ns() - start)
"""


def environment(folder: Path) -> Path:
    """Makes a virtual environment without packages and returns its site-packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return next((folder / "lib").glob("python*/site-packages"))


def start(python: Path) -> float:
    """Milliseconds of one start of Python."""
    begin = time.perf_counter()
    subprocess.run([str(python), "-c", "pass"], check=True)
    return (time.perf_counter() - begin) * 1e3


def model_pairs(count: int) -> list[tuple[float, float]]:
    """CPU seconds of the imports with the collector and without it, in turn, after one pair that is not counted."""

    def seconds(collector: str) -> float:
        return int(subprocess.check_output([sys.executable, "-W", "ignore", "-c", MODEL, collector], text=True)) / 1e9

    return [(seconds("work"), seconds("rest")) for _ in range(count + 1)][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--model-pairs", type=int, default=9)
    given = parser.parse_args()
    pairs = given.pairs
    installed = Path(sysconfig.get_path("purelib"))
    with tempfile.TemporaryDirectory(prefix="bench-import-") as temporary:
        plugged, plain = Path(temporary) / "plugged", Path(temporary) / "plain"
        environment(plain)
        site = environment(plugged)
        for name in ("_bentoml_detectron_plug.py", "bentoml_detectron_plug.pth"):
            shutil.copy(installed / name, site / name)
        python = [folder / "bin" / "python" for folder in (plugged, plain)]
        times = [(start(python[0]), start(python[1])) for _ in range(pairs + 5)][5:]
    cost = statistics.median(a - b for a, b in times)
    bare = statistics.median(b for _, b in times)
    package = statistics.median(
        int(subprocess.check_output([sys.executable, "-c", IMPORT], text=True)) / 1e6 for _ in range(min(pairs, 25))
    )
    print(f"Median of {pairs} pairs of fresh interpreters")
    print("| | ms |\n|---|---|")
    print(f"| `python -c pass` | {bare:.2f} |\n| the plug, on top of it | {cost:.2f} |")
    print(f"| `import bentoml_detectron` | {package:.2f} |")
    times = model_pairs(given.model_pairs)
    working, resting = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"\nWhat a model needs, median of {given.model_pairs} pairs of processes, CPU seconds")
    print("| the collector | s |\n|---|---|")
    print(f"| works | {working:.2f} |\n| rests | {resting:.2f} |")
    print(f"ratio, pair by pair: median {timing.spread((a / b for a, b in times), 2)}")


if __name__ == "__main__":
    main()
