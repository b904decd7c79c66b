"""``bentoml detectron COMMAND``: one module per command, imported when the command is called."""

from __future__ import annotations

import os
import sys
import textwrap
import warnings
from importlib import import_module
from typing import Any

import click

from bentoml_detectron import threads

COMMANDS = ("demo", "evaluate", "optimize", "predict", "save", "serve", "verify")


class _Commands(click.Group):
    """Finds its commands in this package's modules, and shows an error as one line, with exit status 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"bentoml_detectron.cli.{cmd_name}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name != "serve":  # whose workers divide the cores among them
            os.environ.update(threads.count())
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        from bentoml._internal.configuration import get_debug_mode

        os.environ.update(threads.environment())  # before a command imports PyTorch
        is_debug = get_debug_mode()  # BentoML gives each of its commands the option --debug
        with warnings.catch_warnings():
            if not is_debug:  # what these warn of is for those who write programs
                warnings.filterwarnings("ignore", module=r"(torch|torchvision|detectron2|fvcore|iopath)(\.|\Z)")
            try:
                return super().invoke(ctx)
            except (click.exceptions.Exit, click.Abort, click.exceptions.NoArgsIsHelpError, BrokenPipeError):
                raise  # of a broken pipe click says nothing, as nobody reads on
            except Exception as exc:
                if is_debug and not isinstance(exc, click.ClickException):
                    raise
                click.echo(f"Error: {_line(exc)}", err=True)
                sys.exit(1)


def _line(exc: Exception) -> str:
    """An error as one line, with its cure."""
    from bentoml.exceptions import BentoMLException

    if isinstance(exc, click.UsageError) and exc.ctx is not None:
        return f"{_short(exc.format_message())} See '{exc.ctx.command_path} --help'"
    if isinstance(exc, click.ClickException):
        return _short(exc.format_message())
    if isinstance(exc, BentoMLException):
        return _short(str(exc))
    return f"{_short(f'{type(exc).__name__}: {exc}')}; 'bentoml detectron --debug ...' shows where"


def _short(text: str) -> str:
    """On one line; a list of hundreds of names is cut."""
    return textwrap.shorten(text, 1000, placeholder=" ...")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def detectron() -> None:
    """Save, load and serve Detectron2 models."""
