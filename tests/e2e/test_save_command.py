"""``bentoml detectron save`` as a user calls it, and BentoML's own commands on what it saved."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
from pathlib import Path

import pytest
import torch
from bentoml import Model
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor

from bentoml_detectron import demo, load_model
from bentoml_detectron.artifact import manifest
from servers import BENTOML, environment
from support import BLOCK_NETWORK, assert_same

pytestmark = pytest.mark.slow
OVERRIDE = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.3")
HERE = Path(demo.__file__).parent


def bentoml(home: Path, *arguments: str, cwd: Path, status: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [str(BENTOML), *arguments], cwd=cwd, env=environment(home, **more), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What a user brings: a config, weights in the zoo's form, a COCO file; and a module that forbids the network."""
    folder = tmp_path_factory.mktemp("brought")
    (folder / "config.yaml").write_bytes((HERE / "config.yaml").read_bytes())
    state = torch.load(HERE / "weights.pth", weights_only=True)["model"]
    content = {"model": {name: each.numpy() for name, each in state.items()}, "__author__": "Detectron2 Model Zoo"}
    (folder / "model.pkl").write_bytes(pickle.dumps(content, protocol=2))
    (folder / "train.json").write_text(json.dumps(demo.ground_truth()))
    (folder / "sitecustomize.py").write_text(f"{BLOCK_NETWORK}\nopen('watched', 'w').close()\n")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def printed(folder, home) -> str:
    """What the command printed; nothing of it went to stderr, and no connection was made."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    arguments = ["--config-file", "config.yaml", "--weights", "model.pkl", "--name", "digits", "--classes-from", "train.json"]
    result = bentoml(home, "detectron", "save", *arguments, *OVERRIDE, cwd=folder, PYTHONPATH=path)
    assert result.stderr == ""
    assert (folder / "watched").exists(), "the network was not forbidden"
    return result.stdout


@pytest.fixture(scope="module")
def tag(printed) -> str:
    return re.match(r"Saved (digits:\w+)\n", printed)[1]


def saved_in(home: Path, tag: str) -> Model:
    return Model.from_path(home / "models" / tag.replace(":", "/"))


def test_it_prints_tag_summary_and_next_command(printed, tag, home):
    lines = printed.splitlines()
    count = sum(each.numel() for each in load_model(saved_in(home, tag)).model.parameters())
    assert lines[1].split()[:3] == ["model", "GeneralizedRCNN,", f"{count:,}"]
    assert lines[2].split()[0] == "weights"
    assert lines[2].endswith("/model.pkl")
    assert lines[4].split()[:3] == ["classes", "10:", "0,"]
    assert "self-test   recorded" in printed
    assert lines[-1] == f"Next: bentoml detectron serve {tag}"


def test_what_it_saved_finds_what_detectron2_finds_with_the_same_arguments(tag, home, folder, demo_image):
    """Detectron2's own reading of the zoo file unpickles it."""
    cfg = get_cfg()
    cfg.merge_from_file(str(folder / "config.yaml"))
    cfg.merge_from_list(list(OVERRIDE))
    cfg.MODEL.WEIGHTS = str(folder / "model.pkl")
    loaded = load_model(saved_in(home, tag))
    assert isinstance(loaded, DefaultPredictor)
    assert loaded.cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 0.3
    assert_same(loaded(demo_image), DefaultPredictor(cfg)(demo_image))


def test_classes_and_their_ids_are_those_of_the_file(tag, home):
    dataset = manifest.read(Path(saved_in(home, tag).path)).dataset
    categories = demo.ground_truth()["categories"]
    assert dataset.thing_classes == [each["name"] for each in categories]
    assert dataset.thing_dataset_id_to_contiguous_id == {each["id"]: number for number, each in enumerate(categories)}


def test_a_program_is_not_run_and_nothing_is_in_the_store(folder, tmp_path):
    (tmp_path / "config.py").write_text("open('touched', 'w').close()\n")
    arguments = ["--config-file", "config.py", "--weights", str(folder / "model.pkl"), "--name", "digits"]
    result = bentoml(tmp_path / "home", "detectron", "save", *arguments, cwd=tmp_path, status=1)
    assert "run it with --trust-remote-code" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not (tmp_path / "touched").exists()
    assert not list((tmp_path / "home").glob("models/*"))


def test_bentomls_own_commands_list_and_show_the_model(tag, home, tmp_path):
    listed = json.loads(bentoml(home, "models", "list", "--output", "json", cwd=tmp_path).stdout)
    assert [(each["tag"], each["module"]) for each in listed] == [(tag, "bentoml.detectron")]
    shown = json.loads(bentoml(home, "models", "get", tag, "--output", "json", cwd=tmp_path).stdout)
    assert shown["context"]["framework_name"] == "detectron2"
    assert shown["metadata"] == {"_is_predictor": True}


def test_exported_imported_elsewhere_and_verified(tag, home, tmp_path):
    """The same in another store, which never saw the first, and gone when it is deleted there."""
    other = tmp_path / "other"
    archive = str(tmp_path / "digits.bentomodel")  # whole: BentoML takes a relative path as if it began at /
    bentoml(home, "models", "export", tag, archive, cwd=tmp_path)
    bentoml(other, "models", "import", archive, cwd=tmp_path)
    result = bentoml(other, "detectron", "verify", "digits:latest", cwd=tmp_path)
    assert result.stdout == f"{tag} is unchanged since it was saved, and gives identical results\n"
    assert result.stderr == ""
    bentoml(other, "models", "delete", tag, "--yes", cwd=tmp_path)
    assert json.loads(bentoml(other, "models", "list", "--output", "json", cwd=tmp_path).stdout) == []
    assert bentoml(home, "models", "get", tag, "--output", "path", cwd=tmp_path).returncode == 0
