"""What this package costs whoever starts Python beside it: the plug, ``import bentoml_detectron``, and what a model needs.

The plug is measured in two fresh virtual environments, alike but for the plug's two files: ``python -c pass`` in turn, the
median of the differences. Then the imports that come with the first model that a process loads, PyTorch's and Detectron2's
among them, in turn as they are and for less (`imports.for_less`), and what the process holds after them.

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
import psutil
from bentoml_detectron import imports
start = time.process_time()
with imports.for_less() if sys.argv[1] == "less" else contextlib.nullcontext():
    import bentoml_detectron.model
print(time.process_time() - start, psutil.Process().memory_full_info().uss / 1e6)
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


def of_model(way: str) -> tuple[float, float]:
    """CPU seconds of the imports in a fresh process, and megabytes that are its own after them."""
    seconds, megabytes = subprocess.check_output([sys.executable, "-W", "ignore", "-c", MODEL, way], text=True).split()
    return float(seconds), float(megabytes)


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
    of_model("less")
    found = [(of_model("plain"), of_model("less")) for _ in range(given.model_pairs)]
    print(f"\nWhat a model needs, median of {given.model_pairs} pairs of processes")
    print("| imported | CPU, s | MB |\n|---|---|---|")
    for name, column in zip(("as it is", "for less"), zip(*found, strict=True), strict=True):
        seconds, megabytes = (statistics.median(values) for values in zip(*column, strict=True))
        print(f"| {name} | {seconds:.2f} | {megabytes:.0f} |")
    print(f"ratio of CPU, pair by pair: median {timing.spread((plain[0] / less[0] for plain, less in found), 2)}")


if __name__ == "__main__":
    main()
