"""``bentoml detectron COMMAND``, one module a command, imported when it is called."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import click

COMMANDS = ("demo", "evaluate", "predict", "serve", "verify")


class _Commands(click.Group):
    """Finds its commands in this package's modules, and shows an error as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"bentoml_detectron.cli.{cmd_name}").command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        from bentoml._internal.configuration import get_debug_mode
        from bentoml.exceptions import BentoMLException

        try:
            return super().invoke(ctx)
        except BentoMLException as exc:
            if get_debug_mode():  # BentoML gives each of its commands the option --debug
                raise
            click.echo(f"Error: {' '.join(str(exc).split())}", err=True)
            sys.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def detectron() -> None:
    """Save, load and serve Detectron2 models."""
