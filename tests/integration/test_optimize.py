"""``optimize``: what it saves, what it refuses, and what the new model is."""

from __future__ import annotations

import json
from dataclasses import replace

import bentoml
import numpy as np
import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN

from bentoml_detectron import Detections, demo, engines, errors, fastest, load_predictor, verify
from bentoml_detectron.artifact import manifest
from bentoml_detectron.engines.int8 import Ranges
from bentoml_detectron.engines.quantized import Range
from bentoml_detectron.model import load, module_of
from bentoml_detectron.optimization import LEAST_ALIKE, MOST_LOST, Report, alike, optimize, problems
from bentoml_detectron.store import check_precision, open_model
from support import built, tiny_cfg

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not engines.has_int8(), reason="int8 needs AVX2"),
]
REPORT = Report("digits:1", "int8", 20, 20, {"fp32": 20.0, "int8": 10.0}, 2.0, 0.99, {}, {})


@META_ARCH_REGISTRY.register()
class GivingNumbers(GeneralizedRCNN):
    """Counts, and gives no detections."""

    def forward(self, batched_inputs):
        return [{"count": len(each["instances"])} for each in super().forward(batched_inputs)]


@pytest.fixture(scope="module")
def digits():
    return bentoml.detectron.save_model("to_optimize", demo.predictor())


@pytest.fixture
def optimized(digits):
    model, report = optimize(digits, demo.images()[:8], name="optimized", force=True)
    yield model, report
    bentoml.models.delete(model.tag)


def test_the_new_model_holds_its_report_and_is_whole(digits, optimized):
    model, report = optimized
    assert model.tag.name == "optimized"
    assert model.info.metadata["optimization"] == json.loads(json.dumps(report.to_dict()))
    assert model.info.labels == digits.info.labels
    assert report.source == str(digits.tag)
    assert report.calibrated == report.compared == 8
    assert set(report.milliseconds) == {"fp32", "int8"} | ({"bf16"} if engines.has_bf16() else set())
    assert verify(model).ok


def test_a_version_that_exists_is_told_before_any_work(digits, optimized):
    with pytest.raises(errors.SaveError, match="is already in the model store; give a new version"):
        optimize(digits, ["none.jpg"], name=str(optimized[0].tag))


def test_its_weights_are_those_of_the_old_one(digits, optimized):
    old, new = (bentoml.detectron.load_model(each).model.state_dict() for each in (digits, optimized[0]))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_in_int8_it_finds_what_it_finds_in_fp32(optimized):
    model, report = optimized
    predictor, plain = (load_predictor(model, precision=each) for each in ("int8", "fp32"))
    shares = [alike(plain([each])[0], predictor([each])[0]) for each in demo.images()]
    assert np.mean(shares) >= LEAST_ALIKE
    assert report.alike >= LEAST_ALIKE
    assert any(not np.array_equal(plain([each])[0].scores, predictor([each])[0].scores) for each in demo.images()[:3])


@pytest.mark.parametrize(("score", "due"), [(0.95, 1.0), (0.76, 1.0), (0.74, 0.5), (0.31, 0.0)])
def test_what_scores_much_less_is_not_alike(score, due):
    one, other = (
        Detections((50, 50), np.array([[0, 0, 10, 10]], np.float32), np.array([each], np.float32), np.array([0]), ("",))
        for each in (0.95, score)
    )
    assert alike(one, other) == alike(other, one) == due


def test_an_image_that_cannot_be_used_is_named(digits, tmp_path):
    (tmp_path / "bad.jpg").write_text("no picture")
    with pytest.raises(errors.UnsupportedImageError, match=rf"^{tmp_path}/bad\.jpg: it is text"):
        optimize(digits, [demo.images()[0], tmp_path / "bad.jpg"], name="none")
    for wrong in (iter(demo.images()), str(demo.images()[0]), np.zeros((2, 9, 9, 3), np.uint8)):
        with pytest.raises(errors.InvalidArgumentError, match="images must be a list, not "):
            optimize(digits, wrong, name="none")


def test_a_model_that_gives_no_detections_is_told_so():
    cfg = tiny_cfg("GivingNumbers")
    saved = bentoml.detectron.save_model("numbers", built(cfg), cfg)
    with pytest.raises(errors.InvalidModelError, match="the model must give Detections, not dict"):
        optimize(saved, demo.images()[:2], name="none")


def test_a_model_that_was_not_calibrated_has_no_int8(digits):
    with pytest.raises(errors.InvalidArgumentError, match="bentoml detectron optimize"):
        load_predictor(digits, precision="int8")
    with pytest.raises(errors.InvalidArgumentError, match="bentoml detectron optimize"):
        check_precision(digits, "int8")


