"""The page at ``/ui`` in a real browser, before real servers: what a user sees and does, and what the browser may do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from bentoml_detectron import Detections, demo
from bentoml_detectron.masks import decode
from browsing import Page, changed, contrast, needs_chromium, run_both
from servers import Server, served, started, write_service

pytestmark = [pytest.mark.slow, needs_chromium]
DROP = """bytes => {
    const data = new DataTransfer();
    data.items.add(new File([Uint8Array.from(bytes)], "dropped it's.jpg"));
    document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory, digits_home) -> Iterator[Server]:
    """Of the demo model."""
    folder = tmp_path_factory.mktemp("ui")
    write_service(folder)
    with served(folder, digits_home) as server:
        yield server


@pytest.fixture
def page(browser, server) -> Iterator[Page]:
    """On it nothing fails, and all that it asks for is its own server's."""
    page = Page(browser, server.url)
    yield page
    page.context.close()
    assert page.errors == []
    assert len(page.asked) > 2
    assert {httpx.URL(url).host for url in page.asked if not url.startswith("blob:")} == {"127.0.0.1"}


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


def test_page_and_its_commands_hold_below_a_prefix(browser, digits_home, tmp_path):
    write_service(tmp_path, "'digits:latest', path_prefix='/models/v1'")
    with started(tmp_path, digits_home) as server:
        server.url += "/models/v1"
        server.until(lambda: server.ready()[0] == 200)
        page = Page(browser, server.url)
        found = page.sample()
        assert len(found["scores"]) == 7
        assert run_both(page, tmp_path / "sample") == [found, found]
        assert page.errors == []
        assert {httpx.URL(url).path[:11] for url in page.asked if not url.startswith("blob:")} == {"/models/v1/"}
        page.context.close()


def test_layers_stay_as_they_were_chosen(page):
    score, masks, boxes = (page.page.locator(each) for each in ("#score_threshold", "[value=masks]", "[value=boxes]"))
    page.sample()
    masks.uncheck()
    page.after(lambda: score.fill("1"))
    expect(masks).to_be_disabled()  # and still there
    expect(boxes).to_be_disabled()
    page.after(lambda: score.fill("0.5"))
    expect(masks).to_be_enabled()
    expect(masks).not_to_be_checked()
    expect(boxes).to_be_checked()
    expect(page.page.locator("[value=segments]")).to_be_hidden()  # this model gives none


def test_boxes_and_dots_stand_out_from_what_is_around_them(browser, server):
    for scheme in ("light", "dark"):
        page = Page(browser, server.url, color_scheme=scheme)
        found = page.sample()
        drawn = page.draw("boxes")
        scale = drawn.shape[0] / found["image_size"][0]
        for left, top, _, bottom in np.array(found["boxes"]) * scale:
            across = drawn[int((top + bottom) / 2), int(left) - 8 : int(left) + 8]
            assert contrast(across) > 4
        colors = "[getComputedStyle(document.querySelector('.dot')).outlineColor, getComputedStyle(result).backgroundColor]"
        ring, card = (re.findall(r"\d+", color) for color in page.page.evaluate(colors))
        assert contrast(np.array([ring, card], dtype=int)) > 4.5
        page.context.close()


def test_labels_do_not_cover_each_other(page):
    page.sample()
    page.page.evaluate("""() => {
        const { fillText } = CanvasRenderingContext2D.prototype;
        CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
            labels.push([x, y, this.measureText(text).width, parseFloat(this.font)]);
            fillText.call(this, text, x, y);
        };
        window.labels = [];
    }""")
    for score, least in (("0.4", 7), ("0.02", 12)):
        page.page.evaluate("labels.length = 0")
        found = page.after(lambda score=score: page.page.locator("#score_threshold").fill(score))
        labels = page.page.evaluate("labels")
        assert least <= len(labels) <= len(found["scores"])
        for (x, y, width, size), (other_x, other_y, other_width, _) in combinations(labels, 2):
            assert abs(y - other_y) > size or x + width < other_x or other_x + other_width < x


