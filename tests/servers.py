"""Servers that tests start by BentoML's command line: on free ports of 127.0.0.1, and ended by their own processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

BENTOML = Path(sys.executable).with_name("bentoml")
SERVE = ("serve", "service:service", "--host", "127.0.0.1")
SAVE_DEMO = "import bentoml\nfrom bentoml_detectron import demo\nbentoml.detectron.save_model('digits', demo.predictor())"


class Server:
    """A server that was started, by its port, process and log."""

    def __init__(self, log: Path, port: int, process: subprocess.Popen[bytes]) -> None:
        self.port = port
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    def workers(self) -> set[int]:
        return {each.pid for each in psutil.Process(self.process.pid).children() if each.status() != psutil.STATUS_ZOMBIE}

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def ready(self) -> tuple[int, str]:
        """Status and text of ``/readyz``; 0 and the error where there is no answer."""
        try:
            answer = httpx.get(f"{self.url}/readyz", timeout=5)
        except httpx.HTTPError as exc:
            return 0, str(exc)
        return answer.status_code, answer.text

    def metrics(self) -> dict[str, float]:
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}

    def predict(self, content: bytes) -> httpx.Response:
        return httpx.post(f"{self.url}/predict", content=content, headers={"content-type": "image/jpeg"}, timeout=60)

    def half_sent(self, sent: bytes, length: int) -> socket.socket:
        """A connection with a request of which only a part is sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(_head("/predict", length) + sent)
        return connection

    def unread(self, path: str, sent: bytes) -> socket.socket:
        """A connection with a request whose answer is not read."""
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(_head(path, len(sent)) + sent)
        return connection


def _head(path: str, length: int) -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: image/jpeg\r\ncontent-length: {length}\r\n\r\n".encode()


def free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return int(each.getsockname()[1])


def environment(home: Path, **more: str) -> dict[str, str]:
    """This process's, with another home of BentoML's."""
    return {**os.environ, "BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True", **more}


def write_service(folder: Path, arguments: str = "'digits:latest'") -> None:
    """``service.py`` with ``get_service(ARGUMENTS)``, which may use ``Settings``."""
    code = f"import bentoml\nfrom bentoml_detectron import Settings\n\nservice = bentoml.detectron.get_service({arguments})\n"
    (folder / "service.py").write_text(code)


@contextmanager
def started(folder: Path, home: Path, *command: str, **more: str) -> Iterator[Server]:
    """A server that need not be ready, and is ended by SIGTERM.

    Args:
        folder: Where it runs, and writes ``server.log``.
        home: BentoML's.
        command: Arguments of ``bentoml``, but for the port; `SERVE` unless given.
        more: Environment variables.
    """
    port = free_port()
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [str(BENTOML), *(command or SERVE), "--port", str(port)],
            cwd=folder, env=environment(home, **more), stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield Server(folder / "server.log", port, process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            for each in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
                each.kill()
            process.wait(10)
            raise


@contextmanager
def two_instances(folder: Path, home: Path) -> Iterator[Server]:
    """A server of ``service.py`` whose worker has both instances of the model, as with two threads for PyTorch."""
    with served(folder, home, OMP_NUM_THREADS="2") as server:
        server.until(lambda: "has one more instance" in server.log)
        yield server


@contextmanager
def served(folder: Path, home: Path, *command: str, **more: str) -> Iterator[Server]:
    """As `started`; the server is ready."""
    with started(folder, home, *command, **more) as server:
        server.until(lambda: server.ready()[0] == 200)
        yield server
