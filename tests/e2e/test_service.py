"""A BentoML server for a saved model, as its users start and call it."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from bentoml_detectron import Detections, demo, threads
from servers import BENTOML, Server, environment, served, write_service
from support import run_python

pytestmark = pytest.mark.slow
IMAGE = demo.images()[3]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_service(folder)
    return folder


@pytest.fixture(scope="module")
def server(project, digits_home) -> Iterator[Server]:
    with served(project, digits_home) as server:
        yield server


@pytest.fixture(scope="module")
def url(server) -> str:
    return server.url


def test_workers_threads_wait_for_each_other_no_longer_than_they_should(server):
    for each in psutil.Process(server.process.pid).children():
        assert each.environ().items() >= threads.environment().items()


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


def test_token_is_asked_for_before_the_body_is_read(project, digits_home):
    with served(project, digits_home, BENTOML_DETECTRON_TOKEN="secret") as server:
        url = server.url
        answer = httpx.post(f"{url}/predict", files={"image": IMAGE.read_bytes()})
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        headers = {"authorization": "Bearer secret"}
        assert httpx.post(f"{url}/predict", files={"image": IMAGE.read_bytes()}, headers=headers).status_code == 200
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
            assert b"401" in connection.recv(1000)


def bentoml_command(home: Path, *arguments: str, folder: Path) -> str:
    result = subprocess.run(
        [str(BENTOML), *arguments], cwd=folder, env=environment(home), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_bento_carries_the_model_and_serves_where_the_store_is_gone(project, digits_home, tmp_path):
    """Built, exported, imported into an empty home, and served from another folder."""
    # With packages of the project's own, as most have.
    (project / "bentofile.yaml").write_text(
        "service: 'service:service'\ninclude: ['service.py']\npython: {packages: [requests]}\n"
        "docker: {system_packages: [curl]}\n"
    )
    tag = bentoml_command(digits_home, "build", "--output", "tag", folder=project).strip().rpartition("__tag__:")[2]
    bentoml_command(digits_home, "export", tag, str(tmp_path / "it.bento"), folder=project)
    empty = tmp_path / "empty"
    empty.mkdir()
    bentoml_command(empty, "import", str(tmp_path / "it.bento"), folder=tmp_path)
    with served(tmp_path, empty, "serve", tag, "--host", "127.0.0.1") as server:
        assert len(httpx.post(f"{server.url}/predict", files={"image": IMAGE.read_bytes()}, timeout=60).json()["scores"]) > 5
    dockerfile = (empty / "bentos" / tag.replace(":", "/") / "env" / "docker" / "Dockerfile").read_text()
    # After the packages, into the environment that they are in, which BentoML's Dockerfile makes without a pip.
    packages, after = dockerfile.split("env/python/requirements.txt", 1)
    assert "uv pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'" in after
    assert packages.index(" git g++") < packages.index("uv venv")
    assert " curl" in packages
    requirements = (empty / "bentos" / tag.replace(":", "/") / "env" / "python" / "requirements.txt").read_text()
    assert {"requests", "torch"} <= set(requirements.split())
