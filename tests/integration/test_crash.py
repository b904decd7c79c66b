"""A model is in the store whole or not at all: through kill -9, a full disk, failing disks, and many saves at once.

``strace`` lets one system call of a save fail, or kills the process at it; the tests do so at every call that changes anything.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import bentoml
import pytest
from bentoml._internal.models.model import ModelStore

from bentoml_detectron import errors
from support import built, tiny_cfg, tree

pytestmark = pytest.mark.slow

MUTATING = (
    "openat,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,write,pwrite64,writev,ftruncate,truncate,"
    "fsync,fdatasync,sync_file_range,link,linkat,symlink,symlinkat,chmod,fchmod,fchmodat,utimensat,fallocate,flock"
)
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (apt-get install strace)")


class Worker:
    """A process that forks saves; see crash_worker.py."""

    def __init__(self, home: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("crash_worker.py"))],
            env={**os.environ, "BENTOML_HOME": str(home), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(home / "worker.log").open("w"),
            text=True,
        )
        self.home = home
        assert self.read() == "ready", (home / "worker.log").read_text()

    def read(self) -> str:
        return self.process.stdout.readline().strip()

    def say(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def save(self, log: Path, *strace: str, name: str = "crash") -> int:
        """One save under strace; returns its exit status."""
        self.say(f"paused {name}")
        pid = int(self.read())
        tracer = subprocess.Popen(
            ["strace", "-f", "-y", "-o", str(log), "-p", str(pid), *strace], stderr=subprocess.PIPE, text=True
        )
        assert "attached" in tracer.stderr.readline()
        os.kill(pid, signal.SIGCONT)
        status = int(self.read())
        tracer.wait(timeout=60)
        return status

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture
def worker(tmp_path) -> Iterator[Worker]:
    home = tmp_path / "home"
    home.mkdir()
    worker = Worker(home)
    yield worker
    worker.close()


def points(log: str) -> list[tuple[str, int]]:
    """Every mutating call of a traced save: its name, and the how manieth of that name it is."""
    found, seen = [], {}
    for line in log.splitlines():
        match = re.match(r"\d+\s+(\w+)\((.*)", line)
        if not match:
            continue
        name, rest = match.groups()
        seen[name] = seen.get(name, 0) + 1
        if name != "openat" or re.search(r"O_(WRONLY|RDWR|CREAT|TRUNC)", rest):
            found.append((name, seen[name]))
    return found


def check_store(store: ModelStore, whole: dict[str, dict[str, bytes]]) -> set[str]:
    """The store can be listed, `latest` leads to a model, and every model in it is whole; returns the versions.

    Args:
        store: Which has no other name's models.
        whole: What was in those that were loaded before, by their versions; only what differs is loaded again.
    """
    models = store.list("crash")
    assert models == store.list()
    for model in models:
        content = tree(Path(model.path))
        if whole.get(model.tag.version) != content:
            bentoml.detectron.load_model(model)
            whole[model.tag.version] = content
        for name in ("model.yaml", "config.yaml", "saved_model.pth", "custom_objects.pkl", "manifest.json"):
            assert Path(model.path_of(name)).is_file()
    latest = Path(store._path) / "crash" / "latest"  # as it lies there: BentoML mends it when it reads it
    assert not latest.exists() or (latest.parent / latest.read_text()).is_dir()
    assert store.get("crash:latest").tag in {model.tag for model in models}
    return {model.tag.version for model in models}


def kept(store: ModelStore, versions: set[str], most: int = 8) -> set[str]:
    """The same, or the newest half where there are more: each look at the store reads all."""
    if len(versions) <= most:
        return versions
    newest = sorted(store.list("crash"), key=lambda model: model.creation_time, reverse=True)
    for model in newest[most // 2 :]:
        store.delete(model.tag)
    return {model.tag.version for model in newest[: most // 2]}


@needs_strace
@pytest.mark.parametrize("fault", ["signal=SIGKILL", "error=ENOSPC", "error=EIO"])
def test_save_is_whole_or_absent_whatever_call_fails(fault, worker, tmp_path, record_property):
    """At each mutating system call of a save: kill -9, no space left, or an I/O error."""
    store = ModelStore(worker.home / "models")
    log = tmp_path / "strace.log"
    assert worker.save(log, "-e", f"trace={MUTATING}") == 0
    every = points(log.read_text())
    kinds = {name for name, _ in every}
    assert {"openat", "mkdir", "write", "fsync", "rename", "flock"} <= kinds
    whole: dict[str, dict[str, bytes]] = {}
    before = check_store(store, whole)
    statuses: dict[int, int] = {}
    for name, number in every:
        status = worker.save(log, "-e", f"trace={MUTATING}", "-e", f"inject={name}:{fault}:when={number}")
        assert "INJECTED" in log.read_text() or status == -signal.SIGKILL, f"{name} {number} was not reached"
        statuses[status] = statuses.get(status, 0) + 1
        after = check_store(store, whole)
        assert status in ((-signal.SIGKILL,) if "SIGKILL" in fault else (0, 3)), (name, number, status)
        if status == 0:
            assert len(after - before) == 1, (name, number)
        elif status == 3:
            assert after == before, (name, number)
        assert before <= after
        before = kept(store, after)
    assert worker.save(log, "-e", "trace=none") == 0  # and the next save goes through
    assert len(check_store(store, whole) - before) == 1
    assert [path.name for path in (worker.home / "models.staging").iterdir()] == ["lock"]  # and cleans up
    record_property("points", len(every))
    print(f"\n{fault} at {len(every)} calls of a save: exit statuses {statuses}")


@needs_strace
@pytest.mark.parametrize("fault", ["signal=SIGKILL", "error=EIO"])
def test_first_save_of_a_name_is_whole_or_absent(fault, worker, tmp_path):
    """Where neither the name's folder nor `latest` is there yet: at each call that touches the store itself."""
    store = ModelStore(worker.home / "models")
    log = tmp_path / "strace.log"
    assert worker.save(log, "-e", f"trace={MUTATING}", name="trial") == 0
    every = [point for point in points(log.read_text()) if point[0] in ("mkdir", "rename", "fsync", "unlink", "rmdir")]
    assert len(every) > 10
    for index, (name, number) in enumerate(every):
        status = worker.save(log, "-e", f"inject={name}:{fault}:when={number}", name=f"first-{index}")
        assert "INJECTED" in log.read_text() or status == -signal.SIGKILL, f"{name} {number} was not reached"
        folder = Path(store._path) / f"first-{index}"
        versions = list(folder.glob("*/"))
        assert len(versions) <= 1
        assert status in (0, 3, -signal.SIGKILL)
        if status == 3:
            assert not folder.exists(), (name, number)
        if status == 0:
            assert len(versions) == 1
        for version in versions:
            bentoml.detectron.load_model(store.get(f"first-{index}:{version.name}"))
        store.list()


