"""How long a saved Mask R-CNN R50-FPN takes to load, against BentoML's own adapter, in turn, in one process.

BentoML's adapter builds ``DefaultPredictor(cfg)``: it initialises the model at random and then reads the original checkpoint.

Usage::

    python benchmarks/bench_load.py [--pairs 9]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import warnings
from pathlib import Path

os.environ["BENTOML_HOME"] = (home := tempfile.TemporaryDirectory(prefix="bench-load-")).name
os.environ["BENTOML_DO_NOT_TRACK"] = "True"
warnings.simplefilter("ignore")

import bentoml
import torch
from bentoml._internal.frameworks import detectron as adapter
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

import timing
from bentoml_detectron.artifact import files, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    pairs = parser.parse_args().pairs
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = f"{home.name}/model_final.pth"
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    tag = bentoml.detectron.save_model("bench", DefaultPredictor(cfg)).tag

    ours, theirs = bentoml.detectron.load_model(tag), adapter.load_model(tag)  # warm, and equal
    if not isinstance(ours, DefaultPredictor) or not isinstance(theirs, DefaultPredictor):
        raise SystemExit("a loader gives no DefaultPredictor")
    state = theirs.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ours.model.state_dict().items())

    times = timing.pairs(lambda: adapter.load_model(tag), lambda: bentoml.detectron.load_model(tag), pairs)
    old, new = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"Loading Mask R-CNN R50-FPN, median of {pairs} pairs, {torch.get_num_threads()} threads")
    print("| loader | seconds |\n|---|---|")
    print(f"| BentoML's adapter | {old:.3f} |\n| this package | {new:.3f} |")
    print(f"ratio, pair by pair: median {timing.spread(a / b for a, b in times)}")
    print_parts(Path(bentoml.detectron.get(tag).path), pairs)


def print_parts(folder: Path, runs: int) -> None:
    """Why the weights file is read and checked as it is: each way on its own."""
    path = folder / weights.WEIGHTS
    ways = {
        "tensors by `artifact.weights.read`": lambda: weights.read(folder),
        "tensors by `torch.load(weights_only=True, mmap=True)`": lambda: torch.load(path, weights_only=True, mmap=True),
        "XXH3-128 of the file": lambda: files.checksum(folder, path.name),
        "SHA-256 of the file": lambda: hashlib.file_digest(path.open("rb"), "sha256"),
    }
    print(f"\nParts on their own, median of {runs}\n| part | ms |\n|---|---|")
    for name, way in ways.items():
        times = [timing.seconds(way) * 1e3 for _ in range(runs + 1)]
        print(f"| {name} | {statistics.median(times[1:]):.1f} |")


if __name__ == "__main__":
    main()
