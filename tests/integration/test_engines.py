"""Engines: what each computes is what Detectron2 computes, within the precision's bound, for every family of the zoo."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import bentoml
import numpy as np
import pytest
import torch
from detectron2.layers import ROIAlign
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN, Backbone, ResNet
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from bentoml_detectron import demo, engines, fastest
from bentoml_detectron.artifact import config
from bentoml_detectron.engines import anchors, eager, fusion, normalization, parts, proposals, structure, winograd
from bentoml_detectron.engines.graph import Graph
from bentoml_detectron.engines.pooler import Pooler
from bentoml_detectron.errors import InvalidArgumentError
from bentoml_detectron.predictor import Predictor, on_device
from support import assert_same, built, picture, tensors, tiny_cfg
from zoo import PROJECTS, ZOO, zoo_config

needs_bf16 = pytest.mark.skipif(not engines.has_bf16(), reason="this processor does not compute in bf16")
needs_int8 = pytest.mark.skipif(not engines.has_int8(), reason="int8 needs AVX2")
every_precision = pytest.mark.parametrize(
    "precision", ["fp32", pytest.param("bf16", marks=needs_bf16), pytest.param("int8", marks=needs_int8)]
)


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


def faster(model, precision, *inputs):
    """The model in a precision, calibrated on some inputs where that is needed."""
    calibration = engines.calibrate(model, lambda each: run(each, *inputs)) if precision == "int8" else None
    return engines.accelerated(model, precision, calibration)


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
    inputs = [with_proposals(model, each) for each in (image(96, 230), image(96, 230, 1))]
    fast = faster(model, precision, *inputs)
    assert not [each for each in caplog.records if each.name == engines.__name__]
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


@pytest.mark.parametrize(("family", "place"), [("Mask R-CNN, FPN", "mask_head"), ("Keypoint R-CNN", "keypoint_head")])
def test_heads_that_give_maps_take_a_few_boxes_at_once(family, place, monkeypatch):
    model = built(zoo_config(ZOO[family]))
    fast = engines.accelerated(model, "fp32")
    head = parts.Part(f"roi_heads.{place}", "layers")
    taken, channels_last = [], eager.channels_last
    monkeypatch.setattr(engines, "_MAPS_AT_ONCE", 3)
    monkeypatch.setattr(eager, "channels_last", lambda tensor: taken.append(len(tensor)) or channels_last(tensor))
    for boxes in (0, 1, 3, 4, 7):
        given = torch.rand(boxes, model.backbone.output_shape()["p2"].channels, 14, 14)
        taken.clear()
        with torch.inference_mode():
            due, found = head.of(model)(given), head.of(fast)(given)
        assert taken == [3] * (boxes // 3) + [boxes % 3] * (boxes % 3 > 0 or not boxes)
        torch.testing.assert_close(found, due, atol=1e-4, rtol=1e-3)


@every_precision
def test_a_c4_models_many_boxes_go_through_its_head_some_at_a_time(precision, monkeypatch):
    """What its last stage gives on is averaged, and so may be integers."""
    model = built(zoo_config(ZOO["Faster R-CNN, C4"]))
    inputs = [image()]
    fast = faster(model, precision, *inputs)
    due = run(fast, *inputs)[0]["instances"]
    monkeypatch.setattr(engines, "_MAPS_AT_ONCE", 3)
    found = run(fast, *inputs)[0]["instances"]
    assert len(found) == len(due) > 3
    torch.testing.assert_close(found.scores, due.scores, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_all_normalisations_go_into_convolutions(norm):
    cfg = zoo_config(ZOO["Mask R-CNN, FPN"])
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = norm
    model = built(cfg)
    backbone = next(part for part in parts.find(model) if part.is_backbone)
    example = parts.record(model, [backbone], lambda each: run(each, image()))[backbone]
    graph = Graph(model, backbone, example)
    assert sum(isinstance(each, nn.BatchNorm2d | nn.SyncBatchNorm) for each in model.backbone.modules()) == 50
    assert not any(isinstance(each, nn.BatchNorm2d | nn.SyncBatchNorm) for each in graph.modules())


@every_precision
def test_all_parts_of_a_mask_rcnn_are_replaced(precision):
    model = built(zoo_config(ZOO["Mask R-CNN, FPN"]))
    fast = faster(model, precision)
    places = {part.place for part in parts.find(model)}
    assert places == {"backbone", "proposal_generator.rpn_head", "roi_heads.box_head", "roi_heads.mask_head"}
    assert type(fast) is type(model)
    for place in ("backbone", "proposal_generator.rpn_head", "roi_heads.box_head"):
        held = sum(each.untyped_storage().nbytes() for each in fast.get_submodule(place).parameters())
        assert held == 0, place
    assert isinstance(fast.roi_heads.box_pooler, Pooler)
    assert isinstance(fast.proposal_generator, proposals.ChoosingFirst)


@pytest.mark.parametrize("by_winograd", [False, True], ids=["as it is", "all of its 3x3 convolutions by fewer products"])
def test_fp32_finds_in_the_demo_images_what_default_predictor_finds(demo_predictor, by_winograd, monkeypatch):
    """Its own convolutions are too small to be computed by fewer products; those of the zoo's models are large enough."""
    computed, product = [], winograd.Convolution._product
    monkeypatch.setattr(winograd.Convolution, "_product", lambda *given: computed.append(given) or product(*given))
    if by_winograd:
        monkeypatch.setattr(winograd, "_LEAST_CHANNELS", 1)
        monkeypatch.setattr(winograd, "_LEAST_PIXELS", 1)
    model = engines.accelerated(demo_predictor.model, "fp32")
    predictor = Predictor(model, config.input_of(demo_predictor.cfg), config.dataset_of(demo_predictor.cfg))
    for path in demo.images():
        pixels = np.ascontiguousarray(np.asarray(Image.open(path).convert("RGB"))[:, :, ::-1])
        due, found = demo_predictor(pixels)["instances"], predictor([pixels])[0]
        assert found.class_ids.tolist() == due.pred_classes.tolist()
        assert np.abs(found.boxes - due.pred_boxes.tensor.numpy()).max(initial=0) < 0.05
        assert np.abs(found.scores - due.scores.numpy()).max(initial=0) < 1e-3
    assert bool(computed) == (by_winograd and fusion.is_there())


