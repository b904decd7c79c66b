"""``bentoml detectron predict``, as a user calls it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from pathlib import Path

import orjson
import pytest
import torch
from detectron2.data import MetadataCatalog

from bentoml_detectron import Prediction, demo, save_model
from servers import BENTOML, environment
from support import tree

pytestmark = pytest.mark.slow
IMAGES = demo.images()
COMMAND = [str(BENTOML), "detectron", "predict", "digits"]


def settings(home: Path) -> dict[str, str]:
    return environment(home, PYTHONWARNINGS="ignore", OMP_NUM_THREADS="1")


def predicted(home: Path, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], env=settings(home), input=stdin, capture_output=True, text=True, timeout=300
    )


def test_it_writes_several_formats_with_its_options_and_reports_what_it_cannot_use(digits_home, tmp_path):
    (tmp_path / "bad.jpg").write_text("no picture")
    outputs = ["-o", tmp_path / "a.jsonl", "-o", tmp_path / "b.parquet", "-o", f"{tmp_path}/pictures/"]
    options = ["--score-threshold", "0.6", "--classes", "4,7", "--top-k", "1", "--parquet-rows", "image"]
    source = [IMAGES[0].parent / "digits_0[0-2].jpg", tmp_path / "bad.jpg"]
    result = predicted(digits_home, *source, *outputs, *options)
    assert result.returncode == 3, result.stderr
    assert result.stderr.splitlines() == [
        "4 images",
        f"{tmp_path / 'bad.jpg'}: it is text; only JPEG, PNG, WebP and BMP are supported",
        "1 of them could not be used",
    ]
    assert ": 4 images, " in result.stdout
    assert "of them now" not in result.stdout
    found = [Prediction.from_json(line) for line in (tmp_path / "a.jsonl").read_bytes().splitlines()]
    assert [each.file_name for each in found] == list(map(str, IMAGES[:3]))
    assert {name for each in found for name in each.detections.class_names} <= {"4", "7"}
    assert all(len(each.detections) <= 1 for each in found)
    assert len(list((tmp_path / "pictures").iterdir())) == 3
    waived = predicted(
        digits_home, *source, "-o", tmp_path / "again.jsonl", "--errors", tmp_path / "bad.jsonl", "--allow-errors", *options
    )
    assert waived.returncode == 0
    assert waived.stderr.splitlines() == ["4 images", f"1 of them could not be used; see {tmp_path / 'bad.jsonl'}"]
    assert orjson.loads((tmp_path / "bad.jsonl").read_bytes())["file_name"] == str(tmp_path / "bad.jpg")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()


def test_a_class_whose_name_has_commas_is_one(tmp_path):
    """As many of Detectron2's ADE20K are."""
    MetadataCatalog.get("commas_of_this_test").set(thing_classes=["road, route ", *"123456789"])
    predictor = demo.predictor()
    predictor.cfg.DATASETS.TEST = ("commas_of_this_test",)
    save_model("commas", predictor)
    command = [*COMMAND[:-1], "commas", *map(str, IMAGES), "-o", str(tmp_path / "found.jsonl"), "--classes", "road, route"]
    result = subprocess.run([*command, "--classes", "1, 2"], env=settings(Path(os.environ["BENTOML_HOME"])), timeout=300)
    assert result.returncode == 0
    found = [Prediction.from_json(line) for line in (tmp_path / "found.jsonl").read_bytes().splitlines()]
    assert {name for each in found for name in each.detections.class_names} == {"road, route ", "1", "2"}


def test_list_on_stdin_and_a_second_run_meanwhile(digits_home, tmp_path):
    output = tmp_path / "found.json"
    with subprocess.Popen([*COMMAND, "-", "-o", str(output)], env=settings(digits_home), stdin=subprocess.PIPE) as first:
        while not (tmp_path / "found.json.parts" / "lock").exists():
            assert first.poll() is None
            time.sleep(0.05)
        second = predicted(digits_home, IMAGES[0], "--output", output)
        assert (second.returncode, second.stderr.count("\n")) == (1, 1)
        assert second.stderr.startswith(f"Error: another run is writing '{output}'")
        first.communicate("\n".join(map(str, IMAGES[:2])).encode(), timeout=300)
    assert first.returncode == 0
    assert {row["image_id"] for row in orjson.loads(output.read_bytes())} == {1, 2}
    again = predicted(digits_home, IMAGES[0], "--output", output)
    assert (again.returncode, again.stderr) == (1, f"Error: {output}: already exists; delete it, or give another name\n")


