"""The page at ``/ui`` before models of every kind: what a browser draws of what they find."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from bentoml_detectron import Detections, demo
from browsing import Page, changed, needs_chromium, run_both
from servers import environment, served, write_service
from support import picture

pytestmark = [pytest.mark.slow, needs_chromium]
_BUFFER = io.BytesIO()
Image.fromarray(picture(300, 400)).save(_BUFFER, "PNG")
PICTURE = _BUFFER.getvalue()
PATHS = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
"""With the tests' own modules, one of which a model needs."""
HOSTILE = "<img src=x onerror=\"document.title='run'\">'; touch run; '"
SAVE = f"""
import bentoml
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
import turned
from support import built
from zoo import ZOO, zoo_config

for name, zoo in (("keypoints", "Keypoint R-CNN"), ("panoptic", "Panoptic FPN"), ("semantic", "Semantic FPN")):
    cfg = zoo_config(ZOO[zoo])
    module = built(cfg)
    if name == "keypoints":
        cfg.DATASETS.TEST = ("hostile",)
        MetadataCatalog.get("hostile").set(thing_classes=[{HOSTILE!r}])
        module.roi_heads.keypoint_head.score_lowres.weight.data.mul_(50)  # random weights are sure of no keypoint
    bentoml.detectron.save_model(name, module, cfg)
cfg = get_cfg()
cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "TurnedBoxes", "cpu"
bentoml.detectron.save_model("turned", built(cfg), cfg)
"""


@pytest.fixture(scope="module")
def others_home(tmp_path_factory) -> Path:
    """A model of keypoints whose class has a hostile name, a panoptic, a semantic one and one of rotated boxes."""
    home = tmp_path_factory.mktemp("others")
    command = [sys.executable, "-W", "ignore", "-c", SAVE]
    subprocess.run(command, env=environment(home, PYTHONPATH=PATHS), check=True, timeout=300, cwd=sys.prefix)
    return home


def test_keypoints_token_and_a_class_with_a_hostile_name(browser, others_home, tmp_path):
    write_service(tmp_path, "'keypoints:latest'")
    with served(tmp_path, others_home, BENTOML_DETECTRON_TOKEN="secret") as server:
        page = Page(browser, server.url)
        page.page.locator("#token").fill("secret")
        expect(page.page.locator("#tag")).to_contain_text("keypoints:")
        assert page.page.locator("#samples").is_hidden()  # the demo's images are not for this model
        page.after(lambda: page.choose("a.jpg", demo.images()[3].read_bytes()))
        found = page.after(lambda: page.page.locator("#score_threshold").fill("0"))
        assert len(found["scores"]) > 0
        drawn = page.draw("keypoints")
        difference = changed(drawn, page.draw())
        scale = difference.shape[0] / found["image_size"][0]
        sure = [(int(x * scale), int(y * scale)) for each in found["keypoints"] for x, y, score in each if score >= 0.05]
        within = [difference[y, x] for x, y in sure if x < difference.shape[1] and y < difference.shape[0]]
        assert len(within) > 10
        assert all(within)
        assert len({tuple(drawn[y, x]) for x, y in sure if x < drawn.shape[1] and y < drawn.shape[0]}) > 3  # instances
        # Its name is text, wherever it stands.
        assert HOSTILE in page.text("#rows")
        found = page.after(lambda: page.page.get_by_label(HOSTILE, exact=True).check())
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "a.jpg").write_bytes(demo.images()[3].read_bytes())
        assert run_both(page, tmp_path / "run", BENTOML_DETECTRON_TOKEN="secret") == [found, found]
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["a.jpg"]
        assert page.page.title().startswith("keypoints:")
        assert page.page.locator("main img").count() == 0
        assert "secret" not in page.text("#curl") + page.text("#python")
        assert page.page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        assert page.errors == []
        page.context.close()


