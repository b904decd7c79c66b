"""Writes docs/cli.md from what ``bentoml detectron ... --help`` prints. With --check it only says whether the file is stale."""

from __future__ import annotations

import sys
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
WIDTH = 110  # characters of a line of help
HEAD = """\
# The command line

Written by `tools/make_cli_docs.py` from what the commands print with `--help`; a test holds it to them.

An error is one line on stderr that says what to do, with exit status 1; `bentoml detectron --debug COMMAND ...` shows the
traceback. What PyTorch and Detectron2 warn of is left out without it.

BentoML's completion of the shell knows these commands and their options, after this line in `~/.bashrc`:

    eval "$(_BENTOML_COMPLETE=bash_source bentoml)"

or, for zsh and fish, with `zsh_source` or `fish_source` in its place.

Saved models are BentoML models: `bentoml models list`, `get`, `export`, `import` and `delete` work on them. `bentoml models
push` needs a BentoCloud account, and was not tried. Give `export` and `import` a whole path: BentoML 1.4.39 takes others as
if they began at `/`.

    bentoml models export street:latest "$PWD/street.bentomodel"
    bentoml models import "$PWD/street.bentomodel"
    bentoml detectron verify street:latest
"""


def document() -> str:
    """The whole document."""
    from bentoml_cli.cli import cli
    from click.testing import CliRunner

    from bentoml_detectron.cli import COMMANDS

    parts = [HEAD]
    for name in (None, *COMMANDS):
        arguments = ["detectron", *([name] if name else []), "--help"]
        shown = CliRunner().invoke(cli, arguments, prog_name="bentoml", terminal_width=WIDTH)
        if shown.exit_code:
            raise SystemExit(f"bentoml {' '.join(arguments)} fails: {shown.output}")
        text = "\n".join(line.rstrip() for line in shown.output.splitlines())
        parts.append(f"## bentoml detectron{f' {name}' if name else ''}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def main() -> None:
    due = document()
    if sys.argv[1:] == ["--check"]:
        if not DOCUMENT.is_file() or DOCUMENT.read_text() != due:
            sys.exit(f"{DOCUMENT} is stale; run python tools/make_cli_docs.py")
    else:
        DOCUMENT.write_text(due)


if __name__ == "__main__":
    main()