@every_precision
def test_exact_batches_of_a_faster_model_are_its_single_results_bit_for_bit(demo_predictor, precision):
    model = faster(demo_predictor.model, precision, image(192, 192))
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


class Tapping(ResNet):
    """Gives what each stage's last block but one has made, into which that last one must not add."""

    def forward(self, x):
        x, found = self.stem(x), {}
        for name, stage in zip(self.stage_names, self.stages, strict=True):
            made = []
            for block in stage:
                x = block(x)
                made.append(x)
            if name in self._out_features:
                found[name] = made[-2]
        return found


@needs_int8
def test_part_that_would_be_wrong_in_float32_stays_where_rounding_hides_it():
    cfg = zoo_config(ZOO["RPN, C4"])
    cfg.MODEL.RESNETS.NORM = "BN"
    model = built(cfg)
    model.backbone.__class__ = Tapping
    for name, module in model.named_modules():
        if name.endswith("conv3.norm"):
            nn.init.constant_(module.weight, 0.2)
    fast = faster(model, "int8")
    given = (image()["image"] - model.pixel_mean)[None] / model.pixel_std
    with torch.inference_mode():
        assert rms(fast.backbone(given)["res4"] - model.backbone(given)["res4"]) < 0.05 * rms(model.backbone(given)["res4"])


def test_not_a_number_in_any_output_is_no_small_error():
    example = parts.Example((torch.ones(1),), [torch.ones(2), torch.ones(2)])
    assert engines._tried(parts.Part("x"), example, "fp16", lambda: lambda inputs: [torch.ones(2), torch.ones(2)])
    bad = torch.tensor([1.0, torch.nan])
    for given in ([bad, torch.ones(2)], [torch.ones(2), bad]):
        assert engines._tried(parts.Part("x"), example, "fp16", lambda given=given: lambda inputs: given) is None


