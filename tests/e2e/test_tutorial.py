"""The tutorial runs from its first block to its last, and its commands print what it shows."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from bentoml_detectron.engines import has_int8
from documents import blocks, is_shown, run_in_shell
from servers import served

ROOT = Path(__file__).resolve().parent.parent.parent
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
BLOCKS = blocks(TUTORIAL)
STEPS = (
    "python prepare.py", "bentoml detectron save", "bentoml detectron verify", "python look.py", "bentoml detectron predict",
    "bentoml detectron evaluate", "bentoml detectron optimize", "bentoml detectron serve", "curl", "bentoml models export",
    "BENTOML_HOME=\"$PWD/elsewhere\" bentoml models import", "bentoml build",
)  # fmt: skip


@pytest.mark.slow
def test_every_block(tmp_path):
    home = tmp_path / "home"
    with contextlib.ExitStack() as servers:
        run_blocks(tmp_path, home, servers)
    assert len(list((tmp_path / "pictures").glob("*.jpg"))) == 20
    assert (tmp_path / "elsewhere" / "models" / "digits" / "1" / "saved_model.pth").is_file()
    carried = {path.name for path in (home / "bentos" / "detectron-digits" / "1" / "src").rglob("*")}
    assert "service.py" in carried
    assert not carried & {"val.json", "found.json"}


def run_blocks(folder: Path, home: Path, servers: contextlib.ExitStack) -> None:
    """Python is a file, named in its first line; a server runs to the end, on a free port of its own."""
    address = ""
    for language, text in BLOCKS:
        if language == "python":
            name = re.match(r"# ([\w/]+\.py)\n", text)[1]
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
            if name == "prepare.py":  # the text says how it is called
                run_in_shell(f"$ python {name}\n", folder, home)
        elif language != "console":
            pytest.fail(f"the tutorial has a block of {language!r}, which no test runs")
        elif text.startswith("$ bentoml detectron serve "):
            server = servers.enter_context(served(folder, home, *text.split()[2:]))
            address = f"127.0.0.1:{server.port}"
        elif "int8" not in text or has_int8():
            run_in_shell(text.replace("127.0.0.1:3000", address), folder, home)
    assert address


@pytest.mark.parametrize("step", STEPS)
def test_no_step_is_missing(step):
    ran = "".join(text for language, text in BLOCKS if language == "console")
    assert f"$ {step} " in ran.replace("\n", " ") or f"`{step}`" in TUTORIAL


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", TUTORIAL)
    assert links
    for link in links:
        assert (ROOT / "docs" / link).is_file(), link


@pytest.mark.parametrize(
    ("shown", "due"),
    [
        ("one 1\ntwo 2\n", True),
        ("one 1\n", False),
        ("one ...\ntwo 2\n", True),
        ("...\ntwo 2\n...\n", True),
        ("...\none 2\n", False),
    ],
)
def test_what_is_shown_is_compared(shown, due):
    assert is_shown("one 1\ntwo 2\n", shown) is due
