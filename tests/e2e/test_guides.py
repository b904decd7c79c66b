"""The guides in docs/ (results, deployment, moving from other code): their blocks run, and what they name exists."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import bentoml
import cv2
import httpx
import numpy as np
import pytest
import yaml
from bentoml._internal.frameworks import detectron as adapter
from pycocotools import mask as coco_masks

from bentoml_detectron import Detections, demo, errors
from browsing import needs_chromium
from documents import blocks, run_in_shell
from servers import Server, served

pytestmark = pytest.mark.slow
DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
GUIDES = ("results", "deploy", "upgrade")


def text_of(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def printed_by(text: str, namespace: dict) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(text, "a block", "exec"), namespace)  # noqa: S102 (what these tests are for)
    return output.getvalue()


def run(name: str) -> None:
    """Runs a guide's Python blocks that name no file, in order; each block of output is what the one before it prints."""
    namespace: dict = {}
    printed = ""
    for language, text in blocks(text_of(name)):
        if language == "python" and not re.match(r"# [\w/]+\.py\n", text):
            printed = printed_by(text, namespace)
        elif language == "output":
            assert printed == text


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
    bitmaps.append(np.zeros((700, 500), np.uint8, order="F"))
    bitmaps[-1][3:690, 200:480] = 1
    encoded = [coco_masks.encode(each) for each in bitmaps]
    given = [{"size": each["size"], "counts": each["counts"].decode()} for each in encoded]
    page = browser.new_page()
    changes = "bits => [...bits].flatMap((bit, place) => bit !== (place ? bits[place - 1] : 0) ? [place] : [])"
    found = page.evaluate(f"masks => {{ {function} return masks.map(decodeMask).map({changes}); }}", given)
    page.close()
    for bitmap, places in zip(bitmaps, found, strict=True):
        assert places == np.flatnonzero(np.diff(bitmap.ravel(), prepend=0)).tolist()


def named(name: str, file: str) -> str:
    """The Python block of a guide that is a file."""
    (text,) = (text for _, text in blocks(text_of(name)) if text.startswith(f"# {file}\n"))
    return text


class Page(BaseHTTPRequestHandler):
    """An empty page, of an origin of its own."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def origins() -> Iterator[list[str]]:
    """Two other servers, each with an empty page."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as one, ThreadingHTTPServer(("127.0.0.1", 0), Page) as two:
        for each in (one, two):
            threading.Thread(target=each.serve_forever, daemon=True).start()
        yield [f"http://127.0.0.1:{each.server_port}" for each in (one, two)]
        for each in (one, two):
            each.shutdown()


@pytest.fixture(scope="module")
def server(tmp_path_factory, demo_predictor, origins) -> Iterator[Server]:
    """The deployment's ``service.py``, with the demo model and a token; pages of the first origin may ask it."""
    folder = tmp_path_factory.mktemp("deploy")
    saved = bentoml.detectron.save_model("deployed", demo_predictor)
    text = named("deploy", "service.py")
    assert '"street:latest"' in text
    assert '"https://app.example.com"' in text
    text = text.replace("street:latest", str(saved.tag)).replace("https://app.example.com", origins[0])
    (folder / "service.py").write_text(text)
    with served(folder, Path(os.environ["BENTOML_HOME"]), BENTOML_DETECTRON_TOKEN="secret") as server:
        yield server


@pytest.mark.parametrize("file", ["client.py", "one.py"])
def test_clients_of_the_deployment(file, server, monkeypatch):
    paths = demo.images()[: None if file == "client.py" else 1]
    monkeypatch.setenv("DETECTRON_URL", server.url)
    monkeypatch.setenv("BENTOML_DETECTRON_TOKEN", "secret")
    monkeypatch.setattr(sys, "argv", [file, *map(str, paths)])
    with ThreadPoolExecutor(1) as pool:  # the browser's event loop is the main thread's
        printed = pool.submit(printed_by, named("deploy", file), {"__name__": "__main__"}).result(120)
    assert printed.count("Detections(") == len(paths)
    assert all(path.name in printed for path in paths) or file == "one.py"


