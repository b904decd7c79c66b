"""Small steps between the parts of a model: Detectron2's and this package's, in turn, on the same inputs, in one process.

Memory is kept as `load_predictor` keeps it, for both.

Usage::

    python benchmarks/bench_steps.py [--pairs 50]
"""

from __future__ import annotations

import argparse
import statistics
import warnings

warnings.simplefilter("ignore")

import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model

import calibrated
import timing
from bentoml_detectron import engines
from bentoml_detectron.engines.eager import channels_last
from bentoml_detectron.predictor import on_device

SIZES = [(800, 1067), (192, 192)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=50)
    count = parser.parse_args().pairs
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(calibrated.FASTER_RCNN))
    cfg.MODEL.DEVICE = "cpu"
    theirs = build_model(cfg).eval()
    ours = engines.accelerated(theirs, "fp32")
    print(f"{torch.get_num_threads()} threads, median of {count} pairs")
    print("| step | image | Detectron2's, ms | ours, ms | times as long as ours, pair by pair |\n|---|---|---|---|---|")
    for height, width in SIZES:
        image = on_device(calibrated.picture(height, width), torch.device("cpu"))
        padded = theirs.preprocess_image([{"image": image}]).tensor.shape[-2:]
        features = [torch.empty(1, 1, *(-(-length // stride) for length in padded)) for stride in (4, 8, 16, 32, 64)]
        with torch.inference_mode():
            for step, call in {
                "normalize, pad, lay out channels-last": lambda model, image=image: channels_last(
                    model.preprocess_image([{"image": image}]).tensor
                ),
                "anchors": lambda model, features=features: model.proposal_generator.anchor_generator(features),
            }.items():
                ways = [lambda model=model, call=call: call(model) for model in (ours, theirs)]
                for way in ways:
                    way()
                mine, milliseconds, ratio = timing.compare(*ways, count)
                print(f"| {step} | {height}x{width} | {milliseconds:.2f} | {statistics.median(mine) * 1e3:.2f} | {ratio} |")


if __name__ == "__main__":
    main()
