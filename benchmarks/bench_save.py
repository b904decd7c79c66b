"""How much memory saving takes beyond the weights that are there already, and how many bytes it writes.

Each run is a process of its own: Mask R-CNN R50-FPN is built, then saved; the figures are the kernel's (VmHWM, wchar).

Usage::

    python benchmarks/bench_save.py [--runs 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

CHILD = """
import re, sys, time, warnings
warnings.simplefilter("ignore")
import bentoml, torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model

def kernel(file, key):
    return int(re.search(key + r":\\s+(\\d+)", open(file).read()).group(1))

cfg = get_cfg()
cfg.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"))
cfg.MODEL.DEVICE = "cpu"
tiny = cfg.clone()
tiny.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
tiny.MODEL.RESNETS.WIDTH_PER_GROUP = tiny.MODEL.RESNETS.STEM_OUT_CHANNELS = tiny.MODEL.FPN.OUT_CHANNELS = 8
tiny.MODEL.ROI_BOX_HEAD.FC_DIM = tiny.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
bentoml.detectron.save_model("warm", build_model(tiny), tiny)  # what is imported late is imported now
module = build_model(cfg)
weights = sum(value.numel() * value.element_size() for value in module.state_dict().values())
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
before, written = kernel("/proc/self/status", "VmRSS") * 1024, kernel("/proc/self/io", "wchar")
start = time.perf_counter()
bentoml.detectron.save_model("bench", module, cfg)
seconds = time.perf_counter() - start
peak = kernel("/proc/self/status", "VmHWM") * 1024
written = kernel("/proc/self/io", "wchar") - written
from bentoml_detectron import selftest
from bentoml_detectron.artifact import config
start = time.perf_counter()
selftest.record(module.eval(), config.input_of(cfg), config.dataset_of(cfg))
print(weights, peak - before, written, seconds, time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    rows = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory(prefix="bench-save-") as home:
            environment = {**os.environ, "BENTOML_HOME": home, "BENTOML_DO_NOT_TRACK": "True"}
            output = subprocess.check_output([sys.executable, "-c", CHILD], env=environment, text=True)
        rows.append([float(number) for number in output.split()])
    weights, extra, written, seconds, test = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"Saving Mask R-CNN R50-FPN, median of {runs} processes; its weights are {weights / 1e6:.1f} MB")
    print("| | MB | times the weights |\n|---|---|---|")
    print(f"| memory at the peak, with the model's own weights | {(weights + extra) / 1e6:.1f} | {1 + extra / weights:.2f} |")
    print(f"| bytes written | {written / 1e6:.1f} | {written / weights:.2f} |")
    print(f"in {seconds:.2f} s; one run of the self-test took {test:.2f} s")


if __name__ == "__main__":
    main()
