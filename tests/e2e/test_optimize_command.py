"""``bentoml detectron optimize`` by the real command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bentoml_detectron import demo, engines
from support import run_python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not engines.has_int8(), reason="int8 needs AVX2"),
]
BENTOML = Path(sys.executable).with_name("bentoml")


def bentoml(home, *arguments):
    given = {**os.environ, "BENTOML_HOME": str(home)}
    return subprocess.run([BENTOML, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=given)


def test_it_reports_and_saves_and_the_next_command_is_right(digits_home, tmp_path):
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(demo.ground_truth()))
    folder = demo.images()[0].parent
    # --force, since which is faster is this machine's to say.
    given = ["--calibration", folder, "--annotations", annotations]
    made = bentoml(digits_home, "detectron", "optimize", "digits", *given, "--name", "smaller", "--force")
    assert made.returncode == 0, made.stderr
    assert made.stderr == ""
    assert f"calibrated on {len(demo.images())} images" in made.stdout
    scores = {name: float(after) - float(before) for name, before, after in
              re.findall(r"^(\w+) AP: ([\d.]+) in fp32, ([\d.]+) in int8$", made.stdout, re.MULTILINE)}  # fmt: skip
    assert set(scores) == {"box", "mask"}
    assert min(scores.values()) > -0.8
    tag = re.search(r"^saved (\S+); next: bentoml detectron serve \1 --precision int8$", made.stdout, re.MULTILINE)[1]
    assert tag.startswith("smaller:")
    found = bentoml(
        digits_home, "detectron", "evaluate", tag, "--annotations", annotations, "--images", folder, "--precision", "int8"
    )
    assert found.returncode == 0, found.stderr
    assert f"{float(re.search(r'box AP: .* ([0-9.]+) in int8', made.stdout)[1]) / 100:.4f}" in found.stdout
    assert bentoml(digits_home, "models", "delete", tag, "--yes").returncode == 0


def test_few_images_are_told_and_the_next_command_trusts_what_this_one_did(digits_home, tmp_path):
    (tmp_path / "one.jpg").write_bytes(demo.images()[0].read_bytes())
    given = ["--calibration", tmp_path, "--name", "few:1", "--force", "--trust-remote-code", "--trusted", "json"]
    made = bentoml(digits_home, "detectron", "optimize", "digits", *given)
    assert made.returncode == 0, made.stderr
    lines = made.stdout.splitlines()
    assert lines[0] == "calibrated on 1 image; these are few: give about a hundred typical ones"
    options = "--precision int8 --trust-remote-code --trusted json"
    assert lines[-1] == f"saved few:1; next: bentoml detectron serve few:1 {options}"
    assert bentoml(digits_home, "models", "delete", "few:1", "--yes").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--calibration", "no/such/folder", "--name", "x"], "no/such/folder"),
        (["digits", "--calibration", ".", "--name", "no/name"], "no/name"),
        (["no_such_model", "--calibration", ".", "--name", "x"], "no_such_model"),
    ],
)
def test_errors_are_one_line(digits_home, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.jpg").write_bytes(demo.images()[0].read_bytes())
    failed = bentoml(digits_home, "detectron", "optimize", *arguments)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert message in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["verify", "nobody"], "no Models with name 'nobody' exist"),
        (["optimize", "nobody:1", "--calibration", "IMAGES", "--name", "new"], "'nobody:1' is not found"),
        (["optimize", "nobody:1", "--calibration", "IMAGES", "--name", "a new one"], "'a new one' is not a valid tag"),
        (["optimize", "nobody:1", "--calibration", "no such folder", "--name", "new"], "no such folder"),
        (
            ["optimize", "nobody:1", "--calibration", "IMAGES", "--annotations", "no.json", "--name", "a new one"],
            "'a new one' is not a valid tag",
        ),
    ],
)
def test_what_is_wrong_with_arguments_is_said_before_pytorch_is_imported(arguments, why):
    """Which takes seconds."""
    given = [str(demo.images()[0].parent) if each == "IMAGES" else each for each in arguments]
    code = f"""
import sys
from bentoml_cli.cli import cli
try:
    cli(["detectron", *{given!r}])
except SystemExit as exc:
    print(exc.code, "torch" in sys.modules)
"""
    done = run_python(code)
    assert done.stdout.split() == ["1", "False"]
    assert why in done.stderr
