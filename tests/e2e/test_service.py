"""A BentoML server for a saved model, as its users start and call it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from bentoml_detectron import Detections, demo
from support import run_python

pytestmark = pytest.mark.slow
BENTOML = Path(sys.executable).with_name("bentoml")
IMAGE = demo.images()[3]


def free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return int(each.getsockname()[1])


@contextmanager
def served(folder: Path, home: Path, *arguments: str, target: str = "service:service") -> Iterator[str]:
    """The address of a server that is ready; it is ended by SIGTERM."""
    port = free_port()
    environment = {**os.environ, "BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [str(BENTOML), "serve", target, "--host", "127.0.0.1", "--port", str(port), *arguments],
            cwd=folder, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while status(f"{url}/readyz") != 200:
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def status(url: str) -> int | None:
    try:
        return httpx.get(url, timeout=5).status_code
    except httpx.HTTPError:
        return None


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model store with the demo model as ``digits``."""
    home = tmp_path_factory.mktemp("home")
    code = "import bentoml\nfrom bentoml_detectron import demo\nbentoml.detectron.save_model('digits', demo.predictor())"
    run_python(code, BENTOML_HOME=str(home))
    return home


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "service.py").write_text("import bentoml\n\nservice = bentoml.detectron.get_service('digits:latest')\n")
    return folder


@pytest.fixture(scope="module")
def url(project, home) -> Iterator[str]:
    with served(project, home) as url:
        yield url


def test_form_gives_what_the_predictor_gives(url, demo_predictor):
    files = {"image": ("any.name", IMAGE.read_bytes(), "text/plain")}
    fields = {"score_threshold": "0.6", "classes": ["8", "9"], "top_k": "2"}
    answer = httpx.post(f"{url}/predict", files=files, data=fields, timeout=60)
    assert answer.status_code == 200
    found = Detections.from_json(answer.content)
    theirs = demo_predictor(np.ascontiguousarray(np.asarray(Image.open(IMAGE).convert("RGB"))[:, :, ::-1]))["instances"]
    wanted = [i for i in range(len(theirs)) if int(theirs.pred_classes[i]) in (8, 9)][:2]
    assert found.class_ids.tolist() == theirs.pred_classes[wanted].tolist()
    assert np.allclose(found.boxes, theirs.pred_boxes.tensor[wanted].numpy(), atol=1e-2)
    assert found.masks is not None
    assert "predict;dur=" in answer.headers["server-timing"]


def test_image_as_the_body_with_fields_in_the_query(url):
    answer = httpx.post(
        f"{url}/predict?classes=8&masks=polygon", content=IMAGE.read_bytes(), headers={"content-type": "image/jpeg"}, timeout=60
    )
    assert answer.status_code == 200
    content = answer.json()
    assert set(content["class_names"]) == {"8"}
    assert all(isinstance(each[0][0], float) for each in content["masks"])


