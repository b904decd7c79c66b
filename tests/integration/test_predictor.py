"""`Predictor`: what ``DefaultPredictor`` gives, for many images at a time and with options for each."""

from __future__ import annotations

import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bentoml
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultPredictor
from detectron2.layers import CycleBatchNormList
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

import bentoml_detectron
from bentoml_detectron import demo, engines, errors, forward, outputs, selftest
from bentoml_detectron.artifact import config
from bentoml_detectron.artifact.manifest import Dataset, Input
from bentoml_detectron.images import Limits
from bentoml_detectron.masks import decode, from_roi_masks
from bentoml_detectron.options import Options, options
from bentoml_detectron.predictor import MOST_PIXELS_ON_CPU, Predictor, free_memory
from bentoml_detectron.results import Detections
from support import built, checkpoint, picture, small_cfg, tiny_cfg
from zoo import PROJECTS, ZOO, zoo_config

WITH_OWN_PROPOSALS = {name: zoo for name, zoo in ZOO.items() if name != "Fast R-CNN, FPN"}
CONFIGS = {name: lambda zoo=zoo: zoo_config(zoo) for name, zoo in WITH_OWN_PROPOSALS.items()}
CONFIGS |= {name: each for name, each in PROJECTS.items() if callable(each)}
FEW = ["Faster R-CNN, FPN", "Mask R-CNN, C4", "RetinaNet", "Keypoint R-CNN", "Panoptic FPN", "Semantic FPN"]


def pixels(index: int) -> np.ndarray:
    """A sample image of the demo, (192, 192, 3) uint8 in BGR."""
    return np.ascontiguousarray(np.asarray(Image.open(demo.images()[index]).convert("RGB"))[:, :, ::-1])


def of(cfg, module=None, **arguments) -> Predictor:
    return Predictor(module or built(cfg), config.input_of(cfg), config.dataset_of(cfg), **arguments)


def assert_equals_detectron2(found: Detections, output: dict) -> None:
    """`found` says, to the last bit, what a Detectron2 model gave."""
    said = 0
    if "instances" in output or "proposals" in output:
        instances = output.get("instances", output.get("proposals"))
        boxes = instances.get("pred_boxes" if "instances" in output else "proposal_boxes")
        assert np.array_equal(found.boxes, boxes.tensor.numpy())
        said += len(instances)
    if "instances" in output:
        assert np.array_equal(found.scores, instances.scores.numpy())
        assert np.array_equal(found.class_ids, instances.pred_classes.numpy())
        assert (found.masks is not None) == instances.has("pred_masks")
        assert (found.keypoints is not None) == instances.has("pred_keypoints")
        if instances.has("pred_masks"):
            for ours, theirs in zip(found.masks, instances.pred_masks.numpy(), strict=True):
                assert ours["counts"] == coco_mask.encode(np.asfortranarray(theirs.astype(np.uint8)))["counts"].decode()
        if instances.has("pred_keypoints"):
            assert np.array_equal(found.keypoints, instances.pred_keypoints.numpy())
    elif "proposals" in output:
        assert np.array_equal(found.scores, instances.objectness_logits.sigmoid().numpy())
    assert (found.semantic is not None) == ("sem_seg" in output)
    if "sem_seg" in output:
        assert np.array_equal(found.semantic, output["sem_seg"].argmax(dim=0).numpy())
        said += 1
    assert (found.panoptic is not None) == ("panoptic_seg" in output)
    if "panoptic_seg" in output:
        assert_same_panoptic(found, *output["panoptic_seg"])
    assert said > 0


