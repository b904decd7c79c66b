"""Where an image's time goes, in Detectron2's ``DefaultPredictor`` and in each precision here: parts of a model, and operators.

The models and pictures are `bench_speed`'s: random weights, calibrated so that 1000 proposals and 100 detections come out.
Parts are timed by hooks on the modules, each without those inside it that are parts themselves; "the rest" is what is between
them and around them. Operators come from PyTorch's profiler, which makes all slower, so only their shares count. On a GPU each
part waits until it is done there, and operators' shares are those of the thread that starts them.

Usage::

    python benchmarks/bench_profile.py [--model MASK_RCNN] [--size 800x1088] [--way DefaultPredictor fp32 ...] [--runs 7]
        [--device cuda:0]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

os.environ["BENTOML_DO_NOT_TRACK"] = "True"

import bench_speed

PARTS = (
    "backbone", "proposal_generator", "proposal_generator.rpn_head", "roi_heads.box_pooler", "roi_heads.box_head",
    "roi_heads.box_predictor", "roi_heads.mask_pooler", "roi_heads.mask_head", "roi_heads.keypoint_pooler",
    "roi_heads.keypoint_head", "sem_seg_head", "head",
)  # fmt: skip
NAMES = {"proposal_generator": "proposals, but for the RPN's head"}
WAYS = {"cpu": ("DefaultPredictor", "fp32", "bf16", "int8"), "cuda": bench_speed.WAYS["cuda"]}
LEAST = 0.01
"""Share of the time from which on an operator is shown."""


class Clock:
    """Seconds by part, each without its parts."""

    def __init__(self, wait: Callable[[], object]) -> None:
        self._wait = wait
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[list[float]] = []

    def begin(self) -> None:
        self._wait()
        self._open.append([time.perf_counter(), 0.0])

    def end(self, name: str) -> None:
        self._wait()
        start, inside = self._open.pop()
        spent = time.perf_counter() - start
        self.seconds[name] += spent - inside
        if self._open:
            self._open[-1][1] += spent


def watch(model, clock: Clock) -> None:
    """Times a model's parts from now on."""
    for name, module in model.named_modules():
        if name in PARTS:
            module.register_forward_pre_hook(lambda *_: clock.begin())
            module.register_forward_hook(lambda *_, name=name: clock.end(name))


def measured(way: str, model: str, size: str, folder: str, runs: int, device: str) -> dict:
    """Milliseconds of each part, of all, and operators' shares."""
    import torch

    import calibrated

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    images = [calibrated.picture(*map(int, size.split("x")))]
    call = bench_speed.call_of(way, model, folder, images, device)
    for _ in range(3):
        call()
    predictor = next(each.cell_contents for each in call.__closure__ if hasattr(each.cell_contents, "model"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    events = profile.key_averages()
    whole = sum(each.self_cpu_time_total for each in events)
    operators = {each.key: (each.self_cpu_time_total / whole, each.count) for each in events}
    clock = Clock((lambda: None) if device == "cpu" else lambda: torch.cuda.synchronize(device))
    watch(predictor.model, clock)
    rows = []
    for _ in range(runs):
        clock.seconds.clear()
        clock.begin()
        call()
        clock.end("the rest")
        rows.append(dict(clock.seconds))
    parts = {name: statistics.median(row[name] for row in rows) * 1e3 for name in rows[0]}
    return {
        "parts": parts,
        "whole": statistics.median(sum(row.values()) for row in rows) * 1e3,
        "operators": {name: found for name, found in operators.items() if found[0] >= LEAST},
    }


def report(found: dict[str, dict]) -> None:
    names = [each for each in (*PARTS, "the rest") if any(each in one["parts"] for one in found.values())]
    print(f"| part, ms | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    for name in names:
        cells = (
            f"{one['parts'][name]:.1f} ({one['parts'][name] / one['whole']:.0%})" if name in one["parts"] else ""
            for one in found.values()
        )
        print(f"| {NAMES.get(name, name)} | {' | '.join(cells)} |")
    print(f"| all | {' | '.join(format(one['whole'], '.1f') for one in found.values())} |\n")
    for way, one in found.items():
        ordered = sorted(one["operators"].items(), key=lambda each: -each[1][0])
        print(f"{way}, operators: " + ", ".join(f"{name} {share:.1%} ({count})" for name, (share, count) in ordered))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="MASK_RCNN", choices=bench_speed.MODELS)
    parser.add_argument("--size", default="800x1088")
    parser.add_argument("--way", nargs="+")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.child:
        way, folder = arguments.child
        print(json.dumps(measured(way, arguments.model, arguments.size, folder, arguments.runs, arguments.device)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-profile-") as folder:
        os.environ["BENTOML_HOME"] = str(Path(folder, "bentoml"))
        bench_speed.prepare(arguments.model, folder, [arguments.size], device=arguments.device)
        found = {}
        for way in arguments.way or WAYS[arguments.device.partition(":")[0]]:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--child", way, folder], capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            found[way] = json.loads(done.stdout.splitlines()[-1])
    print(f"{arguments.model}, {arguments.size}, {os.cpu_count()} cores, medians of {arguments.runs} runs")
    report(found)


if __name__ == "__main__":
    main()