class Looking(RetinaNet):
    """Does more with features than the class that is known."""

    def forward_inference(self, images, features, predictions):
        nn.functional.conv2d(features[0], torch.ones(1, features[0].shape[1], 1, 1))
        return super().forward_inference(images, features, predictions)


class Adding(RPN):
    def forward(self, images, features, gt_instances=None):
        weight = torch.eye(next(iter(features.values())).shape[1])[:, :, None, None]
        features = {name: nn.functional.conv2d(each, weight) for name, each in features.items()}
        return super().forward(images, features, gt_instances)


@every_precision
@pytest.mark.parametrize("name", ["RetinaNet", "Faster R-CNN, FPN"])
def test_subclasses_that_use_features_themselves_get_float32(name, precision):
    model = built(zoo_config(ZOO[name]))
    if name == "RetinaNet":
        model.__class__ = Looking
    else:
        model.proposal_generator.__class__ = Adding
    assert len(run(faster(model, precision))) == 1


@needs_int8
def test_auto_leaves_out_a_precision_in_which_the_model_fails(monkeypatch):
    cfg = tiny_cfg()
    model = built(cfg)
    calibration = engines.calibrate(model, run)

    class Broken(nn.Module):
        def forward(self, inputs):
            raise TypeError("no integers")

    real = engines.accelerated
    monkeypatch.setattr(engines, "accelerated", lambda *given: Broken().eval() if given[1] == "int8" else real(*given))
    assert fastest.fastest(model, config.input_of(cfg), calibration).precision != "int8"