def assert_same_panoptic(found: Detections, labels: torch.Tensor, infos: list | None) -> None:
    if infos is None:  # Panoptic-DeepLab: class * 1000 + instance, or -1
        for segment in found.panoptic.segments:
            theirs = np.unique(labels.numpy()[found.panoptic.ids == segment.id])
            assert theirs.tolist() == [theirs[0]]
            assert (segment.class_id, segment.is_thing) == (theirs[0] // 1000, theirs[0] % 1000 > 0)
        assert np.array_equal(found.panoptic.ids == 0, labels.numpy() == -1)
        return
    assert np.array_equal(found.panoptic.ids, labels.numpy())
    assert len(found.panoptic.segments) == len(infos) > 0
    for segment, info in zip(found.panoptic.segments, infos, strict=True):
        assert (segment.id, segment.class_id, segment.is_thing) == (info["id"], info["category_id"], info["isthing"])
        assert (segment.score, segment.detection) == (info.get("score"), info.get("instance_id"))
        assert segment.area == int((labels == info["id"]).sum())


@pytest.mark.parametrize("order", ["BGR", "RGB"])
@pytest.mark.parametrize("shortest", [0, 64, 300])
@pytest.mark.parametrize("kind", ["array", "PIL", "PNG"])
def test_images_are_scaled_as_detectron2_scales_arrays(kind, shortest, order):
    """To the last bit, though an encoded image is scaled before it is an array."""
    array = picture(120, 130)
    as_pil = Image.fromarray(np.ascontiguousarray(array[:, :, ::-1]))
    as_pil.save(file := io.BytesIO(), "PNG")
    predictor = Predictor(nn.Identity(), Input(format=order, min_size_test=shortest, max_size_test=400))
    given = {"array": array, "PIL": as_pil, "PNG": file.getvalue()}[kind]
    prepared = predictor.prepare(given, predictor.options())
    due = array if order == "BGR" else array[:, :, ::-1]
    if shortest:
        due = ResizeShortestEdge(shortest, 400).get_transform(due).apply_image(due)
    assert np.array_equal(prepared.pixels, due)
    assert prepared.size == (120, 130)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_one_image_gives_what_default_predictor_gives(name, tmp_path):
    """Every family of the zoo, to the last bit."""
    cfg = checkpoint(CONFIGS[name](), tmp_path / "weights.pth")
    theirs = DefaultPredictor(cfg)
    image = picture(120, 130)
    found = of(cfg, theirs.model)([image])[0]
    assert_equals_detectron2(found, theirs(image))
    assert found.image_size == (120, 130)


def test_one_image_of_the_demo_gives_what_default_predictor_gives(demo_predictor):
    """Bit for bit with Detectron2's own modules; but for rounding as `load_predictor` makes them faster."""
    plain = of(demo_predictor.cfg, demo_predictor.model)
    loaded = bentoml.detectron.load_predictor(bentoml.detectron.save_model("as-default", demo_predictor))
    for index in range(3):
        exact, found = plain([pixels(index)])[0], loaded([pixels(index)])[0]
        assert len(exact) > 3
        assert_equals_detectron2(exact, demo_predictor(pixels(index)))
        assert found.class_names == exact.class_names
        assert np.abs(found.boxes - exact.boxes).max() < 0.05
        assert np.abs(found.scores - exact.scores).max() < 1e-3


def _sure(outputs):
    return [{"instances": each["instances"][each["instances"].scores > 0.9]} for each in outputs]


def _set_on_it(name):
    def change(model):
        before = getattr(model, name)
        setattr(model, name, lambda *given, **named: _sure(before(*given, **named)))

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.register_forward_hook(lambda module, given, outputs: _sure(outputs)),
        *map(_set_on_it, ["forward", "inference"]),
    ],
    ids=["hook", "forward", "inference"],
)  # fmt: skip
def test_what_is_set_on_a_model_itself_holds_for_the_predictor_and_is_not_lost_in_saving(change):
    default = demo.predictor()
    image = np.asarray(Image.open(demo.images()[0]))[:, :, ::-1]
    count = len(default(image)["instances"])
    change(default.model)
    due = default(image)["instances"]
    assert 0 < len(due) < count
    found = Predictor(default.model, config.input_of(default.cfg))([image])[0]
    assert np.array_equal(found.scores, due.scores)
    with pytest.raises(errors.InvalidModelError, match="the model would give other results"):
        bentoml.detectron.save_model("hooked", default)


class TestBatches:
    """Images of one call go through the model together."""

    @pytest.fixture
    def module(self):
        return built(tiny_cfg())

    @pytest.fixture
    def shapes(self, module):
        """Shapes of the batches that the model saw."""
        seen: list[tuple[int, ...]] = []
        handle = module.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
        yield seen
        handle.remove()

    @staticmethod
    def unresized(module, **arguments):
        return Predictor(module, Input(format="BGR", min_size_test=0, max_size_test=0), **arguments)

    def test_images_of_one_padded_shape_are_one_batch(self, module, shapes):
        """64x80 and 50x70 are both padded to 64x96, the model's multiple of 32, as each is alone."""
        self.unresized(module)([picture(64, 80), picture(50, 70), picture(40, 90)])
        assert shapes == [(3, 3, 64, 96)]

    def test_no_image_is_padded_more_than_alone(self, module, shapes):
        images = [picture(*size) for size in [(64, 80), (64, 100), (96, 64), (10, 300), (64, 65), (33, 128), (97, 33)]]
        predictor = self.unresized(module)
        predictor(images)
        together = sorted(shape[2:] for shape in shapes for _ in range(shape[0]))
        shapes.clear()
        for image in images:
            predictor([image])
        assert together == sorted(shape[2:] for shape in shapes)

    def test_batches_stay_within_the_pixels_that_the_user_set(self, module, shapes):
        self.unresized(module, max_batch_pixels=2 * 64 * 96)([picture(64, 80)] * 5)
        assert [shape[0] for shape in shapes] == [2, 2, 1]

    def test_image_above_the_budget_goes_alone(self, module, shapes):
        found = self.unresized(module, max_batch_pixels=1)([picture(64, 80)] * 2)
        assert [shape[0] for shape in shapes] == [1, 1]
        assert len(found) == 2

    def test_what_waits_for_company_stays_within_the_budget(self, module, shapes):
        """With an image of each of many shapes, not all of them are held in memory at once."""
        sizes = [(64, 32 * i) for i in range(1, 20)]
        loaded: list[int] = []

        class Watched(Predictor):
            def prepare(self, image, wanted, index=0):
                loaded.append(index - sum(shape[0] for shape in shapes))
                return super().prepare(image, wanted, index)

        Watched(module, Input(format="BGR", min_size_test=0, max_size_test=0), max_batch_pixels=64 * 32 * 20)(
            [picture(*size) for size in sizes]
        )
        assert max(loaded) < 10

    def test_default_budget_is_of_the_memory_that_is_free(self, module, monkeypatch, shapes):
        monkeypatch.setattr("bentoml_detectron.predictor.free_memory", lambda device: 2 * 3000 * 64 * 96 * 3)
        self.unresized(module)([picture(64, 80)] * 5)
        assert [shape[0] for shape in shapes] == [3, 2]
        assert 0 < free_memory(torch.device("cpu")) < 1 << 45

    def test_default_budget_on_the_cpu_has_a_bound_whatever_memory_is_free(self, module, monkeypatch, shapes):
        monkeypatch.setattr("bentoml_detectron.predictor.free_memory", lambda device: 1 << 50)
        images = [picture(320, 320)] * 8
        self.unresized(module)(images)
        most = MOST_PIXELS_ON_CPU // (320 * 320)
        assert 1 < most < len(images)
        assert [shape[0] for shape in shapes] == [most] * (len(images) // most) + [len(images) % most] * (
            len(images) % most > 0
        )

    def test_results_come_in_the_order_of_the_images(self, module):
        sizes = [(64, 80), (96, 64), (50, 70), (64, 90), (96, 60)]
        found = self.unresized(module)([picture(*size) for size in sizes])
        assert [each.image_size for each in found] == sizes

    def test_no_images_are_no_results(self, module):
        assert self.unresized(module)([]) == []

    def test_together_and_alone_differ_by_rounding_only(self, demo_predictor):
        """The largest difference that ``benchmarks/bench_predictor.py`` printed for these scores was 1.9e-06."""
        predictor = of(demo_predictor.cfg, demo_predictor.model)
        images = [pixels(index) for index in range(6)]
        for together, image in zip(predictor(images), images, strict=True):
            alone = predictor([image])[0]
            assert np.array_equal(together.class_ids, alone.class_ids)
            assert np.abs(together.scores - alone.scores).max() < 1e-4
            assert np.abs(together.boxes - alone.boxes).max() < 1e-2


