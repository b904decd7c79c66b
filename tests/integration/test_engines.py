"""Engines: what each computes is what Detectron2 computes, within the precision's bound, for every family of the zoo."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances
from PIL import Image

from bentoml_detectron import demo, engines
from bentoml_detectron.artifact import config
from bentoml_detectron.engines import parts, proposals, structure
from bentoml_detectron.engines.pooler import Pooler
from bentoml_detectron.errors import InvalidArgumentError
from bentoml_detectron.predictor import Predictor
from support import assert_same, built, picture, tensors, tiny_cfg
from zoo import PROJECTS, ZOO, zoo_config

needs_bf16 = pytest.mark.skipif(not engines.has_bf16(), reason="this processor does not compute in bf16")


every_precision = pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])


def image(height=128, width=160, seed=0):
    pixels = torch.from_numpy(np.ascontiguousarray(picture(height, width, seed).transpose(2, 0, 1))).float()
    return {"image": pixels, "height": height, "width": width}


def run(model, *inputs):
    with torch.inference_mode():
        return model(list(inputs or [image()]))


def with_proposals(model, given):
    """Fast R-CNN takes what others have proposed."""
    if getattr(model, "proposal_generator", model) is not None:
        return given
    boxes = Boxes(torch.tensor([[0.0, 0.0, 50.0, 40.0], [10.0, 20.0, 90.0, 80.0]]))
    proposed = Instances((given["height"], given["width"]), proposal_boxes=boxes, objectness_logits=torch.zeros(2))
    return {**given, "proposals": proposed}


def rms(tensor):
    return float(tensor.float().square().mean().sqrt())


NAMES = [pytest.param(lambda name=name: zoo_config(name), id=label) for label, name in ZOO.items() if "deformable" not in label]
PROJECT_CONFIGS = [
    pytest.param(*each.values, marks=each.marks, id=label) if hasattr(each, "values") else pytest.param(each, id=label)
    for label, each in PROJECTS.items()
]


@pytest.mark.slow
@every_precision
@pytest.mark.parametrize("make", NAMES + PROJECT_CONFIGS)
def test_every_family(make, precision, caplog):
    """Each part, on the same inputs, gives what Detectron2's does, for a batch of two of a size that it was not made with.

    Of the whole only kind and number of what is found are compared: weights are random and thresholds let all through, so that
    which are found turns on rounding.
    """
    model = built(make())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = engines.accelerated(model, precision)
    assert not [each for each in caplog.records if each.name == engines.__name__]
    inputs = [with_proposals(model, each) for each in (image(96, 230), image(96, 230, 1))]
    examples = parts.record(model, parts.find(model), lambda each: run(each, *inputs))
    assert examples
    for part, example in examples.items():
        with torch.inference_mode():
            found = structure.tensors(part.of(fast)(*example.arguments))
        for mine, due in zip(found, structure.tensors(example.output), strict=True):
            assert mine.shape == due.shape
            assert rms(mine.float() - due) <= engines.TOLERANCES[precision] * rms(due), part
    for theirs, mine in zip(run(model, *inputs), run(fast, *inputs), strict=True):
        assert theirs.keys() == mine.keys()
        for key in theirs.keys() & {"instances", "proposals"}:
            assert theirs[key].get_fields().keys() == mine[key].get_fields().keys()
            assert precision != "fp32" or len(mine[key]) > 0
            assert precision != "fp32" or len(mine[key]) == len(theirs[key])
        if "sem_seg" in theirs:
            assert mine["sem_seg"].shape == theirs["sem_seg"].shape
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@every_precision
def test_all_parts_of_a_mask_rcnn_are_replaced(precision):
    model = built(zoo_config(ZOO["Mask R-CNN, FPN"]))
    fast = engines.accelerated(model, precision)
    places = {part.place for part in parts.find(model)}
    assert places == {"backbone", "proposal_generator.rpn_head", "roi_heads.box_head", "roi_heads.mask_head"}
    assert type(fast) is type(model)
    for place in ("backbone", "proposal_generator.rpn_head", "roi_heads.box_head"):
        assert not list(fast.get_submodule(place).parameters()), place
    assert isinstance(fast.roi_heads.box_pooler, Pooler)
    assert isinstance(fast.proposal_generator, proposals.ChoosingFirst)


def test_fp32_finds_in_the_demo_images_what_default_predictor_finds(demo_predictor):
    model = engines.accelerated(demo_predictor.model, "fp32")
    predictor = Predictor(model, config.input_of(demo_predictor.cfg), config.dataset_of(demo_predictor.cfg))
    for path in demo.images():
        pixels = np.ascontiguousarray(np.asarray(Image.open(path).convert("RGB"))[:, :, ::-1])
        due, found = demo_predictor(pixels)["instances"], predictor([pixels])[0]
        assert found.class_ids.tolist() == due.pred_classes.tolist()
        assert np.abs(found.boxes - due.pred_boxes.tensor.numpy()).max(initial=0) < 0.05
        assert np.abs(found.scores - due.scores.numpy()).max(initial=0) < 1e-3


@every_precision
def test_exact_batches_of_a_faster_model_are_its_single_results_bit_for_bit(demo_predictor, precision):
    model = engines.accelerated(demo_predictor.model, precision)
    dataset = config.dataset_of(demo_predictor.cfg)
    predictor = Predictor(model, config.input_of(demo_predictor.cfg), dataset, batch="exact")
    images = demo.images()[:4]
    together = predictor(images)
    assert all(len(each) > 3 for each in together)
    assert together == [predictor([each])[0] for each in images]


class Failing(Backbone):
    """A backbone that fails for other than float32."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    @property
    def size_divisibility(self):
        return self.module.size_divisibility

    def output_shape(self):
        return self.module.output_shape()

    def forward(self, x):
        if x.dtype != torch.float32:
            raise RuntimeError("only float32")
        return self.module(x)


