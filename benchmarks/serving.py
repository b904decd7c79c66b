"""What the benchmarks of servers share: a store with the demo model, a free port, and a server's start and end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SAVE = """
import bentoml
from bentoml_detectron import demo
bentoml.detectron.save_model('digits', demo.predictor())
"""
START_SECONDS = 120


def environment(home: str, threads: int | None = None) -> dict[str, str]:
    """This process's environment with a BentoML home of its own and, where given, a number of PyTorch's threads."""
    found = {**os.environ, "BENTOML_HOME": home, "BENTOML_DO_NOT_TRACK": "True"}
    return found if threads is None else {**found, "OMP_NUM_THREADS": str(threads)}


def save_demo(home: str, code: str = SAVE) -> None:
    """Saves the demo model as ``digits``."""
    subprocess.run([sys.executable, "-c", code], env=environment(home), check=True, capture_output=True)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass(frozen=True)
class Server:
    """A server that was started on 127.0.0.1."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def wait(self) -> str:
        """Its address, when it is ready; ends the benchmark where it is not within `START_SECONDS`."""
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5).close()
                return f"http://127.0.0.1:{self.port}"
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        sys.exit(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def wait_for_instance(self, seconds: float = 60) -> None:
        """Until this package's server has the second instance of the model; not for ever, since it may be told to have one."""
        deadline = time.monotonic() + seconds
        while "has one more instance" not in self.log.read_text() and time.monotonic() < deadline:
            time.sleep(0.2)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Lets it run while the context lasts, and stops it after."""
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGSTOP)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Lets some processes use a core each while the context lasts."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for each in processes:
            each.kill()
            each.wait()


@contextmanager
def started(command: list[str], given: Mapping[str, str], log: Path, folder: Path | None = None) -> Iterator[Server]:
    """Runs a server while the context lasts; it ends by SIGTERM to the session that was started.

    Args:
        command: What starts it; PORT stands for a free port.
        given: Its environment.
        log: Where its output goes.
        folder: Its working directory.
    """
    port = free_port()
    arguments = [str(port) if each == "PORT" else each for each in command]
    with log.open("w") as output:
        process = subprocess.Popen(
            arguments, env=given, stdout=output, stderr=output, cwd=folder, start_new_session=True
        )  # fmt: skip
    try:
        yield Server(process, port, log)
    finally:
        # All that it started in its session: LitServe's processes outlive the first one's SIGTERM.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
                os.killpg(process.pid, signal.SIGCONT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
