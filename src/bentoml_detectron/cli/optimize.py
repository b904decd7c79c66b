"""``bentoml detectron optimize``: calibrates a saved model for int8 on a user's own images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bentoml_detectron.cli import options

if TYPE_CHECKING:
    from bentoml_detectron.optimization import Measure, Report
    from bentoml_detectron.predictor import Predictor

_FEW = 20  # images; fewer may lack what a model will see


@click.command("optimize")
@click.argument("tag")
@click.option("--precision", default="int8", show_default=True, type=click.Choice(["int8"]),
              help="The precision to optimize for.")  # fmt: skip
@click.option("--calibration", required=True, metavar="DIR", help="A folder of typical input images; 100 are enough.")
@click.option("--annotations", metavar="FILE", type=click.Path(path_type=Path),
              help="COCO annotations of images in that folder, to measure AP before and after.")  # fmt: skip
@click.option("--name", required=True, help="The new model's name, or NAME:VERSION.")
@click.option("--force", is_flag=True, help="Save the model even if it is slower or loses too much accuracy.")
@options.trust_remote_code
@options.trusted
def command(
    tag: str,
    precision: str,
    calibration: str,
    annotations: Path | None,
    name: str,
    force: bool,
    trust_remote_code: bool,
    trusted: tuple[str, ...],
) -> None:
    """Calibrate a saved model for int8, and save it under another name if that pays off.

    Measures the ranges of the model's features on the images, then compares int8 with fp32 in speed on this machine and in
    what is found. The result is not saved if it is slower than fp32, loses more than 0.8 points of a metric or, without
    annotations, agrees with fp32 on less than 95 % of the detections.

    \b
    Example:
      bentoml detectron optimize mask_rcnn:latest --calibration photos/ --annotations val.json --name mask_rcnn_int8
      bentoml detectron serve mask_rcnn_int8:latest --precision int8
    """
    from bentoml_detectron import store
    from bentoml_detectron.dataset.sources import Dataset
    from bentoml_detectron.optimization import optimize

    images = [each.file_name for each in Dataset(calibration)]
    store.check_new(name)  # before annotations are read, which may take a while
    model, report = optimize(
        store.get(tag),
        images,
        name=name,
        measure=None if annotations is None else _measure(annotations, Path(calibration)),
        force=force,
        trust_remote_code=trust_remote_code,
        trusted=trusted,
        track=options.watched,
    )
    for line in _lines(report):
        click.echo(line)
    trust = options.trusting(trusted, trust_remote_code=trust_remote_code)
    click.echo(f"saved {model.tag}; next: bentoml detectron serve {model.tag} --precision {precision}{trust}")


def _measure(annotations: Path, folder: Path) -> Measure:
    """The metrics of a predictor on annotated images: AP, panoptic quality or IoU."""
    from bentoml_detectron.evaluation import evaluate, ground_truth

    truth = ground_truth.read(annotations)
    files = truth.files(folder)

    def measure(predictor: Predictor) -> Mapping[str, float]:
        known = predictor.dataset
        found = ((image, predictor([path])[0]) for image, path in options.watched(files.items(), "evaluating", len(files)))
        evaluation = evaluate(
            found,
            truth,
            thing_classes=(known and known.thing_classes) or None,
            stuff_classes=(known and known.stuff_classes) or None,
        )
        return {f"{name} {metric}": float(value) for name, task in evaluation.tasks.items()
                for metric, value in list(task.metrics.items())[:1]}  # fmt: skip

    return measure


def _lines(report: Report) -> list[str]:
    """A report, a line each."""
    times = ", ".join(f"{name} {each:.1f}" for name, each in report.milliseconds.items())
    images = "1 image" if report.calibrated == 1 else f"{report.calibrated} images"
    few = "; these are few: give about a hundred typical ones" if report.calibrated < _FEW else ""
    lines = [
        f"calibrated on {images}{few}",
        f"ms per image, median of {report.compared} in turn: {times}",
        f"int8 is {report.times_as_fast:.2f} times as fast as fp32, by the median over the images",
    ]
    if report.alike is not None:
        lines.append(f"{report.alike:.1%} of the detections in fp32 or int8 are found in both")
    lines += [
        f"{name}: {100 * value:.2f} in fp32, {100 * report.after[name]:.2f} in int8" for name, value in report.before.items()
    ]
    return [*lines, *(f"saved in spite of this: {each}" for each in report.problems)]