def test_what_falls_is_not_saved(digits):
    seen = []

    def measure(predictor):
        seen.append(predictor)
        return {"box AP": 0.7 if len(seen) == 1 else 0.69}

    before = len(bentoml.models.list())
    with pytest.raises(errors.OptimizationError, match=r"box AP falls by 1\.00 points") as caught:
        optimize(digits, demo.images()[:2], name="falls", measure=measure)
    assert any("falls" in each for each in caught.value.value)
    assert len(bentoml.models.list()) == before
    assert seen[0].model is not seen[1].model


def test_what_falls_is_kept_by_force_and_marked(digits):
    found = iter([{"box AP": 0.7}, {"box AP": 0.5}])
    model, report = optimize(digits, demo.images()[:2], name="forced", measure=lambda predictor: next(found), force=True)
    assert report.is_forced
    assert any("falls by 20.00 points" in each for each in model.info.metadata["optimization"]["problems"])
    bentoml.models.delete(model.tag)


def test_ranges_of_images_that_show_nothing_are_refused(digits):
    black = [np.zeros((192, 192, 3), np.uint8)] * 2
    with pytest.raises(errors.OptimizationError, match="its drift is unknown"):
        optimize(digits, black, name="black")


def test_such_images_are_kept_by_force_and_marked(digits):
    black = [np.zeros((192, 192, 3), np.uint8)] * 2
    model, report = optimize(digits, black, name="black", force=True)
    assert (report.alike, report.is_forced) == (None, True)
    assert any("its drift is unknown" in each for each in model.info.metadata["optimization"]["problems"])
    bentoml.models.delete(model.tag)


def test_metric_of_annotations_that_hold_nothing_of_it_is_no_evidence(digits):
    """Its value is NaN, of which no drop is too large; what fp32 and int8 both find decides, then."""
    black = [np.zeros((192, 192, 3), np.uint8)] * 2
    with pytest.raises(errors.OptimizationError, match="its drift is unknown"):
        optimize(digits, black, name="black", measure=lambda predictor: {"box AP": float("nan")})


def test_no_images_are_refused(digits):
    with pytest.raises(errors.InvalidArgumentError, match="no images"):
        optimize(digits, [], name="none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"times_as_fast": 0.99}, "slower than fp32"),
        ({"alike": LEAST_ALIKE - 0.01}, "94.0% of its detections"),
        ({"alike": 0.1, "before": {"box AP": 0.5}, "after": {"box AP": 0.5 - MOST_LOST + 1e-6}}, None),
        ({"before": {"box AP": 0.5}, "after": {"box AP": 0.5 - MOST_LOST - 1e-6}}, "box AP falls"),
        ({"before": {"box AP": 0.5, "mask AP": 0.5}, "after": {"box AP": 0.6}}, "mask AP falls by 50.00"),
    ],
)
def test_bounds(changes, message):
    found = problems(replace(REPORT, **changes))
    assert (len(found), message is None or message in found[0]) == (0 if message is None else 1, True)


class TestAuto:
    """``precision="auto"``."""

    def test_it_finds_what_fp32_finds(self, optimized):
        predictor, plain = (load_predictor(optimized[0], precision=each) for each in ("auto", "fp32"))
        assert all(alike(plain([each])[0], predictor([each])[0]) >= LEAST_ALIKE for each in demo.images()[:4])

    def test_it_takes_the_fastest_of_those_that_it_tried(self, digits):
        saved = open_model(digits)
        chosen = fastest.fastest(module_of(load(saved, "cpu")), saved.input, None)
        assert "int8" not in chosen.seconds
        assert not chosen.seconds or chosen.seconds[chosen.precision] == min(chosen.seconds.values())

    def test_what_finds_something_else_is_not_taken(self, digits, monkeypatch):
        """Of two features of a thousand times their range nothing is left."""
        monkeypatch.setitem(engines.TOLERANCES, "int8", 10.0)
        saved = open_model(digits)
        module = module_of(load(saved, "cpu"))
        names = [name for name, each in module.named_modules() if isinstance(each, torch.nn.Conv2d)]
        wrong = {name: Ranges(Range(0.0, 1e-3), Range(0.0, 1e-3)) for name in names}
        assert "int8" not in fastest.fastest(module, saved.input, wrong).seconds


@pytest.mark.parametrize(
    "wrong", [[1.0, 2.0, 0.0, 1.0], [0.0, -1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, float("inf"), 0.0, 1.0], "x"]
)
def test_a_calibration_that_is_none_is_refused(digits, tmp_path, wrong):
    content = manifest.read(open_model(digits).folder).model_dump(mode="json")
    (tmp_path / manifest.MANIFEST).write_bytes(manifest.spell({**content, "calibration": {"backbone": wrong}}))
    with pytest.raises(errors.CorruptFileError, match="is not a valid manifest"):
        manifest.read(tmp_path)