def test_row_shows_its_box(page):
    found = page.sample()
    rows = page.page.locator("#rows tr")
    scale = page.pixels("lit").shape[0] / found["image_size"][0]

    def lit() -> int | None:
        """Whose box is shown: what is around it is darker."""
        alpha = page.pixels("lit", alpha=True)
        inside = [alpha[int((y + y2) / 2 * scale), int((x + x2) / 2 * scale)] == 0 for x, y, x2, y2 in found["boxes"]]
        return inside.index(True) if alpha.any() else None

    assert lit() is None
    rows.nth(3).hover()
    assert lit() == 2
    rows.nth(0).hover()  # the heads
    assert lit() is None
    page.page.locator("#list").focus()
    page.page.keyboard.press("Tab")
    assert lit() == 0
    for key, shown in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("ArrowUp", 0), ("ArrowUp", 0)):
        page.page.keyboard.press(key)
        assert lit() == shown
    page.page.keyboard.press("ArrowDown")
    page.page.keyboard.press("Shift+Tab")
    assert lit() is None
    page.page.keyboard.press("Tab")  # one stop for all rows: the last one
    assert lit() == 1
    rows.nth(5).click()
    assert lit() == 4
    assert page.page.locator("#rows [tabindex='0']").count() == 1
    page.page.mouse.move(5, 5)
    page.page.locator("#score_threshold").focus()
    page.after(lambda: page.page.keyboard.press("ArrowRight"))
    assert lit() is None


def test_no_class_ticked_means_all_and_is_said_so(page):
    page.sample()
    assert page.text("#choice summary") == "Classes: all, as none is ticked"
    page.after(lambda: page.page.get_by_label("8", exact=True).check())
    page.after(lambda: page.page.get_by_label("9", exact=True).check())
    assert page.text("#choice summary") == "Classes: only 8, 9"
    page.after(lambda: page.page.get_by_label("8", exact=True).uncheck())
    page.after(lambda: page.page.get_by_label("9", exact=True).uncheck())
    assert page.text("#choice summary") == "Classes: all, as none is ticked"


def test_downloads_are_what_is_shown(page, tmp_path):
    found = page.sample()
    for button, name in (("JSON", "digits_03.json"), ("picture", "digits_03-found.png")):
        with page.page.expect_download() as download:
            page.page.get_by_role("button", name=f"Download {button}").click()
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
    assert json.loads((tmp_path / "digits_03.json").read_text()) == found
    assert Detections.from_json((tmp_path / "digits_03.json").read_text()).class_names == tuple(found["class_names"])
    with Image.open(tmp_path / "digits_03-found.png") as picture:
        assert not changed(np.asarray(picture.convert("RGB")).astype(np.int16), page.pixels("picture")).any()


@pytest.mark.parametrize("width", [375, 1280])
def test_calls_are_not_cut(browser, server, width):
    page = Page(browser, server.url, width=width)
    page.sample()
    page.after(lambda: page.page.get_by_label("8", exact=True).check())
    page.after(lambda: page.page.locator("#top_k").fill("3"))
    for name in ("curl", "python"):
        assert page.page.evaluate(f"{name}.scrollWidth - {name}.clientWidth") == 0
        assert max(map(len, page.page.locator(f"#{name}").text_content().splitlines())) < 70
    page.context.close()


def test_nothing_turns_where_motion_is_not_wanted(browser, server):
    for wanted, name in (("no-preference", "turn"), ("reduce", "none")):
        page = Page(browser, server.url, reduced_motion=wanted)
        assert page.page.evaluate("getComputedStyle(document.querySelector('#progress span')).animationName") == name
        page.context.close()


def test_screen_reader_has_a_name_for_everything(page):
    page.sample()
    tree = page.page.locator("body").aria_snapshot()
    for line in (
        "- status: 7 found in",
        "- status: GeneralizedRCNN, 10 classes",
        '- slider "Score above": "0.5"',
        '- spinbutton "At most"',
        'img "digits_03.jpg with 7 found: 9, 7, 8, 0, 8, 5, 0"',
        '- grid "What was found"',
        '- row "9 1.000 26, 51, 60, 105"',
        '- button "Copy curl"',
        '- button "Copy Python"',
        '- checkbox "masks" [checked]',
        '- button "Sample digits_03.jpg" [pressed]',
    ):
        assert line in tree
    assert not re.search(r"- (button|checkbox|img|slider|spinbutton|textbox)( \[.*\])?(:.*)?$", tree, re.MULTILINE)  # unnamed


