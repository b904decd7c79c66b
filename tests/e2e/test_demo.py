"""The demo model is as good as the README says, and ``bentoml detectron demo`` shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bentoml_detectron import demo

BENTOML = Path(sys.executable).with_name("bentoml")


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(BENTOML), "detectron", *arguments], cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_command_saves_loads_detects_and_draws(tmp_path):
    result = run("demo", "--output", "found.png", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("Saved digits-demo:")
    assert "digit" in result.stdout
    assert "score" in result.stdout
    rows = [line for line in lines if line[:1].isdigit()]
    truth = demo.ground_truth()
    assert len(rows) >= 3
    names = [truth["categories"][a["category_id"] - 1]["name"] for a in truth["annotations"] if a["image_id"] == 4]
    assert sorted(row[0] for row in rows) == sorted(names)
    picture = np.asarray(Image.open(tmp_path / "found.png").convert("RGB")).astype(int)
    original = Image.open(demo.images()[3]).convert("RGB").resize((768, 768), Image.Resampling.BICUBIC)
    assert picture.shape == (768, 768, 3)
    changed = np.abs(picture - np.asarray(original)).max(axis=2) > 30
    assert 0.01 < changed.mean() < 0.9  # something is drawn, on the picture


@pytest.mark.slow
def test_errors_are_one_line_and_exit_status_1(tmp_path):
    result = run("demo", "--output", "no/such/folder/found.png", folder=tmp_path)
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if "Error" in line]
    assert len(errors) == 1
    assert "--output" in errors[0]
    assert "Traceback" not in result.stderr
    named = run("demo", "--output", "found.txt", folder=tmp_path)
    assert (named.returncode, named.stdout) == (1, "")
    assert named.stderr.splitlines()[-1] == "Error: found.txt is not the name of an image file; give one, as --output found.png"
    assert "Traceback" in run("--debug", "demo", "--output", "no/such/folder/found.png", folder=tmp_path).stderr


@pytest.mark.slow
def test_help_has_an_example(tmp_path):
    assert "bentoml detectron demo --image 7" in run("demo", "--help", folder=tmp_path).stdout
    assert "demo" in run("--help", folder=tmp_path).stdout


@pytest.mark.slow
def test_sample_images_are_detected_well(demo_predictor):
    """The package's own 20 images and annotations, by pycocotools; the README's table is over 200."""
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    truth.dataset = demo.ground_truth()
    truth.createIndex()
    assert [image["file_name"] for image in truth.dataset["images"]] == [path.name for path in demo.images()]
    results = []
    for image, path in zip(truth.dataset["images"], demo.images(), strict=True):
        found = demo_predictor(np.ascontiguousarray(np.asarray(Image.open(path).convert("RGB"))[:, :, ::-1]))["instances"]
        for box, score, label, mask in zip(
            found.pred_boxes.tensor.tolist(), found.scores.tolist(), found.pred_classes.tolist(), found.pred_masks.numpy(),
            strict=True,
        ):  # fmt: skip
            results.append(
                {
                    "image_id": image["id"],
                    "category_id": label + 1,
                    "score": score,
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "segmentation": coco_mask.encode(np.asfortranarray(mask)),
                }
            )
    for kind, least in (("bbox", 0.65), ("segm", 0.55)):
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] >= least, kind


@pytest.mark.slow
def test_training_is_deterministic(tmp_path):
    """Two short runs of the training script end with the same weights, and those are not the ones it starts from."""
    script = Path(__file__).resolve().parent.parent.parent / "tools" / "train_demo.py"
    digests = []
    for iterations in (3, 3, 2):
        command = [sys.executable, str(script), "--max-iter", str(iterations), "--output", str(tmp_path)]
        output = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
        digests.append(output.split()[-1])
    assert len(digests[0]) == 64
    assert digests[0] == digests[1] != digests[2]


def test_test_images_depend_on_nothing_that_training_sees(monkeypatch):
    """With every training digit blanked, the test images are the same, and the training images are not."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent.parent / "tools")
    import train_demo

    before = [(train_demo.compose(seed, test=True)[0], train_demo.compose(seed)[0]) for seed in range(20)]
    glyphs, targets = train_demo.digits()
    blanked = glyphs.copy()
    blanked[: -train_demo.TEST_DIGITS] = 0
    monkeypatch.setattr(train_demo, "digits", lambda: (blanked, targets))
    for seed, (test_image, training_image) in enumerate(before):
        assert np.array_equal(train_demo.compose(seed, test=True)[0], test_image)
        assert not np.array_equal(train_demo.compose(seed)[0], training_image)


def test_package_data_is_small():
    folder = Path(demo.__file__).parent
    assert (folder / "weights.pth").stat().st_size <= 3_000_000
    assert len(demo.images()) == 20
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 4_000_000
