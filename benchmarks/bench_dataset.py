"""A whole dataset: ``bentoml detectron predict`` against a plain loop over ``DefaultPredictor``, in turn, each in a process
of its own; the share of the time that the model runs; the peak memory for few and for many images; and what a long list takes.

The dataset is the demo's images, linked again and again. The loop reads each image with Detectron2's ``read_image`` and calls
``DefaultPredictor``; in its second form it also makes COCO results of the instances, as Detectron2's evaluator does, and writes
them, which is what ours does. Ours is timed with the loading of the model and all files; the loops without.

Usage::

    python benchmarks/bench_dataset.py [--images 1000] [--rounds 3] [--many 10000]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from bentoml_detectron import threads

os.environ["BENTOML_DO_NOT_TRACK"] = "True"
warnings.simplefilter("ignore")

LOOP, LOOP_COCO, OURS, OURS_ALL = "DefaultPredictor", "DefaultPredictor, COCO results", "predict", "predict, all formats"
OUTPUTS = {OURS: ["found.json"], OURS_ALL: ["found.json", "found.jsonl", "found.parquet", "pictures"]}


def loop(images: Path, folder: Path, writes: bool) -> dict[str, float]:
    from detectron2.data.detection_utils import read_image
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json

    from bentoml_detectron import demo

    predictor = demo.predictor()
    start = time.perf_counter()
    rows = []
    for number, path in enumerate(sorted(images.iterdir())):
        instances = predictor(read_image(str(path), "BGR"))["instances"]
        if writes:
            rows += instances_to_coco_json(instances.to("cpu"), number)
    if writes:
        (folder / "found.json").write_text(json.dumps(rows))
    return {"seconds": time.perf_counter() - start}


def ours(images: Path, folder: Path, outputs: list[str]) -> dict[str, float]:
    from bentoml_detectron.dataset import write
    from bentoml_detectron.store import load_predictor

    load_predictor("digits")  # as the loop's: what is imported by it is not timed
    start = time.perf_counter()
    report = write("digits", images, [folder / each for each in outputs])
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "busy": report.busy, "engine": report.seconds, "peak": peak}


def listed(count: int) -> None:
    """Lists images whose paths come on stdin; prints what it takes above the rest."""
    from bentoml_detectron.dataset import parts
    from bentoml_detectron.dataset.chunks import CHUNK
    from bentoml_detectron.dataset.sources import Dataset

    with tempfile.TemporaryDirectory(prefix="bench-dataset-") as folder:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        listing = parts.Listing(Path(folder) / "sources", Dataset("-"), CHUNK)
        seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if listing.count != count:
        raise SystemExit(f"{listing.count} images were listed, not {count}")
    print(f"\nA list of {count:,} images: {seconds:.1f} s, {(peak - before) * 1024 / 1e6:.0f} MB more", flush=True)


def list_many(count: int) -> None:
    with subprocess.Popen([sys.executable, __file__, "--child", "list", str(count)], stdin=subprocess.PIPE) as process:
        process.stdin.writelines(b"/data/photos/%08d/image_%08d.jpg\n" % (each // 1000, each) for each in range(count))
        process.stdin.close()
    if process.returncode:
        raise SystemExit(process.returncode)


def child(way: str, images: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-dataset-") as folder:
        if way in OUTPUTS:
            print(json.dumps(ours(images, Path(folder), OUTPUTS[way])))
        else:
            print(json.dumps(loop(images, Path(folder), way == LOOP_COCO)))


def measured(way: str, images: Path, home: str) -> dict[str, float]:
    more = threads.environment() if way in OUTPUTS else {}  # as in the command's process
    result = subprocess.run(
        [sys.executable, __file__, "--child", way, str(images)],
        env={**os.environ, "BENTOML_HOME": home, **more}, capture_output=True, text=True,
    )  # fmt: skip
    if result.returncode:
        raise SystemExit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def dataset(folder: Path, count: int) -> Path:
    from bentoml_detectron import demo

    folder.mkdir()
    some = demo.images()
    for number in range(count):
        (folder / f"{number:06d}.jpg").symlink_to(some[number % len(some)])
    return folder


def compare(images: Path, count: int, rounds: int, home: str) -> None:
    found: dict[str, list[dict[str, float]]] = {way: [] for way in (LOOP, LOOP_COCO, OURS, OURS_ALL)}
    for _ in range(rounds):
        for way, each in found.items():
            each.append(measured(way, images, home))
            print(f"{way}: {each[-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    print(f"{count:,} images of 192x192, {os.cpu_count()} cores, median of {rounds} rounds, in turn")
    print("| way | images a second | times the loop | times the loop with COCO results | model busy |\n|---|---|---|---|---|")
    for way, each in found.items():
        speed = statistics.median(count / one["seconds"] for one in each)
        ratios = [
            f"{statistics.median(other['seconds'] / one['seconds'] for one, other in zip(each, found[loop], strict=True)):.2f}"
            for loop in (LOOP, LOOP_COCO)
        ]
        busy = f"{statistics.median(one['busy'] for one in each):.1%}" if "busy" in each[0] else ""
        print(f"| {way} | {speed:.1f} | {' | '.join(ratios)} | {busy} |", flush=True)


def memory(folder: Path, few: int, many: int, home: str) -> None:
    print(f"\n| way | peak memory, {few:,} images, MB | {many:,} images, MB | more, MB |\n|---|---|---|---|")
    for way in OUTPUTS:
        small, large = (measured(way, folder / str(count), home)["peak"] / 1e6 for count in (few, many))
        print(f"| {way} | {small:.0f} | {large:.0f} | {large - small:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--few", type=int, default=100)
    parser.add_argument("--many", type=int, default=10_000)
    parser.add_argument("--only", choices=["speed", "memory", "list"])
    parser.add_argument("--child", nargs=2, metavar=("WAY", "IMAGES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child and arguments.child[0] == "list":
        listed(int(arguments.child[1]))
        return
    if arguments.child:
        child(arguments.child[0], Path(arguments.child[1]))
        return
    with tempfile.TemporaryDirectory(prefix="bench-dataset-") as home:
        save = "import bentoml\nfrom bentoml_detectron import demo\nbentoml.detectron.save_model('digits', demo.predictor())"
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", save], env={**os.environ, "BENTOML_HOME": home}, check=True, timeout=300
        )
        folder = Path(home)
        if arguments.only in (None, "list"):
            list_many(1_000_000)
        if arguments.only in (None, "speed"):
            compare(dataset(folder / "images", arguments.images), arguments.images, arguments.rounds, home)
        if arguments.only in (None, "memory"):
            for count in {arguments.few, arguments.many}:
                dataset(folder / str(count), count)
            memory(folder, arguments.few, arguments.many, home)


if __name__ == "__main__":
    main()