def tints(page: Page, ids: np.ndarray) -> dict[int, np.ndarray]:
    """The color that each segment is veiled in, as far as it is above the half percent that gets a label, by its id."""
    veiled, plain = page.draw("segments"), page.draw()
    places = [
        np.linspace(0, length, count, endpoint=False).astype(int) for length, count in zip(ids.shape, plain.shape, strict=False)
    ]
    ids = ids[np.ix_(*places)]
    share = 125 / 255
    color = (veiled - plain * (1 - share)) / share
    return {int(each): np.median(color[ids == each], axis=0) for each in np.unique(ids) if (ids == each).mean() > 0.005}


def listed(page: Page) -> dict[str, tuple[np.ndarray, str]]:
    """The color of its dot, and the number of pixels, of each segment in the list, by its name."""
    rows = page.page.evaluate("""[...rows.rows].slice(1).map(row =>
        [row.cells[0].innerText, row.querySelector(".dot").style.background, row.cells[2].innerText])""")
    return {name: (np.array([int(each) for each in color[4:-1].split(",")]), pixels) for name, color, pixels in rows}


def test_panoptic_segments_are_painted_as_the_list_says(browser, others_home, tmp_path):
    write_service(tmp_path, "'panoptic:latest'")
    with served(tmp_path, others_home) as server:
        page = Page(browser, server.url)
        found = page.after(lambda: page.choose("a.jpg", PICTURE))
        segments = found["panoptic"]["segments"]
        result = Detections.from_json(json.dumps(found))
        seen, rows = tints(page, result.panoptic.ids), listed(page)
        assert f"{len(segments)} segments in " in page.text("#status")
        assert len(segments) > 3
        for each in segments:
            color, pixels = rows[each["class_name"]]
            assert pixels == str(each["area"])
            if each["id"] in seen:
                assert np.abs(seen[each["id"]] - color).max() < 12, each
        assert page.errors == []
        page.context.close()


def test_semantic_maps_are_painted_as_the_list_says(browser, others_home, tmp_path):
    write_service(tmp_path, "'semantic:latest'")
    with served(tmp_path, others_home) as server:
        page = Page(browser, server.url)
        found = page.after(lambda: page.choose("a.jpg", PICTURE))
        names = httpx.get(f"{server.url}/info").json()["stuff_classes"]
        classes = Detections.from_json(json.dumps(found)).semantic
        seen, rows = tints(page, classes), listed(page)
        assert len(seen) > 3
        assert {names[each] for each in np.unique(classes)} == rows.keys()
        for each, color in seen.items():
            assert np.abs(color - rows[names[each]][0]).max() < 12, names[each]
            assert rows[names[each]][1] == str((classes == each).sum())
        assert len({tuple(np.round(color, -1)) for color in seen.values()}) > 3
        assert page.errors == []
        page.context.close()


def test_rotated_boxes_are_drawn_as_detectron2_turns_them(browser, others_home, tmp_path):
    write_service(tmp_path, "'turned:latest', settings=Settings(trusted=('turned',))")
    with served(tmp_path, others_home, PYTHONPATH=PATHS) as server:
        page = Page(browser, server.url)
        found = page.after(lambda: page.choose("a.jpg", PICTURE))
        difference = changed(page.draw("boxes"), page.draw())
        scale = difference.shape[0] / found["image_size"][0]
        assert ", no class names, " in page.text("#about")
        assert len(found["boxes"]) == 4
        for x, y, width, height, degrees in found["boxes"]:
            # Counter-clockwise where y goes down: to the right along the box is cos, -sin.
            right = np.array([np.cos(np.radians(degrees)), -np.sin(np.radians(degrees))])
            down = np.array([np.sin(np.radians(degrees)), np.cos(np.radians(degrees))])
            for edge in (right * width / 2, -right * width / 2, down * height / 2, -down * height / 2):
                across, along = ((np.array([x, y]) + edge) * scale).astype(int)
                assert difference[along - 3 : along + 4, across - 3 : across + 4].any()
            end = ((np.array([x, y]) + right * width * 0.4) * scale).astype(int)  # within, so that another turn would be seen
            assert not difference[end[1] - 3 : end[1] + 4, end[0] - 3 : end[0] + 4].any()
        assert page.errors == []
        page.context.close()
