"""``bentoml detectron serve``, as a user calls it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from bentoml_detectron import demo
from bentoml_detectron.engines import has_bf16
from servers import BENTOML, environment, served
from support import run_python

pytestmark = pytest.mark.slow
COMMAND = ("detectron", "serve", "digits")
JPEG = {"content-type": "image/jpeg"}
IMAGE = {"image": demo.images()[3].read_bytes()}
FOUND = ["0", "0", "5", "7", "8", "8", "9"]
"""Classes of what scores 0.6 and more on it."""


def failed(home: Path, *arguments: str, **more: str) -> str:
    """What the command says where it starts no server."""
    result = subprocess.run(
        [str(BENTOML), "detectron", "serve", *arguments],
        env=environment(home, **more),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    return result.stderr


def test_unknown_tag_is_one_line_and_no_server(digits_home):
    assert failed(digits_home, "nobody:latest").startswith("Error: no Models with name 'nobody'")
    assert failed(digits_home, "nobody:latest").count("\n") == 1


def test_address_that_cannot_be_had_is_one_line(digits_home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = failed(digits_home, "digits", "--port", str(taken.getsockname()[1]))
    assert said.startswith("Error: cannot listen on 127.0.0.1, port ")
    assert said.count("\n") == 1
    assert failed(digits_home, "digits", "--host", "here") == "Error: --host is 'here'; give an IP address of this machine\n"


def test_served_module_alone_says_how_to_start_it(digits_home):
    result = run_python("import bentoml_detectron.service.served", check=False, BENTOML_HOME=str(digits_home))
    assert "start this service with: bentoml detectron serve TAG" in result.stderr


def test_it_serves_with_its_options_and_token_and_ends_by_sigterm(digits_home, tmp_path):
    arguments = ("--workers", "2", "--max-body-bytes", "100000")
    with served(tmp_path, digits_home, *COMMAND, *arguments, BENTOML_DETECTRON_TOKEN="secret") as server:
        process, url = server.process, server.url
        assert httpx.post(f"{url}/predict", files=IMAGE, timeout=60).status_code == 401
        bearing = {"authorization": "Bearer secret"}
        assert httpx.post(f"{url}/predict", files=IMAGE, headers=bearing, timeout=60).status_code == 200
        large = {"image": bytes(200_000)}
        assert httpx.post(f"{url}/predict", files=large, headers=bearing, timeout=60).status_code == 413
        info = httpx.get(f"{url}/info", headers=bearing).json()
        assert info["tag"].startswith("digits:")
        assert info["limits"]["max_body_bytes"] == 100_000
        assert len(psutil.Process(process.pid).children()) == 2
        listening = {each.laddr.ip for each in psutil.Process(process.pid).net_connections("tcp") if each.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
        # The token is in no command line, nor in the variable that the command sets.
        for each in psutil.Process(process.pid).children():
            assert "secret" not in " ".join(each.cmdline())
            assert "secret" not in each.environ()["BENTOML_DETECTRON_SERVE"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.skipif(not has_bf16(), reason="the processor does not compute in bf16")
def test_precision_is_served_and_said(digits_home, tmp_path):
    with served(tmp_path, digits_home, *COMMAND, "--precision", "bf16") as server:
        assert httpx.get(f"{server.url}/info").json()["precision"] == "bf16"
        found = httpx.post(f"{server.url}/predict?score_threshold=0.6", content=IMAGE["image"], headers=JPEG, timeout=60).json()
        assert sorted(found["class_names"]) == FOUND


def test_precision_that_the_machine_lacks_is_one_line(digits_home, tmp_path):
    """As on a processor without it: the command's own process is told that it has none."""
    (tmp_path / "sitecustomize.py").write_text(
        "import builtins, pathlib\n"
        "real = pathlib.Path.read_text\n"
        "def read_text(self, *given, **options):\n"
        "    return 'flags : sse2' if str(self) == '/proc/cpuinfo' else real(self, *given, **options)\n"
        "pathlib.Path.read_text = read_text\n"
    )
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    said = failed(digits_home, "digits", "--precision", "bf16", PYTHONPATH=paths)
    last = said.splitlines()[-1]
    assert last == "Error: this processor does not support bf16; use --precision fp32 (precision='fp32')"
    assert "Traceback" not in said


def test_device_that_is_not_there_is_one_line(digits_home):
    said = failed(digits_home, "digits", "--device", "warp")
    assert said.splitlines()[-1].startswith("Error: PyTorch has no device 'warp' here")
    assert "Traceback" not in said


def test_it_ends_by_ctrl_c_and_its_log_is_free_of_pytorchs_warnings(digits_home, tmp_path):
    with served(tmp_path, digits_home, *COMMAND) as server:
        process = server.process
        workers = psutil.Process(process.pid).children()
        # A terminal sends it to all of them.
        for each in (process, *workers):
            os.kill(each.pid, signal.SIGINT)
        assert process.wait(60) == 0
        assert "Traceback" not in server.log
        assert "Warning" not in server.log


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "auto"])
def test_it_serves_on_a_gpu(precision, digits_home, tmp_path):
    with served(tmp_path, digits_home, *COMMAND, "--device", "cuda:0", "--precision", precision) as server:
        info = httpx.get(f"{server.url}/info").json()
        found = httpx.post(f"{server.url}/predict?score_threshold=0.6", content=IMAGE["image"], headers=JPEG, timeout=60)
    assert (info["device"], info["precision"]) == ("cuda:0", precision)
    assert sorted(found.json()["class_names"]) == FOUND