class TestExact:
    """With ``batch="exact"`` what else is in the call changes nothing, to the last bit."""

    def test_demo_model(self, demo_predictor):
        predictor = of(demo_predictor.cfg, demo_predictor.model, batch="exact")
        images = [pixels(index) for index in range(6)] + [picture(100, 150), pixels(0)]
        for together, image in zip(predictor(images), images, strict=True):
            assert together == predictor([image])[0]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", FEW)
    def test_zoo(self, name):
        predictor = of(CONFIGS[name](), batch="exact")
        images = [picture(120, 130, seed) for seed in range(3)] + [picture(128, 100)]
        for together, image in zip(predictor(images), images, strict=True):
            assert together == predictor([image])[0]


class TestOutOfMemory:
    """A batch that takes too much memory is halved."""

    @staticmethod
    def greedy(most: int) -> nn.Module:
        """A model that asks PyTorch for more than any machine has, for more than `most` images."""
        module = built(tiny_cfg())

        def ask(_, inputs):
            if len(inputs[0]) > most:
                torch.empty(1 << 50)

        module.backbone.register_forward_pre_hook(ask)
        return module

    def test_halves_give_what_the_whole_would(self):
        images = [picture(64, 80, seed) for seed in range(5)]
        halved = of(tiny_cfg(), self.greedy(2))(images)
        alone = of(tiny_cfg())
        assert [len(each) for each in halved] == [len(alone([image])[0]) for image in images]
        assert [each.image_size for each in halved] == [(64, 80)] * 5

    def test_image_that_alone_takes_too_much_is_reported_in_its_place(self):
        predictor = of(tiny_cfg(), self.greedy(0))
        found = predictor([picture(64, 80), picture(64, 80)], errors="collect")
        assert all(isinstance(each, errors.OutOfMemoryError) for each in found)
        with pytest.raises(errors.OutOfMemoryError, match="image 0: 80x64 needs more memory than is available"):
            predictor([picture(64, 80)])

    def test_results_that_take_too_much_beside_others_are_made_alone(self, monkeypatch):
        """Masks of many images at once may be what takes the memory."""
        seen = []

        def greedy(output, size, *rest):
            seen.append(size)
            if size == (64, 96) and seen.count(size) == 1:
                torch.empty(1 << 50)
            return outputs.detections(output, size, *rest)

        images = [picture(64, 80), picture(64, 96), picture(64, 90)]
        due = of(tiny_cfg())(images)
        monkeypatch.setattr("bentoml_detectron.predictor.detections", greedy)
        found = of(tiny_cfg())(images)
        assert (seen.count((64, 96)), [each.image_size for each in found]) == (2, [each.image_size for each in due])
        assert len(found[1]) == len(due[1])

    def test_other_failures_of_the_model_are_raised_as_they_are(self):
        module = built(tiny_cfg())
        module.backbone.register_forward_pre_hook(lambda _, inputs: inputs[0].reshape(7, 7))
        with pytest.raises(RuntimeError, match="shape"):
            of(tiny_cfg(), module)([picture(64, 80)])


def lowered(cfg, threshold: float):
    """The same config with its thresholds set, as a user of DefaultPredictor has to."""
    cfg = cfg.clone()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = threshold
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = threshold
    cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = threshold
    return cfg


def raised(cfg):
    return lowered(cfg, 0.9)


