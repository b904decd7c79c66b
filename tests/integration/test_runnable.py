"""The legacy runner: predictor and module, batchable or not, called directly and through a runner."""

from __future__ import annotations

import bentoml
import numpy as np
import pytest
import torch

from support import assert_same, built, picture, tiny_cfg

BATCHABLE = {"__call__": {"batchable": True, "batch_dim": 0}}


@pytest.fixture(scope="module")
def module():
    return built(tiny_cfg())


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    from detectron2.engine import DefaultPredictor

    from support import checkpoint

    cfg = tiny_cfg()
    cfg.INPUT.FORMAT = "RGB"
    return DefaultPredictor(checkpoint(cfg, tmp_path_factory.mktemp("weights") / "model.pth"))


def save(model, cfg, signatures=None):
    name = "runs-" + ("batch" if signatures else "one")
    return bentoml.detectron.save_model(name, model, cfg, signatures=signatures)


def chw(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def expected_of_module(module, image: np.ndarray):
    with torch.no_grad():
        return module([{"image": torch.as_tensor(chw(image))}])[0]


def runner(saved):
    runner = saved.to_runner()
    runner.init_local(quiet=True)
    return runner


def test_predictor(predictor):
    result = runner(save(predictor, None)).run(picture())
    assert_same(result, predictor(picture()))


def test_module_takes_images_as_arguments(module):
    """Arrays become tensors; one result an image comes back, as from the module."""
    results = runner(save(module, tiny_cfg())).run(chw(picture()), torch.as_tensor(chw(picture(seed=1))))
    assert len(results) == 2
    with torch.no_grad():
        both = module([{"image": torch.as_tensor(chw(picture(seed=seed)))} for seed in (0, 1)])
    assert_same(results, both)


@pytest.mark.parametrize("kind", ["predictor", "module"])
def test_batchable_runs_images_as_one_batch(kind, module, predictor, monkeypatch):
    """The model is called once for all images of a call, of different sizes too."""
    images = [picture(), picture(seed=1), picture(48, 90, seed=2)]
    saved = save(predictor, None, BATCHABLE) if kind == "predictor" else save(module, tiny_cfg(), BATCHABLE)
    runnable = bentoml.detectron.get_runnable(saved)()
    model = runnable.model.model if kind == "predictor" else runnable.model
    calls = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, inputs: calls.append(len(inputs)) or forward(self, inputs))
    results = runnable.__call__(images if kind == "predictor" else [chw(image) for image in images])
    assert calls == [3]
    assert len(results) == 3
    for image, result in zip(images, results, strict=True):
        alone = predictor(image) if kind == "predictor" else expected_of_module(module, image)
        assert result["instances"].image_size == alone["instances"].image_size
        # Padding to the batch's common size may move the last bits.
        assert torch.allclose(result["instances"].scores[:5], alone["instances"].scores[:5], atol=1e-3)


def test_batchable_through_a_runner(predictor):
    results = runner(save(predictor, None, BATCHABLE)).run([picture(), picture()])
    assert_same(results[0], results[1])
    # A batch of two may take other kernels than one image alone.
    alone = predictor(picture())["instances"]
    assert torch.allclose(results[0]["instances"].pred_boxes.tensor, alone.pred_boxes.tensor, atol=1e-2)
    assert torch.allclose(results[0]["instances"].scores, alone.scores, atol=1e-4)


def test_batch_as_one_array(predictor, module):
    stack = np.stack([picture(), picture(seed=1)])
    assert len(runner(save(predictor, None, BATCHABLE)).run(stack)) == 2
    assert len(runner(save(module, tiny_cfg(), BATCHABLE)).run(stack.transpose(0, 3, 1, 2))) == 2


def test_every_signature_is_a_method(module):
    signatures = {"__call__": {"batchable": False}, "inference": {"batchable": False}}
    local = runner(save(module, tiny_cfg(), signatures))
    assert_same(local.inference.run(chw(picture())), [expected_of_module(module, picture())])


def test_runs_in_inference_mode(module, monkeypatch):
    runnable = bentoml.detectron.get_runnable(save(module, tiny_cfg()))()
    modes = []
    forward = type(runnable.model).forward
    monkeypatch.setattr(
        type(runnable.model),
        "forward",
        lambda self, inputs: modes.append(torch.is_inference_mode_enabled()) or forward(self, inputs),
    )
    runnable.__call__(chw(picture()))
    assert modes == [True]


def test_class_says_where_it_can_run_and_changes_no_default(module):
    saved = save(module, tiny_cfg())
    runnable = saved.to_runnable()
    assert runnable.SUPPORTED_RESOURCES == ("nvidia.com/gpu", "cpu")
    assert runnable.SUPPORTS_CPU_MULTI_THREADING is True
    before = torch.get_default_dtype(), torch.get_default_device()
    instance = runnable()
    assert instance.device_id == ("cuda" if torch.cuda.is_available() else "cpu")
    assert (torch.get_default_dtype(), torch.get_default_device()) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("signatures", [None, BATCHABLE])
def test_runs_on_a_gpu_where_there_is_one(predictor, signatures):
    runnable = bentoml.detectron.get_runnable(save(predictor, None, signatures))()
    assert {each.device.type for each in runnable.model.model.parameters()} == {"cuda"}
    found = runnable.__call__([picture()])[0] if signatures else runnable.__call__(picture())
    due = predictor(picture())["instances"]
    assert torch.allclose(found["instances"].scores.cpu(), due.scores, atol=1e-2)
