"""The self-test that saving records, and ``verify``, which finds whatever changed since then."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import bentoml
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from bentoml._internal.frameworks import detectron as adapter
from detectron2.engine import DefaultPredictor
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import zoo
from bentoml_detectron import errors, selftest, verify
from bentoml_detectron import outputs as our_outputs
from bentoml_detectron.artifact import config, folder, manifest, plain_yaml
from bentoml_detectron.results import Detections
from support import built, checkpoint, small_cfg, tiny_cfg, tree

pytestmark = pytest.mark.slow

BENTOML = Path(sys.executable).with_name("bentoml")


def test_a_caller_s_mistake_is_an_error_and_no_problem_of_the_model(demo_predictor):
    saved = bentoml.detectron.save_model("sound", demo_predictor)
    with pytest.raises(errors.InvalidArgumentError, match="trusted is 'my_package'; give a list of modules"):
        verify(saved, trusted="my_package")
    with bentoml.models.create("of_another_framework", module="bentoml.sklearn") as other:
        pass
    for each in (other, other.tag, str(other.tag)):
        with pytest.raises(errors.ModelNotFoundError, match=r"bentoml\.sklearn"):
            verify(each)
    bentoml.models.delete(other.tag)


@META_ARCH_REGISTRY.register()
class Adapting(GeneralizedRCNN):
    """Normalizes by what it has seen, and writes that into its buffer."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.register_buffer("level", torch.tensor(120.0))

    def preprocess_image(self, given):
        images = super().preprocess_image([{**each, "image": each["image"] * (120 / self.level)} for each in given])
        self.level.lerp_(given[0]["image"].mean(), 0.5)
        return images


@pytest.mark.filterwarnings("ignore:the model needs")
def test_model_that_writes_into_its_buffers_is_saved_as_it_was():
    cfg = tiny_cfg("Adapting")
    module = built(cfg)
    saved = bentoml.detectron.save_model("adapting", module, cfg)
    assert module.level == 120
    assert bentoml.detectron.load_model(saved).level == 120
    assert verify(saved).identical


@pytest.mark.parametrize("where", ["saved", "verified"])
def test_autocast_around_it_changes_nothing(where, demo_predictor):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "saved"):
        saved = bentoml.detectron.save_model("autocast", demo_predictor)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "verified"):
        assert verify(saved).identical


@pytest.mark.parametrize("name", ["a\n", "a:1\n"])
def test_name_with_a_line_s_end_is_refused(name, demo_predictor):
    with pytest.raises(errors.InvalidArgumentError, match="is not a valid tag"):
        bentoml.detectron.save_model(name, demo_predictor)


@pytest.mark.parametrize("given", [None, 5, [1]], ids=str)
def test_datasets_that_are_no_names_are_none(given):
    cfg = small_cfg()
    cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = given, given
    saved = bentoml.detectron.save_model("nameless", built(small_cfg()), cfg)
    assert verify(saved).ok


def boxes_cfg() -> Any:
    """Random weights amplify; with these statistics they do not."""
    cfg = tiny_cfg()
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.PIXEL_STD = [3000.0, 3000.0, 3000.0]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [48], [64], [128], [256]]  # so that boxes overlap
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    return cfg


def masked_cfg() -> Any:
    cfg = boxes_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 7
    return cfg


def keypoint_cfg() -> Any:
    cfg = boxes_cfg()
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = [8]
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 5
    return cfg


def panoptic_cfg() -> Any:
    cfg = masked_cfg()
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 32
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 4
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 255
    cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = 0.0
    return cfg


def semantic_cfg() -> Any:
    cfg = panoptic_cfg()
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    return cfg


def retinanet_cfg() -> Any:
    cfg = boxes_cfg()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RETINANET.NUM_CLASSES = 5
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    return cfg


def proposals_cfg() -> Any:
    cfg = boxes_cfg()
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    return cfg