def test_token_is_asked_for_where_it_is_entered(browser, digits_home, tmp_path):
    write_service(tmp_path)
    with served(tmp_path, digits_home, BENTOML_DETECTRON_TOKEN="secret") as server:
        page = Page(browser, server.url)
        assert page.text("#about") == "This service needs a token: enter it below"
        page.page.keyboard.press("Tab")
        assert page.page.evaluate("document.activeElement.id") == "token"
        page.choose("mine.jpg", demo.images()[3].read_bytes())
        expect(page.page.locator("#status.error")).to_have_text("This service needs a token: enter it above")
        assert "Authorization: Bearer $BENTOML_DETECTRON_TOKEN" in page.text("#curl")  # as it will run where the token is
        assert 'token=os.environ["BENTOML_DETECTRON_TOKEN"]' in page.text("#python")
        page.page.locator("#token").fill("guessed")
        expect(page.page.locator("#about")).to_have_text("The token is not right")
        expect(page.page.locator("#token")).to_have_attribute("aria-invalid", "true")
        expect(page.page.locator("#status.error")).to_have_text("The token is not right")
        page.page.locator("#token").fill("secret")
        page.page.keyboard.press("Enter")
        expect(page.page.locator("#status")).to_contain_text("7 found")  # of the image that waited
        assert "10 classes" in page.text("#about")
        expect(page.page.locator("#token")).to_have_attribute("aria-invalid", "false")
        assert page.errors == []
        page.context.close()


def test_refusal_is_shown_as_the_server_says_it(page, server):
    page.sample()
    page.choose("notes.txt", b"no picture")
    page.page.wait_for_selector("#status.error")
    assert page.text("#status") == server.predict(b"no picture").json()["error"]
    for what in ("#picture", "#result", "#calls"):  # the browser has no picture of it, either
        assert page.page.locator(what).is_hidden()
    page.sample()  # and it goes on
    for what in ("#picture", "#result", "#calls"):
        assert page.page.locator(what).is_visible()


def test_image_stays_where_its_call_is_refused(page):
    page.sample()
    plain = page.draw()
    for box in page.page.locator("#layers input:enabled").all():
        box.check()
    page.page.locator("#top_k").fill("0")
    expect(page.page.locator("#status.error")).to_contain_text("top_k")
    assert page.page.locator("#picture").is_visible()
    assert not changed(page.pixels("picture"), plain).any()
    assert page.page.locator("#calls").is_hidden()
    assert page.page.locator("#result").is_hidden()
    page.after(lambda: page.page.locator("#top_k").fill("1"))
    assert changed(page.pixels("picture"), plain).any()
    assert page.page.locator("#calls").is_visible()


def test_nothing_found_says_why(page):
    page.sample()
    page.after(lambda: page.page.locator("#score_threshold").fill("1"))
    assert page.text("#status").startswith("Nothing above 1.00: lower the score (")
    page.after(lambda: page.page.get_by_label("4", exact=True).check())
    assert page.text("#status").startswith("Nothing of the chosen classes above 1.00: lower the score or choose other")
    assert page.page.locator("#list").is_hidden()


def test_progress_is_shown_over_the_chosen_image(page):
    page.sample(4)
    plain = page.draw()
    old = page.sample(3)
    held: list[Any] = []
    page.page.route("**/predict", lambda route: held.append(route), times=1)
    page.page.locator("#samples button").nth(4).click()
    expect(page.page.locator("#stage")).to_have_attribute("aria-busy", "true")
    expect(page.page.locator("#progress")).to_be_visible()
    assert page.text("#status") == "Predicting …"
    assert not changed(page.pixels("picture"), plain).any()  # nothing of the image before
    new = page.after(held[0].continue_)
    assert new != old
    expect(page.page.locator("#stage")).to_have_attribute("aria-busy", "false")
    expect(page.page.locator("#progress")).to_be_hidden()


@pytest.mark.parametrize("width", [360, 375])
def test_phone_has_all_one_below_the_other(browser, server, width):
    page = Page(browser, server.url, width=width)
    page.sample()
    assert page.page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    boxes = [page.page.locator(each).bounding_box() for each in (".upload", "#status", "#picture", "#list", "#form", "#calls")]
    for above, below in pairwise(boxes):
        assert above["y"] + above["height"] <= below["y"]
    assert boxes[1]["y"] < boxes[0]["y"] + boxes[0]["height"] + 30
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
