"""Every block of the README runs, in order, and prints what the README says."""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import os
import re
from pathlib import Path

import pytest

from bentoml_detectron import Detections, demo
from documents import blocks, run_in_shell
from servers import served

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = blocks(README)


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
    (tmp_path / "picture.jpg").write_bytes(demo.images()[3].read_bytes())
    (tmp_path / "config.yaml").write_bytes(Path(demo.__file__).with_name("config.yaml").read_bytes())
    (tmp_path / "model_final.pth").write_bytes(Path(demo.__file__).with_name("weights.pth").read_bytes())
    (tmp_path / "train.json").write_text(json.dumps(demo.ground_truth()))
    with contextlib.ExitStack() as servers:
        run_blocks(tmp_path, servers)
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def run_blocks(folder: Path, servers: contextlib.ExitStack) -> None:
    """A server runs to the end, on a free port of its own."""
    namespace: dict = {}
    printed = address = ""
    home = Path(os.environ["BENTOML_HOME"])
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
        elif language == "console" and text.startswith("$ bentoml serve "):
            command = (*text.split()[2:], "--host", "127.0.0.1")
            server = servers.enter_context(served(folder, home, *command))
            address = f"127.0.0.1:{server.port}"
        elif language == "console" and text.startswith("$ curl "):
            assert address, "nothing serves yet"
            assert len(Detections.from_json(run_in_shell(text.replace("127.0.0.1:3000", address), folder, home))) == 7
        elif language == "console":
            run_in_shell(text, folder, home)
        else:
            pytest.fail(f"the README has a block of {language!r}, which no test runs")
    assert address


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


def test_no_command_is_outside_a_block():
    outside = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(r"^    .*", outside, re.MULTILINE)


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", README):
        if not link.startswith("http"):
            assert (ROOT / link).is_file(), link