def test_curl_of_the_readme(url):
    command = ["curl", "-s", "-F", f"image=@{IMAGE}", "-F", "score_threshold=0.6", f"{url}/predict"]
    found = Detections.from_json(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    assert len(found) == 7


def test_bentoml_sync_and_async_clients(url):
    code = f"""
import asyncio, bentoml
from pathlib import Path

with bentoml.SyncHTTPClient({url!r}) as client:
    print(len(client.predict(image=Path({str(IMAGE)!r}), score_threshold=0.6)["scores"]))
    print(Path(client.render(image=Path({str(IMAGE)!r}))).read_bytes()[:3])

async def main():
    async with bentoml.AsyncHTTPClient({url!r}) as client:
        print(len((await client.predict(image=Path({str(IMAGE)!r}), classes=["8"], top_k=1))["scores"]))

asyncio.run(main())
"""
    assert run_python(code).stdout.split("\n")[:3] == ["7", "b'\\xff\\xd8\\xff'", "1"]


def test_render_gives_the_picture_of_the_same_size(url):
    answer = httpx.post(f"{url}/render", files={"image": IMAGE.read_bytes()}, timeout=60)
    assert answer.headers["content-type"] == "image/jpeg"
    import io

    assert Image.open(io.BytesIO(answer.content)).size == (192, 192)


def test_info_says_what_the_model_is(url):
    info = httpx.get(f"{url}/info").json()
    assert info["tag"].startswith("digits:")
    assert info["thing_classes"] == list("0123456789")
    assert info["input"]["format"] == "BGR"


def test_page_is_there(url):
    answer = httpx.get(f"{url}/ui")
    assert answer.status_code == 200
    assert "<form" in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_openapi_document_describes_the_answers(url):
    import jsonschema

    document = httpx.get(f"{url}/docs.json").json()
    assert {"/predict", "/render", "/info"} <= document["paths"].keys()
    answer = httpx.post(f"{url}/predict", files={"image": IMAGE.read_bytes()}, timeout=60).json()
    schema = {"$ref": "#/components/schemas/Detections", **document}
    jsonschema.Draft202012Validator(schema).validate(answer)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate({**answer, "scores": None})


def test_metrics_are_on_bentomls_page(url):
    httpx.post(f"{url}/predict", files={"image": IMAGE.read_bytes()}, timeout=60)
    httpx.post(f"{url}/predict", files={"image": b"GIF89a"}, timeout=60)
    text = httpx.get(f"{url}/metrics").text
    for name in ("detectron_stage_seconds_bucket", "detectron_batch_images_count", "detectron_scores_sum",
                 'detectron_detections_total{class_name="8"}', 'reason="UnsupportedImageError"'):  # fmt: skip
        assert name in text
    for stage in ("decode", "queue", "forward", "postprocess", "encode"):
        assert f'detectron_stage_seconds_count{{stage="{stage}"}}' in text


def test_concurrent_requests_of_different_thresholds_run_as_one_batch(url):
    from concurrent.futures import ThreadPoolExecutor

    def batches() -> tuple[float, float]:
        values = dict(line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if line[0] != "#")
        return float(values["detectron_batch_images_count"]), float(values["detectron_batch_images_sum"])

    def ask(number: int) -> int:
        fields = {"score_threshold": str(number / 20)}
        answer = httpx.post(f"{url}/predict", files={"image": IMAGE.read_bytes()}, data=fields, timeout=60)
        scores = answer.json()["scores"]
        assert all(score > number / 20 for score in scores)
        return len(scores)

    before = batches()
    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(ask, range(16)))
    after = batches()
    assert counts[0] > counts[-1] > 0
    assert after[1] - before[1] == 16
    assert after[0] - before[0] < 12


def test_token_is_asked_for_before_the_body_is_read(project, home, monkeypatch):
    monkeypatch.setenv("BENTOML_DETECTRON_TOKEN", "secret")
    with served(project, home) as url:
        answer = httpx.post(f"{url}/predict", files={"image": IMAGE.read_bytes()})
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        headers = {"authorization": "Bearer secret"}
        assert httpx.post(f"{url}/predict", files={"image": IMAGE.read_bytes()}, headers=headers).status_code == 200
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
            assert b"401" in connection.recv(1000)


def bentoml_command(home: Path, *arguments: str, folder: Path) -> str:
    environment = {**os.environ, "BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"}
    result = subprocess.run(
        [str(BENTOML), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_bento_carries_the_model_and_serves_where_the_store_is_gone(project, home, tmp_path):
    """Built, exported, imported into an empty home, and served from another folder."""
    (project / "bentofile.yaml").write_text("service: 'service:service'\ninclude: ['service.py']\n")
    tag = bentoml_command(home, "build", "--output", "tag", folder=project).strip().rpartition("__tag__:")[2]
    bentoml_command(home, "export", tag, str(tmp_path / "it.bento"), folder=project)
    empty = tmp_path / "empty"
    empty.mkdir()
    bentoml_command(empty, "import", str(tmp_path / "it.bento"), folder=tmp_path)
    with served(tmp_path, empty, target=tag) as url:
        assert len(httpx.post(f"{url}/predict", files={"image": IMAGE.read_bytes()}, timeout=60).json()["scores"]) > 5
    dockerfile = (empty / "bentos" / tag.replace(":", "/") / "env" / "docker" / "Dockerfile").read_text()
    assert "github.com/facebookresearch/detectron2.git" in dockerfile