def median_score(module, cfg, image) -> float:
    scores = of(cfg, module)([image], score_threshold=0.0)[0].scores
    return float(np.sort(scores)[len(scores) // 2])


WITH_THRESHOLDS = ["Faster R-CNN, FPN", "Mask R-CNN, C4", "Mask R-CNN, FPN", "Cascade Mask R-CNN", "RetinaNet",
                   "Keypoint R-CNN", "Panoptic FPN", "PointRend"]  # fmt: skip


@ROI_HEADS_REGISTRY.register()
class Rescoring(StandardROIHeads):
    """As Mask Scoring R-CNN's, which weigh the scores of what was chosen."""

    def forward(self, images, features, proposals, targets=None):
        found, losses = super().forward(images, features, proposals, targets)
        for each in found:
            each.scores = each.scores * 0.1
        return found, losses


class Maps(nn.Module):
    """Gives masks as Mask2Former's models do: whole ones, in floats."""

    def forward(self, inputs):
        given = inputs[0]
        found = Instances((given["height"], given["width"]))
        found.pred_masks = torch.zeros(1, given["height"], given["width"])
        found.pred_masks[0, 2:5, 3:9] = 1
        found.pred_boxes, found.scores = Boxes(torch.tensor([[3.0, 2.0, 9.0, 5.0]])), torch.tensor([0.9])
        found.pred_classes = torch.tensor([0])
        return [{"instances": found}]


def test_masks_may_be_bitmaps_of_floats():
    (found,) = Predictor(Maps().eval(), Input(format="BGR", min_size_test=0, max_size_test=0), None)([picture()])
    due = np.zeros(found.image_size, bool)
    due[2:5, 3:9] = True
    assert np.array_equal(decode(found.masks[0]), due)


@ROI_HEADS_REGISTRY.register()
class WithImages(StandardROIHeads):
    """Needs the images for masks, too, as heads of a user's own may."""

    def forward(self, images, features, proposals, targets=None):
        found = self._forward_box(features, proposals)
        return self.forward_with_given_boxes(features, found, images=images), {}

    def forward_with_given_boxes(self, features, instances, images=None):
        assert images is not None
        return super().forward_with_given_boxes(features, instances)


class TestOptions:
    """Thresholds, classes and numbers for each call, and the model as it was."""

    def test_heads_whose_second_half_takes_more_are_given_it(self):
        cfg = tiny_cfg()
        cfg.MODEL.ROI_HEADS.NAME = "WithImages"
        predictor = of(cfg)
        everything = predictor([picture()])[0]
        assert predictor([picture()], top_k=3)[0] == everything[:3]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", WITH_THRESHOLDS)
    def test_threshold_under_the_models_own_is_honoured(self, name, tmp_path):
        """As if the model had been built with that threshold, to the last bit; 0.9 is its own."""
        cfg = checkpoint(CONFIGS[name](), tmp_path / "weights.pth")
        image = picture(120, 130)
        ours = of(raised(cfg), DefaultPredictor(raised(cfg)).model)
        threshold = median_score(ours.model, raised(cfg), image)
        theirs = DefaultPredictor(lowered(cfg, threshold))(image)
        assert len(ours([image])[0]) == 0
        assert_equals_detectron2(ours([image], score_threshold=threshold)[0], theirs)

    def test_threshold_of_fcos_is_honoured(self):
        """FCOS is in the zoo as a LazyConfig only."""
        cfg = PROJECTS["FCOS"].values[0]()
        module = built(cfg)
        everything = of(cfg, module)([picture(120, 130)])[0]
        module.test_score_thresh = 0.9
        predictor = of(cfg, module)
        assert len(predictor([picture(120, 130)])[0]) == 0
        assert predictor([picture(120, 130)], score_threshold=0.0)[0] == everything
        assert module.test_score_thresh == 0.9

    @pytest.mark.slow
    @pytest.mark.parametrize("name", WITH_THRESHOLDS)
    def test_images_of_one_batch_have_options_of_their_own(self, name):
        """Each gets what it gets in a batch of as many whose images all have its options."""
        cfg = lowered(CONFIGS[name](), 0.001)
        predictor = of(cfg, batch="padded")
        if name == "RetinaNet":  # as built, its scores are all but the same; equal ones come in any order
            predictor.model.head.cls_score.weight.data.mul_(100)
        image = picture(120, 130)
        middle = median_score(predictor.model, cfg, image)
        label = int(predictor([image])[0].class_ids[0])
        mixed = [options(None), options(None, score_threshold=middle), options(None, top_k=2), options(None, classes=[label]),
                 options(None, score_threshold=0.0, top_k=1), options(None, classes=[])]  # fmt: skip
        for together, wanted in zip(predictor.predict([image] * len(mixed), mixed), mixed, strict=True):
            place = mixed.index(wanted)
            alike = predictor.predict([image] * len(mixed), [wanted] * len(mixed))[place]
            assert np.array_equal(together.boxes, alike.boxes)
            assert np.array_equal(together.scores, alike.scores)
            assert np.array_equal(together.class_ids, alike.class_ids)
            if alike.panoptic is not None:
                assert (together.panoptic.ids == alike.panoptic.ids).mean() > 0.99

    def test_options_choose_among_what_the_model_finds(self, demo_predictor):
        predictor = of(demo_predictor.cfg, demo_predictor.model, batch="exact")
        everything = predictor([pixels(0)], score_threshold=0.02)[0]
        assert predictor([pixels(0)], score_threshold=0.5)[0] == everything[everything.scores > 0.5]
        assert predictor([pixels(0)], score_threshold=0.02, top_k=3)[0] == everything[:3]
        eights = predictor([pixels(0)], score_threshold=0.02, classes=["8", 4])[0]
        assert eights == everything[np.isin(everything.class_ids, [8, 4])]
        assert 0 < len(eights) < len(everything)
        best = predictor([pixels(0)], score_threshold=0.02, classes=["8"], top_k=1)[0]
        assert best == everything[everything.class_ids == 8][:1]

    def test_number_above_the_models_own_limit_is_honoured(self):
        cfg = tiny_cfg()
        cfg.TEST.DETECTIONS_PER_IMAGE = 5
        predictor = of(cfg)
        assert len(predictor([picture()])[0]) == 5
        assert len(predictor([picture()], top_k=30)[0]) == 30

    @pytest.mark.parametrize("name", ["Mask R-CNN, FPN", "RetinaNet", "Panoptic FPN"])
    def test_number_that_another_image_wants_leaves_the_models_own_limit(self, name):
        cfg = zoo_config(ZOO[name])
        cfg.TEST.DETECTIONS_PER_IMAGE = 3
        predictor = of(lowered(cfg, 0.0))
        wanted = [predictor.options(), predictor.options(top_k=8), predictor.options(top_k=2), predictor.options(classes=[0])]
        images = [picture(128, 160, 3)] * len(wanted)
        together = predictor.predict(images, wanted)
        alone = [predictor.predict([image], [each])[0] for image, each in zip(images, wanted, strict=True)]
        assert [len(each) for each in together[:3]] == [3, 8, 2]
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)

    def test_scores_that_heads_change_after_their_threshold_are_kept(self):
        cfg = tiny_cfg()
        cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = "Rescoring", 0.15
        predictor = of(cfg)
        (found,) = predictor([picture()])
        assert len(found)
        assert found.scores.max() < 0.15
        assert not len(predictor([picture()], score_threshold=0.15)[0])

    def test_masks_are_computed_for_the_wanted_detections_alone(self, demo_predictor):
        """Most of the time of a detection is its mask's."""
        rows: list[int] = []
        head = demo_predictor.model.roi_heads.mask_head
        handle = head.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
        try:
            predictor = of(demo_predictor.cfg, demo_predictor.model)
            wanted = [options(predictor.dataset, top_k=2), options(predictor.dataset, score_threshold=0.9)]
            found = predictor.predict([pixels(0), pixels(1)], wanted)
        finally:
            handle.remove()
        assert rows == [sum(len(each) for each in found)]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["Mask R-CNN, FPN", "Cascade Mask R-CNN", "RetinaNet", "Panoptic FPN"])
    def test_call_leaves_the_model_as_it_was(self, name):
        predictor = of(CONFIGS[name]())
        before = selftest.settings(predictor.model), {k: v.clone() for k, v in predictor.model.state_dict().items()}
        modules = dict(predictor.model.named_modules())
        predictor([picture(), picture(seed=1)], score_threshold=0.0, classes=[1], top_k=200)
        assert selftest.settings(predictor.model) == before[0]
        assert all(torch.equal(value, before[1][key]) for key, value in predictor.model.state_dict().items())
        assert dict(predictor.model.named_modules()) == modules
        assert not any("forward_with_given_boxes" in vars(module) for module in predictor.model.modules())

    def test_call_leaves_the_processes_random_numbers_alone(self, demo_predictor):
        np.random.seed(0)
        torch.manual_seed(0)
        before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        of(demo_predictor.cfg, demo_predictor.model)([pixels(0)])
        assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


