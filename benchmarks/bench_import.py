"""What this package costs whoever starts Python beside it: the plug, and ``import bentoml_detectron``.

The plug is measured as Python runs it: ``site`` processes a folder that holds its two files, against an empty folder, in a
fresh interpreter each time.

Usage::

    python benchmarks/bench_import.py [--runs 25]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SITE = """
import site, sys, time
start = time.perf_counter_ns()
site.addsitedir(sys.argv[1])
print(time.perf_counter_ns() - start)
"""
IMPORT = """
import sys, time
start = time.perf_counter_ns()
import bentoml_detectron
elapsed = time.perf_counter_ns() - start
assert not {"torch", "detectron2", "bentoml"} & set(sys.modules)
print(elapsed)
"""


def milliseconds(*command: str) -> float:
    return int(subprocess.check_output([sys.executable, *command], text=True)) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25)
    runs = parser.parse_args().runs
    installed = Path(sysconfig.get_path("purelib"))
    with tempfile.TemporaryDirectory(prefix="bench-import-") as temporary:
        plug, empty = Path(temporary) / "plug", Path(temporary) / "empty"
        plug.mkdir()
        empty.mkdir()
        for name in ("_bentoml_detectron_plug.py", "bentoml_detectron_plug.pth"):
            shutil.copy(installed / name, plug / name)
        milliseconds("-S", "-c", SITE, str(plug))  # writes the bytecode, as an installer does
        pairs = [(milliseconds("-S", "-c", SITE, str(plug)), milliseconds("-S", "-c", SITE, str(empty))) for _ in range(runs)]
    cost = statistics.median(a - b for a, b in pairs)
    package = statistics.median(milliseconds("-c", IMPORT) for _ in range(runs))
    print(f"Median of {runs} fresh interpreters")
    print("| | ms |\n|---|---|")
    print(f"| the plug, at every start of Python | {cost:.2f} |\n| `import bentoml_detectron` | {package:.2f} |")


if __name__ == "__main__":
    main()
