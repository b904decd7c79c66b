"""``bentoml detectron verify``: checks whether a saved model is still what was saved."""

from __future__ import annotations

import sys

import click

from bentoml_detectron.cli import options


@click.command("verify")
@click.argument("tag")
@click.option("--device", default="cpu", show_default=True, help="Device to run the self-test on, such as cpu or cuda:0.")
@options.trust_remote_code
@options.trusted
def command(tag: str, device: str, trust_remote_code: bool, trusted: tuple[str, ...]) -> None:
    """Check a saved model's files, weights and self-test. Exits with status 1 if there is a problem.

    \b
    Example:
      bentoml detectron verify mask_rcnn:latest
    """
    from bentoml_detectron import verify

    report = verify(tag, device, trust_remote_code=trust_remote_code, trusted=trusted)
    for note in report.notes:
        click.echo(f"note: {note}")
    for problem in report.problems:
        click.echo(f"problem: {problem}", err=True)
    if not report.ok:
        sys.exit(1)
    if not report.has_digests:
        click.echo(f"{report.tag} loads")
        return
    same = {True: "gives identical results", False: "gives the same results, within tolerances", None: "loads"}
    click.echo(f"{report.tag} is unchanged since it was saved, and {same[report.identical]}")