class TestThreads:
    """Threads share one predictor."""

    THRESHOLDS = (0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, None)

    def mismatches(self, module) -> int:
        """How many of 8 threads' results with different thresholds are not what each gets alone."""
        cfg = demo.config()
        predictor = of(cfg, module, batch="exact")
        alone = [predictor([pixels(0)], score_threshold=each)[0] for each in self.THRESHOLDS]
        assert len({len(each) for each in alone}) > 4
        start = threading.Barrier(len(self.THRESHOLDS))

        def call(threshold):
            start.wait()
            return [predictor([pixels(0)], score_threshold=threshold)[0] for _ in range(4)]

        with ThreadPoolExecutor(len(self.THRESHOLDS)) as pool:
            together = list(pool.map(call, self.THRESHOLDS))
        return sum(found != due for finds, due in zip(together, alone, strict=True) for found in finds)

    def test_eight_threads_with_different_thresholds_get_what_they_would_alone(self, demo_predictor):
        assert self.mismatches(demo_predictor.model) == 0

    def test_norms_of_each_level_are_not_mixed_up(self):
        """Detectron2's RetinaNet counts the calls of its head's norms: other threads' too, and those that failed."""
        cfg = zoo_config(ZOO["RetinaNet"])
        cfg.MODEL.RETINANET.NORM = "BN"
        module = built(lowered(cfg, 0.0))
        generator = torch.Generator().manual_seed(0)
        for each in module.head.modules():
            if isinstance(each, nn.BatchNorm2d):
                each.running_mean.uniform_(-0.3, 0.3, generator=generator)
                each.running_var.uniform_(0.3, 2, generator=generator)
        for precision in ("fp32", "int8") if engines.has_int8() else ("fp32",):
            predictor = of(cfg, engines.accelerated(module, precision, {}))
            due = predictor([picture(128, 160)])[0]
            with ThreadPoolExecutor(2) as pool:
                found = list(pool.map(lambda _, predictor=predictor: predictor([picture(128, 160)])[0], range(20)))
            for each in found:
                np.testing.assert_allclose(each.scores, due.scores, atol=1e-5)
            next(each for each in module.modules() if isinstance(each, CycleBatchNormList))._pos = 3  # as a failure leaves it
            np.testing.assert_allclose(predictor([picture(128, 160)])[0].scores, due.scores, atol=1e-5)

    def test_test_above_sees_a_threshold_that_is_shared(self, monkeypatch):
        """With the threshold set in the model itself, as one would do it first, threads get each other's."""

        def in_place(module, change):
            for each in module.modules():
                for name, value in change(each).items():
                    setattr(each, name, value)
            return module

        monkeypatch.setattr(forward, "view", in_place)
        assert self.mismatches(demo.predictor().model) > 0


@pytest.fixture(scope="module")
def panoptic_predictor():
    cfg = CONFIGS["Panoptic FPN"]()
    cfg.MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT = 1
    cfg.MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH = 1.0
    return of(cfg, batch="exact")


