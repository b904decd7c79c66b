"""Each precision against ``DefaultPredictor``: a BGR image in, `Detections` with RLE out, or its ``Instances``.

Each way has a process of its own, which the parent lets run in turn; so no way has another's settings or memory. Ratios are
pair by pair, their median is printed. Of int8 the ranges are those of three pictures. The share of the peak: the time that
the model's convolutions and products would take at the rate of this machine's products of large matrices of the same type, as
a share of the time that the whole takes. On a GPU peaks are those of its tensor cores, float32 as TF32, which PyTorch's
convolutions take; memory is the most that PyTorch had allocated there; and a way ends when the GPU has done all of it.

Usage::

    python benchmarks/bench_speed.py [--model MASK_RCNN ...] [--size 800x1088 ...] [--batch 1 ...] [--way fp32 ...] [--pairs 5]
        [--as-it-is] [--device cuda:0]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

DEFAULT = "DefaultPredictor"
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
WAYS = {
    "cpu": (DEFAULT, "DefaultPredictor, memory kept", "fp32", "bf16", "int8", "whole model in OpenVINO, bf16"),
    "cuda": (DEFAULT, "fp32", "bf16", "fp16"),
}
"""By the device's type."""
MODELS = ("MASK_RCNN", "FASTER_RCNN", "RETINANET", "KEYPOINT_RCNN", "PANOPTIC_FPN", "demo")


class Worker:
    """A way in a process of its own."""

    def __init__(self, way: str, model: str, size: str, batch: int, folder: str, device: str) -> None:
        self.way = way
        environment = {**os.environ, "BENTOML_HOME": folder, "BENTOML_DO_NOT_TRACK": "True"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", way, model, size, str(batch), folder, device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self.loading = self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.way} ended with status {self.process.wait()}")
        return json.loads(line)

    def run(self) -> dict:
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


def prepare(model: str, folder: str, sizes: list[str], is_resized: bool = True, device: str = "cpu") -> dict[str, int]:
    """Writes a model's config and weights, and saves it into the store.

    Args:
        model: Its name.
        folder: Where to write, and BentoML's home.
        sizes: Of the pictures.
        is_resized: Whether the model gets them at its own size, or as they are.
        device: That it will be measured on; for a CPU, it is calibrated for int8 too.

    Returns:
        The floating-point operations of Detectron2's convolutions and matrix products for an image, by its size.
    """
    import bentoml
    from detectron2.engine import DefaultPredictor
    from torch.utils.flop_counter import FlopCounterMode

    import calibrated
    from bentoml_detectron import Predictor, demo, engines, store
    from bentoml_detectron.artifact import config

    path = f"{folder}/{model}.pth"
    cfg = demo.config() if model == "demo" else calibrated.config(getattr(calibrated, model), path)
    if not is_resized:
        cfg.INPUT.MIN_SIZE_TEST = 0
    Path(folder, f"{model}.yaml").write_text(cfg.dump())
    default = DefaultPredictor(cfg)
    saved = bentoml.detectron.save_model(model.lower(), default)
    if device == "cpu" and engines.has_int8():
        pictures = [calibrated.picture(*map(int, sizes[0].split("x")), index) for index in range(3)]

        def run(view: object) -> None:
            Predictor(view, config.input_of(cfg), batch="exact")(pictures)

        calibration = engines.calibrate(default.model, run)
        store.save_calibrated(saved, store.open_model(saved), f"{model.lower()}_int8", calibration, {})
    operations = {}
    for size in sizes:
        with FlopCounterMode(display=False) as counter:
            default(calibrated.picture(*map(int, size.split("x"))))
        operations[size] = counter.get_total_flops()
    return operations


def call_of(way: str, model: str, folder: str, images: list, device: str):
    """A way as a function of no arguments."""
    import bentoml
    import torch
    from detectron2.config import get_cfg
    from detectron2.engine import DefaultPredictor

    from bentoml_detectron.memory import keep_freed_memory

    if way in PRECISIONS:
        name = f"{model.lower()}_int8" if way == "int8" else model.lower()
        predictor = bentoml.detectron.load_predictor(f"{name}:latest", device, precision=way)
        return lambda: predictor(images)
    cfg = get_cfg()
    cfg.merge_from_file(f"{folder}/{model}.yaml")
    cfg.MODEL.DEVICE = device
    default = DefaultPredictor(cfg)
    if way == "whole model in OpenVINO, bf16":
        return whole_model(default, images)
    if way == "DefaultPredictor, memory kept":
        keep_freed_memory()

    def call() -> None:
        for image in images:
            default(image)
        if device != "cpu":
            torch.cuda.synchronize(device)

    return call


def whole_model(default, images: list):
    """What a user can do with OpenVINO's documentation: the model traced and converted whole, masks pasted after it."""
    import openvino as ov
    import torch
    from detectron2.export import TracingAdapter
    from detectron2.modeling.postprocessing import detector_postprocess

    def tensor(image):
        return torch.as_tensor(default.aug.get_transform(image).apply_image(image).astype("float32").transpose(2, 0, 1))

    def inference(model, inputs):
        return [{"instances": model.inference(inputs, do_postprocess=False)[0]}]

    inputs = [{"image": tensor(images[0])}]
    adapter = TracingAdapter(default.model, inputs, inference)
    with torch.no_grad():
        traced = torch.jit.trace(adapter.eval(), adapter.flattened_inputs, check_trace=False)
    model = ov.convert_model(traced, example_input=adapter.flattened_inputs)
    program = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY",
                                                     "INFERENCE_NUM_THREADS": torch.get_num_threads()})  # fmt: skip

    def call() -> None:
        for image in images:
            outputs = [torch.from_numpy(each.copy()) for each in program([tensor(image).numpy()]).values()]
            found = adapter.outputs_schema(outputs)[0]["instances"]
            detector_postprocess(found, *image.shape[:2])

    return call


