"""Image sizes that never came before: each is run by what is there, and nothing is kept for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bentoml_detectron import engines
from bentoml_detectron.engines import int8
from support import run_python

WARM_UP, SIZES = 30, 200
MOST_BYTES = 100e6
"""That the memory may grow by: half a megabyte a size. One copy of the model's weights a size would be 260 MB. PyTorch's
kernels for shapes, of which it keeps 1,024, and gaps in the heap are the rest."""

RUN = f"""
import json, random, statistics, sys, time
import psutil, torch
sys.path.insert(0, sys.argv[2])
from bentoml_detectron import engines
from bentoml_detectron.artifact.manifest import Input
from bentoml_detectron.engines import fusion, int8, packed, winograd
from bentoml_detectron.engines.graph import Graph
from bentoml_detectron.predictor import Predictor
from support import built, picture, tiny_cfg

torch.set_num_threads(1)
weights = []

class Noted(packed.Packed):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        weights.append(self)

fusion.Packed = int8.Packed = winograd.Packed = Noted
winograd._LEAST_CHANNELS, winograd._LEAST_PIXELS = 8, 1  # the model's maps are small
model, own = built(tiny_cfg()), Input(format="BGR", min_size_test=0, max_size_test=0)
calibration = None
if sys.argv[1] == "int8":
    calibration = engines.calibrate(model, lambda view: Predictor(view, own)([picture(320, 736)]))
predictor = Predictor(engines.accelerated(model, sys.argv[1], calibration), own)

def refuse(*arguments):
    raise RuntimeError("a part is compiled again")

def seconds(image):
    start = time.process_time()
    predictor([image])
    return time.process_time() - start

Graph.__init__ = refuse
sizes = [(32 * high, 32 * wide) for high in range(1, 11) for wide in range(1, 24)]  # each is a shape of its own in the model
random.Random(0).shuffle(sizes)
sizes.insert(0, (320, 736))
for size in sizes[:{WARM_UP}]:
    predictor([picture(*size)])
measured = sizes[{WARM_UP}:{WARM_UP + SIZES}]
before = psutil.Process().memory_info().rss
first, again = [], []
for number, size in enumerate(measured):
    image = picture(*size)
    first.append(seconds(image))
    if number % 4 == 0:
        again.append(seconds(image) / first[-1])
after = psutil.Process().memory_info().rss
print(json.dumps({{"sizes": len(set(measured)), "grown": after - before, "again": statistics.median(again),
                  "copies": max(len(each._layouts) for each in weights)}}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision",
    [
        "fp32",
        pytest.param("bf16", marks=pytest.mark.skipif(not engines.has_bf16(), reason="this processor has no bf16")),
        pytest.param("int8", marks=pytest.mark.skipif(not engines.has_int8(), reason="int8 needs AVX2")),
    ],
)
def test_two_hundred_sizes_compile_nothing_and_keep_nothing(precision):
    found = json.loads(run_python(RUN, precision, str(Path(__file__).parents[1])).stdout.splitlines()[-1])
    assert found["sizes"] == SIZES
    assert found["grown"] < MOST_BYTES
    assert 1 <= found["copies"] <= int8._LAYOUTS  # of a convolution's weights, which are too small here to be seen in that
    # Of the time that the size took when it was new: oneDNN makes kernels for it, but a compiler would take seconds.
    assert found["again"] > 0.25