class TestPanoptic:
    """Panoptic FPN, where classes and numbers are chosen after things and stuff were combined."""

    @pytest.fixture
    def predictor(self, panoptic_predictor):
        return panoptic_predictor

    @pytest.fixture
    def everything(self, predictor):
        found = predictor([picture(120, 130)])[0]
        assert {segment.is_thing for segment in found.panoptic.segments} == {True, False}
        return found

    def test_segments_point_at_their_detections(self, everything):
        for segment in everything.panoptic.segments:
            if segment.is_thing:
                assert everything.class_ids[segment.detection] == segment.class_id
                assert everything.class_names[segment.detection] == segment.class_name != ""
                mask = decode(everything.masks[segment.detection])
                assert mask[everything.panoptic.ids == segment.id].all()
            else:
                assert segment.detection is None
                assert segment.class_name != ""

    def test_top_k_keeps_the_best_things_and_all_stuff(self, predictor, everything):
        best = predictor([picture(120, 130)], top_k=1)[0]
        assert len(best) == 1
        assert [s.detection for s in best.panoptic.segments if s.is_thing] in ([0], [])
        stuff = [s.id for s in everything.panoptic.segments if not s.is_thing]
        assert [s.id for s in best.panoptic.segments if not s.is_thing] == stuff
        kept = [s.id for s in best.panoptic.segments]
        expected = np.where(np.isin(everything.panoptic.ids, kept), everything.panoptic.ids, 0)
        assert np.array_equal(best.panoptic.ids, expected)

    def test_classes_keep_their_things_and_stuff(self, predictor, everything):
        stuff = next(s for s in everything.panoptic.segments if not s.is_thing)
        thing = next(s for s in everything.panoptic.segments if s.is_thing)
        found = predictor([picture(120, 130)], classes=[stuff.class_name, thing.class_id])[0]
        assert {(s.class_id, s.is_thing) for s in found.panoptic.segments} == {
            (stuff.class_id, False), (thing.class_id, True),
        }  # fmt: skip
        assert set(found.class_ids.tolist()) == {thing.class_id}

    def test_semantic_classes_leave_the_rest_void(self):
        predictor = of(CONFIGS["Semantic FPN"]())
        everything = predictor([picture(120, 130)])[0].semantic
        label = int(everything[0, 0])
        found = predictor([picture(120, 130)], classes=[label])[0].semantic
        assert np.array_equal(found, np.where(everything == label, label, 255))


class TestImages:
    """Whatever an image comes as, the model gets it in its own channel order."""

    @staticmethod
    def png(bgr: np.ndarray, **arguments) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(bgr[:, :, ::-1])).save(buffer, "PNG", **arguments)
        return buffer.getvalue()

    @pytest.mark.parametrize("order", ["BGR", "RGB"])
    def test_array_bytes_path_and_pil_image_reach_the_model_alike(self, order, tmp_path):
        cfg = tiny_cfg()
        cfg.INPUT.FORMAT = order
        predictor = of(cfg)
        seen: list[torch.Tensor] = []
        predictor.model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        bgr = picture(64, 80)
        path = tmp_path / "picture.png"
        path.write_bytes(self.png(bgr))
        for image in [bgr, self.png(bgr), bytearray(self.png(bgr)), path, str(path), Image.open(path)]:
            predictor([image])
        expected = torch.as_tensor((bgr if order == "BGR" else bgr[:, :, ::-1]).copy()).permute(2, 0, 1)
        mean = predictor.model.pixel_mean
        for tensor in seen:
            assert torch.allclose(tensor[0, :, :64, :80] + mean, expected.float(), atol=1e-3)
        assert len(seen) == 6

    def test_orientation_is_applied(self, demo_predictor):
        predictor = of(demo_predictor.cfg, demo_predictor.model, batch="exact")
        upright = Image.fromarray(np.ascontiguousarray(pixels(0)[:, :, ::-1]))
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned: show it turned by 270 degrees
        buffer = io.BytesIO()
        upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
        assert predictor([buffer.getvalue()]) == predictor([pixels(0)])

    def test_one_bad_image_is_reported_in_its_place_and_the_others_are_not_lost(self, demo_predictor):
        predictor = of(demo_predictor.cfg, demo_predictor.model, batch="exact")
        good = predictor([pixels(0)])[0]
        cut = demo.images()[1].read_bytes()[:2000]
        found = predictor([pixels(0), cut, b"GIF89a", pixels(0), "https://example.org/a.jpg"], errors="collect")
        assert found[0] == found[3] == good
        kinds = [errors.DamagedImageError, errors.UnsupportedImageError, errors.ImageError]
        assert [type(found[index]) for index in (1, 2, 4)] == kinds
        assert [found[index].index for index in (1, 2, 4)] == [1, 2, 4]

    def test_first_bad_image_is_raised(self, demo_predictor):
        predictor = of(demo_predictor.cfg, demo_predictor.model)
        with pytest.raises(errors.UnsupportedImageError, match="image 1: it is a GIF") as caught:
            predictor([pixels(0), b"GIF89a", b""])
        assert caught.value.index == 1

    def test_limits_are_arguments(self, demo_predictor):
        predictor = of(demo_predictor.cfg, demo_predictor.model, limits=Limits(max_pixels=100))
        with pytest.raises(errors.ImageTooLargeError, match="192 x 192"):
            predictor([demo.images()[0]])

    def test_image_of_which_nothing_is_left_at_the_models_size_is_refused(self, demo_predictor):
        with pytest.raises(errors.ImageError, match="image 0: 9000x1 is too long and thin"):
            of(demo_predictor.cfg, demo_predictor.model)([np.zeros((1, 9000, 3), np.uint8)])

    def test_callers_array_stays_as_it_was(self, demo_predictor):
        image = pixels(0)
        before = image.copy()
        of(demo_predictor.cfg, demo_predictor.model)([image])
        assert np.array_equal(image, before)


