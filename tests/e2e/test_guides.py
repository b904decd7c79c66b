"""The guides in docs/ (results, deployment, moving from other code): their blocks run, and what they name exists."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_masks

from bentoml_detectron import demo
from browsing import needs_chromium
from documents import blocks

pytestmark = pytest.mark.slow
DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
GUIDES = ("results",)


def text_of(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def run(name: str, namespace: dict | None = None) -> dict:
    """Runs a guide's Python blocks that name no file, in order; each block of output is what the one before it prints."""
    namespace = {} if namespace is None else namespace
    printed = ""
    for language, text in blocks(text_of(name)):
        if language == "python" and not re.match(r"# [\w/]+\.py\n", text):
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(text, f"{name}.md", "exec"), namespace)  # noqa: S102 (what this test is for)
            printed = output.getvalue()
        elif language == "output":
            assert printed == text
    return namespace


def write_video(path: Path) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (192, 192))
    for each in demo.images():
        writer.write(cv2.imread(str(each)))
    writer.release()


def test_blocks_of_the_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "video.avi")
    run("results")
    assert len(list(tmp_path.glob("*.avi"))) == 2
    assert (tmp_path / "picture.png").is_file()


@needs_chromium
def test_javascript_decodes_masks_as_pycocotools(browser):
    (function,) = (text for language, text in blocks(text_of("results")) if language == "javascript")
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (7, 5), (40, 64), (300, 200), (2000, 30)]
    bitmaps = [np.asfortranarray(rng.random(shape) < share, np.uint8) for shape in shapes for share in (0, 0.001, 0.5, 1)]
    bitmaps.append(np.zeros((2000, 1500), np.uint8, order="F"))
    bitmaps[-1][3:1990, 700:1400] = 1
    encoded = [coco_masks.encode(each) for each in bitmaps]
    given = [{"size": each["size"], "counts": each["counts"].decode()} for each in encoded]
    page = browser.new_page()
    changes = "bits => [...bits].flatMap((bit, place) => bit !== (place ? bits[place - 1] : 0) ? [place] : [])"
    found = page.evaluate(f"masks => {{ {function} return masks.map(decodeMask).map({changes}); }}", given)
    page.close()
    for bitmap, places in zip(bitmaps, found, strict=True):
        assert places == np.flatnonzero(np.diff(bitmap.ravel(), prepend=0)).tolist()


@pytest.mark.parametrize("name", GUIDES)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)]+)\)", text_of(name)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = DOCS / path if path else DOCS / f"{name}.md"
        assert target.is_file(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
        assert not anchor or anchor in anchors, link
