"""``bentoml detectron evaluate``: measures a saved model, or a running service, on an annotated dataset."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from bentoml_detectron.cli import options
from bentoml_detectron.errors import InvalidArgumentError

if TYPE_CHECKING:
    from bentoml_detectron.dataset import Failure
    from bentoml_detectron.engines import Precision
    from bentoml_detectron.evaluation import Evaluation, GroundTruth
    from bentoml_detectron.evaluation.report import Table
    from bentoml_detectron.images import Limits
    from bentoml_detectron.results import Detections

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Source:
    """Something that finds what is on images.

    Attributes:
        name: Of its model, with the precision unless that is fp32, or where it is.
        thing_classes: The model's names, by id; empty where it has none.
        stuff_classes: The same of stuff.
        predict: What it finds on each file, in order.
    """

    name: str
    thing_classes: list[str]
    stuff_classes: list[str]
    predict: Callable[[list[Path]], Iterator[Detections]]


@click.command("evaluate")
@click.argument("tag", required=False)
@click.option("--annotations", required=True, metavar="FILE", type=click.Path(path_type=Path),
              help="COCO JSON: instances, person keypoints or panoptic; or a folder of semantic maps as PNGs.")  # fmt: skip
@click.option("--images", required=True, metavar="DIR", type=click.Path(path_type=Path), help="The folder with the images.")
@click.option("--url", metavar="URL", help="Evaluate the service running at this URL, over HTTP.")
@click.option("--compare", "other", metavar="TAG",
              help="Also report the differences from this model, with confidence intervals.")  # fmt: skip
@click.option("--json", "json_file", metavar="FILE", type=click.Path(path_type=Path, allow_dash=True),
              help="Write the whole report as JSON; - writes it to stdout instead of the tables.")  # fmt: skip
@click.option("--classes", multiple=True, metavar="NAME", help="Evaluate only this class; repeatable.")
@click.option("--panoptic-root", metavar="DIR", type=click.Path(path_type=Path),
              help="The folder with a panoptic file's PNGs; by default, the file's path without .json.")  # fmt: skip
@click.option("--keypoint-sigmas", metavar="S1,S2,...",
              help="One for each of K keypoints; by default COCO's if K is 17, else 1/K.")  # fmt: skip
@click.option("--resamples", default=1000, show_default=True, type=click.IntRange(min=1),
              help="Bootstrap resamples for --compare.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Random seed for --compare.")
@click.option("--connections", default=4, show_default=True, type=click.IntRange(1, 256), help="Concurrent requests to --url.")
@options.device
@options.precision
@options.max_image_pixels
@options.trust_remote_code
@options.trusted
def command(
    tag: str | None,
    annotations: Path,
    images: Path,
    url: str | None,
    other: str | None,
    json_file: Path | None,
    classes: tuple[str, ...],
    panoptic_root: Path | None,
    keypoint_sigmas: str | None,
    resamples: int,
    seed: int,
    connections: int,
    device: str,
    precision: Precision,
    max_image_pixels: int,
    trust_remote_code: bool,
    trusted: tuple[str, ...],
) -> None:
    """Evaluate a saved model, or with --url a running service, on annotated images.

    Reports the AP of boxes, masks and keypoints, panoptic quality, or mean IoU, depending on the annotations and on what the
    model predicts, over all classes and for each one. If the service requires a token, set BENTOML_DETECTRON_TOKEN to it.

    \b
    Examples:
      bentoml detectron evaluate mask_rcnn:latest --annotations instances_val2017.json --images val2017
      bentoml detectron evaluate --url http://127.0.0.1:3000 --annotations val.json --images val --json report.json
      bentoml detectron evaluate new:latest --compare old:latest --annotations val.json --images val
    """
    _check_target(tag, url, other, json_file)
    if url is not None and other is None:
        _refuse_given("device", "precision", "max_image_pixels", "trust_remote_code", "trusted")
    elif url is not None:
        _refuse_given("precision")
    from bentoml_detectron.dataset.prediction import written
    from bentoml_detectron.evaluation import compare, evaluate, ground_truth

    truth = ground_truth.read(annotations, panoptic_root=panoptic_root)
    truth = ground_truth.chosen(truth, classes) if classes else truth
    files = list(truth.files(images).values())
    measure = partial(_measured, truth, files, partial(evaluate, keypoint_sigmas=_numbers(keypoint_sigmas)))
    limits = options.limits(max_image_pixels)
    local = partial(_local, device=device, limits=limits, trust_remote_code=trust_remote_code, trusted=trusted)
    report: dict[str, Any] = {"annotations": written(str(annotations))}
    comparison = None
    with ExitStack() as stack:
        source = stack.enter_context(_served(tag, url, connections) if url else local(str(tag), precision=precision))
        against = None if other is None else stack.enter_context(local(other, precision="fp32"))
        for each in filter(None, (source, against)):  # before one of them runs for hours
            _check_names(truth, each)
        evaluation = measure(source)
        report = {"model": source.name, **report, **evaluation.to_dict()}
        if against is not None:
            evaluated = measure(against)
            comparison = compare(evaluation, evaluated, resamples=resamples, seed=seed)
            report["comparison"] = {"with": {"model": against.name, **evaluated.to_dict()}, **comparison.to_dict()}
    _show(report, evaluation, comparison, json_file)


def _check_target(tag: str | None, url: str | None, other: str | None, json_file: Path | None) -> None:
    """What can be known before the model runs, which may take hours."""
    from bentoml_detectron.store import get

    if tag is None and url is None:
        raise InvalidArgumentError("there is nothing to evaluate; give the TAG of a saved model, or the --url of a service")
    if json_file is not None and str(json_file) != "-" and not json_file.parent.is_dir():
        raise InvalidArgumentError(f"there is no folder {json_file.parent}; give another --json", value=str(json_file))
    if json_file is not None and json_file.is_dir():
        raise InvalidArgumentError(f"{json_file} is a folder; give another --json", value=str(json_file))
    if other is not None:
        get(other)


def _refuse_given(*names: str) -> None:
    """Refuses options that say how a model runs in this process, where none does that they could be for."""
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = f"--{name.replace('_', '-')}"
            raise InvalidArgumentError(f"{option} has no effect on a service that is already running; remove it", value=name)


def _check_names(truth: GroundTruth, source: _Source) -> None:
    from bentoml_detectron.evaluation import check_names

    try:
        check_names(truth, source.thing_classes, source.stuff_classes)
    except InvalidArgumentError as exc:
        raise InvalidArgumentError(f"{source.name}: {exc}", value=exc.value) from exc


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(each) for each in text.split(",")]
    except ValueError as exc:
        raise InvalidArgumentError(f"--keypoint-sigmas is {text!r}; give numbers separated by commas", value=text) from exc


@contextmanager
def _local(
    tag: str, *, precision: Precision, device: str, limits: Limits, trust_remote_code: bool, trusted: tuple[str, ...]
) -> Iterator[_Source]:
    """A saved model in this process."""
    from bentoml_detectron import dataset, get, load_predictor

    model = get(tag)
    # "exact", so that no image's results depend on which others are run with it.
    predictor = load_predictor(
        model,
        device,
        precision=precision,
        batch="exact",
        limits=limits,
        trust_remote_code=trust_remote_code,
        trusted=trusted,
    )

    def predict(files: list[Path]) -> Iterator[Detections]:
        for each in dataset.predict(predictor, files, on_error=_fail):
            yield each.detections

    known = predictor.dataset
    things, stuff = (known and known.thing_classes) or [], (known and known.stuff_classes) or []
    name = str(model.tag) if precision == "fp32" else f"{model.tag} in {precision}"
    yield _Source(name, things, stuff, predict)


def _fail(failure: Failure) -> None:
    raise failure.named() from failure.error


@contextmanager
def _served(tag: str | None, url: str, connections: int) -> Iterator[_Source]:
    """A running service."""
    from bentoml_detectron.remote import TOKEN_VARIABLE, Remote

    with Remote(url, token=os.environ.get(TOKEN_VARIABLE) or None, connections=connections) as service:
        info = service.info()
        if tag is not None:
            from bentoml_detectron import get

            if str(get(tag).tag) != info["tag"]:
                raise InvalidArgumentError(f"{url} serves {info['tag']}, not {tag}; omit the tag", value=info["tag"])
        things, stuff = (list(info.get(name) or []) for name in ("thing_classes", "stuff_classes"))
        precision = info.get("precision", "fp32")
        name = f"{info['tag']} at {url}" + ("" if precision == "fp32" else f" in {precision}")
        yield _Source(name, things, stuff, service.predict)


def _measured(truth: GroundTruth, files: list[Path], evaluate: Callable[..., Evaluation], source: _Source) -> Evaluation:
    found = options.watched(source.predict(files), source.name, len(files))
    pairs = zip((each.id for each in truth.images), found, strict=True)
    return evaluate(pairs, truth, thing_classes=source.thing_classes, stuff_classes=source.stuff_classes)


def _show(report: Mapping[str, Any], evaluation: Any, comparison: Any, json_file: Path | None) -> None:
    """Writes the report and shows it; where one of the two cannot be done, the other is."""
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if str(json_file) == "-":
        click.echo(text, nl=False)
        return
    fault = None
    if json_file is not None:
        try:
            _write(text, json_file)
        except InvalidArgumentError as exc:  # the disk may be full
            fault = exc
    from bentoml_detectron.evaluation.report import tables

    head = report["model"] if comparison is None else f"{report['model']} against {report['comparison']['with']['model']}"
    click.echo(f"{head} on {report['annotations']}\n")
    for table in tables(evaluation, comparison):
        _print(table)
    notes = list(evaluation.notes)
    if comparison is not None:
        other = report["comparison"]["with"]
        of_one = sorted(evaluation.tasks.keys() ^ other["tasks"].keys())
        notes += [*other["notes"], *(f"{task} is not compared: only one of the two models has it" for task in of_one)]
    for note in dict.fromkeys(notes):
        click.echo(f"note: {note}")
    if fault is not None:
        raise fault


def _write(text: str, path: Path) -> None:
    """Writes a file, whole or not at all."""
    new = path.with_name(f".{path.name}.tmp")
    try:
        if path.exists() and not path.is_file():  # /dev/stdout, or a pipe
            path.write_text(text, encoding="utf-8")
            return
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as exc:
        with suppress(OSError):
            new.unlink()
        raise InvalidArgumentError(f"cannot write {path} ({exc.strerror}); give another --json", value=str(path)) from exc


def _print(table: Table) -> None:
    """A table, with lines and bold where someone looks."""
    if not sys.stdout.isatty():
        click.echo(f"{table}\n")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    # As texts, in which square brackets are nothing but that. Names are folded where it is narrow, numbers never.
    drawn = RichTable(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD)
    for place, column in enumerate(zip(table.header, *table.rows, strict=True)):
        if place == 0:
            drawn.add_column(Text(column[0]), overflow="fold")
        else:
            drawn.add_column(Text(column[0]), justify="right", min_width=max(map(len, column)))
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    Console().print(drawn)
