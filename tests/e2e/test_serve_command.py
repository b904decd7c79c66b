"""``bentoml detectron serve``, as a user calls it."""

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
import psutil
import pytest

from bentoml_detectron import demo
from support import run_python

pytestmark = pytest.mark.slow
BENTOML = Path(sys.executable).with_name("bentoml")
IMAGE = {"image": demo.images()[3].read_bytes()}


def free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return int(each.getsockname()[1])


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model store with the demo model as ``digits``."""
    home = tmp_path_factory.mktemp("home")
    code = "import bentoml\nfrom bentoml_detectron import demo\nbentoml.detectron.save_model('digits', demo.predictor())"
    run_python(code, BENTOML_HOME=str(home))
    return home


def environment(home: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True", **more}


def failed(home: Path, *arguments: str) -> str:
    """What the command says where it starts no server."""
    result = subprocess.run(
        [str(BENTOML), "detectron", "serve", *arguments], env=environment(home), capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    return result.stderr


@contextmanager
def serving(home: Path, log: Path, *arguments: str, **more: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port = free_port()
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(BENTOML), "detectron", "serve", "digits", "--port", str(port), *arguments],
            cwd=log.parent, env=environment(home, **more), stdout=file, stderr=file,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while status(f"{url}/readyz") != 200:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process, url
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(60)


def status(url: str) -> int | None:
    try:
        return httpx.get(url, timeout=5).status_code
    except httpx.HTTPError:
        return None


def test_unknown_tag_is_one_line_and_no_server(home):
    assert failed(home, "nobody:latest").startswith("Error: no Models with name 'nobody'")
    assert failed(home, "nobody:latest").count("\n") == 1


def test_address_that_cannot_be_had_is_one_line(home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = failed(home, "digits", "--port", str(taken.getsockname()[1]))
    assert said.startswith("Error: cannot listen on 127.0.0.1, port ")
    assert said.count("\n") == 1
    assert failed(home, "digits", "--host", "here") == "Error: --host is 'here'; give an IP address of this machine\n"


def test_served_module_alone_says_how_to_start_it(home):
    result = run_python("import bentoml_detectron.service.served", check=False, BENTOML_HOME=str(home))
    assert "start this service with: bentoml detectron serve TAG" in result.stderr


def test_it_serves_with_its_options_and_token_and_ends_by_sigterm(home, tmp_path):
    arguments = ("--workers", "2", "--max-body-bytes", "100000")
    with serving(home, tmp_path / "log", *arguments, BENTOML_DETECTRON_TOKEN="secret") as (process, url):
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


def test_it_ends_by_ctrl_c(home, tmp_path):
    with serving(home, tmp_path / "log") as (process, _):
        workers = psutil.Process(process.pid).children()
        # A terminal sends it to all of them.
        for each in (process, *workers):
            os.kill(each.pid, signal.SIGINT)
        assert process.wait(60) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()