@needs_bf16
def test_part_that_no_engine_runs_stays_as_it_is():
    model = parts.with_module(built(tiny_cfg()), "backbone", Failing)
    fast = engines.accelerated(model, "bf16")
    given = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        for name, due in model.backbone(given).items():
            assert torch.equal(fast.backbone(given)[name], due)
    assert len(run(fast)) == 1


@every_precision
def test_threads_share_a_model(precision):
    fast = engines.accelerated(built(tiny_cfg()), precision)
    inputs = [image(64 + 32 * (each % 2), 96, each) for each in range(6)]
    alone = [tensors(run(fast, each)[0]["instances"]) for each in inputs]
    together = [None] * len(inputs)

    def work(place):
        for _ in range(3):
            together[place] = tensors(run(fast, inputs[place])[0]["instances"])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(inputs))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


class TestProposals:
    """The RPN's choice."""

    @pytest.mark.parametrize("seed", range(5))
    def test_is_detectron2s(self, seed):
        rpn = built(tiny_cfg()).proposal_generator
        generator = torch.Generator().manual_seed(seed)
        anchors = [
            Boxes(torch.rand(count, 4, generator=generator) * 50 + torch.tensor([0, 0, 60, 60])) for count in (3000, 700, 5)
        ]
        logits = [torch.randn(2, len(each), generator=generator) for each in anchors]
        deltas = [torch.randn(2, len(each), 4, generator=generator) for each in anchors]
        logits[0][0, 7], deltas[1][1, 3] = float("inf"), float("nan")
        sizes = [(100, 120), (64, 90)]
        due = rpn.predict_proposals(anchors, logits, deltas, sizes)
        found = proposals.choosing_first(rpn).predict_proposals(anchors, logits, deltas, sizes)
        for one, other in zip(found, due, strict=True):
            assert_same(one, other)

    def test_of_an_rpn_that_chooses_in_its_own_way_stay(self):
        class Own(RPN):
            def predict_proposals(self, *arguments):
                return super().predict_proposals(*arguments)

        rpn = built(tiny_cfg()).proposal_generator
        assert proposals.takes(rpn)
        rpn.__class__ = Own
        assert not proposals.takes(rpn)


def test_unknown_precision_is_named():
    with pytest.raises(InvalidArgumentError, match="precision='fp8'"):
        engines.check("fp8")
