"""``bentoml detectron predict``: runs a saved model over a whole dataset and writes the results to files."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import click

from bentoml_detectron.cli import options
from bentoml_detectron.errors import escaped

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from bentoml_detectron.dataset import Progress
    from bentoml_detectron.engines import Precision

INCOMPLETE = 3
"""Exit status where all is written but for images that could not be used."""
INTERRUPTED = 130
"""As shells have it for SIGINT."""
_SECONDS = 10.0  # between lines


@click.command("predict")
@click.argument("tag")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--output", "-o", "outputs", multiple=True, required=True, metavar="PATH",
              help=".json (COCO results), .jsonl or .parquet file, or a folder for annotated images; repeatable.")  # fmt: skip
@click.option("--errors", metavar="FILE", help="File to list unusable images in, each with the reason, as JSON lines.")
@click.option("--allow-errors", is_flag=True, help=f"Exit with status 0, not {INCOMPLETE}, if some images are unusable.")
@click.option("--resume", is_flag=True, help="Continue an unfinished run, if there is one.")
@click.option("--parquet-rows", default="detection", show_default=True, type=click.Choice(["detection", "image"]),
              help="What each row of a .parquet output holds.")  # fmt: skip
@click.option("--image-root", metavar="FOLDER",
              help="Folder that file names in the annotations are relative to; by default, theirs.")  # fmt: skip
@click.option("--image-column", metavar="NAME", help="Column of a Parquet source with the images.")
@click.option("--key-column", metavar="NAME", help="Column of a Parquet source with the images' names.")
@click.option("--chunk", default=100, show_default=True, type=click.IntRange(1),
              help="Images per checkpoint; a killed run may repeat up to this many.")  # fmt: skip
@click.option("--engine", default="local", show_default=True, type=click.Choice(["local", "ray"]),
              help="Where to run the model.")  # fmt: skip
@click.option("--ray-address", metavar="HOST:PORT", help="Address of the Ray cluster; by default, the one on this machine.")
@click.option("--ray-workers", type=click.IntRange(1),
              help="Number of model processes; by default, one per GPU or, on the CPU, per node.")  # fmt: skip
@options.device
@options.precision
@click.option("--score-threshold", type=float, help="Lowest score to keep, from 0 to 1; by default, the model's own.")
@click.option("--classes", multiple=True, metavar="CLASSES",
              help="Names or ids of classes to keep, separated by commas; repeatable.")  # fmt: skip
@click.option("--top-k", type=int, help="Keep at most this many detections per image, the highest-scoring ones.")
@options.max_image_pixels
@options.trust_remote_code
@options.trusted
def command(
    tag: str,
    sources: tuple[str, ...],
    outputs: tuple[str, ...],
    errors: str | None,
    allow_errors: bool,
    resume: bool,
    parquet_rows: Literal["detection", "image"],
    image_root: str | None,
    image_column: str | None,
    key_column: str | None,
    chunk: int,
    engine: Literal["local", "ray"],
    ray_address: str | None,
    ray_workers: int | None,
    device: str,
    precision: Precision,
    score_threshold: float | None,
    classes: tuple[str, ...],
    top_k: int | None,
    max_image_pixels: int,
    trust_remote_code: bool,
    trusted: tuple[str, ...],
) -> None:
    """Run a saved model over images, and write the results.

    A SOURCE is an image, a folder, a glob, a COCO annotation file, a Parquet file with encoded images, or - for a list of paths
    on stdin. Outputs appear when the whole run is finished; an interrupted run can be continued with --resume.

    \b
    Example:
      bentoml detectron predict mask_rcnn:latest photos/ --output found.json --output pictures/
    """
    from bentoml_detectron.dataset import write
    from bentoml_detectron.dataset.prediction import written

    names = written(", ".join(outputs))
    with _interruptible(), _progress(quiet=errors is not None) as progress:
        report = write(
            tag,
            sources,
            outputs,
            errors=errors,
            resume=resume,
            parquet_rows=parquet_rows,
            device_id=device,
            precision=precision,
            trust_remote_code=trust_remote_code,
            trusted=trusted,
            limits=options.limits(max_image_pixels),
            score_threshold=score_threshold,
            classes=_classes(classes, tag),
            top_k=top_k,
            image_root=image_root,
            image_column=image_column,
            key_column=key_column,
            chunk=chunk,
            engine=engine,
            ray_address=ray_address,
            ray_workers=ray_workers,
            progress=progress,
        )
    if not report.images:
        click.echo(f"{names}: already complete, and there is no unfinished run; nothing was done")
        return
    new = report.images - report.resumed
    share = f", {new:,} of them now" if report.resumed else ""
    speed = f"{share}, {new / report.seconds:.1f} a second, with the model busy {report.busy:.0%} of the time"
    click.echo(f"{names}: {report.images:,} images{speed if new else ''}")
    if report.failures:
        click.echo(f"{report.failures:,} of them could not be used{f'; see {errors}' if errors else ''}", err=True)
        if not allow_errors:
            sys.exit(INCOMPLETE)


def _classes(given: tuple[str, ...], tag: str) -> list[str] | None:
    """Names and ids; None: all classes. What is the name of one of the model's classes is not split at its commas."""
    if not any("," in each for each in given):
        return [each.strip() for each in given] or None
    from bentoml_detectron.store import class_names, get

    names = {each.strip() for each in class_names(get(tag))}
    each_alone = [[some.strip()] if some.strip() in names else some.split(",") for some in given]
    return [each.strip() for some in each_alone for each in some]


@contextmanager
def _interruptible() -> Iterator[None]:
    """Says what is left where someone ends the run by Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("Error: interrupted; continue with --resume", err=True)
        sys.exit(INTERRUPTED)


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """A bar on a terminal, and lines elsewhere; on stderr."""
    if not sys.stderr.isatty():
        yield _lines(quiet)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield _bar(bar, quiet)


def _bar(bar: Bar, quiet: bool) -> Progress:
    from bentoml_detectron.dataset import Progress

    class OnTerminal(Progress):
        task: TaskID
        begun: float
        images = 0

        def start(self, total: int, done: int) -> None:
            self.begun = time.perf_counter()
            self.task = bar.add_task("images", total=total, completed=done, rate="")

        def advance(self, images: int) -> None:
            self.images += images
            bar.update(self.task, advance=images, rate=f"{self.images / (time.perf_counter() - self.begun):.1f}/s")

        def failed(self, message: str) -> None:
            if not quiet:
                bar.console.print(escaped(message), markup=False, highlight=False)

    return OnTerminal()


def _lines(quiet: bool) -> Progress:
    from bentoml_detectron.dataset import Progress

    class Lines(Progress):
        total = before = images = 0
        begun = said = 0.0

        def start(self, total: int, done: int) -> None:
            self.total, self.before = total, done
            self.begun = self.said = time.perf_counter()
            click.echo(f"{total:,} images{f', {done:,} of them already done' if done else ''}", err=True)

        def advance(self, images: int) -> None:
            self.images += images
            now = time.perf_counter()
            if now - self.said >= _SECONDS:
                self.said = now
                rate = self.images / (now - self.begun)
                left = (self.total - self.before - self.images) / rate
                click.echo(
                    f"{self.before + self.images:,} of {self.total:,} images, {rate:.1f}/s, {_clock(left)} left", err=True
                )

        def failed(self, message: str) -> None:
            if not quiet:
                click.echo(escaped(message), err=True)

    return Lines()


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
