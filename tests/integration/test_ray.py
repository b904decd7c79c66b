"""Whole datasets on a Ray cluster: what two workers write is what the local engine writes, whatever becomes of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster

import bentoml_detectron
from bentoml_detectron import demo, errors, evaluate, load_predictor, save_model, threads
from bentoml_detectron.dataset import Progress, parts, write
from bentoml_detectron.dataset.on_ray import connect, shares
from bentoml_detectron.dataset.sources import Dataset
from bentoml_detectron.dataset.work import Work
from bentoml_detectron.images import DEFAULT_LIMITS
from bentoml_detectron.store import fingerprint
from servers import BENTOML, free_port
from support import tree

# Ray takes the machine's own address for 127.0.0.1, unless it is told that there are no other machines.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
RAY = Path(sys.executable).with_name("ray")
ALL = ["found.json", "found.jsonl", "found.parquet", "pictures"]


def of_session(session: int) -> list[psutil.Process]:
    found = []
    for each in psutil.process_iter():
        try:
            if os.getsid(each.pid) == session and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found


def workers(session: int) -> set[int]:
    """Processes that have the model."""
    found = set()
    for each in of_session(session):
        try:
            if each.cmdline()[:1] and each.cmdline()[0].startswith("ray::MapWorker"):
                found.add(each.pid)
        except psutil.NoSuchProcess:
            pass
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, int]]:
    """A cluster of one node with two cores, by its address and session; this process is not connected to it."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, for its sockets
    port = free_port()
    with pytest.MonkeyPatch.context() as patch, (Path(folder) / "log").open("w") as log:
        for name, value in LOOPBACK.items():
            patch.setenv(name, value)
        process = subprocess.Popen(
            [str(RAY), "start", "--head", "--block", "--include-dashboard=false", "--node-ip-address=127.0.0.1",
             f"--port={port}", "--num-cpus=2", "--object-store-memory=100000000", f"--temp-dir={folder}"],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while not list(Path(folder).glob("session_2*/sockets/raylet")):
                assert process.poll() is None, (Path(folder) / "log").read_text()
                assert time.monotonic() < deadline, (Path(folder) / "log").read_text()
                time.sleep(0.1)
            yield f"127.0.0.1:{port}", process.pid
        finally:
            for each in of_session(process.pid):
                each.send_signal(signal.SIGKILL)
            process.wait(30)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def connected(cluster) -> Iterator[int]:
    """The cluster's session; this process is connected to it, so that its workers need not be started for each run."""
    import ray

    ray.init(address=cluster[0], log_to_driver=False)
    yield cluster[1]
    ray.shutdown()


@pytest.fixture(scope="module")
def saved(store):
    return save_model("ray-digits", demo.predictor())


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with the sample images in ``photos``, and one thread a model, as two workers on two cores have."""
    (tmp_path / "photos").mkdir()
    for each in demo.images():
        shutil.copy(each, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with other numbers of threads, PyTorch finds other last digits
    yield tmp_path
    torch.set_num_threads(threads)


class Told(Progress):
    """Counts, and may end the run, or the workers of a cluster, after the first chunk."""

    def __init__(self, *, ends: bool = False, kills: int | None = None) -> None:
        self.images = 0
        self.seen: set[int] = set()
        self.killed: set[int] = set()
        self.turns: set[str | None] = set()
        self._ends, self._session = ends, kills

    def advance(self, images: int) -> None:
        self.images += images
        if self._session is not None:
            self.seen |= workers(self._session)
            if not self.killed:
                self.turns = {psutil.Process(each).environ().get("GOMP_SPINCOUNT") for each in self.seen}
                self.killed = {min(self.seen)}
                os.kill(min(self.seen), signal.SIGKILL)
        if self._ends:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_command_writes_the_same_files_as_the_local_engine(folder, saved, cluster):
    (folder / "photos" / "bad.jpg").write_text("no picture")
    outputs = [argument for each in ALL for argument in ("--output", f"ray/{each}")]
    (folder / "ray").mkdir()
    (folder / "local").mkdir()
    result = subprocess.run(
        [str(BENTOML), "detectron", "predict", str(saved.tag), "photos", "photos/bad.jpg",
         *outputs, "--errors", "ray/errors.jsonl", "--chunk", "4", "--score-threshold", "0.3", "--classes", "1,4,7",
         "--engine", "ray", "--ray-address", cluster[0], "--ray-workers", "2"],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert result.returncode == 3, result.stderr
    assert "22 images, " in result.stdout
    paths = [f"local/{each}" for each in ALL]
    source = ["photos", "photos/bad.jpg"]
    write(saved, source, paths, errors="local/errors.jsonl", chunk=4, score_threshold=0.3, classes=["1", "4", "7"])
    assert tree(folder / "ray") == tree(folder / "local")


@pytest.mark.slow
def test_average_precision_of_what_workers_write_is_that_in_this_process_to_the_fourth_decimal(folder, saved, connected):
    """The files by faster-coco-eval, and `evaluate` in this process; batches are others, and so are last digits."""
    images = demo.images()[0].parent
    annotations = images.parent / "annotations.json"
    write(saved, annotations, "found.json", image_root=images, chunk=7, engine="ray", ray_workers=2)
    found = load_predictor(saved, batch="exact")(demo.images())
    ids = {each["file_name"]: each["id"] for each in demo.ground_truth()["images"]}
    pairs = ((ids[path.name], each) for path, each in zip(demo.images(), found, strict=True))
    due = evaluate(pairs, annotations, thing_classes=demo.CLASSES)
    truth = COCO(str(annotations))
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        evaluation = COCOeval_faster(truth, truth.loadRes("found.json"), kind)
        evaluation.run()
        assert due.tasks[name].metrics["AP"] > 0.6
        assert evaluation.stats[0] == pytest.approx(due.tasks[name].metrics["AP"], abs=5e-5)


@pytest.mark.slow
def test_worker_that_is_killed_in_the_middle_takes_nothing_along(folder, saved, connected):
    told = Told(kills=connected)
    report = write(saved, "photos", "ray.jsonl", chunk=1, engine="ray", ray_workers=2, progress=told)
    assert (report.images, report.failures, told.images) == (20, 0, 20)
    assert 0 < report.busy <= 1
    assert told.killed < told.seen
    assert told.turns == {threads.environment()["GOMP_SPINCOUNT"]}
    write(saved, "photos", "local.jsonl", chunk=1)
    assert Path("ray.jsonl").read_bytes() == Path("local.jsonl").read_bytes()


@pytest.mark.slow
def test_run_goes_on_with_the_other_engine(folder, saved, connected):
    options = {"chunk": 2, "resume": True}
    with pytest.raises(KeyboardInterrupt):
        write(saved, "photos", "found.jsonl", engine="ray", ray_workers=2, progress=Told(ends=True), **options)
    first = Told(ends=True)
    with pytest.raises(KeyboardInterrupt):
        write(saved, "photos", "found.jsonl", progress=first, **options)
    told = Told()
    report = write(saved, "photos", "found.jsonl", engine="ray", ray_workers=2, progress=told, **options)
    assert 0 < report.resumed == 20 - told.images
    write(saved, "photos", "whole.jsonl", chunk=2)
    assert Path("found.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


@pytest.mark.slow
def test_node_that_does_not_see_the_images_is_an_error_and_no_fault_of_theirs(folder, saved, connected):
    """A process of the cluster works in another folder tree, where there is nothing."""
    import ray

    def elsewhere(work, listing, witness):
        from bentoml_detectron.dataset.on_ray import _Place, _Worker

        worker = _Worker(work, _Place(1, 0, bentoml_detectron.__version__), listing, witness)
        return worker({"number": 0, "first": 1, "start": 0, "size": 1})["problem"]

    listing = parts.Listing(folder / "sources", Dataset("photos"), 10)
    (folder / "chunks").mkdir()
    work = Work(
        str(saved.tag), fingerprint(saved), "cpu", "fp32", False, (), DEFAULT_LIMITS, None, None, None, None, ("jsonl",),
        folder=str(folder / "chunks"),
    )  # fmt: skip
    for there, gone in [(str(listing.path), "/nowhere/1.jpg"), ("/nowhere/list", None)]:
        problem = ray.get(ray.remote(elsewhere).remote(work, there, gone)).decode()
        assert (
            f"the node 127.0.0.1 cannot read '{gone or there}', which the node that started the run can; all nodes need"
            in problem
        )
    assert list((folder / "chunks").iterdir()) == []


@pytest.mark.slow
def test_workers_errors_are_this_packages_and_leave_nothing(folder, saved, connected):
    for options, kind, match in [
        ({"classes": ["nine"]}, errors.InvalidArgumentError, "^the model has no class 'nine'.*$"),
        ({"device_id": "warp"}, errors.InvalidArgumentError, "^the Ray cluster has 0 GPUs.*$"),
        ({"ray_workers": 3}, errors.InvalidArgumentError, "^the Ray cluster has 2 cores, but 3 workers need one each.*$"),
        (
            {"ray_address": "127.0.0.1:1"},
            errors.InvalidArgumentError,
            "^this process is already connected to a cluster other than.*$",
        ),
    ]:
        with pytest.raises(kind, match=match):
            write(saved, "photos", "found.jsonl", engine="ray", **options)
    assert [each.name for each in folder.iterdir()] == ["photos"]


def test_arguments_of_the_other_engine_and_clusters_that_are_not_there_are_told(folder, saved):
    for options, match in [
        ({"engine": "spark"}, "engine is 'spark'"),
        ({"ray_address": "127.0.0.1:6379"}, "need --engine ray"),
        ({"engine": "ray", "ray_address": "ray://127.0.0.1:10001"}, "give HOST:PORT"),
        ({"engine": "ray", "ray_address": "127.0.0.1"}, "give HOST:PORT"),
        ({"engine": "ray", "ray_workers": 0}, "ray_workers is 0"),
    ]:
        with pytest.raises(errors.InvalidArgumentError, match=match):
            write(saved, "photos", "found.jsonl", **options)
    with pytest.raises(errors.DetectronError, match=r"^no Ray cluster at 127.0.0.1:1 can be used .*--ray-address.*$"):
        connect("127.0.0.1:1")
    assert [each.name for each in folder.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("nodes", "wanted", "with_gpu", "due"),
    [
        ([(2, 0)], None, False, (1, 2, 0)),
        ([(2, 0)], 2, False, (2, 1, 0)),
        ([(8, 0), (8, 0), (0, 0)], None, False, (2, 8, 0)),
        ([(8, 0), (8, 0)], 3, False, (3, 4, 0)),
        ([(4, 0), (16, 2), (16, 2)], None, True, (4, 8, 1)),
        ([(16, 2), (16, 2)], 2, True, (2, 16, 1)),
        ([(0, 1)], None, True, (1, 0, 1)),
        ([(1, 0), (9, 0)], 10, False, (10, 1, 0)),
    ],
)
def test_workers_share_the_cores_of_their_nodes(nodes, wanted, with_gpu, due):
    assert shares(nodes, wanted, with_gpu=with_gpu) == due


def test_chunk_over_which_every_worker_dies_is_given_up(tmp_path):
    def tried() -> bool:
        with parts.trying(tmp_path, 7, 2) as may:
            return may

    for _ in range(5):
        assert tried()  # what ends well is forgotten
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        parts.trying(tmp_path, 7, 2).__enter__()
    assert not tried()
    assert parts.finished_chunks(tmp_path) == (set(), 0, 0)
    assert tried()
