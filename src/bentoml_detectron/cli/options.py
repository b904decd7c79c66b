"""What several commands share: the options for loading a model, and a progress bar."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

import click

from bentoml_detectron.options import PRECISIONS

if TYPE_CHECKING:
    from bentoml_detectron.images import Limits

_T = TypeVar("_T")

device = click.option("--device", default="cpu", show_default=True, help="Device to run the model on, such as cpu or cuda:0.")
precision = click.option(
    "--precision",
    default="fp32",
    show_default=True,
    type=click.Choice(PRECISIONS),
    help="bf16 and int8 are faster; fp16 needs a GPU; int8 needs a model saved by optimize; auto picks the fastest.",
)
max_image_pixels = click.option(
    "--max-image-pixels",
    default=25_000_000,
    show_default=True,
    type=click.IntRange(min=1),
    help="Largest image accepted, in pixels.",
)
trust_remote_code = click.option("--trust-remote-code", is_flag=True, help="Import the source code bundled with the model.")
trusted = click.option(
    "--trusted", multiple=True, metavar="MODULE", help="Installed module that the model may import; repeatable."
)


def trusting(trusted: Iterable[str], *, trust_remote_code: bool = False) -> str:
    """The same two options for a command that is shown, with a space before each."""
    return " --trust-remote-code" * trust_remote_code + "".join(f" --trusted {each}" for each in trusted)


def limits(max_image_pixels: int) -> Limits:
    """Limits of images of so many pixels, and of as many bytes as such an image has in the largest of the formats, BMP."""
    from bentoml_detectron.images import DEFAULT_LIMITS, Limits

    return Limits(max_pixels=max_image_pixels, max_bytes=max(DEFAULT_LIMITS.max_bytes, 4 * max_image_pixels))


def watched(items: Iterable[_T], title: str, count: int) -> Iterable[_T]:
    """The same items, with a bar on stderr of how many of `count` are done where someone looks."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, title, total=count, console=console, transient=True, disable=not console.is_terminal)
