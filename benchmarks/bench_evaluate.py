"""Whether ways to the same model give the same AP, and what evaluating costs: the demo model on images of its training's kind.

The images are those of ``tools/train_demo.py`` that training never saw. The ways: in this process one image at a time, as
``bentoml detectron evaluate`` does it, and in batches; and over HTTP with several numbers of connections. Then the time that
pycocotools takes, that faster-coco-eval takes for the same, and that of the bootstrap.

Usage::

    python benchmarks/bench_evaluate.py [--images 200]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import faster_coco_eval
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import serving
import train_demo
from bentoml_detectron import Detections, compare, evaluate, load_predictor
from bentoml_detectron.evaluation import Evaluation
from bentoml_detectron.remote import Remote
from timing import seconds, spread

SERVE = [sys.executable, "-m", "bentoml", "detectron", "serve", "digits", "--port", "PORT"]
METRICS = ("AP", "AP50", "AP75", "AR")
TURNS = 5


def ways(files: list[Path], home: str) -> Iterator[tuple[str, list[Detections]]]:
    """What each way finds on the images."""
    for batch, name in (("exact", "in this process, one by one"), ("padded", "in this process, in batches")):
        yield name, load_predictor("digits", batch=batch)(files)
    with serving.started(SERVE, serving.environment(home), Path(home) / "log") as server:
        url = server.wait()
        for connections in (1, 4, 16):
            with Remote(url, connections=connections) as service:
                yield f"over HTTP, {connections} at once", list(service.predict(files))


def rows_of(found: list[Detections], kind: str) -> list[dict[str, Any]]:
    rows = [{**row, "category_id": row["category_id"] + 1} for place, each in enumerate(found, start=1)
            for row in each.to_coco(place)]  # fmt: skip
    return rows if kind == "bbox" else [{key: value for key, value in row.items() if key != "bbox"} for row in rows]


def by(coco: Any, evaluation: Any, truth: dict[str, Any], rows: list[dict[str, Any]], kind: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        there = coco()
        there.dataset = copy.deepcopy(truth)
        there.createIndex()
        each = evaluation(there, there.loadRes(copy.deepcopy(rows)), kind)
        each.evaluate()
        each.accumulate()
        each.summarize()


def print_ways(truth: dict[str, Any], files: list[Path], home: str) -> tuple[list[Detections], Evaluation, Evaluation]:
    """Prints a row of each way; gives what the first found, and the evaluations of the first and the second."""
    print(f"AP on {len(files)} images\n| way | as the first, to the last bit |", end="")
    print("".join(f" {task} {name} |" for task in ("box", "mask") for name in METRICS))
    print("|---" * (2 + 2 * len(METRICS)) + "|")
    first: list[Detections] = []
    evaluations = []
    for name, found in ways(files, home):
        first = first or found
        evaluation = evaluate(enumerate(found, start=1), truth)
        same = sum(one == other for one, other in zip(found, first, strict=True))
        numbers = [evaluation.tasks[task].metrics[metric] for task in ("box", "mask") for metric in METRICS]
        print(f"| {name} | {same} of {len(files)} | {' | '.join(f'{number:.6f}' for number in numbers)} |", flush=True)
        evaluations.append(evaluation)
    return first, evaluations[0], evaluations[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    count = parser.parse_args().images
    truth = train_demo.coco_dataset(count)
    with tempfile.TemporaryDirectory() as home:
        os.environ["BENTOML_HOME"] = home
        serving.save_demo(home)
        files = []
        for number, (_, image, _) in enumerate(train_demo.test_images(count)):
            files.append(Path(home) / f"{number}.png")
            Image.fromarray(image[:, :, ::-1]).save(files[-1])
        found, one, other = print_ways(truth, files, home)
    print(f"\nseconds, {TURNS} turns\n| | boxes | masks |\n|---|---|---|")
    tools = {
        "pycocotools": (COCO, COCOeval),
        "faster-coco-eval": (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster),
    }
    for name, (coco, evaluation) in tools.items():
        cells = [
            spread((seconds(partial(by, coco, evaluation, truth, rows_of(found, kind), kind)) for _ in range(TURNS)), 2)
            for kind in ("bbox", "segm")
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(f"\n1,000 resamples, boxes and masks: {spread((seconds(lambda: compare(one, other)) for _ in range(3)), 2)} s")


if __name__ == "__main__":
    main()