def test_eight_processes_save_one_name(worker):
    """25 times each: 200 versions, no error, `latest` the newest, and the store can be listed and read all the while."""
    store = ModelStore(worker.home / "models")
    worker.say("storm 8 25")
    lists = 0
    while not _readable(worker.process.stdout):
        models = store.list()
        assert store.get("crash").tag.version
        lists += 1
        assert all((Path(model.path) / "manifest.json").is_file() for model in models)
        time.sleep(0.3)  # or the lists take a core
    assert worker.read() == " ".join(["0"] * 8), (worker.home / "worker.log").read_text()
    versions = check_store(store, {})
    newest = max(store.list("crash"), key=lambda model: model.creation_time)
    assert len(versions) == 201  # one of the worker's own
    assert store.get("crash:latest").tag == newest.tag
    assert lists > 10
    print(f"\n{len(versions) - 1} saved by 8 processes, the store listed {lists} times meanwhile")


def _readable(stream) -> bool:
    import select

    time.sleep(0.01)
    return bool(select.select([stream], [], [], 0)[0])


@pytest.mark.parametrize("name", ["saved_model.pth", "config.yaml", "manifest.json", "model.yaml"])
def test_flipped_bit_is_reported_with_the_files_name(name, store):
    """One bit anywhere in any file that loading uses."""
    cfg = tiny_cfg()
    saved = bentoml.detectron.save_model("flip", built(cfg), cfg)
    path = Path(saved.path_of(name))
    good = path.read_bytes()
    numbers = random.Random(name)
    for _ in range(40):
        position = numbers.randrange(len(good) * 8)
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        path.write_bytes(bad)
        with pytest.raises(errors.CorruptFileError) as caught:
            bentoml.detectron.load_model(f"flip:{saved.tag.version}")
        assert caught.value.file == name, position
        assert name in str(caught.value)
    path.write_bytes(good)
    bentoml.detectron.load_model(saved.tag)


@pytest.mark.parametrize("name", ["saved_model.pth", "config.yaml", "manifest.json"])
def test_file_that_is_missing_or_cut_short_is_reported_with_its_name(name):
    cfg = tiny_cfg()
    saved = bentoml.detectron.save_model("short", built(cfg), cfg)
    path = Path(saved.path_of(name))
    content = path.read_bytes()
    for damage in (lambda: path.write_bytes(content[: len(content) // 2]), lambda: path.write_bytes(b""), path.unlink):
        damage()
        with pytest.raises(errors.CorruptFileError) as caught:
            bentoml.detectron.load_model(saved.tag)
        assert caught.value.file == name