@needs_chromium
def test_javascript_of_another_page_asks_the_service(server, browser, origins):
    (function,) = (text for language, text in blocks(text_of("deploy")) if language == "javascript")
    content = list(demo.images()[3].read_bytes())
    call = f"""([url, content, token]) => {{
        {function}
        const file = new File([new Uint8Array(content)], "digits.jpg", {{ type: "image/jpeg" }});
        return predict(url, file, {{ token, scoreThreshold: 0.6 }}).catch(error => error.message);
    }}"""
    page = browser.new_page()
    page.goto(origins[0])
    assert len(Detections.from_json(page.evaluate(call, [server.url, content, "secret"]))) == 7
    assert page.evaluate(call, [server.url, content, "wrong"]).startswith("401: send the service's token")
    page.goto(origins[1])
    assert page.evaluate(call, [server.url, content, "secret"]) == "Failed to fetch"
    page.close()


def test_metrics_of_the_deployment_are_there(server):
    content, headers = demo.images()[3].read_bytes(), {"authorization": "Bearer secret"}
    answers = [httpx.post(f"{server.url}/predict", files={"image": content}, headers=each) for each in (headers, {})]
    assert [answer.status_code for answer in answers] == [200, 401]  # one that is refused
    there = {name.partition("{")[0] for name in server.metrics()}
    queries = "".join(text for language, text in blocks(text_of("deploy")) if language == "promql")
    asked = set(re.findall(r"\b(?:detectron|bentoml)_\w+", queries))
    assert len(asked) >= 8
    assert asked <= there
    rows = re.findall(r"^\| `((?:detectron|bentoml)_\w+)` \| (\w+) \|", text_of("deploy"), re.MULTILINE)
    for name, kind in rows:
        assert (f"{name}_bucket" if kind == "histogram" else name) in there
    assert {name for name in there if name.startswith("detectron_")} == {
        each for name, kind in rows if name.startswith("detectron_")
        for each in ([f"{name}_{part}" for part in ("bucket", "sum", "count")] if kind == "histogram" else [name])
    }  # fmt: skip


def test_manifest_of_the_deployment_is_yaml():
    (text,) = (text for language, text in blocks(text_of("deploy")) if language == "yaml")
    secret, deployment, service = yaml.safe_load_all(text)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert container["env"][0]["name"] == "BENTOML_DETECTRON_TOKEN"
    assert container["env"][0]["valueFrom"]["secretKeyRef"] == {"name": secret["metadata"]["name"], "key": "token"}


@pytest.mark.filterwarnings("ignore:.*class names")
def test_blocks_of_the_upgrade(demo_predictor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter.save_model("street", demo_predictor)
    run("upgrade")


def test_old_model_with_custom_objects_is_saved_again(demo_predictor, monkeypatch):
    old = adapter.save_model("old-objects", demo_predictor, custom_objects={"since": datetime.date(2024, 5, 17)})
    with pytest.raises(errors.UnsafeFileError, match="BENTOML_DETECTRON_PLUG=0"):
        bentoml.detectron.load_model(old.tag)
    with monkeypatch.context() as patch:
        patch.setattr(bentoml, "detectron", adapter)  # as BENTOML_DETECTRON_PLUG=0 has it; see test_plug.py
        patch.setattr(sys, "argv", ["resave.py", str(old.tag), "new-objects"])
        tag = printed_by(named("upgrade", "resave.py"), {}).split()[-1]
    assert tag.startswith("new-objects:")
    assert len(bentoml.detectron.load_model(tag).model.state_dict()) == len(demo_predictor.model.state_dict())


def test_module_of_an_old_model_is_saved_again_with_its_config(demo_predictor):
    old = adapter.save_model("old-module-again", demo_predictor.model, config=demo_predictor.cfg)
    config = bentoml.detectron.get(old.tag).custom_objects["config"]
    new = bentoml.detectron.save_model("new-module-again", bentoml.detectron.load_model(old.tag), config)
    assert bentoml.detectron.verify(new).ok


def test_code_of_ones_own_goes_with_the_model(tmp_path):
    for file in ("my_heads.py", "save_own.py"):
        (tmp_path / file).write_text(named("upgrade", file))
    run_in_shell("$ python save_own.py\n", tmp_path, Path(os.environ["BENTOML_HOME"]))
    with pytest.raises(errors.UntrustedCodeError):
        bentoml.detectron.load_model("own:latest")
    assert printed_by(named("upgrade", "load_own.py"), {}) == "MyBoxHead\n"


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
