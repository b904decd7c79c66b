"""The page at ``/ui`` in a real browser, before real servers: what a user sees and does, and what the browser may do."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from bentoml_detectron import demo
from bentoml_detectron.masks import decode
from servers import Server, environment, served, write_service

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium, which make test installs where it is root"),
]
HOSTILE = "<img src=x onerror=\"document.title='run'\">'; touch run; '"
SAVE_OTHERS = f"""
import bentoml
from detectron2.data import MetadataCatalog
from support import built
from zoo import ZOO, zoo_config

for name, zoo in (("keypoints", "Keypoint R-CNN"), ("panoptic", "Panoptic FPN")):
    cfg = zoo_config(ZOO[zoo])
    module = built(cfg)
    if name == "keypoints":
        cfg.DATASETS.TEST = ("hostile",)
        MetadataCatalog.get("hostile").set(thing_classes=[{HOSTILE!r}])
        module.roi_heads.keypoint_head.score_lowres.weight.data.mul_(50)  # random weights are sure of no keypoint
    bentoml.detectron.save_model(name, module, cfg)
"""
DROP = """bytes => {
    const data = new DataTransfer();
    data.items.add(new File([Uint8Array.from(bytes)], "dropped it's.jpg"));
    document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, which finds no host but this one."""
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory, digits_home) -> Iterator[Server]:
    """Of the demo model."""
    folder = tmp_path_factory.mktemp("ui")
    write_service(folder)
    with served(folder, digits_home) as server:
        yield server


@pytest.fixture(scope="module")
def others_home(tmp_path_factory) -> Path:
    """A model of keypoints whose class has a hostile name, and a panoptic one; with random weights."""
    home = tmp_path_factory.mktemp("others")
    tests = Path(__file__).parent.parent
    paths = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-c", SAVE_OTHERS]
    subprocess.run(command, env=environment(home, PYTHONPATH=paths), check=True, timeout=300, cwd=sys.prefix)
    return home


class Page:
    """A page of the browser, all that it asked for, and what went wrong on it."""

    def __init__(self, browser: Any, url: str, width: int = 1280) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 800})
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text) if "Security" in message.text else None)
        self.page.goto(f"{url}/ui")
        expect(self.page.locator("#about")).not_to_contain_text("Asking")

    def after(self, action: Callable[[], Any]) -> dict[str, Any]:
        """What the server answers to the request that an action leads to, when it is drawn."""
        with self.page.expect_response("**/predict") as answer:
            action()
        found = answer.value.json()
        assert answer.value.status == 200, found
        expect(self.page.locator("#status")).to_contain_text(f"{len(found['scores'])} found in ")
        return found

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def sample(self, number: int = 3) -> dict[str, Any]:
        return self.after(lambda: self.page.locator("#samples button").nth(number).click())

    def choose(self, name: str, content: bytes) -> None:
        self.page.set_input_files("#image", {"name": name, "mimeType": "", "buffer": content})

    def draw(self, *layers: str) -> np.ndarray:
        """The canvas with these layers alone, (H, W, 3) int16."""
        for box in self.page.locator("#layers input").all():
            box.set_checked(box.get_attribute("value") in layers)
        url = self.page.evaluate("picture.toDataURL()")
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as drawn:
            return np.asarray(drawn.convert("RGB")).astype(np.int16)

    def copied(self, name: str) -> str:
        self.page.locator(f"button[value={name}]").click()
        expect(self.page.locator(f"button[value={name}]")).to_have_text("Copied")
        return str(self.page.evaluate("navigator.clipboard.readText()"))


@pytest.fixture
def page(browser, server) -> Iterator[Page]:
    """On it nothing fails, and all that it asks for is its own server's."""
    page = Page(browser, server.url)
    yield page
    page.context.close()
    assert page.errors == []
    assert len(page.asked) > 2
    assert {httpx.URL(url).host for url in page.asked if not url.startswith("blob:")} == {"127.0.0.1"}


def changed(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(H, W) bool, where two pictures differ."""
    return np.abs(one - other).max(2) > 8


def test_masks_are_painted_where_they_are(page):
    found = page.sample()
    difference = changed(page.draw("masks"), page.draw())
    wanted = np.any([decode(mask) for mask in found["masks"]], axis=0)
    scale = difference.shape[0] // wanted.shape[0]
    painted = difference[scale // 2 :: scale, scale // 2 :: scale]
    assert len(found["masks"]) == 7
    assert (painted & wanted).sum() / (painted | wanted).sum() > 0.95


def test_boxes_are_drawn_where_they_are(page):
    found = page.sample()
    difference = changed(page.draw("boxes"), page.draw())
    scale = difference.shape[0] / found["image_size"][0]
    for left, top, right, bottom in np.array(found["boxes"]) * scale:
        middle_x, middle_y = int((left + right) / 2), int((top + bottom) / 2)
        for y, x in ((int(bottom), middle_x), (middle_y, int(left)), (middle_y, int(right))):
            assert difference[y, x]


def test_chosen_and_dropped_files_are_predicted_on(page):
    content = demo.images()[3].read_bytes()
    chosen = page.after(lambda: page.choose("mine.jpg", content))
    dropped = page.after(lambda: page.page.evaluate(DROP, list(demo.images()[4].read_bytes())))
    assert len(chosen["scores"]) == 7
    assert dropped["scores"] != chosen["scores"]
    assert page.text("#file") == "dropped it's.jpg"


def test_threshold_class_and_number_change_what_is_found(page):
    counts = [len(page.sample()["scores"])]
    for value in ("0.02", "0.97"):
        counts.append(len(page.after(lambda value=value: page.page.locator("#score_threshold").fill(value))["scores"]))
        assert page.page.locator("#rows tr").count() == counts[-1] + 1
    assert counts[2] < counts[0] < counts[1]
    page.after(lambda: page.page.locator("#score_threshold").fill("0.5"))
    eights = page.after(lambda: page.page.get_by_label("8", exact=True).check())
    assert set(eights["class_names"]) == {"8"}
    both = page.after(lambda: page.page.get_by_label("9", exact=True).check())
    assert set(both["class_names"]) == {"8", "9"}
    assert len(page.after(lambda: page.page.locator("#top_k").fill("1"))["scores"]) == 1


def run_both(page: Page, folder: Path, **more: str) -> list[Any]:
    """What the copied commands print, from JSON and from Python."""
    folder.mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def printed(*command: str) -> str:
        given = environment(folder, PATH=path, **more)
        return subprocess.run(command, cwd=folder, env=given, check=True, timeout=120, stdout=subprocess.PIPE, text=True).stdout

    by_curl = printed("sh", "-c", page.copied("curl"))
    by_python = printed(sys.executable, "-W", "ignore", "-c", page.copied("python"))
    return [json.loads(by_curl), ast.literal_eval(by_python)]


def test_copied_commands_run_and_give_the_same(page, tmp_path):
    page.sample()
    page.after(lambda: page.page.get_by_label("8", exact=True).check())
    found = page.after(lambda: page.page.locator("#top_k").fill("3"))
    assert run_both(page, tmp_path / "sample") == [found, found]
    # A file of the user's own lies where the commands run.
    name = 'it\'s "mine"; x.jpg'
    found = page.after(lambda: page.choose(name, demo.images()[4].read_bytes()))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / name).write_bytes(demo.images()[4].read_bytes())
    assert run_both(page, tmp_path / "own") == [found, found]


def test_refusal_is_shown_as_the_server_says_it(page, server):
    page.sample()
    page.choose("notes.txt", b"no picture")
    page.page.wait_for_selector("#status.error")
    assert page.text("#status") == server.predict(b"no picture").json()["error"]
    assert page.page.locator("#picture").is_hidden()
    page.sample()  # and it goes on
    assert page.page.locator("#picture").is_visible()


def test_phone_needs_no_scrolling_sideways(browser, server):
    page = Page(browser, server.url, width=360)
    page.sample()
    assert page.page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    page.context.close()


def test_keyboard_alone_reaches_and_works_everything(page):
    keyboard = page.page.keyboard
    focused = "document.activeElement"
    reached: list[int] = []
    for _ in range(60):
        keyboard.press("Tab")
        if page.page.evaluate(f"{focused} === document.body"):
            break
        if page.page.evaluate(f"{focused}.value === 'digits_03.jpg'"):
            page.after(lambda: keyboard.press("Enter"))
        reached.append(page.page.evaluate(f"{focused}.dataset.turn = {len(reached)}"))
    there = page.page.evaluate("""[...document.querySelectorAll("input, button, summary, [tabindex='0']")]
        .filter(each => each.checkVisibility()).map(each => Number(each.dataset.turn))""")
    assert len(there) > 20
    assert there == reached
    page.page.locator("#score_threshold").focus()
    before = page.text("#shown")
    page.after(lambda: keyboard.press("ArrowRight"))
    assert float(page.text("#shown")) > float(before)
    page.page.locator("#classes input").nth(8).focus()
    assert set(page.after(lambda: keyboard.press("Space"))["class_names"]) == {"8"}


def test_keypoints_token_and_a_class_with_a_hostile_name(browser, others_home, tmp_path):
    write_service(tmp_path, "'keypoints:latest'")
    with served(tmp_path, others_home, BENTOML_DETECTRON_TOKEN="secret") as server:
        page = Page(browser, server.url)
        assert "Bearer TOKEN" in page.text("#about")
        page.page.locator("#token").fill("secret")
        expect(page.page.locator("#tag")).to_contain_text("keypoints:")
        assert page.page.locator("#samples").is_hidden()  # the demo's images are not for this model
        page.after(lambda: page.choose("a.jpg", demo.images()[3].read_bytes()))
        found = page.after(lambda: page.page.locator("#score_threshold").fill("0"))
        assert len(found["scores"]) > 0
        difference = changed(page.draw("keypoints"), page.draw())
        scale = difference.shape[0] / found["image_size"][0]
        sure = [(int(x * scale), int(y * scale)) for each in found["keypoints"] for x, y, score in each if score >= 0.05]
        within = [difference[y, x] for x, y in sure if x < difference.shape[1] and y < difference.shape[0]]
        assert len(within) > 10
        assert all(within)
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


def test_segments_are_painted(browser, others_home, tmp_path):
    write_service(tmp_path, "'panoptic:latest'")
    with served(tmp_path, others_home) as server:
        page = Page(browser, server.url)
        found = page.after(lambda: page.choose("a.jpg", demo.images()[3].read_bytes()))
        segments = found["panoptic"]["segments"]
        assert segments
        painted = changed(page.draw("segments"), page.draw()).mean()
        assert painted > 0.9 * sum(each["area"] for each in segments) / np.prod(found["image_size"])
        listed = page.page.locator("#rows tr").all_inner_texts()
        for each in segments:
            assert any(row.split("\t") == [each["class_name"], row.split("\t")[1], str(each["area"])] for row in listed)
        assert page.errors == []
        page.context.close()


def test_policy_admits_the_page_alone(page):
    """What the other tests would see if the policy did not hold."""
    with pytest.raises(Exception, match="TrustedHTML"):
        page.page.evaluate("document.body.innerHTML = '<p>'")
    assert page.page.evaluate("fetch('http://127.0.0.2:9/').then(() => 'sent', () => 'refused')") == "refused"
    assert any("connect-src 'self'" in error for error in page.errors)
    page.errors.clear()
    page.asked[:] = [url for url in page.asked if "127.0.0.2" not in url]


def test_bentomls_own_page_works(browser, server):
    context = browser.new_context()
    page = context.new_page()
    failed: list[str] = []
    page.on("requestfailed", lambda request: failed.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("text=/predict")
    # It asks for one thing from elsewhere, which is not there, and does without.
    assert [url for url in failed if httpx.URL(url).host == "127.0.0.1"] == []
    context.close()