class TestNames:
    """Class names and category ids are the saved model's."""

    def test_one_class_model(self):
        cfg = tiny_cfg()
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
        cfg.DATASETS.TEST = ("one_class_of_this_test",)
        MetadataCatalog.get("one_class_of_this_test").set(thing_classes=["scratch"], thing_dataset_id_to_contiguous_id={17: 0})
        predictor = bentoml.detectron.load_predictor(bentoml.detectron.save_model("one-class", built(cfg), cfg))
        found = predictor([picture()])[0]
        assert set(found.class_names) == {"scratch"}
        assert set(found.category_ids.tolist()) == {17}
        assert {each["category_id"] for each in found.to_coco(1)} == {17}
        assert predictor([picture()], classes=["scratch"])[0].class_names == found.class_names
        assert predictor.class_names == ("scratch",)

    def test_semantic_models_have_those_of_stuff_alone(self):
        """Detectron2's own datasets of stuff name things, too, to which no pixel belongs."""
        cfg = zoo_config(ZOO["Semantic FPN"])
        cfg.DATASETS.TEST = ("coco_2017_val_panoptic_stuffonly",)
        predictor = of(cfg)
        assert len(predictor.class_names) == 54
        assert predictor.class_names[2] == "blanket"
        with pytest.raises(errors.InvalidArgumentError, match="the model has no class 'person'"):
            predictor([picture()], classes=["person"])
        with pytest.raises(errors.InvalidArgumentError, match="from 0 to 53"):
            predictor([picture()], classes=[70])
        found = predictor([picture()])[0]
        there = int(np.unique(found.semantic)[0])
        only = predictor([picture()], classes=[predictor.class_names[there]])[0]
        assert np.array_equal(only.semantic == there, found.semantic == there)

    def test_model_without_names_gives_none(self):
        found = of(tiny_cfg())([picture()])[0]
        assert set(found.class_names) == {""}
        assert found.category_ids is None


@META_ARCH_REGISTRY.register()
class Embedder(nn.Module):
    """A model whose output is none of Detectron2's."""

    def __init__(self, cfg):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, batch):
        return [{"embedding": self.layer(each["image"][None]).mean(dim=(2, 3))[0]} for each in batch]


def test_output_of_another_kind_is_given_as_it_is():
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "Embedder"
    found = of(cfg)([picture(), picture(seed=1)])
    assert [each["embedding"].shape for each in found] == [(4,), (4,)]


def test_semantic_logits_are_scaled_some_classes_at_a_time(monkeypatch):
    """The same classes as from all at once, ties included, for any number at a time."""
    logits = torch.randn(7, 20, 24).round()
    expected = sem_seg_postprocess(logits, (18, 23), 50, 61).argmax(dim=0).numpy()
    for most in (1, 2 * 50 * 61, 3 * 50 * 61 + 1, 1 << 24):
        monkeypatch.setattr(outputs, "_MAX_VALUES", most)
        assert np.array_equal(outputs._semantic(logits, (18, 23), (50, 61)), expected)


def test_semantic_map_has_room_for_many_classes():
    labels = np.array([[0, 299]])
    assert outputs._map(labels, 300).dtype == np.int16
    assert outputs._map(labels, 255).dtype == np.uint8


@pytest.mark.parametrize("most", [outputs._MAX_PASTED, 30_000])
def test_masks_pasted_where_they_are_are_those_of_the_cpu(most, monkeypatch):
    """As a GPU does it, some at a time; here on the CPU, where Detectron2 pastes to the last bit what is found without."""
    monkeypatch.setattr(outputs, "_MAX_PASTED", most)
    generator = torch.Generator().manual_seed(0)
    soft = torch.rand((9, 14, 14), generator=generator)
    first = torch.rand((9, 2), generator=generator) * 60
    boxes = torch.cat([first, first + 1 + torch.rand((9, 2), generator=generator) * 60], dim=1)
    due = from_roi_masks(soft, boxes, (100, 120))
    assert outputs.pasted(soft, boxes, (100, 120)) == due
    assert len({each["counts"] for each in due}) == 9


class TestRotated:
    """Rotated boxes need Detectron2's compiled ops to be found; what they become does not."""

    def test_boxes_have_five_columns(self):
        from detectron2.structures import Instances, RotatedBoxes

        boxes = RotatedBoxes(torch.tensor([[40.0, 30, 20, 10, 30], [60, 60, 30, 12, -45]]))
        instances = Instances((80, 100), pred_boxes=boxes, scores=torch.tensor([0.9, 0.2]), pred_classes=torch.tensor([1, 0]))
        output = forward._recognised({"instances": instances}, Options(), forward._Settings())
        names = outputs.Names(Dataset(name="ships", thing_classes=["ferry", "tug"]))
        found = outputs.detections(output, (80, 100), Options(), names)
        assert np.array_equal(found.boxes, boxes.tensor.numpy())
        assert found.class_names == ("tug", "ferry")
        assert found.to_coco(3)[0]["bbox"] == pytest.approx([40, 30, 20, 10, 30])


