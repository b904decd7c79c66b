"""A model's parts one by one, by this package's engine and by OpenVINO: what an engine of OpenVINO's would give.

    python benchmarks/bench_openvino.py [--precision fp32|bf16|int8] [--rounds 7]

Mask R-CNN R50-FPN with random weights, an image of 800x1088, 1,000 proposals, 100 detections. Both run in turn in this process,
with as many threads, on the same numbers: channels-last for this package's, plain for OpenVINO's. "and channels-last" is with
what it takes to hand OpenVINO's results to RoIAlign, which takes those; "off" is how far results are from the model's own in
float32, root mean square by theirs, of the output that is farthest. (The weights are random, which amplifies what is rounded.)
In int8 both take and give floats, as parts do where nothing is known of what is around them, and what is in no integers is in
bf16 where the processor computes in that; both are calibrated on what they are then timed with, OpenVINO's by NNCF.

OpenVINO: ``pip install openvino``, for int8 ``nncf``, too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence

warnings.simplefilter("ignore")

import openvino
import torch
from detectron2.engine import DefaultPredictor

import calibrated
from bentoml_detectron import engines
from bentoml_detectron.engines import eager, int8
from bentoml_detectron.engines.graph import Graph
from bentoml_detectron.engines.parts import Example, Part, find, record
from bentoml_detectron.engines.structure import rebuild, tensors
from bentoml_detectron.memory import keep_freed_memory

HEIGHT, WIDTH, PROPOSALS, DETECTIONS = 800, 1088, 1000, 100
FLOATS = {torch.float32: "f32", torch.bfloat16: "bf16"}
"""What OpenVINO calls them."""


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
    arrays = dict(enumerate(each.contiguous().numpy() for each in inputs))
    traced = torch.jit.trace(graph.eval(), tuple(inputs), check_trace=False)
    converted = openvino.convert_model(traced, example_input=tuple(inputs))
    free = (0, 2, 3) if part.sizes else (0,)
    converted.reshape(
        {
            index: [-1 if axis in free else int(size) for axis, size in enumerate(each.shape)]
            for index, each in enumerate(inputs)
        }
    )
    if precision == "int8":
        import nncf

        converted = nncf.quantize(converted, nncf.Dataset([arrays]), preset=nncf.QuantizationPreset.MIXED, subset_size=1)
    hints = {"INFERENCE_PRECISION_HINT": FLOATS[engines._float(precision)], "PERFORMANCE_HINT": "LATENCY"}
    program = openvino.Core().compile_model(converted, "CPU", {**hints, "INFERENCE_NUM_THREADS": torch.get_num_threads()})
    request, count = program.create_infer_request(), len(program.outputs)

    def call() -> list[torch.Tensor]:
        request.infer(arrays, share_inputs=True)
        return [torch.from_numpy(request.get_output_tensor(index).data) for index in range(count)]

    return call


def farthest(found: Sequence[torch.Tensor], due: Sequence[torch.Tensor]) -> float:
    return max(
        float((mine.float() - own).square().mean().sqrt() / own.square().mean().sqrt())
        for mine, own in zip(found, due, strict=True)
    )


def calibrate(model: torch.nn.Module, examples: dict[Part, Example]) -> dict[str, int8.Ranges]:
    def run(view: torch.nn.Module) -> None:
        with torch.inference_mode():
            for part, example in examples.items():
                part.of(view)(*rebuild(example.arguments)(inputs_of(part, example)))

    return engines.calibrate(model, run)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "int8"))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.precision == "bf16" and not engines.has_bf16():
        parser.error("this processor does not compute in bf16")
    dtype = engines._float(options.precision)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        model = DefaultPredictor(calibrated.config(calibrated.MASK_RCNN, f"{folder}/weights.pth")).model
    examples = example_of(model)
    calibration = None if options.precision != "int8" else calibrate(model, examples)
    print(f"{options.precision}, {torch.get_num_threads()} threads; ms, medians of {options.rounds}, in turn")
    print(f"{'':30} {'ours':>8} {'OpenVINO':>9} {'and channels-last':>18} {'convert, s':>11} {'ours off':>9} {'theirs':>7}")
    for part, example in examples.items():
        given = inputs_of(part, example)
        with torch.inference_mode():
            run = eager.compiled(Graph(model, part, example), dtype, calibration)
        start = time.perf_counter()
        with torch.no_grad():
            theirs = by_openvino(Graph(model, part, example), part, given, options.precision)
        converting = time.perf_counter() - start
        rows = [eager.channels_last(each.to(dtype)) for each in given]
        ways = {
            "ours": lambda run=run, rows=rows: run(rows),
            "OpenVINO": theirs,
            "laid out": lambda theirs=theirs: [eager.channels_last(each) for each in theirs()],
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        with torch.inference_mode():
            due = Graph(model, part, example)(*given)
            off = [farthest(call(), due) for call in (ways["ours"], theirs)]
            for _ in range(options.rounds):
                for name, call in ways.items():
                    start = time.perf_counter()
                    call()
                    taken[name].append(time.perf_counter() - start)
        ours, plain, laid_out = (statistics.median(each) * 1e3 for each in taken.values())
        print(
            f"{part.place:30} {ours:8.1f} {plain:9.1f} {laid_out:18.1f} {converting:11.1f} {off[0]:9.1g} {off[1]:7.1g}",
            flush=True,
        )


if __name__ == "__main__":
    main()