@every_precision
def test_threads_share_a_model(precision):
    fast = faster(built(tiny_cfg()), precision)
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


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=needs_bf16), pytest.param("int8", marks=needs_int8)])
@pytest.mark.parametrize("name", ["RetinaNet", "Mask R-CNN, GroupNorm", "Mask R-CNN, C4", "Faster R-CNN, FPN, ResNeXt"])
def test_narrow_images(name, precision):
    """Whose maps are one pixel wide and many high, of which oneDNN's kernels for bf16 make numbers out of the blue."""
    model = built(zoo_config(ZOO[name]))
    every = 1 if name.endswith("C4") else 32
    given = [torch.rand(1, 3, high, -(-wide // every) * every) for high, wide in [(1280, 2), (960, 40), (640, 100)]]
    calibration = None
    if precision == "int8":
        calibration = engines.calibrate(model, lambda each: [each.backbone(x) for x in given])
    fast = engines.accelerated(model, precision, calibration)
    with torch.inference_mode():
        for x in given * 2:
            found = fast.backbone(x)
            for level, due in model.backbone(x).items():
                assert rms(found[level].float() - due) < engines.TOLERANCES["int8"] * rms(due)


class TestProposals:
    """The RPN's choice."""

    @pytest.mark.parametrize("most", [20, 300, 700, 3000])
    @pytest.mark.parametrize("seed", range(3))
    def test_is_detectron2s(self, seed, most):
        """Whether the best boxes alone give enough of them, or more have to be compared, or all are too few."""
        rpn = built(tiny_cfg()).proposal_generator
        rpn.post_nms_topk = {**rpn.post_nms_topk, False: most}
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


class TestNormalization:
    """Images as the backbone takes them."""

    @pytest.mark.parametrize("name", ["Mask R-CNN, FPN", "Mask R-CNN, C4", "RetinaNet", "Panoptic FPN"])
    def test_is_detectron2s_to_the_last_bit(self, name):
        cfg = zoo_config(ZOO[name])
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [103.53, 116.28, 123.675], [57.375, 57.12, 58.395]
        model = built(cfg)
        ours = engines.accelerated(model, "fp32").preprocess_image
        assert isinstance(ours, normalization.Preprocess)
        for given in [[image(97, 130)], [image(64, 96)], [image(97, 130), image(120, 65, 1)]]:
            due, found = model.preprocess_image(given), ours(given)
            assert torch.equal(found.tensor, due.tensor)
            assert found.tensor.is_contiguous(memory_format=torch.channels_last)
            assert found.image_sizes == due.image_sizes

    @pytest.mark.parametrize(
        "layout", [torch.Tensor.contiguous, lambda each: each.permute(1, 2, 0).contiguous().permute(2, 0, 1)]
    )
    def test_takes_planes_and_pixels(self, layout):
        model = built(tiny_cfg())
        given = [{"image": layout(image(50, 70)["image"])}]
        assert torch.equal(normalization.Preprocess(model)(given).tensor, model.preprocess_image(given).tensor)

    def test_constraints_without_a_square_leave_it(self):
        """As FPN has them in Detectron2's main branch."""
        model = built(zoo_config(ZOO["Faster R-CNN, FPN"]))
        for side, takes in ((0, True), (1024, False)):
            model.backbone.__class__ = type("FPN", (FPN,), {"padding_constraints": {"square_size": side}})
            assert normalization.takes(model) is takes

    def test_of_a_model_that_has_its_own_stays(self):
        class Own(type(built(tiny_cfg()))):
            def preprocess_image(self, batched_inputs):
                return super().preprocess_image(batched_inputs)

        model = built(tiny_cfg())
        assert normalization.takes(model)
        model.__class__ = Own
        assert not normalization.takes(model)
        assert "preprocess_image" not in engines.accelerated(model, "fp32").__dict__


class TestAnchors:
    """Anchors of sizes that came before."""

    def grids(self, height, width):
        return [(-(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32, 64)]

    def test_are_detectron2s(self):
        generator = built(tiny_cfg()).proposal_generator.anchor_generator
        kept = anchors.Kept(generator)
        for size in [(64, 96), (96, 64), (64, 96)]:
            due = generator._grid_anchors(self.grids(*size))
            assert all(torch.equal(*each) for each in zip(kept(self.grids(*size)), due, strict=True))

    def test_are_made_once_a_size_and_given_as_copies(self):
        """So that whoever takes them may write into them."""
        generator = built(tiny_cfg()).proposal_generator.anchor_generator
        made, make = [], generator._grid_anchors
        generator._grid_anchors = lambda sizes: made.append(sizes) or make(sizes)
        kept, grids = anchors.Kept(generator), self.grids(128, 160)
        for _ in range(3):
            found = kept(grids)
            assert all(torch.equal(*each) for each in zip(found, make(grids), strict=True))
            for each in found:
                each.zero_()
        assert made == [grids]

    def test_of_200_sizes_and_of_one_that_is_too_large_are_bounded(self):
        kept = anchors.Kept(built(tiny_cfg()).proposal_generator.anchor_generator)
        for number in range(200):
            kept(self.grids(160, 16 * (number + 1)))
            assert 0 < sum(each.nbytes for tensors in kept._kept.values() for each in tensors) <= anchors.MOST_BYTES
        assert 1 < len(kept._kept) < 200
        assert sum(each.nbytes for each in kept(self.grids(3200, 3200))) > anchors.MOST_BYTES
        assert not kept._kept
        assert kept._bytes == 0

    def test_by_threads(self):
        generator = built(tiny_cfg()).proposal_generator.anchor_generator
        kept = anchors.Kept(generator)
        sizes = [(32, 32 * (number % 40 + 1)) for number in range(400)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda size: kept(self.grids(*size)), sizes))
        for size, tensors_of_size in zip(sizes, found, strict=True):
            due = generator._grid_anchors(self.grids(*size))
            assert all(torch.equal(*each) for each in zip(tensors_of_size, due, strict=True))
        assert kept._bytes == sum(each.nbytes for tensors in kept._kept.values() for each in tensors)

    def test_of_a_generator_that_makes_its_own_stay(self):
        class Own(DefaultAnchorGenerator):
            def _grid_anchors(self, grid_sizes):
                return super()._grid_anchors(grid_sizes)

        generator = built(tiny_cfg()).proposal_generator.anchor_generator
        assert anchors.takes(generator)
        generator.__class__ = Own
        assert not anchors.takes(generator)


def assert_computes_in(precision, model, fast):
    """A view under autocast: its parts alone are in 16 bits, and give float32."""
    inputs = [image(96, 230), image(96, 230, 1)]
    heads = fast.roi_heads
    seen = []
    handle = heads.box_predictor.register_forward_pre_hook(
        lambda _, given: seen.append((given[0].dtype, torch.is_autocast_enabled(given[0].device.type)))
    )
    examples = parts.record(model, parts.find(model), lambda each: run(each, *inputs))
    assert {part.place for part in examples} == {
        "backbone", "proposal_generator.rpn_head", "roi_heads.box_head", "roi_heads.mask_head"
    }  # fmt: skip
    for part, example in examples.items():
        with torch.inference_mode():
            found = structure.tensors(part.of(fast)(*example.arguments))
        for mine, due in zip(found, structure.tensors(example.output), strict=True):
            assert mine.dtype == torch.float32
            error = rms(mine - due) / rms(due)
            assert 1e-4 < error <= engines.TOLERANCES[precision], part  # float32 would be nearer
    seen.clear()
    results = run(fast, *inputs)
    handle.remove()
    assert seen == [(torch.float32, False)]
    assert type(heads.box_pooler) is type(model.roi_heads.box_pooler)
    assert type(fast.proposal_generator) is type(model.proposal_generator)
    assert all(each["instances"].pred_boxes.tensor.dtype == torch.float32 for each in results)


class TestAutocast:
    """What a GPU gets, on the CPU, whose autocast has the same parts."""

    def test_weights_are_in_16_bits_once_and_norms_stay(self):
        cfg = zoo_config(ZOO["Mask R-CNN, FPN"])
        cfg.MODEL.FPN.NORM = "GN"
        model = built(cfg)
        graphs = []
        run = eager.autocast

        def autocast(graph, *rest):
            graphs.append(graph)
            return run(graph, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(eager, "autocast", autocast)
            engines.autocast(model, "bf16")
        layers = [each for graph in graphs for each in graph.modules()]
        for kind, dtype in (
            (nn.Conv2d, torch.bfloat16), (nn.ConvTranspose2d, torch.bfloat16), (nn.Linear, torch.bfloat16),
            (nn.GroupNorm, torch.float32),
        ):  # fmt: skip
            own = [value for each in layers if isinstance(each, kind) for value in each.parameters(recurse=False)]
            assert {value.dtype for value in own} == {dtype}, kind
        assert {each.dtype for each in model.parameters()} == {torch.float32}

    @pytest.mark.parametrize("precision", engines.HALVES)
    def test_parts_are_in_16_bits_and_all_else_is_not(self, precision):
        model = built(zoo_config(ZOO["Mask R-CNN, FPN"]))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert_computes_in(precision, model, engines.autocast(model, precision))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model.backbone.bottom_up.stem.conv1.weight.is_contiguous()

    @pytest.mark.slow
    @pytest.mark.parametrize("make", NAMES)
    @pytest.mark.parametrize("precision", engines.HALVES)
    def test_every_family(self, precision, make, caplog):
        model = built(make())
        fast = engines.autocast(model, precision)
        assert not [each for each in caplog.records if each.name == engines.__name__]
        given = with_proposals(model, image(96, 230))
        theirs, mine = run(model, given)[0], run(fast, given)[0]
        assert theirs.keys() == mine.keys()
        if "sem_seg" in theirs:
            assert mine["sem_seg"].dtype == torch.float32
            assert rms(mine["sem_seg"] - theirs["sem_seg"]) <= engines.TOLERANCES[precision] * rms(theirs["sem_seg"])

    def test_a_part_that_overflows_in_fp16_stays_in_float32(self, caplog):
        model = built(tiny_cfg())
        with torch.no_grad():
            model.backbone.fpn_output2.bias.fill_(1e5)
        fast, given = engines.autocast(model, "fp16"), torch.rand(1, 3, 64, 64)
        told = [each.message for each in caplog.records if each.name == engines.__name__]
        assert told[0] == "backbone in fp16 is off by inf; it runs unaccelerated"
        with torch.inference_mode():
            assert torch.equal(fast.backbone(given)["p2"], model.backbone(given)["p2"])

    @pytest.mark.parametrize("precision", engines.HALVES)
    def test_finds_in_the_demo_images_what_fp32_finds(self, precision, demo_predictor):
        fast = engines.autocast(demo_predictor.model, precision)
        source = config.input_of(demo_predictor.cfg)
        for path in demo.images()[:4]:
            due = Predictor(demo_predictor.model, source)([path], score_threshold=0.6)[0]
            found = Predictor(fast, source)([path], score_threshold=0.6)[0]
            assert sorted(found.class_ids.tolist()) == sorted(due.class_ids.tolist())

    def test_devices_that_do_not_compute_in_a_precision_are_named(self):
        meta = torch.device("meta")
        engines.check("fp32", meta)
        with pytest.raises(InvalidArgumentError, match=r"^meta, .* does not support bf16; use --precision fp32"):
            engines.check("bf16", meta)
        with pytest.raises(InvalidArgumentError, match="fp16 needs a GPU, not cpu; use --precision fp32"):
            engines.check("fp16")
        with pytest.raises(InvalidArgumentError, match="int8 needs the CPU, not cuda:0; use --precision bf16"):
            engines.check("int8", torch.device("cuda:0"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestGpu:
    """The same on a GPU."""

    def test_fp32_is_the_model_itself_but_for_anchors_that_are_kept(self):
        model = built(tiny_cfg()).cuda()
        fast = engines.accelerated(model, "fp32")
        assert isinstance(fast.proposal_generator.anchor_generator._grid_anchors, anchors.Kept)
        assert fast.backbone is model.backbone
        for _ in range(2):
            grids = [(5, 7), (3, 4), (2, 2), (1, 1), (1, 1)]
            made = [view.proposal_generator.anchor_generator._grid_anchors(grids) for view in (fast, model)]
            assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))

    def test_bf16_is_for_gpus_that_compute_in_it(self):
        device = torch.device("cuda:0")
        assert engines.has_bf16(device) == (torch.cuda.get_device_capability(device) >= (8, 0))
        if not engines.has_bf16(device):
            with pytest.raises(InvalidArgumentError, match=r"use --precision fp32 \(precision='fp32'\)"):
                engines.check("bf16", device)

    @pytest.mark.parametrize("precision", engines.HALVES)
    def test_parts_are_in_16_bits_and_all_else_is_not(self, precision):
        model = built(zoo_config(ZOO["Mask R-CNN, FPN"])).cuda()
        fast = engines.accelerated(model, precision)
        assert not list(fast.backbone.parameters())
        assert_computes_in(precision, model, fast)

    @pytest.mark.slow
    @pytest.mark.parametrize("make", NAMES)
    @pytest.mark.parametrize("precision", engines.HALVES)
    def test_every_family(self, precision, make, caplog):
        model = built(make()).cuda()
        fast = engines.accelerated(model, precision)
        assert not [each for each in caplog.records if each.name == engines.__name__]
        given = with_proposals(model, image(96, 230))
        assert run(model, given)[0].keys() == run(fast, given)[0].keys()

    @pytest.mark.parametrize("precision", engines.HALVES)
    def test_finds_in_the_demo_images_what_the_cpu_finds(self, precision, demo_predictor):
        saved = bentoml.detectron.save_model(f"{precision}-on-gpu", demo_predictor)
        due = bentoml.detectron.load_predictor(saved)(demo.images()[:4], score_threshold=0.6)
        found = bentoml.detectron.load_predictor(saved, "cuda:0", precision=precision)(demo.images()[:4], score_threshold=0.6)
        assert [sorted(each.class_ids.tolist()) for each in found] == [sorted(each.class_ids.tolist()) for each in due]

    def test_auto_takes_the_fastest_of_what_finds_the_same(self, demo_predictor):
        model = copy.deepcopy(demo_predictor.model).cuda()
        chosen = fastest.fastest(model, config.input_of(demo_predictor.cfg), None)
        assert {"fp32"} < chosen.seconds.keys() <= {"fp32", *engines.HALVES}
        assert chosen.seconds[chosen.precision] == min(chosen.seconds.values())

    @pytest.mark.parametrize("order", [1, -1])
    def test_images_get_there_whole(self, order):
        """Many at a time, so that copies are under way while others are made; channels in either order."""
        pixels = [picture(200, 300, seed)[:, :, ::order] for seed in range(40)]
        there = [on_device(each, torch.device("cuda:0")) for each in pixels]
        for each, due in zip(there, pixels, strict=True):
            here = on_device(due, torch.device("cpu"))
            assert torch.equal(each.cpu(), here)
            assert each.dtype == torch.float32


def test_unknown_precision_is_named():
    with pytest.raises(InvalidArgumentError, match="precision='fp8'"):
        engines.check("fp8")


class ScalingRPN(RPN):
    """Writes into its anchors, which are its own in Detectron2."""

    def forward(self, images, features, gt_instances=None):
        features = [features[name] for name in self.in_features]
        boxes = self.anchor_generator(features)
        for each in boxes:
            each.scale(1.1, 1.1)
        logits, deltas = self.rpn_head(features)
        logits = [each.permute(0, 2, 3, 1).flatten(1) for each in logits]
        deltas = [each.view(len(each), -1, 4, *each.shape[-2:]).permute(0, 3, 4, 1, 2).flatten(1, -2) for each in deltas]
        return self.predict_proposals(boxes, logits, deltas, images.image_sizes), {}


class ViewingRPNHead(StandardRPNHead):
    def forward(self, features):
        return super().forward([each.view(len(each), -1).view(each.shape) for each in features])


class ViewingBoxHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16 * 7 * 7, 16)

    def forward(self, x):
        return self.fc(x.view(len(x), -1)).relu()


class ViewingPooled(StandardROIHeads):
    def _forward_box(self, features, proposals):
        pooled = self.box_pooler([features[name] for name in self.box_in_features], [each.proposal_boxes for each in proposals])
        found = self.box_predictor(self.box_head(pooled.view(len(pooled), -1).view(pooled.shape)))
        return self.box_predictor.inference(found, proposals)[0]


class ViewingFeatures(StandardROIHeads):
    def forward(self, images, features, proposals, targets=None):
        return super().forward(images, {name: each.view(-1).view(each.shape) for name, each in features.items()}, proposals)


class Doubling(ROIAlign):
    def forward(self, input, rois):
        return super().forward(input, rois) * 2


class AskingWhereItIs(GeneralizedRCNN):
    def preprocess_image(self, batched_inputs):
        assert next(self.backbone.parameters()).device.type == next(self.roi_heads.box_head.parameters()).device.type == "cpu"
        return super().preprocess_image(batched_inputs)


def _double(model):
    for each in model.roi_heads.box_pooler.level_poolers:
        each.__class__ = Doubling


def _halve(model):
    whole = model.preprocess_image

    def half(given):
        images = whole(given)
        images.tensor = images.tensor * 0.5
        return images

    model.preprocess_image = half


def _shrink(model):
    decode = model.proposal_generator._decode_proposals
    model.proposal_generator._decode_proposals = lambda *given: [each * 0.9 for each in decode(*given)]


def _changed(change):
    model = built(tiny_cfg())
    change(model)
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.proposal_generator, "__class__", ScalingRPN),
        lambda model: setattr(model.proposal_generator.rpn_head, "__class__", ViewingRPNHead),
        lambda model: setattr(model.roi_heads, "box_head", ViewingBoxHead()),
        lambda model: setattr(model.roi_heads, "__class__", ViewingPooled),
        lambda model: setattr(model.roi_heads, "__class__", ViewingFeatures),
        lambda model: setattr(model.backbone, "lock", threading.Lock()),
        _double,
        lambda model: model.roi_heads.box_pooler.register_forward_hook(lambda module, given, pooled: pooled * 2),
        lambda model: model.roi_heads.box_pooler.level_poolers[1].register_forward_pre_hook(lambda module, given: given),
        lambda model: setattr(model, "__class__", AskingWhereItIs),
        _halve,
        _shrink,
    ],
    ids=["anchors are written into", "RPN's head views", "box head views", "pooled features are viewed",
         "feature maps are viewed", "backbone that cannot be copied", "RoIAlign that doubles", "hook on a pooler",
         "hook before a level's pooler", "parts are asked where they are", "preprocess_image that is set on the model",
         "_decode_proposals that is set on the RPN"],
)  # fmt: skip
@every_precision
def test_parts_of_a_users_own_find_what_they_find_in_detectron2(change, precision):
    """Each of these is right with ``DefaultPredictor``, which makes anchors anew and has no tensor but plain ones."""
    model = _changed(change)
    fast = faster(model, precision)
    due = run(model)[0]["instances"]
    for _ in range(3):
        found = run(fast)[0]["instances"]
        assert len(found) > 0
        if precision == "fp32":
            assert len(found) == len(due)
            torch.testing.assert_close(found.pred_boxes.tensor, due.pred_boxes.tensor, atol=1e-2, rtol=1e-3)


