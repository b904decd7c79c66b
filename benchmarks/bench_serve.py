"""What the service makes of the model: images a second over HTTP, against the predictor in a process and other servers.

The demo model and its 20 JPEG images of 192x192. The client is wrk with 8 connections and multipart forms; all servers run on
127.0.0.1, each with one worker and PyTorch's threads as many as there are cores. They are measured in turn, and all but the
one whose turn it is are stopped (SIGSTOP), since some use a core while nobody asks them:

- the predictor, in this process: from a JPEG's bytes to the bytes of the JSON, in batches of 8 and one by one;
- this package: ``bentoml detectron serve``, also with ``--precision bf16`` where the processor computes in it;
- BentoML's own adapter behind a legacy service; FastAPI; LitServe: see ``rivals/``, with Detectron2's JSON, masks as RLE.

Before that, each server's answers are compared with what Detectron2's predictor finds.

Usage::

    pip install --target FOLDER fastapi litserve python-multipart uvicorn
    python benchmarks/bench_serve.py --rivals FOLDER [--rounds 3] [--seconds 3] [--only NAME ...]
        [--variants VARIABLE=VALUE ...] [--busy PROCESSES]

wrk: ``apt-get install wrk``. The other servers have a folder of their own, which their processes alone see: they bring uvloop
and httptools, on which this package's service would run too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import cycle, islice
from pathlib import Path

CORES = len(os.sched_getaffinity(0))
os.environ["OMP_NUM_THREADS"] = str(CORES)
os.environ["BENTOML_HOME"] = (home := tempfile.TemporaryDirectory(prefix="bench-serve-")).name
os.environ["BENTOML_DO_NOT_TRACK"] = "True"
warnings.simplefilter("ignore")

import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor

import serving
import timing
import wrk
from bentoml_detectron import demo, engines, load_predictor
from bentoml_detectron.predictor import Predictor

IMAGES = [path.read_bytes() for path in demo.images()]
RIVALS = Path(__file__).with_name("rivals")
BENTOML = [sys.executable, "-m", "bentoml"]
OURS, BATCHES, SINGLES = "bentoml detectron serve", "predictor, batches of 8", "predictor, one by one"
BF16 = ", bf16"
SERVE = [*BENTOML, "detectron", "serve", "digits", "--port", "PORT"]
COMMANDS = {
    OURS: SERVE,
    OURS + BF16: [*SERVE, "--precision", "bf16"],
    "BentoML's adapter, legacy service": [
        *BENTOML, "serve", "legacy:service", "--working-dir", str(RIVALS), "--host", "127.0.0.1", "--port", "PORT",
        "--api-workers", "1",
    ],
    "FastAPI": [sys.executable, str(RIVALS / "with_fastapi.py"), "PORT"],
    "LitServe": [sys.executable, str(RIVALS / "with_litserve.py"), "PORT"],
}  # fmt: skip
LIKELY = 0.6
"""Score above which boxes are asked of bf16: those near the model's own threshold are there or not."""
OTHERS = ("FastAPI", "LitServe")
SAVE_THEIRS = """
from bentoml._internal.frameworks import detectron as adapter
from bentoml_detectron import demo
adapter.save_model('theirs', demo.predictor())
"""


def predict_for(predictor: Predictor, batch: int, seconds: float) -> float:
    """Images a second in this process."""
    encoded, wanted, done = cycle(IMAGES), predictor.options(), 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for found in predictor.predict(list(islice(encoded, batch)), [wanted] * batch):
            found.to_json().encode()
        done += batch
    return done / (time.perf_counter() - start)