class TestArguments:
    """What is refused, by name."""

    @pytest.mark.parametrize("images", ["a.jpg", b"\xff\xd8", np.zeros((4, 4, 3), np.uint8), 3, iter([])])
    def test_images_that_are_no_list(self, images, demo_predictor):
        with pytest.raises(errors.InvalidArgumentError, match="images must be a list, not "):
            of(demo_predictor.cfg, demo_predictor.model)(images)

    def test_model_that_needs_proposals(self):
        predictor = of(zoo_config(ZOO["Fast R-CNN, FPN"]))
        with pytest.raises(errors.InvalidArgumentError, match="needs precomputed box proposals"):
            predictor([picture()])

    @pytest.mark.parametrize(
        "arguments", [{"batch": "big"}, {"max_batch_pixels": 0}, {"max_batch_pixels": "many"}, {"limits": 5}]
    )
    def test_predictor(self, arguments, demo_predictor):
        with pytest.raises(errors.InvalidArgumentError, match=next(iter(arguments))):
            of(demo_predictor.cfg, demo_predictor.model, **arguments)

    def test_channel_order_that_is_not_known(self, demo_predictor):
        with pytest.raises(errors.InvalidArgumentError, match=r"'YUV-BT\.601'"):
            Predictor(demo_predictor.model, Input(format="YUV-BT.601", min_size_test=0, max_size_test=0))

    def test_way_of_errors(self, demo_predictor):
        with pytest.raises(errors.InvalidArgumentError, match="errors='ignore'"):
            of(demo_predictor.cfg, demo_predictor.model)([], errors="ignore")

    def test_precision(self, demo_predictor):
        saved = bentoml.detectron.save_model("precision", demo_predictor)
        with pytest.raises(errors.InvalidArgumentError, match="precision='fp8'"):
            bentoml.detectron.load_predictor(saved, precision="fp8")

    def test_device(self, demo_predictor):
        saved = bentoml.detectron.save_model("no-device", demo_predictor)
        with pytest.raises(errors.UnknownDeviceError):
            bentoml.detectron.load_predictor(saved, "warp")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestGpu:
    """The same on a GPU."""

    def test_batches_give_what_the_cpu_gives(self, demo_predictor):
        saved = bentoml.detectron.save_model("on-gpu", demo_predictor)
        images = [pixels(index) for index in range(6)]
        ours = bentoml.detectron.load_predictor(saved, "cuda:0")(images, score_threshold=0.3)
        theirs = bentoml.detectron.load_predictor(saved)(images, score_threshold=0.3)
        for one, other in zip(ours, theirs, strict=True):
            assert np.array_equal(one.class_ids, other.class_ids)
            assert np.abs(one.boxes - other.boxes).max() < 0.1

    def test_one_image_gives_what_default_predictor_gives_there(self, demo_predictor, monkeypatch):
        """Masks are pasted there, and only where they change leaves it."""
        monkeypatch.setattr(outputs.rle_masks, "from_roi_masks", None)
        model = copy.deepcopy(demo_predictor.model).cuda()
        found = of(demo_predictor.cfg, model)([pixels(3)])[0]
        with torch.inference_mode():
            image = torch.as_tensor(pixels(3).astype("float32").transpose(2, 0, 1))
            due = model([{"image": image, "height": 192, "width": 192}])[0]["instances"].to("cpu")
        assert len(due) > 3
        assert np.array_equal(found.class_ids, due.pred_classes.numpy())
        assert np.abs(found.boxes - due.pred_boxes.tensor.numpy()).max() < 0.05
        for rle, bitmap in zip(found.masks, due.pred_masks.numpy(), strict=True):
            assert (decode(rle) != bitmap).mean() < 1e-3

    def test_out_of_memory_is_halved(self, demo_predictor):
        predictor = of(demo_predictor.cfg, demo_predictor.model.cuda())

        def ask(_, inputs):
            if len(inputs[0]) > 2:
                torch.empty(1 << 45, device="cuda")

        handle = predictor.model.backbone.register_forward_pre_hook(ask)
        try:
            assert len(predictor([Path(path) for path in demo.images()[:5]])) == 5
        finally:
            handle.remove()
            demo_predictor.model.cpu()


def test_another_default_device_changes_nothing(monkeypatch):
    """As torch.set_default_device("cuda") would for a model on the CPU; what is made on "meta" has no numbers."""
    cfg = tiny_cfg()
    module = built(cfg)
    saved = bentoml.detectron.save_model("default-device", module, cfg)
    due = bentoml.detectron.load_predictor(saved)([picture()])[0]
    monkeypatch.setattr(engines, "has_bf16", lambda device=None: False)  # "auto" is fp32 then
    torch.set_default_device("meta")
    try:
        assert bentoml_detectron.verify(saved).ok
        bentoml.detectron.save_model("default-device", module, cfg)
        found = bentoml.detectron.load_predictor(saved)([picture()])[0]
        auto = bentoml.detectron.load_predictor(saved, precision="auto")([picture()])[0]
    finally:
        torch.set_default_device(None)
    assert found == due
    assert auto == due


def test_image_larger_than_the_square_that_a_model_pads_to_is_refused():
    """Detectron2 would cut it without a word, and fail with two of them."""
    module = built(tiny_cfg())
    module.backbone.padding_constraints = {"square_size": 96}
    predictor = of(tiny_cfg(), module)
    predictor.prepare(picture(48, 72), predictor.options())
    predictor.input = Input(format="BGR", min_size_test=128, max_size_test=128)
    with pytest.raises(errors.ImageError, match="80x64 is scaled to 128x102, but the model takes at most 96 pixels per side"):
        predictor.prepare(picture(64, 80), predictor.options())


@pytest.mark.parametrize("classes", [[0], [1]])
def test_proposals_are_of_class_0_and_of_no_name(classes):
    MetadataCatalog.get("named_proposals").set(thing_classes=["cat", "dog"])
    cfg = small_cfg()
    cfg.DATASETS.TEST = ("named_proposals",)
    predictor = of(cfg)
    assert (len(predictor([picture()], classes=classes)[0]) > 0) == (classes == [0])
    with pytest.raises(errors.InvalidArgumentError, match="has no class names"):
        predictor([picture()], classes=["cat"])


def test_budget_may_be_numpys_number():
    assert of(tiny_cfg(), max_batch_pixels=np.int64(5000)).budget() == 5000