def neighbour(name: str) -> Any:
    """Another file of tests beside this one; once a process, as one of them registers a model."""
    path = Path(__file__).with_name(f"{name}.py")
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path):
            return module
    spec = importlib.util.spec_from_file_location(f"neighbour_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def zoo_config(name: str) -> Any:
    """A config of Detectron2's zoo, made narrow."""
    return zoo.zoo_config(zoo.ZOO[name])


KINDS: dict[str, Callable[[], Any]] = {
    "boxes": boxes_cfg,
    "masks": masked_cfg,
    "keypoints": keypoint_cfg,
    "panoptic": panoptic_cfg,
    "semantic": semantic_cfg,
    "RetinaNet": retinanet_cfg,
    "proposals": proposals_cfg,
}


def spread(module: torch.nn.Module) -> torch.nn.Module:
    """Gives an untrained model scores that differ, as a trained one's do."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in module.named_parameters():
        if name.endswith(("cls_score.weight", "objectness_logits.weight", "predictor.weight", "bbox_pred.weight")):
            weight = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
            weight -= weight.flatten(1).mean(1).reshape(-1, *[1] * (weight.dim() - 1))  # features are above 0: of no one class
            parameter.data = weight * (0.5 if "bbox" in name else 40.0 if name.startswith("head") else 10.0)
    return module


def model_of(cfg: Any, seed: int = 0) -> torch.nn.Module:
    return spread(built(cfg, seed))


def saved_model(cfg: Any, name: str = "verified", seed: int = 0, **options: Any) -> bentoml.Model:
    return bentoml.detectron.save_model(name, model_of(cfg, seed), cfg, **options)


def manifest_of(saved: bentoml.Model) -> dict[str, Any]:
    content = json.loads(Path(saved.path_of("manifest.json")).read_text())
    content.pop(manifest.DIGEST)
    return content


def seal(saved: bentoml.Model, change: Callable[[dict[str, Any]], None] = lambda content: None) -> None:
    """Writes a manifest with right sizes and digests for what is in the folder now; only the self-test is the old one."""
    content = manifest_of(saved)
    path = Path(saved.path)
    for name in content["files"]:
        content["files"][name] = manifest.record(path, name).model_dump()
    change(content)
    (path / manifest.MANIFEST).write_bytes(manifest.spell(content))


def seal_config(saved: bentoml.Model, change: Callable[[Any], None]) -> None:
    """Another config, as if the model had been saved with it, self-test aside."""
    path = Path(saved.path)
    content = manifest_of(saved)
    cfg = config.from_plain(config.read(path), content["config_tuples"])
    change(cfg)
    description = folder.describe(cfg)
    (path / config.CONFIG).write_bytes(plain_yaml.dump(description.plain))
    tuples = [list(each) for each in description.tuples]
    seal(saved, lambda content: content.update(input=description.input.model_dump(), config_tuples=tuples))


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Callable[[str], Path]:
    """A folder with a saved model of a kind, made once."""
    kept: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in kept:
            saved = saved_model(KINDS[kind]())
            kept[kind] = tmp_path_factory.mktemp(kind)
            shutil.copytree(saved.path, kept[kind], dirs_exist_ok=True)
            bentoml.models.delete(saved.tag)
        return kept[kind]

    return of


@pytest.fixture
def fresh(intact, store, request) -> Iterator[Callable[[str], bentoml.Model]]:
    """A copy of it in the store, to damage."""
    made = []

    def of(kind: str = "boxes") -> bentoml.Model:
        source = intact(kind)
        name, version = (
            next(line.split()[1] for line in (source / "model.yaml").read_text().splitlines() if line.startswith("name:")),
            next(line.split()[1] for line in (source / "model.yaml").read_text().splitlines() if line.startswith("version:")),
        )
        target = store / name / version
        shutil.copytree(source, target)
        made.append(target)
        return bentoml.detectron.get(f"{name}:{version}")

    yield of
    for target in made:
        shutil.rmtree(target, ignore_errors=True)


class TestSaving:
    def test_records_a_self_test(self, fresh):
        recorded = manifest_of(fresh("masks"))["self_test"]
        found = Detections.from_json(recorded["detections"])
        assert len(found) == selftest.WANTED.top_k == 8
        assert len({float(score) for score in found.scores}) == 8
        assert found.masks is not None
        assert recorded["device"] == "cpu"
        assert recorded["settings"]["roi_heads.box_predictor.test_nms_thresh"] == "0.5"

    def test_can_be_told_not_to(self):
        saved = saved_model(tiny_cfg(), self_test=False)
        assert manifest_of(saved)["self_test"] is None
        report = verify(saved)
        assert report.ok
        assert report.identical is None
        assert report.notes == ("no self-test was recorded when the model was saved",)

    def test_model_that_takes_more_than_an_image_is_saved_without_one(self, caplog):
        """Fast R-CNN takes proposals too; a warning says so."""
        cfg = tiny_cfg()
        cfg.MODEL.LOAD_PROPOSALS = True
        cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
        saved = bentoml.detectron.save_model("verified-fast", built(cfg), cfg)
        assert "no self-test is recorded: the model does not run on an image alone" in caplog.text
        assert manifest_of(saved)["self_test"] is None
        assert verify(saved).ok

    def test_what_training_leaves_in_a_module_is_no_setting(self):
        """RetinaNet has the mean of its loss's normalizer since its first step, and what its config builds has none."""
        cfg = zoo.zoo_config(zoo.ZOO["RetinaNet"])
        module = built(cfg).train()
        truth = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[5.0, 5.0, 40.0, 40.0]])), gt_classes=torch.tensor([1]))
        with EventStorage(0):
            module([{"image": torch.rand(3, 64, 64) * 255, "instances": truth, "height": 64, "width": 64}])
        assert "loss_normalizer" in vars(module)
        saved = bentoml.detectron.save_model("verified-trained", module.eval(), cfg)
        assert "loss_normalizer" not in manifest_of(saved)["self_test"]["settings"]
        assert verify(saved).ok

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("norm", "mode"),
        [("FrozenBN", "training"), ("BN", "training"), ("BN", "mixed"), ("BN", "evaluation"), ("GN", "training")],
    )
    def test_leaves_the_module_as_it_was(self, norm, mode):
        """Its mode, module by module; its weights and statistics; its settings; its hooks. ResNet keeps its stages in a list
        too, where statistics of batches would be counted."""
        cfg = tiny_cfg()
        if norm == "GN":
            cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 32
        cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = norm
        cfg.MODEL.FPN.OUT_CHANNELS = 32
        module = built(cfg)
        module.train(mode != "evaluation")
        if mode == "mixed":
            module.backbone.bottom_up.res3.eval()
        expected = state_of(module)
        bentoml.detectron.save_model("verified-manners", module, cfg)
        assert state_of(module) == expected

    def test_keeps_nothing_of_the_run_in_the_module(self, monkeypatch):
        """A model that caches what it computes would keep tensors that cannot be trained with."""

        class Caching(GeneralizedRCNN):
            def preprocess_image(self, batched_inputs):
                self.cached = self.backbone.bottom_up.cached = super().preprocess_image(batched_inputs)
                return self.cached

        monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "Caching", Caching)
        cfg = tiny_cfg("Caching")
        module = built(cfg)
        bentoml.detectron.save_model("verified-caching", module, cfg)
        assert not hasattr(module, "cached")
        assert not hasattr(module.backbone.bottom_up, "cached")

    def test_leaves_random_numbers_as_they_were(self, monkeypatch):
        """Of PyTorch, NumPy and Python, also for a model that draws some when it is built and when it runs."""
        monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "Dicing", Dicing)
        cfg = tiny_cfg("Dicing")
        module = built(cfg)
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        expected = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        bentoml.detectron.save_model("verified-dicing", module, cfg)
        assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected

    def test_model_that_draws_random_numbers_has_a_self_test(self, monkeypatch):
        monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "Dicing", Dicing)
        cfg = tiny_cfg("Dicing")
        report = verify(bentoml.detectron.save_model("verified-dicing", built(cfg), cfg))
        assert report.ok
        assert report.identical

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("path", "value", "says"),
        [
            ("roi_heads.box_predictor.test_score_thresh", 0.7, r"box_predictor\.test_score_thresh is 0\.0; it was 0\.7"),
            ("roi_heads.box_predictor.test_nms_thresh", 0.9, r"box_predictor\.test_nms_thresh is 0\.5; it was 0\.9"),
            ("roi_heads.box_predictor.test_topk_per_image", 5, r"test_topk_per_image is 100; it was 5"),
            ("roi_heads.box_predictor.box2box_transform.weights", (1, 1, 1, 1), r"box2box_transform\.weights is \[10\.0"),
            ("proposal_generator.nms_thresh", 0.3, r"proposal_generator\.nms_thresh is 0\.7; it was 0\.3"),
            ("proposal_generator.post_nms_topk", {True: 5, False: 5}, r"post_nms_topk is .*False: 20.*; it was"),
            ("pixel_mean", torch.zeros(3, 1, 1), r"buffers\.pixel_mean differs"),
            ("proposal_generator.anchor_generator.cell_anchors.0", torch.ones(3, 4), r"cell_anchors\.0 differs"),
            ("roi_heads.box_pooler.level_poolers.0.sampling_ratio", 1, r"ROIAlign\.sampling_ratio is 0 x 4; it was 0 x 3"),
            ("backbone.bottom_up.stem.conv1.norm.eps", 0.1, r"FrozenBatchNorm2d\.eps is 1e-05 x \d+; it was 0\.1 x 1, "),
            ("backbone.fpn_output2.stride", (2, 2), r"the module|Conv2d\.stride"),
        ],
        ids=lambda value: value if isinstance(value, str) and "\\" not in value else "",
    )
    def test_setting_that_was_changed_by_hand_is_refused_by_name(self, path, value, says):
        """The config does not say it, so the loaded model would not have it."""
        cfg = tiny_cfg()
        module = built(cfg)
        holder, _, name = path.rpartition(".")
        target: Any = module
        for step in holder.split(".") if holder else ():
            target = getattr(target, step)
        setattr(target, name, value)
        with pytest.raises(errors.InvalidModelError, match=says) as caught:
            bentoml.detectron.save_model("verified-hand", module, cfg)
        assert "Make the changes to the module in the config, too" in str(caught.value)

    def test_setting_of_a_predictor_that_was_changed_by_hand_is_refused(self, demo_predictor):
        predictor = copy.copy(demo_predictor)
        predictor.model = copy.deepcopy(demo_predictor.model)
        predictor.model.roi_heads.box_predictor.test_score_thresh = 0.9
        with pytest.raises(errors.InvalidModelError, match=r"test_score_thresh is 0\.05; it was 0\.9"):
            bentoml.detectron.save_model("verified-hand", predictor)
        bentoml.detectron.save_model("verified-hand", predictor, self_test=False)

    def test_forward_that_was_replaced_is_refused(self):
        """What is no setting shows in what the model finds."""
        cfg = tiny_cfg()
        module = built(cfg)
        forward = module.backbone.bottom_up.forward
        module.backbone.bottom_up.forward = lambda x: forward(x + 50)
        with pytest.raises(errors.InvalidModelError, match=r"features\.backbone\.p2 differs"):
            bentoml.detectron.save_model("verified-hand", module, cfg)

    def test_device_in_a_setting_is_no_change(self, monkeypatch):
        """Some models keep the device of their config."""

        class Keeping(GeneralizedRCNN):
            def __init__(self, cfg):
                super().__init__(cfg)
                self.my_device = cfg.MODEL.DEVICE

        monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "Keeping", Keeping)
        cfg = tiny_cfg("Keeping")
        module = built(cfg)
        module.my_device = "cuda:1"
        bentoml.detectron.save_model("verified-keeping", module, cfg)