class Sized(FPN):
    """Keeps its image's width between two steps, as Swin's blocks do; `between` is where threads may come in between."""

    between = staticmethod(lambda: None)

    def forward(self, x):
        self.width = x.shape[-1]
        self.between()
        return {name: each * self.width for name, each in super().forward(x).items()}


@every_precision
def test_what_a_part_writes_is_its_call_s_own(precision, monkeypatch):
    model = built(tiny_cfg())
    model.backbone.__class__ = Sized
    fast = faster(model, precision)
    given = [torch.rand(1, 3, 64, 96), torch.rand(1, 3, 64, 160)]
    with torch.inference_mode():
        due = [{name: as_numbers(each) for name, each in fast.backbone(each).items()} for each in given]
    both = threading.Barrier(2)
    monkeypatch.setattr(Sized, "between", staticmethod(lambda: both.wait(timeout=30)))

    def found(image):
        with torch.inference_mode():
            return {name: as_numbers(each) for name, each in fast.backbone(image).items()}

    with ThreadPoolExecutor(2) as pool:
        assert_same(list(pool.map(found, given)), due)
    assert not hasattr(model.backbone, "width")


def as_numbers(features):
    return features.float() if torch.is_tensor(features) else engines._numbers(features)


def _checkpointed(forward, own, offload, x):
    return forward(own(), x)


