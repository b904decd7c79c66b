"""`Predictor` for batches of 1, 4 and 8 images against one-by-one calls of ``DefaultPredictor``, in turn, in one process.

Both start from image arrays. ``DefaultPredictor`` ends with its ``Instances``, masks pasted; `Predictor` with `Detections`,
masks as RLE. Also printed: how far results of a batch are from those of each image alone, and the memory that a batch takes.

Usage::

    python benchmarks/bench_predictor.py [--pairs 3]
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["BENTOML_HOME"] = (home := tempfile.TemporaryDirectory(prefix="bench-predictor-")).name
os.environ["BENTOML_DO_NOT_TRACK"] = "True"
warnings.simplefilter("ignore")

import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image

import timing
from bentoml_detectron import demo
from bentoml_detectron.artifact import config
from bentoml_detectron.predictor import Predictor

R50 = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x.yaml"
MEMORY = (R50, C4, "COCO-Detection/retinanet_R_50_FPN_3x.yaml", "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml",
          "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml")  # fmt: skip


def zoo(name: str, path: str, shortest: int = 800):
    """A zoo config with random weights that detect something; images go in with this shorter edge."""
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(name))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.PIXEL_STD = [5000.0] * 3
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.INPUT.MIN_SIZE_TEST = shortest
    cfg.MODEL.WEIGHTS = path
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, path)
    return cfg


def pictures(count: int, size: tuple[int, int] | None) -> list[np.ndarray]:
    """The demo's images in BGR, scaled to a height and width."""
    found = [Image.open(path).convert("RGB") for path in demo.images()[:count]]
    if size is not None:
        found = [image.resize(size[::-1], Image.Resampling.BICUBIC) for image in found]
    return [np.ascontiguousarray(np.asarray(image)[:, :, ::-1]) for image in found]


def of(theirs: DefaultPredictor, **arguments) -> Predictor:
    return Predictor(theirs.model, config.input_of(theirs.cfg), config.dataset_of(theirs.cfg), **arguments)


def compare_speed(name: str, theirs: DefaultPredictor, size: tuple[int, int] | None, pairs: int, repeat: int) -> None:
    for count in (1, 4, 8):
        images = pictures(count, size)
        ways = {
            "DefaultPredictor": lambda images=images: [theirs(image) for image in images],
            "padded": functools.partial(of(theirs, max_batch_pixels=1 << 60), images),  # all in one batch
        }
        if count == 1 or repeat > 1:  # for large images it is the same as for one
            ways["exact"] = functools.partial(of(theirs, batch="exact"), images)
        for way in ways.values():
            way()
        times = [
            [timing.seconds(lambda way=way: [way() for _ in range(repeat)]) / repeat / count * 1e3 for way in ways.values()]
            for _ in range(pairs)
        ]
        medians = [f"{statistics.median(column):.1f}" for column in zip(*times, strict=True)]
        ratios = [f"{statistics.median(row[0] / row[way] for row in times):.2f}" for way in range(1, len(ways))]
        cells = [*medians, *[""] * (3 - len(medians)), *ratios, *[""] * (2 - len(ratios))]
        print(f"| {name} | {count} | {' | '.join(cells)} |", flush=True)


def compare_results(name: str, theirs: DefaultPredictor, images: list[np.ndarray]) -> None:
    """Largest differences of a batch's results from each image's alone, as far as the same things were found."""
    together, alone = of(theirs, max_batch_pixels=1 << 60)(images), of(theirs, batch="exact")(images)
    same = [(a, b) for a, b in zip(together, alone, strict=True) if np.array_equal(a.class_ids, b.class_ids)]
    scores = max((float(np.abs(a.scores - b.scores).max(initial=0)) for a, b in same), default=float("nan"))
    boxes = max((float(np.abs(a.boxes - b.boxes).max(initial=0)) for a, b in same), default=float("nan"))
    print(f"| {name} | {len(images)} | {len(same)} | {scores:.1e} | {boxes:.1e} |")


def measure_memory(name: str, count: int) -> None:
    """In a process of its own: peak memory of one batch, in bytes per pixel, above what was taken before it."""
    theirs = DefaultPredictor(zoo(name, f"{home.name}/model.pth"))
    predictor = of(theirs, max_batch_pixels=1 << 60)
    images = pictures(count, (800, 1088))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = kernel("VmRSS")
    predictor(images)
    taken = kernel("VmHWM") - before
    print(f"| {name} | {count} | {taken / 1e6:.0f} | {taken / (count * 800 * 1088):.0f} |", flush=True)


def kernel(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--memory", nargs=2, metavar=("CONFIG", "IMAGES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        measure_memory(arguments.memory[0], int(arguments.memory[1]))
        return
    small, large = demo.predictor(), DefaultPredictor(zoo(R50, f"{home.name}/r50.pth", 480))
    print(f"Milliseconds an image, median of {arguments.pairs} pairs, {torch.get_num_threads()} threads")
    print("| model | images | DefaultPredictor | padded | exact | ratio, padded | ratio, exact |")
    print("|---|---|---|---|---|---|---|")
    compare_speed("demo, 192x192", small, None, arguments.pairs, 5)
    compare_speed("Mask R-CNN R50-FPN, 480x640", large, (480, 640), arguments.pairs, 1)

    print("\nDifference of a batch from each image alone")
    print(
        "| model and images | images | found the same | largest of a score | largest of a box, pixels |\n|---|---|---|---|---|"
    )
    compare_results("demo, one size", small, pictures(8, None))
    sizes = [(192, 192), (190, 180), (170, 192), (165, 161)]
    mixed = [picture for size, picture in zip(sizes, pictures(4, None), strict=True)
             for picture in [np.ascontiguousarray(picture[: size[0], : size[1]])]]  # fmt: skip
    compare_results("demo, padded to the same shape", small, mixed)
    compare_results("Mask R-CNN R50-FPN, one size", large, pictures(4, (480, 640)))

    print("\nMemory that a batch of 800x1088 images takes")
    for name in MEMORY:
        for count in (1, 2):
            result = subprocess.run([sys.executable, __file__, "--memory", name, str(count)], capture_output=True, text=True)
            print(result.stdout or result.stderr, end="", flush=True)


if __name__ == "__main__":
    main()
