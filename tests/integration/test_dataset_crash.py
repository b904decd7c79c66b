"""A run that is killed, or whose disk is full, goes on where it was, and ends with what a run that was left alone writes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bentoml_detectron import demo
from support import tree

pytestmark = pytest.mark.slow

CHUNK, IMAGES = 2, 9  # as in dataset_worker.py, and of which one is damaged
OUTPUTS = ("found.json", "found.jsonl", "found.parquet", "pictures")


class Worker:
    """A process that forks runs; see dataset_worker.py."""

    def __init__(self, home: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(Path(__file__).with_name("dataset_worker.py"))],
            env={**os.environ, "BENTOML_HOME": str(home), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(home / "worker.log").open("w"),
            text=True,
        )
        self.log = home / "worker.log"
        assert self.process.stdout.readline() == "ready\n", self.log.read_text()

    def run(self, source: Path, folder: Path, **command) -> dict:
        """One run into a folder; its report, or how it ended."""
        names = command.pop("names", OUTPUTS)
        command = {"source": str(source), "outputs": [str(folder / each) for each in names], **command}
        if "found.jsonl" in names:
            command["errors"] = str(folder / "bad.jsonl")
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert answer["status"] in (0, 3, -signal.SIGKILL), (answer, self.log.read_text())
        return answer


@pytest.fixture(scope="module")
def worker(tmp_path_factory) -> Iterator[Worker]:
    worker = Worker(tmp_path_factory.mktemp("home"))
    yield worker
    worker.process.stdin.close()
    worker.process.wait(60)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The images: five chunks."""
    folder = tmp_path_factory.mktemp("images")
    for path in demo.images()[:IMAGES]:
        shutil.copy(path, folder)
    damaged = sorted(folder.iterdir())[4]
    damaged.write_bytes(damaged.read_bytes()[:2000])
    return folder


@pytest.fixture(scope="module")
def whole(worker, source, tmp_path_factory) -> tuple[dict[str, bytes], int]:
    """What a run writes that nobody disturbs, and at how many places it can be killed."""
    folder = tmp_path_factory.mktemp("whole")
    report = worker.run(source, folder)
    assert (report["images"], report["failures"], report["run"]) == (IMAGES, 1, IMAGES)
    assert len(tree(folder)) == 5 + IMAGES - 1  # outputs and the report, and the pictures
    return tree(folder), report["changes"]


def finished(folder: Path) -> int:
    """Images in the chunks that are finished in an unfinished run's folder."""
    chunks = folder / "found.json.parts" / "chunks"
    numbers = [int(each.name) for each in chunks.iterdir() if not each.name.endswith(".tmp")] if chunks.is_dir() else []
    return sum(min(CHUNK, IMAGES - CHUNK * number) for number in numbers)


def test_killed_run_ends_with_the_same_files_and_does_no_finished_image_twice(worker, source, whole, tmp_path):
    """kill -9 at places drawn from all of the changes that a run makes to the file system; the last ones, each."""
    due, changes = whole
    numbers = random.Random(5)
    places = [*numbers.sample(range(1, changes - 20), 16), *range(changes - 20, changes + 1, 2)]
    seen = {}
    for place in places:
        folder = tmp_path / str(place)
        folder.mkdir()
        assert worker.run(source, folder, kill=place)["status"] == -signal.SIGKILL, place
        is_marked = (folder / "found.json.parts" / "finished.json").exists()
        done = IMAGES if is_marked or all((folder / each).exists() for each in OUTPUTS) else finished(folder)
        report = worker.run(source, folder, resume=True)
        assert report["status"] == 0, (place, report)
        assert report["run"] == IMAGES - done, (place, report)
        assert tree(folder) == due, place
        seen[done] = seen.get(done, 0) + 1
        shutil.rmtree(folder)
    assert {*seen} - {0, IMAGES}, seen  # at some places some chunks were finished, and some not
    print(f"\nkilled at {len(places)} of {changes} places; images done by then, and how often: {seen}")


def test_run_that_is_killed_again_and_again_ends_with_the_same_files(worker, source, whole, tmp_path):
    due, changes = whole
    numbers = random.Random(6)
    for _ in range(6):
        worker.run(source, tmp_path, resume=True, kill=numbers.randrange(1, changes))
    assert worker.run(source, tmp_path, resume=True)["status"] == 0
    assert tree(tmp_path) == due


@pytest.mark.parametrize("limit", [300, 3000, 20_000])
def test_file_that_cannot_grow_is_a_clear_error_and_the_run_goes_on(worker, source, whole, tmp_path, limit):
    answer = worker.run(source, tmp_path, limit=limit)
    assert (answer["status"], answer["kind"]) == (3, "OutputError"), answer
    assert "cannot write" in answer["error"]
    assert "File too large" in answer["error"]
    assert "--resume" in answer["error"]
    assert not any((tmp_path / each).exists() for each in OUTPUTS)
    done = finished(tmp_path)
    report = worker.run(source, tmp_path, resume=True)
    assert (report["status"], report["run"]) == (0, IMAGES - done)
    assert tree(tmp_path) == whole[0]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_a_clear_error_and_the_run_goes_on_when_there_is_room(worker, source, whole, small_disk):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2_000_000))
    answer = worker.run(source, small_disk, names=("found.json",))
    assert (answer["status"], answer["kind"]) == (3, "OutputError"), answer
    assert "No space left on device" in answer["error"]
    assert "--resume" in answer["error"]
    assert not (small_disk / "found.json").exists()
    ballast.unlink()
    done = finished(small_disk)
    report = worker.run(source, small_disk, names=("found.json",), resume=True)
    assert (report["status"], report["run"]) == (0, IMAGES - done)
    assert tree(small_disk) == {"found.json": whole[0]["found.json"]}
