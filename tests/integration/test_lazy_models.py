"""Models of LazyConfigs: every kind in Detectron2's zoo, saved, loaded, and the same outputs bit for bit.

The configs are the zoo's own, made narrower where they can be, with random weights.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import DefaultPredictor
from omegaconf import DictConfig, OmegaConf
from torch import nn

from bentoml_detectron import demo, errors, verify
from support import BLOCK_NETWORK, assert_same, picture, run_python, tensors, tiny_cfg

pytestmark = pytest.mark.slow

has_fcos = importlib.util.find_spec("detectron2.modeling.meta_arch.fcos") is not None
has_vit = importlib.util.find_spec("detectron2.modeling.backbone.vit") is not None


def whole(name: str) -> Any:
    """A zoo config: ``common/models/*`` with a data loader beside, the others as they are."""
    cfg = LazyConfig.load(model_zoo.get_config_file(name))
    if "dataloader" not in cfg:
        cfg.dataloader = LazyConfig.load(model_zoo.get_config_file("common/data/coco.py")).dataloader
    narrow(cfg.model)
    return cfg


def nodes(node: Any):
    """Every mapping in a config."""
    if isinstance(node, DictConfig):
        yield node
    items = node.keys() if isinstance(node, DictConfig) else range(len(node)) if OmegaConf.is_list(node) else ()
    for key in items:
        if not OmegaConf.is_interpolation(node, key):
            yield from nodes(node[key])


def narrow(model: Any) -> None:
    """Small heads, thresholds that let everything through, and what keeps random weights finite and different."""
    for node in nodes(model):
        for key in ("test_score_thresh", "combine_instances_score_thresh"):
            if key in node:
                node[key] = 0.0
        if "test_score_thresh" in node:
            node.test_topk_per_image = 10
        if "fc_dims" in node:
            node.fc_dims = [64 for _ in node.fc_dims]
        if node.get("norm") == "FrozenBN":
            node.norm = "BN"  # with statistics of their own, so that activations stay finite
    for predictor in [node for node in nodes(model) if "box2box_transform" in node and "input_shape" in node]:
        if not isinstance(predictor.input_shape, DictConfig) or "_target_" not in predictor.input_shape:
            from detectron2.layers import ShapeSpec

            predictor.input_shape = ShapeSpec(channels=64)
    if "proposal_generator" in model:
        model.proposal_generator.post_nms_topk = (2000, 50)
    if "mask_head" in model.get("roi_heads", {}):
        model.roi_heads.mask_head.conv_dims = [16]
    if "keypoint_head" in model.get("roi_heads", {}):
        model.roi_heads.keypoint_head.conv_dims = [16]
    if "head" in model:  # RetinaNet and FCOS
        model.pop("test_topk_per_image", None)
        model.test_score_thresh, model.max_detections_per_image = 0.0, 10
    if has_fcos and str(getattr(model._target_, "__name__", model._target_)).endswith("FCOS"):
        model.head.norm = "BN"  # Detectron2 0.6 tries GroupNorm out on one channel, which PyTorch no longer takes
    model.pixel_std = [5000.0, 5000.0, 5000.0]  # random weights amplify


COMMON = sorted(
    f"common/models/{path.name}"
    for path in Path(model_zoo.get_config_file("common/models/retinanet.py")).parent.glob("*.py")
    if has_fcos or path.stem != "fcos"
)  # fmt: skip
NEW_BASELINES = [
    f"new_baselines/mask_rcnn_{backbone}_FPN_100ep_LSJ.py"
    for backbone in ("R_50", "R_101", "regnetx_4gf_dds", "regnety_4gf_dds")
]


def build(node: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return instantiate(node).eval()


def outputs(module: nn.Module) -> Any:
    with torch.no_grad():
        return module([{"image": torch.as_tensor(picture(96, 96).transpose(2, 0, 1).copy()), "height": 90, "width": 100}])


def small_node(**changes: Any) -> Any:
    """A RetinaNet over a narrow ResNet: 0.6 MB of weights."""
    node = LazyConfig.load(model_zoo.get_config_file("common/models/retinanet.py")).model
    narrow(node)
    node.backbone.bottom_up.stem.out_channels = 8
    node.backbone.bottom_up.stages = [
        L(_make_stage())(
            block_class=_bottleneck(), num_blocks=1, in_channels=before, bottleneck_channels=4, out_channels=after,
            stride=stride, norm="BN",
        )
        for before, after, stride in ((8, 16, 1), (16, 24, 2), (24, 32, 2), (32, 64, 2))
    ]  # fmt: skip
    node.backbone.out_channels = 16
    node.backbone.top_block.in_channels = 64
    node.head.conv_dims = [16]
    node.head.input_shape = [_shape(channels=16)] * 5
    node.num_classes = 5
    node.update(changes)
    return node


def _make_stage() -> Callable[..., Any]:
    from detectron2.modeling.backbone import ResNet

    return ResNet.make_stage


def _bottleneck() -> type:
    from detectron2.modeling.backbone import BottleneckBlock

    return BottleneckBlock


def _shape(**shape: int) -> Any:
    from detectron2.layers import ShapeSpec

    return ShapeSpec(**shape)


def config_of(saved: bentoml.Model) -> Any:
    return yaml.safe_load(Path(saved.path_of("config.yaml")).read_text())


class TestZoo:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", [*COMMON, *NEW_BASELINES])
    def test_saves_loads_and_predicts_the_same(self, name):
        """By `load_model`, bit for bit; `load_predictor` finds as much; verify finds the same too."""
        cfg = whole(name)
        module = build(cfg.model)
        expected = outputs(module)
        assert all(torch.isfinite(value.float()).all() for value in tensors(expected).values())
        saved = bentoml.detectron.save_model("lazy-zoo", module, config=cfg)
        try:
            assert_same(outputs(bentoml.detectron.load_model(saved)), expected)
            predictor = bentoml.detectron.load_predictor(saved, batch="exact")
            assert tensors(outputs(predictor.model)).keys() == tensors(expected).keys()
            found = predictor([picture(96, 96)])[0]
            assert len(found) > 0
            report = verify(saved)
            assert (report.problems, report.notes, report.identical) == ((), (), True)
        finally:
            bentoml.models.delete(saved.tag)

    @pytest.mark.slow
    @pytest.mark.skipif(not has_vit, reason="this Detectron2 has no ViT")
    def test_vitdet(self):
        """Its config is in a project, not in the zoo; this is what that file's model comes to, with a small ViT."""
        from detectron2.modeling import SimpleFeaturePyramid, ViT
        from detectron2.modeling.backbone.fpn import LastLevelMaxPool

        node = LazyConfig.load(model_zoo.get_config_file("common/models/mask_rcnn_fpn.py")).model
        narrow(node)
        vit = L(ViT)(img_size=128, patch_size=16, embed_dim=32, depth=2, num_heads=2, window_size=4, out_feature="last_feat")
        node.backbone = L(SimpleFeaturePyramid)(
            net=vit, in_feature="${.net.out_feature}", out_channels=256, scale_factors=(4.0, 2.0, 1.0, 0.5),
            top_block=L(LastLevelMaxPool)(), norm="LN", square_pad=128,
        )  # fmt: skip
        module = build(node)
        saved = bentoml.detectron.save_model("lazy-vit", module, config=node)
        assert_same(outputs(bentoml.detectron.load_model(saved)), outputs(module))

    @pytest.mark.slow
    def test_in_another_process_without_network(self, tmp_path):
        cfg = whole("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
        module = build(cfg.model)
        saved = bentoml.detectron.save_model("lazy-process", module, config=cfg)
        np.save(tmp_path / "image.npy", picture(96, 96))
        code = (
            BLOCK_NETWORK
            + """
import bentoml, numpy as np, torch
tag, image, output = sys.argv[1:]
module = bentoml.detectron.load_model(tag)
image = torch.as_tensor(np.load(image).transpose(2, 0, 1).copy())
with torch.no_grad():
    found = module([{"image": image, "height": 90, "width": 100}])[0]["instances"]
torch.save([found.pred_boxes.tensor, found.scores, found.pred_classes, found.pred_masks], output)
"""
        )
        run_python(code, str(saved.tag), str(tmp_path / "image.npy"), str(tmp_path / "result.pth"))
        found = outputs(module)[0]["instances"]
        assert len(found) == 10
        assert_same(
            torch.load(tmp_path / "result.pth"), [found.pred_boxes.tensor, found.scores, found.pred_classes, found.pred_masks]
        )


class TestArtifact:
    @pytest.fixture(scope="class")
    def saved(self):
        return bentoml.detectron.save_model("lazy-artifact", build(small_node()), config=small_node())

    def test_config_is_plain_yaml_with_names_of_code(self, saved):
        content = config_of(saved)
        assert content["_target_"] == "detectron2.modeling.meta_arch.retinanet.RetinaNet"
        assert content["head"]["num_classes"] == 5  # an interpolation, resolved
        assert "!" not in Path(saved.path_of("config.yaml")).read_text()

    def test_manifest_says_that_it_is_lazy(self, saved):
        content = json.loads(Path(saved.path_of("manifest.json")).read_text())
        assert (content["config"], content["kind"], content["registry_entries"]) == ("lazy", "module", [])

    def test_record_is_that_of_any_module(self, saved):
        assert saved.info.metadata == {"_is_predictor": False}
        assert saved.custom_objects["config"].keys() == small_node().keys()
        assert not isinstance(bentoml.detectron.load_model(saved), DefaultPredictor)

    def test_whole_config_and_its_model_node_give_the_same_config(self, saved):
        cfg = OmegaConf.create({"model": small_node(), "train": {"max_iter": 5}})
        other = bentoml.detectron.save_model("lazy-whole", build(cfg.model), config=cfg)
        assert config_of(other) == config_of(saved)

    def test_plain_dicts_will_do(self, saved):
        """As of ``LazyConfig.to_py`` or a YAML file, with the names as text."""
        plain = config_of(saved)
        other = bentoml.detectron.save_model("lazy-plain", bentoml.detectron.load_model(saved), config={"model": plain})
        assert config_of(other) == plain

    def test_caller_s_config_is_left_alone(self):
        node = small_node()
        before = str(node)
        OmegaConf.set_readonly(node, True)
        bentoml.detectron.save_model("lazy-manners", build(node), config=node)
        assert str(node) == before
        assert OmegaConf.is_readonly(node)

    def test_loaded_model_is_in_evaluation_mode(self, saved):
        assert not any(module.training for module in bentoml.detectron.load_model(saved).modules())


def loader(**mapper: Any) -> Any:
    """A test data loader over the demo's data set."""
    from detectron2.data import DatasetMapper, get_detection_dataset_dicts
    from detectron2.data.transforms import ResizeShortestEdge

    demo.config()  # registers the data set
    given = {
        "is_train": False,
        "augmentations": [L(ResizeShortestEdge)(short_edge_length=96, max_size=160)],
        "image_format": "${...train.mapper.image_format}",
        **mapper,
    }
    return OmegaConf.create(
        {
            "train": {"mapper": {"image_format": "RGB"}},
            "test": {
                "dataset": L(get_detection_dataset_dicts)(names="handwritten_digits", filter_empty=False),
                "mapper": L(DatasetMapper)(**given),
            },
        }
    )


class TestPredictor:
    """What a whole config says of its data comes back in the predictor."""

    @pytest.fixture(scope="class")
    def predictor(self):
        cfg = OmegaConf.create({"model": small_node()})
        cfg.dataloader = loader()
        saved = bentoml.detectron.save_model("lazy-data", build(cfg.model), config=cfg)
        return bentoml.detectron.load_predictor(saved, batch="exact")

    def test_class_names(self, predictor):
        assert predictor.class_names == tuple("0123456789")
        found = predictor([picture()])[0]
        assert [int(name) for name in found.class_names] == found.class_ids.tolist()

    def test_size_and_colour_order(self, predictor):
        assert predictor.input.model_dump() == {"format": "RGB", "min_size_test": 96, "max_size_test": 160}

    def test_image_goes_in_resized_and_as_rgb(self, predictor):
        """By hand, as Detectron2's data loader would do."""
        from detectron2.data.transforms import ResizeShortestEdge

        given = picture(120, 100)
        resized = ResizeShortestEdge([96, 96], 160).get_transform(given).apply_image(np.ascontiguousarray(given[:, :, ::-1]))
        with torch.no_grad():
            tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
            expected = predictor.model([{"image": tensor, "height": 120, "width": 100}])[0]["instances"]
        found = predictor([given])[0]
        assert len(found) > 0
        assert np.array_equal(found.boxes, expected.pred_boxes.tensor.numpy())
        assert np.array_equal(found.scores, expected.scores.numpy())

    def test_model_node_alone_has_the_defaults_of_detectron2(self):
        saved = bentoml.detectron.save_model("lazy-node", build(small_node()), config=small_node())
        predictor = bentoml.detectron.load_predictor(saved)
        assert predictor.input.model_dump() == {"format": "BGR", "min_size_test": 800, "max_size_test": 1333}
        assert predictor.class_names == ()
        assert set(predictor([picture()])[0].class_names) == {""}

    def test_coco_of_the_zoo(self):
        """The zoo's own data loader names a data set of Detectron2's."""
        cfg = OmegaConf.create({"model": small_node()})
        cfg.dataloader = LazyConfig.load(model_zoo.get_config_file("common/data/coco.py")).dataloader
        predictor = bentoml.detectron.load_predictor(bentoml.detectron.save_model("lazy-coco", build(cfg.model), config=cfg))
        assert predictor.class_names[:2] == ("person", "bicycle")
        assert predictor.input.model_dump() == {"format": "BGR", "min_size_test": 800, "max_size_test": 1333}


def test_legacy_runner_runs_it_as_any_module():
    module = build(small_node())
    saved = bentoml.detectron.save_model("lazy-runner", module, config=small_node())
    runnable = bentoml.detectron.get_runnable(bentoml.detectron.get(saved.tag))()
    tensor = torch.as_tensor(picture().transpose(2, 0, 1).copy())
    with torch.inference_mode():
        assert_same(runnable.__call__(tensor), module([{"image": tensor}]))


class TestRefused:
    def test_config_of_another_model(self):
        """At saving; what is missing and misshaped is listed."""
        with pytest.raises(errors.WeightsMismatchError, match=r"head\.cls_score\.weight") as caught:
            bentoml.detectron.save_model("lazy-refused", build(small_node()), config=small_node(num_classes=7))
        assert caught.value.misshaped["head.cls_score.bias"] == ((45,), (63,))

    def test_yacs_config_for_a_lazy_model_and_the_other_way_round(self):
        from support import built

        with pytest.raises(errors.WeightsMismatchError):
            bentoml.detectron.save_model("lazy-refused", build(small_node()), config=tiny_cfg())
        with pytest.raises(errors.WeightsMismatchError):
            bentoml.detectron.save_model("lazy-refused", built(tiny_cfg()), config=small_node())

    @pytest.mark.parametrize("config", [{}, {"model": {}}, {"model": 7}, {"dataloader": {}}, [], "config.py", 7], ids=str)
    def test_what_is_no_lazy_config(self, config):
        with pytest.raises(errors.InvalidArgumentError, match="whole LazyConfig"):
            bentoml.detectron.save_model("lazy-refused", build(small_node()), config=config)

    def test_what_plain_data_cannot_say(self):
        node = small_node()
        node._set_flag("allow_objects", True)
        node.norm = nn.Linear(1, 1)
        with pytest.raises(errors.InvalidArgumentError, match=r"config\.norm is of type Linear"):
            bentoml.detectron.save_model("lazy-refused", build(small_node()), config=node)

    def test_setting_that_was_changed_in_the_module(self):
        """The config would not say so."""
        module = build(small_node())
        module.test_nms_thresh = 0.9
        with pytest.raises(errors.InvalidModelError, match=r"setting test_nms_thresh is 0\.5; it was 0\.9"):
            bentoml.detectron.save_model("lazy-refused", module, config=small_node())


class Scaled(nn.Linear):
    """Code that is neither Detectron2's nor PyTorch's."""


class TestNamesThatAreNotAllowed:
    @pytest.fixture(scope="class")
    def saved(self):
        node = OmegaConf.create(L(Scaled)(in_features=2, out_features=3))
        return bentoml.detectron.save_model("lazy-own", instantiate(node), config=node, self_test=False)

    def test_refused_and_the_error_says_whom_to_trust(self, saved):
        with pytest.raises(errors.UntrustedCodeError) as caught:
            bentoml.detectron.load_model(saved)
        assert f"trusted=[{__name__!r}]" in str(caught.value)

    @pytest.mark.parametrize("trusted", [[__name__], [__name__.partition(".")[0]], ["other", __name__]], ids=str)
    def test_trusted_it_loads(self, saved, trusted):
        assert type(bentoml.detectron.load_model(saved, trusted=trusted)) is Scaled

    def test_another_trusted_module_is_not_enough(self, saved):
        with pytest.raises(errors.UntrustedCodeError):
            bentoml.detectron.load_model(saved, trusted=["other", f"{__name__}x"])

    def test_verify_says_so_and_takes_trusted(self, saved):
        assert "trusted=[" in verify(saved).problems[0]
        assert verify(saved, trusted=[__name__]).ok

    def test_the_other_models_of_the_tests_need_no_trust(self):
        assert config_of(bentoml.detectron.save_model("lazy-none", build(small_node()), config=small_node()))["_target_"]
