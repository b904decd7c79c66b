"""Between BentoML's own adapter and this package: each reads what the other wrote, wherever it can."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import bentoml
import pytest
import torch
from bentoml._internal.frameworks import detectron as adapter
from detectron2.engine import DefaultPredictor

from bentoml_detectron import engines, errors
from bentoml_detectron.optimization import optimize
from support import assert_same, built, checkpoint, picture, small_cfg, tiny_cfg

DATA = Path(__file__).resolve().parent.parent / "data" / "bentoml_1_3"


def run(module: torch.nn.Module):
    with torch.no_grad():
        return module([{"image": torch.as_tensor(picture().transpose(2, 0, 1).copy())}])


@pytest.fixture
def predictor(tmp_path):
    return DefaultPredictor(checkpoint(tiny_cfg(), tmp_path / "model_final.pth"))


def test_predictor_of_bentoml_1_4_loads_from_its_stored_weights(predictor, tmp_path):
    """Nothing to warn of where the original weights are the stored ones; where they are gone, it loads all the same."""
    expected = predictor(picture())
    saved = adapter.save_model("old-predictor", predictor)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(bentoml.detectron.load_model(saved.tag)(picture()), expected)
        (tmp_path / "model_final.pth").unlink()
        assert_same(bentoml.detectron.load_model(saved.tag)(picture()), expected)
    with pytest.raises(AssertionError, match="not found"):
        adapter.load_model(saved.tag)  # what users have today


def test_module_of_bentoml_1_4_loads():
    cfg = tiny_cfg()
    module = built(cfg)
    saved = adapter.save_model("old-module", module, config=cfg)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(run(bentoml.detectron.load_model(saved.tag)), run(module))


@pytest.mark.skipif(not engines.has_int8(), reason="int8 needs AVX2")
def test_model_of_bentoml_is_not_calibrated_but_to_be_saved_again(predictor):
    saved = adapter.save_model("old-optimized", predictor)
    with pytest.raises(errors.InvalidModelError, match="load it and save it with bentoml"):
        optimize(saved.tag, ["none.jpg"], name="new")


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ("other.pth", "differ from"),
        ("", "differ from the random weights"),
        ("http://127.0.0.1:9/a.pth", "could not be compared"),
    ],
    ids=["another file", "none", "a URL"],
)
def test_warns_where_the_old_loader_would_have_used_other_weights(weights, says, predictor, tmp_path, monkeypatch):
    """BentoML's adapter reloads a predictor from `MODEL.WEIGHTS`; a URL is not fetched to find out."""
    monkeypatch.chdir(tmp_path)
    checkpoint(tiny_cfg(), tmp_path / "other.pth", seed=9)
    expected = predictor(picture())
    predictor.cfg.MODEL.WEIGHTS = weights
    saved = adapter.save_model("old-differs", predictor)
    with pytest.warns(UserWarning, match=says) as caught:
        loaded = bentoml.detectron.load_model(saved.tag)
    assert_same(loaded(picture()), expected)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("kind", ["predictor", "module"])
def test_models_of_bentoml_1_3_load(kind, store, tmp_path, monkeypatch):
    """Written by BentoML 1.3.22; see tests/data/make_bentoml_1_3.py."""
    monkeypatch.chdir(tmp_path)
    folder = store / f"old_{kind}" / {"predictor": "phuyv6hgxsqguax4", "module": "phvszshgxsqguax4"}[kind]
    shutil.copytree(DATA / kind, folder)
    torch.manual_seed(13)
    original = built(small_cfg(), seed=13)
    loaded = bentoml.detectron.load_model(f"old_{kind}:{folder.name}")
    assert type(loaded) is (DefaultPredictor if kind == "predictor" else type(original))
    assert_same(run(loaded.model if kind == "predictor" else loaded), run(original))
    if kind == "predictor":
        assert str(folder / "saved_model.pth") == loaded.cfg.MODEL.WEIGHTS


def test_our_models_load_in_bentomls_adapter(predictor):
    """A predictor where its original weights are still there, which that adapter needs; a module always."""
    saved = bentoml.detectron.save_model("new-predictor", predictor)
    assert_same(adapter.load_model(saved.tag)(picture()), predictor(picture()))
    cfg = tiny_cfg()
    cfg.freeze()
    module = built(cfg)
    saved = bentoml.detectron.save_model("new-module", module, cfg)
    assert_same(run(adapter.load_model(saved.tag)), run(module))


def test_old_models_run_in_our_runnable(predictor):
    saved = adapter.save_model("old-runs", predictor)
    runnable = bentoml.detectron.get_runnable(bentoml.detectron.get(saved.tag))()
    assert_same(runnable.__call__(picture()), predictor(picture()))


def test_saving_an_old_model_again_makes_it_one_of_ours(predictor):
    old = bentoml.detectron.load_model(adapter.save_model("again", predictor).tag)
    new = bentoml.detectron.save_model("again", old)
    assert new.info.api_version == "v2"
    assert_same(bentoml.detectron.load_model(new)(picture()), predictor(picture()))


@pytest.mark.parametrize("weights", [None, 7, ["a"], "a\0b", "\ud800"])
def test_odd_weights_in_an_old_config_do_not_stop_loading(weights, predictor):
    expected = predictor(picture())
    predictor.cfg.MODEL.WEIGHTS = weights
    saved = adapter.save_model("odd", predictor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(bentoml.detectron.load_model(saved.tag)(picture()), expected)


def test_training_checkpoint_is_compared_by_its_model_alone(predictor, tmp_path):
    """What Detectron2's trainer writes holds optimizer and scheduler too."""
    from collections import Counter

    optimizer = torch.optim.SGD(predictor.model.parameters(), lr=0.1, momentum=0.9)
    scheduler = {"milestones": Counter([10, 20]), "last_epoch": 5}
    content = {
        "model": predictor.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler,
        "iteration": 7,
    }
    torch.save(content, tmp_path / "model_final.pth")
    saved = adapter.save_model("trained", predictor)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        bentoml.detectron.load_model(saved.tag)