class Dicing(GeneralizedRCNN):
    """Draws random numbers when it is built and when it runs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("drawn", torch.rand(2) + random.random() + np.random.rand())

    def preprocess_image(self, batched_inputs):
        images = super().preprocess_image(batched_inputs)
        images.tensor = images.tensor + torch.randn_like(images.tensor) + random.random() + np.random.rand()
        return images


def state_of(module: torch.nn.Module) -> Any:
    """All of a module that a run could change."""
    return (
        [part.training for part in module.modules()],
        {name: (id(value), value.tolist(), value.requires_grad) for name, value in module.named_parameters()},
        {name: (id(value), value.tolist()) for name, value in module.named_buffers()},
        {path: {key: repr(value) for key, value in vars(part).items()} for path, part in module.named_modules()},
        [list(part._forward_hooks) for part in module.modules()],
    )


class TestIntact:
    """What was not changed is ok, and finds the same to the last bit."""

    @pytest.mark.parametrize(
        "kind", [kind if kind == "panoptic" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
    )
    def test_module(self, kind, fresh):
        report = verify(fresh(kind))
        assert (report.problems, report.notes, report.identical, report.ok) == ((), (), True, True)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", KINDS)
    def test_self_test_is_not_empty(self, kind, fresh):
        recorded = manifest_of(fresh(kind))["self_test"]
        found = Detections.from_json(recorded["detections"])
        assert len(found) == 8 or (found.semantic is not None and len(np.unique(found.semantic)) > 1)
        assert any(name.startswith("features.backbone.") for name in recorded["tensors"])

    def test_predictor(self, demo_predictor):
        report = verify(str(bentoml.detectron.save_model("verified-demo", demo_predictor).tag))
        assert (report.problems, report.notes, report.identical) == ((), (), True)
        assert report.tag.startswith("verified-demo:")

    def test_model_whose_output_is_something_else(self, monkeypatch):
        class Raw(GeneralizedRCNN):
            def forward(self, batched_inputs):
                features = self.backbone(self.preprocess_image(batched_inputs).tensor)
                return [{"pyramid": features, "nested": [features["p2"].mean(), (features["p3"],)]} for _ in batched_inputs]

        monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "Raw", Raw)
        cfg = tiny_cfg("Raw")
        saved = bentoml.detectron.save_model("verified-raw", built(cfg), cfg)
        recorded = manifest_of(saved)["self_test"]
        assert recorded["detections"] is None
        assert {"output.pyramid.p2", "output.nested[0]", "output.nested[1][0]"} <= recorded["tensors"].keys()
        assert verify(saved).identical
        swap_weights(saved, cfg)
        assert any("output.pyramid.p2 differs" in problem for problem in verify(saved).problems)

    @pytest.mark.parametrize("kind", ["predictor", "module"])
    def test_model_of_bentoml_s_own_adapter(self, kind, tmp_path):
        """It has no digests and no self-test; that it loads is what there is to see."""
        if kind == "predictor":
            saved = adapter.save_model("verified-old", DefaultPredictor(checkpoint(tiny_cfg(), tmp_path / "model.pth")))
        else:
            saved = adapter.save_model("verified-old", built(tiny_cfg()), config=tiny_cfg())
        report = verify(saved.tag)
        assert report.ok
        assert report.identical is None
        assert "BentoML's own adapter" in report.notes[0]
        Path(bentoml.models.get(saved.tag).path_of("saved_model.pth")).write_bytes(b"")
        assert "saved_model.pth" in verify(saved.tag).problems[0]

    @pytest.mark.slow
    def test_in_another_process(self, fresh):
        from support import run_python

        code = "import sys, bentoml_detectron as b; r = b.verify(sys.argv[1]); print(r.problems, r.notes, r.identical)"
        assert run_python(code, str(fresh("panoptic").tag)).stdout.strip() == "() () True"

    def test_verify_leaves_the_model_alone(self, fresh):
        saved = fresh()
        before = tree(Path(saved.path))
        verify(saved)
        assert tree(Path(saved.path)) == before


def _tf32(values: torch.Tensor) -> torch.Tensor:
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).view(values.shape)


@contextmanager
def rounding_of_a_gpu() -> Iterator[None]:
    """Convolutions of numbers with 10 bits, as GPUs compute them."""
    plain, transposed = F.conv2d, F.conv_transpose2d
    with (
        mock.patch.object(F, "conv2d", lambda x, weight, *rest, **more: plain(_tf32(x), _tf32(weight), *rest, **more)),
        mock.patch.object(F, "conv_transpose2d", lambda x, w, *rest, **more: transposed(_tf32(x), _tf32(w), *rest, **more)),
    ):
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


OTHERWISE = {
    "one thread": lambda: threads(1),
    "two threads": lambda: threads(2),
    "three threads": lambda: threads(3),
    "without oneDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
}
UNTRAINED = ("Faster R-CNN, C4", "RetinaNet", "RPN, FPN", "Mask R-CNN, FPN", "Mask R-CNN, GroupNorm", "Cascade Mask R-CNN",
             "Keypoint R-CNN", "Semantic FPN", "Panoptic FPN")  # fmt: skip


class TestOtherWaysToCompute:
    """Other kernels round differently: not identical, and no problem."""

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", KINDS)
    def test_small_models(self, kind, fresh):
        saved = fresh(kind)
        for otherwise in OTHERWISE.values():
            with otherwise():
                assert verify(saved).problems == ()

    @pytest.mark.slow
    @pytest.mark.parametrize("otherwise", OTHERWISE.values(), ids=OTHERWISE)
    def test_demo(self, otherwise, demo_predictor):
        saved = bentoml.detectron.save_model("verified-demo", demo_predictor)
        with otherwise():
            assert verify(saved).problems == ()

    def test_these_ways_do_round_differently(self, fresh):
        """Or the tests above would show nothing."""
        saved = fresh("masks")
        with OTHERWISE["without oneDNN"]():
            assert verify(saved).identical is False

    @pytest.mark.slow
    @pytest.mark.parametrize("name", UNTRAINED)
    def test_untrained_models_of_the_zoo(self, name):
        """All their scores are alike, so that what comes first comes first by chance."""
        cfg = zoo_config(name)
        saved = bentoml.detectron.save_model("verified-zoo", built(cfg), cfg)
        for otherwise in OTHERWISE.values():
            with otherwise():
                assert verify(saved).problems == ()
        bentoml.models.delete(saved.tag)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", [*KINDS, "demo", *UNTRAINED])
    def test_saved_on_a_gpu(self, name, fresh, demo_predictor):
        """Computed here as a GPU would."""
        with rounding_of_a_gpu():
            if name in KINDS:
                saved = saved_model(KINDS[name]())
            elif name == "demo":
                saved = bentoml.detectron.save_model("verified-gpu", demo_predictor)
            else:
                saved = bentoml.detectron.save_model("verified-gpu", built(zoo_config(name)), zoo_config(name))
        assert not verify(saved).ok  # nothing else rounds like this
        seal(saved, lambda content: content["self_test"].update(device="cuda:0"))
        assert verify(saved).problems == ()
        bentoml.models.delete(saved.tag)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", KINDS)
    def test_other_weights_are_caught_also_on_another_device(self, kind, fresh):
        saved = fresh(kind)
        swap_weights(saved, KINDS[kind]())
        seal(saved, lambda content: content["self_test"].update(device="cuda:0"))
        assert any("features.backbone" in problem for problem in verify(saved).problems)

    def test_versions_that_differ_are_notes(self, fresh):
        saved = fresh()

        def older(content):
            content["versions"] |= {"torch": "1.9.0", "detectron2": "0.5", "gone": "7"}
            content["self_test"]["settings"]["backbone.of_an_older_version"] = "1"

        seal(saved, older)
        report = verify(saved)
        assert report.ok
        assert report.identical
        assert f"torch is {torch.__version__}; the model was saved with 1.9.0" in report.notes
        assert "gone is absent; the model was saved with 7" in report.notes
        assert len(report.notes) == 3

    def test_device_that_differs_is_a_note(self, fresh):
        saved = fresh()
        seal(saved, lambda content: content["self_test"].update(device="cuda:0"))
        report = verify(saved)
        assert report.ok
        assert report.notes == ("the self-test ran on cpu; when the model was saved, on cuda:0",)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("kind", KINDS)
    def test_on_a_gpu(self, kind, fresh):
        report = verify(fresh(kind), "cuda:0")
        assert report.problems == ()
        assert "the self-test ran on cuda:0" in report.notes[0]


def swap_weights(saved: bentoml.Model, cfg: Any, seed: int = 1) -> None:
    path = Path(saved.path)
    (path / "saved_model.pth").unlink()
    torch.save({"model": model_of(cfg, seed).state_dict()}, path / "saved_model.pth")
    seal(saved)


class TestChangedModel:
    """Sizes and digests are right, so that only the self-test can tell."""

    def changed(self, saved: bentoml.Model, says: str) -> None:
        report = verify(saved)
        assert any(says in problem for problem in report.problems), report.problems
        assert not any("SHA-256" in problem for problem in report.problems)

    def test_control_sealed_again_without_a_change_is_ok(self, fresh):
        saved = fresh("masks")
        seal_config(saved, lambda cfg: None)
        report = verify(saved)
        assert report.ok
        assert report.identical

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", KINDS)
    def test_other_weights(self, kind, fresh):
        saved = fresh(kind)
        swap_weights(saved, KINDS[kind]())
        self.changed(saved, "features.backbone")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "name", ["backbone.fpn_output2.weight", "roi_heads.box_predictor.bbox_pred.bias", "roi_heads.mask_head.deconv.weight"]
    )
    def test_one_other_tensor(self, name, fresh):
        saved = fresh("masks")
        module = bentoml.detectron.load_model(saved)
        with torch.no_grad():
            module.get_parameter(name).add_(0.1)
        path = Path(saved.path) / "saved_model.pth"
        state = {key: value.clone() for key, value in module.state_dict().items()}
        path.unlink()
        torch.save({"model": state}, path)
        seal(saved)
        self.changed(saved, "")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("key", "value", "says"),
        [
            ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.3, "setting roi_heads.box_predictor.test_score_thresh is 0.3; it was 0.0"),
            ("MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.6, "setting roi_heads.box_predictor.test_nms_thresh is 0.6; it was 0.5"),
            ("MODEL.RPN.NMS_THRESH", 0.71, "setting proposal_generator.nms_thresh is 0.71; it was 0.7"),
            ("MODEL.RPN.POST_NMS_TOPK_TEST", 51, "setting proposal_generator.post_nms_topk is"),
            ("TEST.DETECTIONS_PER_IMAGE", 99, "test_topk_per_image is 99; it was 100"),
            ("MODEL.ANCHOR_GENERATOR.SIZES", [[33], [48], [64], [128], [256]], "cell_anchors.0 differs"),
            ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 1.0, 2.1]], "cell_anchors.0 differs"),
            ("MODEL.ANCHOR_GENERATOR.OFFSET", 0.5, "setting proposal_generator.anchor_generator.offset is 0.5; it was 0.0"),
            ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (10.0, 10.0, 5.0, 5.1), "box2box_transform.weights is"),
            ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign", "setting ROIAlign.aligned is"),
            ("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.6], "buffers.pixel_mean differs"),
            ("MODEL.PIXEL_STD", [1.0, 1.0, 1.001], "buffers.pixel_std differs"),
            ("MODEL.RESNETS.STRIDE_IN_1X1", False, "features.backbone.p3 differs"),
            ("INPUT.FORMAT", "RGB", "setting input.format is 'RGB'; it was 'BGR'"),
            ("INPUT.MIN_SIZE_TEST", 65, "setting input.min_size_test is 65; it was 64"),
            ("INPUT.MAX_SIZE_TEST", 95, "setting input.max_size_test is 95; it was 96"),
        ],
        ids=lambda value: value if isinstance(value, str) and value.isupper() else "",
    )
    def test_other_config(self, key, value, says, fresh):
        saved = fresh("masks")
        seal_config(saved, lambda cfg: cfg.merge_from_list([key, value]))
        self.changed(saved, says)

    def test_other_colour_order_shows_in_what_is_found_too(self, fresh):
        saved = fresh("masks")
        seal_config(saved, lambda cfg: cfg.merge_from_list(["INPUT.FORMAT", "RGB"]))
        self.changed(saved, "features.backbone")

    @pytest.mark.parametrize(("key", "value"), [("format", "RGB"), ("min_size_test", 65), ("max_size_test", 95)])
    def test_input_in_the_manifest_that_is_not_the_config_s(self, key, value, fresh):
        saved = fresh()
        seal(saved, lambda content: content["input"].update({key: value}))
        assert any("the manifest describes the input as" in problem for problem in verify(saved).problems)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("key", "value", "says"),
        [("format", "RGB", "features.backbone"), ("min_size_test", 65, "input.min_size_test is 65; it was 800")],
        ids=["format", "min_size_test"],
    )
    def test_input_of_a_lazy_model(self, key, value, says):
        """Only the manifest has it."""
        lazy = neighbour("test_lazy_models")
        saved = bentoml.detectron.save_model("verified-lazy", lazy.build(lazy.small_node()), config=lazy.small_node())
        assert verify(saved).identical
        seal(saved, lambda content: content["input"].update({key: value}))
        self.changed(saved, says)
        bentoml.models.delete(saved.tag)

    def test_class_names_in_another_order(self, demo_predictor):
        saved = bentoml.detectron.save_model("verified-names", demo_predictor)
        seal(saved, lambda content: content["dataset"]["thing_classes"].reverse())
        self.changed(saved, "the class names differ from those that it was saved with")

    def test_settings_that_are_gone(self, fresh):
        saved = fresh()
        seal(saved, lambda content: content["self_test"]["settings"].update({"roi_heads.extra": "1"}))
        self.changed(saved, "setting roi_heads.extra is absent; it was 1")


def _nms_of_all_classes(boxes, scores, ids, threshold, own=torchvision.ops.boxes.batched_nms):
    return own(boxes, scores, torch.zeros_like(ids), threshold)


def _looser_nms(boxes, scores, ids, threshold, own=torchvision.ops.boxes.batched_nms):
    return own(boxes, scores, ids, min(threshold + 0.2, 1.0))


def _no_nms(boxes, scores, ids, threshold):
    return scores.argsort(descending=True)


_roi_align = sys.modules["detectron2.layers.roi_align"]


def _unaligned(image, rois, size, scale, ratio, aligned, own=_roi_align.roi_align):
    return own(image, rois, size, scale, ratio, not aligned)


def _fewer_samples(image, rois, size, scale, ratio, aligned, own=_roi_align.roi_align):
    return own(image, rois, size, scale, 1, aligned)


def _bilinear(image, *args, own=F.interpolate, **kwargs):
    return own(image, *args, **kwargs | ({"mode": "bilinear"} if kwargs.get("mode") == "nearest" else {}))


def _nearest(image, *args, own=F.interpolate, **kwargs):
    if kwargs.get("mode") != "bilinear":
        return own(image, *args, **kwargs)
    return own(image, *args, **{key: value for key, value in kwargs.items() if key != "align_corners"} | {"mode": "nearest"})


def _group_norm(image, groups, weight=None, bias=None, eps=1e-5, own=F.group_norm):
    return own(image, groups, weight, bias, 1e-2)


def _batch_norm(image, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, own=F.batch_norm):
    return own(image, mean, var, weight, bias, training, momentum, 1e-3)


def _max_pool(image, *args, own=F.max_pool2d, **kwargs):
    return F.avg_pool2d(image, *args, **kwargs) if kwargs.get("padding") else own(image, *args, **kwargs)


LIBRARIES: dict[str, tuple[Any, str, Any, list[str]]] = {
    "NMS over all classes": (torchvision.ops.boxes, "batched_nms", _nms_of_all_classes, ["boxes", "panoptic"]),
    "a looser NMS": (torchvision.ops.boxes, "batched_nms", _looser_nms, ["keypoints", "RetinaNet", "proposals"]),
    "no NMS": (torchvision.ops.boxes, "batched_nms", _no_nms, ["boxes", "RetinaNet", "proposals"]),
    "ROIAlign half a pixel off": (_roi_align, "roi_align", _unaligned, ["boxes", "keypoints"]),
    "ROIAlign with fewer samples": (_roi_align, "roi_align", _fewer_samples, ["masks"]),
    "bilinear upsampling in the FPN": (F, "interpolate", _bilinear, ["boxes", "semantic"]),
    "nearest upsampling of logits": (F, "interpolate", _nearest, ["semantic", "panoptic"]),
    "another eps of GroupNorm": (F, "group_norm", _group_norm, ["semantic", "panoptic"]),
    "another eps of BatchNorm": (F, "batch_norm", _batch_norm, ["boxes", "RetinaNet", "semantic"]),
    "another pooling in the stem": (F, "max_pool2d", _max_pool, ["boxes", "semantic"]),
    "another threshold of masks": (our_outputs, "MASK_THRESHOLD", 0.55, ["masks", "panoptic"]),
}


@pytest.mark.slow
class TestChangedLibraries:
    """What PyTorch, torchvision, Detectron2 and this package do may change; each on models that use it."""

    @pytest.mark.parametrize(
        ("change", "kind"),
        [(change, kind) for change, (*_, kinds) in LIBRARIES.items() for kind in kinds],
        ids=lambda value: value,
    )
    def test_is_caught(self, change, kind, fresh):
        saved = fresh(kind)
        holder, name, other, _ = LIBRARIES[change]
        with mock.patch.object(holder, name, other):
            report = verify(saved)
        assert not report.ok
        assert report.identical is False
        assert not any(" setting " in problem or "SHA-256" in problem for problem in report.problems)

    @pytest.mark.parametrize("change", LIBRARIES)
    def test_is_caught_on_the_trained_model(self, change, demo_predictor):
        """But for what the demo model does not use."""
        holder, name, other, _ = LIBRARIES[change]
        saved = bentoml.detectron.save_model("verified-demo", demo_predictor)
        with mock.patch.object(holder, name, other):
            report = verify(saved)
        unused = change in ("another eps of GroupNorm", "nearest upsampling of logits")
        assert report.ok == unused, report.problems
        assert report.identical == unused
        bentoml.models.delete(saved.tag)

    def test_model_that_fails_is_a_problem(self, fresh):
        saved = fresh()
        with mock.patch.object(torchvision.ops.boxes, "batched_nms", side_effect=RuntimeError("no kernel")):
            report = verify(saved)
        assert report.problems == ("the self-test fails, although it ran when the model was saved: RuntimeError('no kernel')",)


class TestDamage:
    """A report with problems, whatever the damage; never an exception."""

    @pytest.fixture(scope="class")
    def least(self):
        """The smallest model, without a self-test that would cost time."""
        return bentoml.detectron.save_model("verified-least", built(small_cfg()), small_cfg())

    @pytest.mark.parametrize("name", ["model.yaml", "config.yaml", "saved_model.pth", "custom_objects.pkl", "manifest.json"])
    def test_flipped_bit(self, name, least):
        """At both ends and at 20 places between; the report names the file."""
        path = Path(least.path) / name
        content = path.read_bytes()
        places = random.Random(name).sample(range(len(content) * 8), 20) + [0, 7, len(content) * 8 - 1]
        try:
            for place in places:
                damaged = bytearray(content)
                damaged[place // 8] ^= 1 << place % 8
                path.write_bytes(damaged)
                report = verify(str(least.tag))
                assert not report.ok, place
                assert any(name in problem for problem in report.problems), (place, report.problems)
        finally:
            path.write_bytes(content)
        assert verify(least).ok

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["model.yaml", "manifest.json"])
    def test_every_flipped_bit(self, name, least):
        """Of every second and every 97th byte of the files that are parsed before any digest is looked at."""
        path = Path(least.path) / name
        content = path.read_bytes()
        try:
            for place in range(0, len(content), 97 if name == "manifest.json" else 2):
                for bit in range(8):
                    damaged = bytearray(content)
                    damaged[place] ^= 1 << bit
                    path.write_bytes(damaged)
                    assert not verify(str(least.tag)).ok, (place, bit)
        finally:
            path.write_bytes(content)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["model.yaml", "config.yaml", "saved_model.pth", "custom_objects.pkl", "manifest.json"])
    @pytest.mark.parametrize("how", ["missing", "empty", "cut short", "longer", "a link", "a folder"])
    def test_file_that_is_not_there_whole(self, name, how, fresh):
        saved = fresh()
        path = Path(saved.path) / name
        content = path.read_bytes()
        path.unlink()
        if how == "a link":
            path.symlink_to("/etc/hostname")
        elif how == "a folder":
            path.mkdir()
        elif how != "missing":
            path.write_bytes({"empty": b"", "cut short": content[:-9], "longer": content + b"\n"}[how])
        for given in (saved, saved.tag):
            try:
                report = verify(given)
            except errors.ModelNotFoundError:  # for BentoML a folder without its record is no model
                assert name == "model.yaml"
                assert how in ("missing", "a folder", "a link")
                assert given is not saved
                continue
            assert any(name in problem for problem in report.problems), report.problems

    @pytest.mark.parametrize("name", ["extra.txt", ".hidden", "last_checkpoint"])
    def test_extra_file(self, name, fresh):
        saved = fresh()
        (Path(saved.path) / name).write_text("x")
        assert verify(saved).problems == (f"{name} is not a file of this model; it was added later",)

    def test_extra_folder(self, fresh):
        saved = fresh()
        (Path(saved.path) / "more").mkdir()
        assert "more is not a file of this model" in verify(saved).problems[0]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "damage",
        [
            lambda test: test.update(detections="{}"),
            lambda test: test.update(detections="no JSON"),
            lambda test: test.update(detections=None),
            lambda test: test.update(detections=other_size(test["detections"])),
            lambda test: test.update(tensors={}),
            lambda test: [tensor.update(first=[]) for tensor in test["tensors"].values()],
            lambda test: [tensor.update(first=[float("nan")] * len(tensor["first"])) for tensor in test["tensors"].values()],
            lambda test: [tensor.update(shape=[1]) for tensor in test["tensors"].values()],
            lambda test: test.update(settings={}),
            lambda test: test.update(image_sha256="0" * 64),
        ],
        ids=["empty", "no JSON", "none", "another size", "no tensors", "short", "NaN", "shapes", "no settings", "image"],
    )
    @pytest.mark.parametrize("kind", ["panoptic", "semantic", "keypoints"])
    def test_self_test_that_says_something_else(self, damage, kind, fresh):
        saved = fresh(kind)
        seal(saved, lambda content: damage(content["self_test"]))
        assert not verify(saved).ok

    @pytest.mark.slow
    @pytest.mark.parametrize("part", ["masks", "keypoints", "panoptic", "semantic", "boxes", "scores"])
    def test_self_test_without_a_part(self, part, fresh):
        saved = fresh({"keypoints": "keypoints", "semantic": "semantic"}.get(part, "panoptic"))

        def without(content):
            found = json.loads(content["self_test"]["detections"])
            found[part] = [] if part in ("boxes", "scores") else None
            content["self_test"]["detections"] = json.dumps(found)

        seal(saved, without)
        assert not verify(saved).ok

    def test_every_problem_is_one_line(self, fresh):
        saved = fresh()
        seal_config(saved, lambda cfg: cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", 7]))
        problems = verify(saved).problems
        assert any("misshaped" in problem for problem in problems)
        assert not any("\n" in problem for problem in problems)

    def test_api_version_of_the_old_adapter_does_not_hide_damage(self, fresh):
        saved = fresh()
        path = Path(saved.path) / "model.yaml"
        path.write_text(path.read_text().replace("api_version: v2", "api_version: v1"))
        assert any("model.yaml differs from what was saved" in problem for problem in verify(str(saved.tag)).problems)


def other_size(text: str) -> str:
    found = Detections.from_json(text)
    wider = (found.image_size[0], found.image_size[1] + 1)
    count = len(found)
    return replace(
        found,
        image_size=wider,
        masks=None if found.masks is None else [{"size": list(wider), "counts": "0"} for _ in range(count)],
        semantic=None if found.semantic is None else np.zeros(wider, np.uint8),
        panoptic=None if found.panoptic is None else type(found.panoptic)(np.zeros(wider, np.int32), found.panoptic.segments),
    ).to_json()


class TestArguments:
    def test_unknown_model(self):
        with pytest.raises(errors.ModelNotFoundError):
            verify("nobody-saved-this:latest")

    def test_no_tag(self):
        with pytest.raises(errors.InvalidArgumentError):
            verify("no tag")

    def test_unknown_device(self, fresh):
        with pytest.raises(errors.UnknownDeviceError):
            verify(fresh(), "warp")

    def test_report_cannot_be_changed(self, fresh):
        report = verify(fresh())
        with pytest.raises(AttributeError):
            report.problems = ("x",)


def test_self_test_image_is_the_same_everywhere():
    """Its digest is in every manifest."""
    assert selftest.image().shape == (128, 160, 3)
    assert len(np.unique(selftest.image().reshape(-1, 3), axis=0)) > 1000
    assert hashlib.sha256(selftest.image().tobytes()).hexdigest() == IMAGE


IMAGE = "715fa8ab0914d8371ed673a7c0c79d0da84d89463a3871979440b6ba08e9ae31"


def command(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BENTOML), "detectron", "verify", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300,
        env={**os.environ, **env},
    )  # fmt: skip


@pytest.mark.slow
class TestCommand:
    def test_intact_model(self, fresh, tmp_path):
        saved = fresh("masks")
        result = command(str(saved.tag), cwd=tmp_path)
        assert result.returncode == 0
        assert result.stdout == f"{saved.tag} is unchanged since it was saved, and gives identical results\n"
        assert "problem" not in result.stderr

    def test_model_of_bentomls_adapter_is_not_called_what_was_saved(self, fresh, tmp_path):
        """There are no digests of it."""
        saved = fresh()
        (Path(saved.path) / "manifest.json").unlink()
        record = Path(saved.path) / "model.yaml"
        record.write_text(record.read_text().replace("api_version: v2", "api_version: v1"))
        result = command(str(saved.tag), cwd=tmp_path)
        assert (result.returncode, result.stdout.splitlines()[-1]) == (0, f"{saved.tag} loads"), result.stderr
        assert not verify(saved.tag).has_digests

    def test_damaged_model(self, fresh, tmp_path):
        saved = fresh()
        seal(saved, lambda content: content["self_test"]["settings"].update({"input.format": "'RGB'"}))
        result = command(str(saved.tag), cwd=tmp_path)
        assert result.returncode == 1
        assert result.stdout == ""
        assert [line for line in result.stderr.splitlines() if "problem" in line] == [
            "problem: setting input.format is 'BGR'; it was 'RGB'"
        ]
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize("arguments", [["nobody-saved-this"], ["x", "--device", "warp"]], ids=str)
    def test_error_is_one_line(self, arguments, tmp_path):
        result = command(*arguments, cwd=tmp_path)
        assert result.returncode == 1
        assert len([line for line in result.stderr.splitlines() if line.startswith("Error: ")]) == 1
        assert "Traceback" not in result.stderr

    def test_trust(self, tmp_path):
        """Both ways: an installed module, and source that the model brings along."""
        (tmp_path / "verified_own.py").write_text("from torch import nn\nclass Own(nn.Linear):\n    pass\n")
        code = """
import bentoml, sys, verified_own
config = {"_target_": "verified_own.Own", "in_features": 2, "out_features": 3}
for given in [], [verified_own]:
    model = verified_own.Own(2, 3)
    print(bentoml.detectron.save_model("verified-own", model, config, self_test=False, external_modules=given).tag)
"""
        from support import run_python

        path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])}
        installed, carried = run_python(code, **path).stdout.split()
        done = command(installed, "--trusted", "other", "--trusted", "verified_own", cwd=tmp_path, **path)
        assert done.returncode == 0
        assert done.stdout.splitlines() == [
            "note: no self-test was recorded when the model was saved",
            f"{installed} is unchanged since it was saved, and loads",
        ]  # fmt: skip
        refused = command(carried, cwd=tmp_path)
        assert refused.returncode == 1
        assert "trust_remote_code=True" in refused.stderr
        assert command(carried, "--trust-remote-code", cwd=tmp_path).returncode == 0