def test_wrapped_forward_computes_with_the_copy_s_own_weights():
    """FairScale's checkpoint_wrapper binds a module's forward to the module weakly, which copies as it is."""
    model = built(tiny_cfg())
    for block in model.backbone.bottom_up.res3:
        block.forward = functools.partial(_checkpointed, type(block).forward, weakref.ref(block), False)
    given = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        due = {name: each.clone() for name, each in model.backbone(given).items()}
    fast = engines.accelerated(model, "fp32")
    assert isinstance(fast.backbone, parts._Replaced)
    del model, block
    gc.collect()
    with torch.inference_mode():
        for name, each in fast.backbone(given).items():
            torch.testing.assert_close(each, due[name], rtol=1e-4, atol=1e-5)


def test_part_with_a_forward_bound_to_its_own_modules_stays(caplog):
    model = built(tiny_cfg())
    block = model.backbone.bottom_up.res3[0]
    block.forward = lambda x, own=block: type(own).forward(own, x)
    fast = engines.accelerated(model, "fp32")
    assert "backbone does not run in fp32; it runs unaccelerated" in caplog.text
    nn.init.zeros_(block.conv1.weight)  # it is the same still
    given = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        for name, each in fast.backbone(given).items():
            assert torch.equal(each, model.backbone(given)[name])
