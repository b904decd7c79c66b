"""A model's parts one by one, by this package's engine and by OpenVINO: what an engine of OpenVINO's would give.

    python benchmarks/bench_openvino.py [--precision fp32] [--rounds 7]

Mask R-CNN R50-FPN with random weights, an image of 800x1088, 1,000 proposals, 100 detections. Both run in turn in this process,
with as many threads, on the same numbers: channels-last for this package's, plain for OpenVINO's. "and channels-last" is with
what it takes to hand OpenVINO's results to RoIAlign, which takes those; "apart" is the largest difference by the largest.

OpenVINO: ``pip install openvino``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable

warnings.simplefilter("ignore")

import openvino
import torch
from detectron2.engine import DefaultPredictor

import calibrated
from bentoml_detectron import engines
from bentoml_detectron.engines import eager
from bentoml_detectron.engines.graph import Graph
from bentoml_detectron.engines.parts import Example, Part, find, record
from bentoml_detectron.engines.structure import tensors
from bentoml_detectron.memory import keep_freed_memory

HEIGHT, WIDTH, PROPOSALS, DETECTIONS = 800, 1088, 1000, 100
HINTS = {"fp32": "f32", "bf16": "bf16"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def example_of(model: torch.nn.Module) -> dict[Part, Example]:
    image = torch.from_numpy(calibrated.picture(HEIGHT, WIDTH).transpose(2, 0, 1).copy())
    return record(model, find(model), lambda view: view([{"image": image, "height": HEIGHT, "width": WIDTH}]))


def inputs_of(part: Part, example: Example) -> list[torch.Tensor]:
    """What the part took, and as many rows as boxes."""
    given = tensors(example.arguments)
    if part.sizes:
        return given
    generator = torch.Generator().manual_seed(0)
    rows = DETECTIONS if "mask" in part.place else PROPOSALS
    return [torch.rand((rows, *each.shape[1:]), generator=generator) for each in given]


def by_openvino(graph: Graph, part: Part, inputs: list[torch.Tensor], precision: str) -> Callable[[], list[torch.Tensor]]:
    traced = torch.jit.trace(graph.eval(), tuple(inputs), check_trace=False)
    converted = openvino.convert_model(traced, example_input=tuple(inputs))
    free = (0, 2, 3) if part.sizes else (0,)
    converted.reshape(
        {
            index: [-1 if axis in free else int(size) for axis, size in enumerate(each.shape)]
            for index, each in enumerate(inputs)
        }
    )
    hints = {"INFERENCE_PRECISION_HINT": HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
    program = openvino.Core().compile_model(converted, "CPU", {**hints, "INFERENCE_NUM_THREADS": torch.get_num_threads()})
    request, count = program.create_infer_request(), len(program.outputs)
    arrays = dict(enumerate(each.contiguous().numpy() for each in inputs))

    def call() -> list[torch.Tensor]:
        request.infer(arrays, share_inputs=True)
        return [torch.from_numpy(request.get_output_tensor(index).data) for index in range(count)]

    return call


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", default="fp32", choices=HINTS)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.precision == "bf16" and not engines.has_bf16():
        parser.error("this processor does not compute in bf16")
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        model = DefaultPredictor(calibrated.config(calibrated.MASK_RCNN, f"{folder}/weights.pth")).model
    print(f"{options.precision}, {torch.get_num_threads()} threads; ms, medians of {options.rounds}, in turn")
    print(f"{'':30} {'ours':>8} {'OpenVINO':>9} {'and channels-last':>18} {'convert, s':>11} {'apart':>8}")
    for part, example in example_of(model).items():
        given = inputs_of(part, example)
        with torch.inference_mode():
            run = eager.compiled(Graph(model, part, example), DTYPES[options.precision])
        start = time.perf_counter()
        with torch.no_grad():
            theirs = by_openvino(Graph(model, part, example), part, given, options.precision)
        converting = time.perf_counter() - start
        rows = [eager.channels_last(each.to(DTYPES[options.precision])) for each in given]
        ways = {
            "ours": lambda run=run, rows=rows: run(rows),
            "OpenVINO": theirs,
            "laid out": lambda theirs=theirs: [eager.channels_last(each) for each in theirs()],
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        with torch.inference_mode():
            pairs = list(zip(ways["ours"](), theirs(), strict=True))
            apart = max(float((mine.float() - due).abs().max() / due.abs().max()) for mine, due in pairs)
            for _ in range(options.rounds):
                for name, call in ways.items():
                    start = time.perf_counter()
                    call()
                    taken[name].append(time.perf_counter() - start)
        ours, plain, laid_out = (statistics.median(each) * 1e3 for each in taken.values())
        print(f"{part.place:30} {ours:8.1f} {plain:9.1f} {laid_out:18.1f} {converting:11.1f} {apart:8.1g}", flush=True)


if __name__ == "__main__":
    main()
