"""What it gives to compute 3x3 convolutions by fewer products (`engines.winograd`), in float32: convolutions, and whole models.

Both ways run in turn in this process, on the same numbers, memory kept as `load_predictor` keeps it. Errors are with respect
to float64, root mean square by the output's. Models have random weights, calibrated so that proposals and detections come out;
the picture has the model's own size, and the way without is this package's otherwise, too.

Usage::

    python benchmarks/bench_winograd.py [--pairs 9] [--model MASK_RCNN KEYPOINT_RCNN] [--size 800x1088]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from unittest import mock

warnings.simplefilter("ignore")

import torch
from detectron2.engine import DefaultPredictor
from torch import nn

import calibrated
import timing
from bentoml_detectron import Predictor, engines
from bentoml_detectron.artifact import config
from bentoml_detectron.engines import fusion, winograd
from bentoml_detectron.memory import keep_freed_memory

CONVOLUTIONS = {
    "RPN, FPN, stride 4": (1, 256, 200, 272),
    "stride 8": (1, 256, 100, 136),
    "stride 16": (1, 256, 50, 68),
    "res2": (1, 64, 200, 272),
    "res3": (1, 128, 100, 136),
    "mask head": (100, 256, 14, 14),
    "keypoint head": (100, 512, 14, 14),
}
"""(N, C, H, W) of what they take; they give as many channels."""


def error(found: torch.Tensor, due: torch.Tensor) -> float:
    return float((found - due).square().mean().sqrt() / due.square().mean().sqrt())


def row(name: str, size: tuple[int, int, int, int], count: int) -> str:
    conv = nn.Conv2d(size[1], size[1], 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(size).relu().contiguous(memory_format=torch.channels_last)
    few = winograd.Convolution(conv)
    ways = [lambda: few(x, True, None), lambda: fusion.in_floats(conv, x, True, None)]
    for way in (*ways, *ways):  # the second call puts weights in order
        way()
    mine, milliseconds, ratio = timing.compare(*ways, count)
    due = nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1).relu()
    off = " | ".join(f"{error(way(), due):.1e}" for way in reversed(ways))
    shape = "x".join(map(str, size))
    return f"| {name} | {shape} | {milliseconds:.1f} | {statistics.median(mine) * 1e3:.1f} | {ratio} | {off} |"


def model_row(name: str, height: int, width: int, count: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        cfg = calibrated.config(getattr(calibrated, name), f"{folder}/weights.pth")
        model = DefaultPredictor(cfg).model
    picture, ways = calibrated.picture(height, width), []
    for speed_up in (winograd.speed_up, lambda module: None):
        with mock.patch.object(winograd, "speed_up", speed_up):
            predictor = Predictor(engines.accelerated(model, "fp32"), config.input_of(cfg))
        ways.append(lambda predictor=predictor: predictor([picture]))
        ways[-1](), ways[-1]()
    mine, milliseconds, ratio = timing.compare(*ways, count)
    return f"| {name} | {height}x{width} | {milliseconds:.0f} | {statistics.median(mine) * 1e3:.0f} | {ratio} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--model", nargs="*", default=["MASK_RCNN", "KEYPOINT_RCNN"])
    parser.add_argument("--size", default="800x1088")
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, medians of {options.pairs} pairs")
    print("| convolution | of | as it is, ms | by fewer products, ms | times as long as that, pair by pair | off | off |")
    print("|---|---|---|---|---|---|---|")
    with torch.inference_mode():
        for name, size in CONVOLUTIONS.items():
            if size[1] < winograd._LEAST_CHANNELS:
                name += ", which is left as it is"
            print(row(name, size, options.pairs), flush=True)
    print("\n| model | image | without, ms | with, ms | times as long as that, pair by pair |\n|---|---|---|---|---|")
    for name in options.model:
        print(model_row(name, *map(int, options.size.split("x")), options.pairs), flush=True)


if __name__ == "__main__":
    main()