def test_annotation_file_gives_ids_of_its_own(digits_home, tmp_path):
    truth = demo.ground_truth()
    truth["images"] = [{**image, "id": 70 + image["id"]} for image in truth["images"][:2]]
    (tmp_path / "truth.json").write_text(json.dumps({**truth, "annotations": []}))
    result = predicted(
        digits_home, tmp_path / "truth.json", "--image-root", IMAGES[0].parent, "--output", tmp_path / "found.json"
    )
    assert result.returncode == 0, result.stderr
    rows = orjson.loads((tmp_path / "found.json").read_bytes())
    assert {row["image_id"] for row in rows} == {71, 72}
    assert {row["category_id"] for row in rows} <= set(range(1, 11))  # the model's own ids are 0 to 9


def test_run_that_is_killed_again_and_again_goes_on_with_resume(digits_home, tmp_path):
    arguments = [IMAGES[0].parent, "--chunk", 2, "--resume"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert predicted(digits_home, *arguments, "-o", whole / "a.json", "-o", whole / "b.jsonl").returncode == 0
    command = [*COMMAND, *map(str, [*arguments, "-o", killed / "a.json", "-o", killed / "b.jsonl"])]
    finished = killed / "a.json.parts" / "chunks"
    for chunks in (0, 2, 5):
        process = subprocess.Popen(command, env=settings(digits_home), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while not finished.exists() or len(list(finished.iterdir())) < chunks:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert predicted(digits_home, *arguments, "-o", killed / "a.json", "-o", killed / "b.jsonl").returncode == 0
    assert tree(killed) == tree(whole)


def test_terminal_shows_a_bar_with_rate_and_estimate(digits_home, tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, str(IMAGES[0].parent), "-o", str(tmp_path / "found.json")],
        env={**settings(digits_home), "TERM": "xterm", "COLUMNS": "120"},
        stderr=theirs,
        stdout=subprocess.DEVNULL,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the terminal has no other end any more
            break
    os.close(ours)
    assert process.wait(300) == 0
    text = shown.decode()
    assert "20/20" in text
    assert "/s" in text
    assert "━" in text
    assert "0:00:00" in text  # what is left, at the end


def test_run_that_is_interrupted_says_how_it_goes_on(digits_home, tmp_path):
    output = tmp_path / "found.jsonl"
    command = [*COMMAND, "-", "-o", str(output), "--chunk", "1"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background has it ignored
    try:
        process = subprocess.Popen(command, env=settings(digits_home), stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        try:
            while not (tmp_path / "found.jsonl.parts" / "lock").exists():
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)  # while it waits for the list
            assert process.wait(60) == 130
        finally:
            process.kill()
        assert process.stderr.read() == "Error: interrupted; continue with --resume\n"
    assert predicted(digits_home, "-", "-o", output, "--resume", stdin=f"{IMAGES[0]}\n").returncode == 0


def test_names_of_files_cannot_write_lines_of_their_own(digits_home, tmp_path):
    (tmp_path / "a\nError: b\x1b[31m.jpg").write_text("no picture")
    result = predicted(digits_home, tmp_path, IMAGES[0], "-o", tmp_path / "found.jsonl")
    assert result.returncode == 3
    assert result.stderr.splitlines()[1].startswith(f"{tmp_path}/a\\nError: b\\x1b[31m.jpg: it is text; ")
    assert len(result.stderr.splitlines()) == 3


def test_url_is_refused_in_one_line(digits_home, tmp_path):
    result = predicted(digits_home, "https://example.com/a.jpg", "--output", tmp_path / "found.json")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("Error: URLs are not supported")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gpu_finds_what_the_cpu_finds(precision, digits_home, tmp_path):
    source = [*IMAGES[:8], "--score-threshold", "0.6"]
    assert not predicted(digits_home, *source, "-o", tmp_path / "cpu.jsonl").returncode
    on_gpu = predicted(
        digits_home, *source, "-o", tmp_path / "gpu.jsonl", "--device", "cuda:0", "--precision", precision
    )  # fmt: skip
    assert not on_gpu.returncode, on_gpu.stderr
    due, found = (
        [sorted(Prediction.from_json(line).detections.class_names) for line in (tmp_path / name).read_bytes().splitlines()]
        for name in ("cpu.jsonl", "gpu.jsonl")
    )
    assert found == due
