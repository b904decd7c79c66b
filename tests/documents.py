"""Documents whose blocks tests run, in order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from servers import environment


def blocks(document: str) -> list[tuple[str, str]]:
    """The language and the text of each fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)


def run_in_shell(text: str, folder: Path, home: Path) -> str:
    """Runs a console block: lines with a dollar are commands, and what follows each is what it must print.

    Args:
        text: The block; a command may go on after a backslash at a line's end.
        folder: Where commands run.
        home: BentoML's.

    Returns:
        What all of them print.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    printed = ""
    for command, shown in re.findall(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
        result = subprocess.run(
            command, shell=True, cwd=folder, env=environment(home, PATH=path), capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, f"{command}\n{result.stderr}"
        if shown:
            assert is_shown(result.stdout, shown), f"{command} prints\n{result.stdout}\nand not\n{shown}"
        printed += result.stdout
    return printed


def is_shown(printed: str, shown: str) -> bool:
    """Whether an output is what a document shows, where dots stand for any part of a line or, alone in one, any lines."""
    lines = (
        r"(?:.*\n)*" if line == "..." else ".*".join(map(re.escape, line.split("..."))) + r" *\n" for line in shown.splitlines()
    )
    return re.fullmatch("".join(lines), f"{printed.rstrip()}\n") is not None
