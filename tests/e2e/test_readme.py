"""Every block of the README runs, in order, and prints what the README says."""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def run_in_shell(text: str, folder: Path) -> None:
    """Lines with a dollar are commands; what follows is their output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
        result = subprocess.run(
            command, shell=True, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
        if output:
            assert output.strip() in result.stdout


def run_session(text: str, namespace: dict) -> None:
    test = doctest.DocTestParser().get_doctest(text, namespace, "README", "README.md", 0)
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    result = runner.run(test, out=report.write, clear_globs=False)
    namespace.update(test.globs)
    assert result.attempted > 0
    assert result.failed == 0, report.getvalue()


def test_every_block(tmp_path, monkeypatch):
    assert len(BLOCKS) >= 8
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    printed = ""
    for language, text in BLOCKS:
        if language == "python" and text.startswith(">>>"):
            run_session(text, namespace)
        elif language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(text, "README.md", "exec"), namespace)  # noqa: S102 (what this test is for)
            printed = output.getvalue()
        elif language == "output":
            assert printed == text
        elif language == "console":
            run_in_shell(text, tmp_path)
        else:
            pytest.fail(f"the README has a block of {language!r}, which no test runs")
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_quoted_table_is_of_the_shipped_weights():
    """The README's AP table and the digest that the training printed belong to the weights in the package."""
    import hashlib

    import torch

    from bentoml_detectron import demo

    state = torch.load(demo.config().MODEL.WEIGHTS, weights_only=True)["model"]
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy().tobytes())
    assert digest.hexdigest()[:16] in README


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", README):
        if not link.startswith("http"):
            assert (ROOT / link).is_file(), link
