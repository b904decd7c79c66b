"""What this package costs whoever starts Python beside it: the plug, and ``import bentoml_detectron``.

The plug is measured in two fresh virtual environments, alike but for the plug's two files: ``python -c pass`` in turn, the
median of the differences.

Usage::

    python benchmarks/bench_import.py [--pairs 100]
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

IMPORT = """
import sys, time
start = time.perf_counter_ns()
import bentoml_detectron
elapsed = time.perf_counter_ns() - start
assert not {"torch", "detectron2", "bentoml"} & set(sys.modules)
print(elapsed)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100)
    pairs = parser.parse_args().pairs
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


if __name__ == "__main__":
    main()