def work(way: str, model: str, size: str, batch: str, folder: str, device: str) -> None:
    """A worker: one line in, one line out."""
    answers, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter("ignore")
    import torch

    import calibrated

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    height, width = map(int, size.split("x"))
    images = [calibrated.picture(height, width, index) for index in range(int(batch))]
    start = time.perf_counter()
    call = call_of(way, model, folder, images, device)
    loaded = time.perf_counter()
    call()
    first = time.perf_counter()
    print(json.dumps({"load": loaded - start, "first": first - loaded}), file=answers, flush=True)
    call()
    for _ in sys.stdin:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        if device == "cpu":
            peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        else:
            peak = torch.cuda.max_memory_allocated(device)
        print(json.dumps({"seconds": seconds, "peak": peak}), file=answers, flush=True)


def types(device: str) -> list[str]:
    """What a device multiplies fast."""
    import torch

    from bentoml_detectron import engines

    on_cpu = device == "cpu"
    has = {"float32": True, "bfloat16": engines.has_bf16(torch.device(device)), "float16": not on_cpu,
           "int8": on_cpu and engines.has_int8()}  # fmt: skip
    return [name for name, is_there in has.items() if is_there]


def gemm_peak(dtype: str, device: str) -> float:
    """Billions of operations a second of a product of large matrices, the best of some."""
    import torch

    size = 8192 if device != "cpu" else 2048 if dtype == "float32" else 4096
    if dtype == "int8":
        one = torch.randint(0, 255, (size, size), dtype=torch.uint8)
        other = torch.ops.onednn.qlinear_prepack(torch.randint(-127, 127, (size, size), dtype=torch.int8), None)
        scales, zeros = torch.ones(size), torch.zeros(size, dtype=torch.int32)
        how = (1.0, 0, other, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        multiply = lambda: torch.ops.onednn.qlinear_pointwise(one, *how)  # noqa: E731
    else:
        torch.backends.cuda.matmul.allow_tf32 = True
        one, other = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        multiply = lambda: torch.mm(one, other)  # noqa: E731
    wait = (lambda: torch.cuda.synchronize(device)) if device != "cpu" else lambda: None
    multiply()
    wait()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        multiply()
        wait()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e9


def name_of(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device)


def compare(
    model: str,
    size: str,
    batch: int,
    ways: list[str],
    pairs: int,
    folder: str,
    operations: int,
    peaks: dict[str, float],
    device: str,
) -> None:
    """Prints one row a way."""
    workers = []
    for way in ways:
        try:
            workers.append(Worker(way, model, size, batch, folder, device))
        except RuntimeError as exc:
            print(f"| {model} | {size} | {batch} | {way} | {exc} |", flush=True)
    rows = [[worker.run() for worker in workers] for _ in range(pairs)]
    decimals = 0 if device == "cpu" else 1
    for place, worker in enumerate(workers):
        worker.end()
        seconds = statistics.median(row[place]["seconds"] for row in rows)
        peak = peaks.get(PRECISIONS.get(worker.way, "bfloat16" if "bf16" in worker.way else "float32"))
        share = f"{operations * batch / 1e9 / peak / seconds:.0%}" if peak else ""
        ratios = [row[0]["seconds"] / row[place]["seconds"] for row in rows]
        print(
            f"| {model} | {size} | {batch} | {worker.way} | {seconds / batch * 1e3:.{decimals}f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | {share} "
            f"| {rows[-1][place]['peak'] / 1e6:.0f} | {worker.loading['load']:.1f} | {worker.loading['first']:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["MASK_RCNN"], choices=MODELS)
    parser.add_argument("--size", nargs="+", default=["800x1088"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--way", nargs="+")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--as-it-is", action="store_true", help="pictures are not resized to the model's size")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return
    processor = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        known = pool.apply(types, (arguments.device,))
        peaks = {each: pool.apply(gemm_peak, (each, arguments.device)) for each in known}
        card = "" if arguments.device == "cpu" else f"{pool.apply(name_of, (arguments.device,))}; "
    print(f"{card}{processor and processor[1]}, {len(os.sched_getaffinity(0))} cores; peak of products of matrices, "
          f"1e9 operations a second: {', '.join(f'{name} {peak:.0f}' for name, peak in peaks.items())}")  # fmt: skip
    print("| model | image | batch | way | ms an image | times as fast, pair by pair | of the peak | peak MB | load, s "
          "| first call, s |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    wanted = arguments.way or WAYS[arguments.device.partition(":")[0]]
    ways = [DEFAULT, *[way for way in wanted if way != DEFAULT]]
    with tempfile.TemporaryDirectory(prefix="bench-speed-") as folder:
        os.environ["BENTOML_HOME"] = folder
        os.environ["BENTOML_DO_NOT_TRACK"] = "True"
        for model in arguments.model:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                operations = pool.apply(prepare, (model, folder, arguments.size, not arguments.as_it_is, arguments.device))
            for size in arguments.size:
                for batch in arguments.batch:
                    compare(model, size, batch, ways, arguments.pairs, folder, operations[size], peaks, arguments.device)


if __name__ == "__main__":
    main()
