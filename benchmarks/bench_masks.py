"""How long soft masks of 28 x 28 take to become RLEs of an image, against pasting and encoding the bitmaps.

The masks are smooth blobs through a sigmoid. The boxes' longer sides are log-normal with the median that the table states and
sigma 0.8, from 16 pixels to the image's width, their aspect ratios log-uniform from 1:2.5 to 2.5:1; they lie anywhere and are
cut to the image.

Usage::

    python benchmarks/bench_masks.py [--pairs 5]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import numpy as np
import pycocotools.mask
import torch
from detectron2.layers.mask_ops import paste_masks_in_image

import timing
from bentoml_detectron import masks

HEIGHT, WIDTH, SIDE = 2160, 3840, 28
CASES = ((2160, 3840, 100, 300), (2160, 3840, 100, 1000), (800, 1088, 100, 100), (192, 192, 25, 40))
"""Height, width, how many masks, and the median of their boxes' longer sides."""


def inputs(count: int, median: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (count, 28, 28) and boxes (count, 4), float32."""
    rng = np.random.default_rng(0)
    longer = np.clip(rng.lognormal(np.log(median), 0.8, count), 16, WIDTH)
    aspect = np.exp(rng.uniform(-np.log(2.5), np.log(2.5), count))
    sides = np.stack([longer * np.minimum(aspect, 1), longer / np.maximum(aspect, 1)], axis=1)
    centres = rng.uniform(0, (WIDTH, HEIGHT), (count, 2))
    boxes = np.clip(np.concatenate([centres - sides / 2, centres + sides / 2], axis=1), 0, (WIDTH, HEIGHT) * 2)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    angle = np.arctan2(y, x)
    lobes, phases = rng.integers(1, 6, (count, 1, 1)), rng.uniform(0, 6, (count, 1, 1))
    logits = 12 * (0.8 + 0.15 * np.sin(lobes * angle + phases) - np.hypot(y, x)) + rng.normal(0, 0.3, (count, SIDE, SIDE))
    return torch.tensor(1 / (1 + np.exp(-logits)), dtype=torch.float32), torch.tensor(boxes, dtype=torch.float32)


def paste_and_encode(soft: torch.Tensor, boxes: torch.Tensor) -> list[masks.RLE]:
    """The way through bitmaps, encoded one at a time, which takes the least memory."""
    pasted = paste_masks_in_image(soft, boxes, (HEIGHT, WIDTH)).numpy().view(np.uint8)
    encoded = (pycocotools.mask.encode(np.asfortranarray(bitmap)) for bitmap in pasted)
    return [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in encoded]


def without_bitmaps(soft: torch.Tensor, boxes: torch.Tensor) -> list[masks.RLE]:
    return masks.from_roi_masks(soft, boxes, (HEIGHT, WIDTH))


WAYS = {"paste and encode": paste_and_encode, "from_roi_masks": without_bitmaps}


def megabytes(way: str, case: tuple[int, ...]) -> float:
    """Peak memory above idle of one call in a process of its own, in MB (10^6 bytes)."""
    command = [sys.executable, __file__, "--peak", way, *map(str, case)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def peak(way: str, count: int, median: int) -> float:
    """What a call adds to this process's memory at most, after one with a single small mask, which imports what there is to."""
    WAYS[way](*inputs(1, 16))
    soft, boxes = inputs(count, median)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far; ru_maxrss would even be the parent's
    idle = kilobytes("VmRSS")
    WAYS[way](soft, boxes)
    return (kilobytes("VmHWM") - idle) * 1024 / 1e6


def kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def report(case: tuple[int, ...], pairs: int) -> None:
    height, width, count, median_side = case
    soft, boxes = inputs(count, median_side)
    if paste_and_encode(soft, boxes) != without_bitmaps(soft, boxes):  # warms both up, too
        raise SystemExit("the two ways differ")
    times = timing.pairs(lambda: paste_and_encode(soft, boxes), lambda: without_bitmaps(soft, boxes), pairs)
    for way, column in zip(WAYS, zip(*times, strict=True), strict=True):
        name = f"{count} at {width} x {height} | median {median_side} px | {way}"
        print(f"| {name} | {statistics.median(column) * 1e3:,.1f} | {megabytes(way, case):,.1f} |")
    print(f"| | | ratio, pair by pair | {timing.spread(old / new for old, new in times)} | |", flush=True)


def main() -> None:
    global HEIGHT, WIDTH
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--peak", nargs=5, metavar=("WAY", "HEIGHT", "WIDTH", "COUNT", "MEDIAN"), help="print megabytes and end"
    )
    options = parser.parse_args()
    if options.peak:
        way, (HEIGHT, WIDTH, count, median_side) = options.peak[0], map(int, options.peak[1:])
        print(peak(way, count, median_side))
        return
    print(f"Median of {options.pairs} pairs, {torch.get_num_threads()} threads")
    print("| masks | boxes' longer side | way | ms | MB above idle |\n|---|---|---|---|---|")
    for case in CASES:
        HEIGHT, WIDTH = case[:2]
        report(case, options.pairs)


if __name__ == "__main__":
    main()