def ask(url: str, image: bytes) -> object:
    request = urllib.request.Request(url, wrk.form(image), {"content-type": f"multipart/form-data; boundary={wrk.BOUNDARY}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def boxes_of(answer: object) -> np.ndarray:
    """(N, 4) corners, from this package's JSON or from COCO results."""
    if isinstance(answer, dict):
        return np.array(answer["boxes"], np.float32).reshape(-1, 4)
    found = np.array([each["bbox"] for each in answer], np.float32).reshape(-1, 4)
    if not all(each["segmentation"]["counts"] for each in answer):
        raise SystemExit("an answer has no masks")
    found[:, 2:] += found[:, :2]
    return found


def check(name: str, url: str, theirs: DefaultPredictor) -> None:
    """Ends the benchmark unless a server finds what Detectron2's predictor finds; in bf16, of that what is likely."""
    for path, image in zip(demo.images(), IMAGES, strict=True):
        instances = theirs(read_image(str(path), "BGR"))["instances"]
        likely = instances.scores > (LIKELY if BF16 in name else 0)
        due, found = instances.pred_boxes.tensor[likely].numpy(), boxes_of(ask(url, image))
        far = max((abs(found - each).max(axis=1).min() for each in due), default=0.0)
        if far > (3 if BF16 in name else 0.05) or (BF16 not in name and len(found) != len(due)):
            raise SystemExit(f"{name} finds something else on {path.name}: {far:.2f} pixels off, {len(found)} for {len(due)}")


def report_first(name: str, url: str) -> None:
    """How much longer the first requests take, of a server that is ready and was asked nothing yet."""
    times = [timing.seconds(lambda image=image: ask(url, image)) * 1e3 for image in IMAGES]
    first = ", ".join(f"{each:.1f}" for each in times[:3])
    print(f"{name}: first requests one by one {first} ms; the median of the last ten: {statistics.median(times[-10:]):.1f} ms")


def batch_sizes(url: str) -> tuple[float, float]:
    """Batches, and images in them, so far."""
    with urllib.request.urlopen(url.replace("/predict", "/metrics"), timeout=60) as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
    return float(lines["detectron_batch_images_count"]), float(lines["detectron_batch_images_sum"])


def missing(rivals: Path, names: list[str]) -> list[str]:
    lacks = [] if shutil.which("wrk") else ["wrk: apt-get install wrk"]
    if set(names) & set(OTHERS) and not all((rivals / name.lower()).is_dir() for name in OTHERS):
        lacks.append(f"{rivals}: pip install --target {rivals} fastapi litserve python-multipart uvicorn, and give --rivals")
    return lacks


def server_environment(name: str, home: str, rivals: Path) -> dict[str, str]:
    given = serving.environment(home, CORES)
    paths = [str(rivals)] if name in OTHERS else []
    return {**given, "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [given.get("PYTHONPATH")])])}


def measure(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Rates by contender, one a round, in turn."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, rate in contenders.items():
            rates[name].append(rate())
    return rates


def report(rates: dict[str, list[float]], latencies: dict[str, list[tuple[float, float]]], rounds: int) -> None:
    medians = {name: statistics.median(found) for name, found in rates.items()}
    print(
        f"Images a second, median of {rounds} rounds in turn, {wrk.CONNECTIONS} connections, {CORES} cores and PyTorch threads"
    )
    print("| | images/s | p50 ms | p99 ms | ours in fp32 as a share, round by round |\n|---|---|---|---|---|")
    for name, found in rates.items():
        times = [f"{statistics.median(column):.1f}" for column in zip(*latencies.get(name, []), strict=True)] or ["", ""]
        share = timing.spread((a / b for a, b in zip(rates[OURS], found, strict=True)), 2)
        print(f"| {name} | {medians[name]:.1f} | {' | '.join(times)} | {share} |")
    for suffix in [each for each in ("", BF16) if OURS + each in rates]:
        best = max((BATCHES + suffix, SINGLES + suffix), key=lambda name: medians[name])
        share = timing.spread((a / b for a, b in zip(rates[OURS + suffix], rates[best], strict=True)), 2)
        print(f"{OURS + suffix}, as a share of {best}: {share}")


def report_rates(
    folder: Path, commands: dict[str, tuple[list[str], dict[str, str]]], rivals: Path, rounds: int, seconds: float
) -> None:
    """Starts all servers, checks their answers and measures them and the predictor in turn."""
    serving.save_demo(home.name)
    script = wrk.write_script(folder, IMAGES)
    latencies: dict[str, list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        servers = {}
        for number, (name, (command, more)) in enumerate(commands.items()):
            # Servers that share a home share a folder of metrics, too, and each empties it when it starts.
            serving.save_demo(own := str(folder / str(number)), serving.SAVE if OURS in name else SAVE_THEIRS)
            given = {**server_environment(name, own, rivals), **more}
            servers[name] = stack.enter_context(serving.started(command, given, folder / f"{number}.log", folder))
        urls = {name: f"{server.wait()}/predict" for name, server in servers.items()}
        theirs = demo.predictor()
        for name in [name for name in urls if OURS in name]:
            report_first(name, urls[name])
            servers[name].wait_for_instance()
        for name, url in urls.items():
            check(name, url, theirs)
            wrk.load(url, script, 2)
            os.killpg(servers[name].process.pid, signal.SIGSTOP)

        def over_http(name: str) -> float:
            with servers[name].running():
                found = wrk.load(urls[name], script, seconds)
            latencies.setdefault(name, []).append((found.median, found.last))
            return found.rate

        contenders: dict[str, Callable[[], float]] = {name: partial(over_http, name) for name in urls}
        for precision in ("fp32", "bf16") if OURS + BF16 in commands else ("fp32",):
            predictor = load_predictor("digits", precision=precision)
            predict_for(predictor, wrk.CONNECTIONS, 1)
            suffix = "" if precision == "fp32" else BF16
            for name, batch in ((BATCHES, wrk.CONNECTIONS), (SINGLES, 1)):
                contenders[name + suffix] = partial(predict_for, predictor, batch, seconds)
        with servers[OURS].running():
            before = batch_sizes(urls[OURS])
        rates = measure(contenders, rounds)
        with servers[OURS].running():
            batches, count = (now - then for now, then in zip(batch_sizes(urls[OURS]), before, strict=True))
    report(rates, latencies, rounds)
    print(f"batches of ours: {count / batches:.1f} images on average")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3)
    here = [name for name in COMMANDS if BF16 not in name or engines.has_bf16()]
    parser.add_argument("--only", nargs="*", default=here, metavar="NAME", help=f"of {', '.join(COMMANDS)}")
    parser.add_argument("--rivals", type=Path, default=Path("build/rivals"), help="folder with the other servers' packages")
    parser.add_argument(
        "--variants", nargs="*", default=[], help="this package's server again, each with an environment variable"
    )
    parser.add_argument("--busy", type=int, default=0, help="processes that use a core each meanwhile")
    options = parser.parse_args()
    if lacks := missing(options.rivals.resolve(), options.only):
        sys.exit("missing: " + "; ".join(lacks))
    commands = {name: (COMMANDS[name], {}) for name in options.only}
    commands |= {f"{OURS}, {each}": (SERVE, dict([each.split("=", 1)])) for each in options.variants}
    folder = Path(home.name)
    with serving.busy(options.busy):
        report_rates(folder, commands, options.rivals.resolve(), options.rounds, options.seconds)


if __name__ == "__main__":
    main()
