"""A LazyConfig's model survives as plain data, and building it from plain data runs nothing that is not on the list."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import importlib
import sys
from collections import namedtuple
from pathlib import Path

import detectron2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.config import LazyCall as L
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling.backbone import BasicStem, BottleneckBlock, ResNet
from detectron2.structures import BoxMode
from omegaconf import OmegaConf
from torch import nn

from bentoml_detectron import errors
from bentoml_detectron.artifact import code, lazy, lazy_build, plain_yaml
from bentoml_detectron.artifact.manifest import Input

CONFIGS = Path(detectron2.__file__).parent / "model_zoo/configs"
ZOO = sorted(
    str(path.relative_to(CONFIGS))
    for folder in ("COCO-Detection", "COCO-InstanceSegmentation", "COCO-Keypoints", "COCO-PanopticSegmentation",
                   "common/models", "new_baselines")
    for path in (CONFIGS / folder).glob("*.py")
)  # fmt: skip
HERE = __name__
Pair = namedtuple("Pair", ["first", "second"])


class Color(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int = 0
    y: float = 0.5


class Keeper(nn.Module):
    """Keeps what it was given."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()
        self.args, self.kwargs = args, kwargs


def zoo(name: str):
    cfg = LazyConfig.load(str(CONFIGS / name))
    if "fcos" in name:
        cfg.model.head.norm = "BN"  # Detectron2 0.6 counts a head with GN wrongly on later versions of PyTorch
    return cfg


def narrow_resnet():
    return L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=4, norm="FrozenBN"),
        stages=[
            L(ResNet.make_stage)(
                block_class=BottleneckBlock, num_blocks=1, in_channels=4, bottleneck_channels=4, out_channels=8,
                norm="${....norm}",
            )
        ],
        out_features=["res2"],
    )  # fmt: skip


def through_yaml(config):
    plain, tuples = lazy.to_plain(config)
    return plain_yaml.load(plain_yaml.dump(plain), "config.yaml"), [list(path) for path in tuples]


def rebuilt(config):
    plain, tuples = through_yaml(config)
    return lazy_build.build(plain, tuples, trusted=[HERE])


def kept(**arguments):
    """What arguments become on their way through a file."""
    return rebuilt({"_target_": Keeper, **arguments}).kwargs


def shapes(module: nn.Module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def types_in(value):
    if isinstance(value, dict):
        return {dict, *(type(key) for key in value)}.union(*map(types_in, value.values()))
    if type(value) is list:
        return {list}.union(*map(types_in, value))
    return {type(value)}


def test_there_are_zoo_configs():
    assert len(ZOO) > 25


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.slow
def test_zoo_model_is_built_again_from_plain_data(name):
    """The same modules, in names and shapes of their state, as Detectron2's own instantiate builds."""
    cfg = zoo(name)
    before = copy.deepcopy(cfg)
    plain, tuples = through_yaml(cfg)
    assert types_in(plain) <= {dict, list, str, int, float, bool, type(None)}
    assert "${" not in str(plain)
    assert cfg == before
    with torch.device("meta"):
        assert shapes(lazy_build.build(plain, tuples)) == shapes(instantiate(cfg.model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["common/models/mask_rcnn_fpn.py", "common/models/panoptic_fpn.py"])
def test_zoo_model_computes_the_same(name):
    """With the same weights, a real model built from plain data sees in an image what the original sees."""
    cfg = zoo(name)
    torch.manual_seed(0)
    one, other = instantiate(cfg.model).eval(), rebuilt(cfg).eval()
    other.load_state_dict(one.state_dict())
    image = [{"image": torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)}]
    with torch.no_grad():
        first, second = one(image)[0]["instances"], other(image)[0]["instances"]
    assert torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor)


def test_code_inside_a_config_file_cannot_be_saved():
    with pytest.raises(errors.InvalidArgumentError, match=r"(?s)ClassificationNet.*top of a module"):
        lazy.to_plain(LazyConfig.load(str(CONFIGS / "Misc/torchvision_imagenet_R_50.py")))


SETTINGS = OmegaConf.create({"names": "lvis_v1_train"})


@pytest.mark.parametrize(
    ("function", "prefix", "keywords"),
    [
        (lambda c: nn.BatchNorm2d(c, eps=1e-3), (), {"eps": 1e-3}),
        (lambda c: nn.GroupNorm(32, c), (32,), {}),
        (lambda a, b: Keeper(None, a, b, mode="N"), (None,), {"mode": "N"}),
        (lambda: Keeper(), (), {}),
        (lambda: Keeper(SETTINGS.names, 0.5), ("lvis_v1_train", 0.5), {}),
    ],
    ids=["keyword", "first argument", "two arguments", "no argument", "what a global holds"],
)
def test_lambda_that_only_passes_its_arguments_on_is_kept_as_a_partial(function, prefix, keywords):
    """As the zoo's new baselines have one for their norm, and its LVIS models one for the weights of their classes."""
    back = kept(value=function)["value"]
    assert (back.args, back.keywords) == (prefix, keywords)
    assert back.func.__name__ in ("BatchNorm2d", "GroupNorm", "Keeper")


def defaulted(c=3):
    return c


@pytest.mark.parametrize(
    "function",
    [
        lambda c: nn.ReLU() if c else nn.Identity(),
        lambda c: nn.GroupNorm(32 if c != 64 else 16, c),
        lambda c: nn.GroupNorm(16 if c == 64 else 32, c),
        lambda c: nn.GroupNorm({64: 16}.get(c, 32), c),
        lambda c, *more: nn.GroupNorm(32, c),
        lambda c, **more: nn.GroupNorm(32, c),
        lambda c, *, more=1: nn.GroupNorm(32, c),
        lambda c: nn.GroupNorm(c, 32),
        lambda c: nn.GroupNorm(32, c).eval(),
        lambda c: nn.Sequential(nn.BatchNorm2d(c)),
        lambda a, b: Keeper(b, a),
        lambda c: Keeper(c, like=c),
        lambda c: (Keeper(c), 3)[1],
        lambda c, d=1: Keeper(c, d),
        lambda: Keeper(SETTINGS),
        lambda c: Keeper(c, [1]),
        lambda c: [Keeper(c) for _ in range(2)],
        lambda c: defaulted,
    ],
    ids=range(18),
)
def test_lambda_that_does_anything_else_is_refused(function):
    with pytest.raises(errors.InvalidArgumentError, match="in place of a lambda"):
        lazy.to_plain({"_target_": "a.b", "value": function})


def test_mmdetection_is_saved_but_not_built_unasked():
    plain, _ = lazy.to_plain(LazyConfig.load(str(CONFIGS / "Misc/mmdet_mask_rcnn_R_50_FPN_1x.py")))
    with pytest.raises(errors.UnsafeFileError, match=r"trusted=\['detectron2.modeling.mmdet_wrapper'\]"):
        lazy_build.build(plain)


def test_whole_config_and_its_model_give_the_same():
    """Interpolations reach the model's own node and what lies around it."""
    cfg = OmegaConf.create({"classes": 7, "model": L(Keeper)(a="${..classes}", b=L(Keeper)(c="${..a}", d="${model.a}"))},
                           flags={"allow_objects": True})  # fmt: skip
    plain, _ = lazy.to_plain(cfg)
    assert lazy.to_plain(cfg.model)[0] == plain
    assert (plain["a"], plain["b"]["c"], plain["b"]["d"]) == (7, 7, 7)


def test_narrow_model_with_class_arguments_static_method_and_interpolation():
    cfg = OmegaConf.create({"norm": "BN", "model": narrow_resnet()}, flags={"allow_objects": True})
    plain, tuples = through_yaml(cfg)
    assert plain["stages"][0]["block_class"] == {
        "_target_": "hydra.utils.get_object", "path": "detectron2.modeling.backbone.resnet.BottleneckBlock",
    }  # fmt: skip
    assert shapes(lazy_build.build(plain, tuples)) == shapes(instantiate(cfg.model))
    assert lazy_build.targets(plain) == [
        "detectron2.modeling.backbone.resnet.BasicStem",
        "detectron2.modeling.backbone.resnet.BottleneckBlock",
        "detectron2.modeling.backbone.resnet.ResNet",
        "detectron2.modeling.backbone.resnet.ResNet.make_stage",
    ]


def test_the_marker_is_hydras_own():
    from hydra.utils import get_object

    assert f"{get_object.__module__}.{get_object.__qualname__}" == lazy_build.GET_OBJECT


def test_vitdet_model_is_built_again():
    """ViTDet's config holds functools.partial(nn.LayerNorm, eps=1e-6)."""
    modeling = importlib.import_module("detectron2.modeling")
    if not hasattr(modeling, "ViT"):
        pytest.skip("this Detectron2 has no ViT")
    fpn = importlib.import_module("detectron2.modeling.backbone.fpn")
    cfg = L(modeling.SimpleFeaturePyramid)(
        net=L(modeling.ViT)(
            img_size=64, patch_size=16, embed_dim=8, depth=2, num_heads=2, drop_path_rate=0.1, window_size=2, mlp_ratio=4,
            qkv_bias=True, norm_layer=functools.partial(nn.LayerNorm, eps=1e-6), window_block_indexes=[0],
            residual_block_indexes=[], use_rel_pos=True, out_feature="last_feat",
        ),
        in_feature="${.net.out_feature}", out_channels=8, scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=L(fpn.LastLevelMaxPool)(), norm="LN", square_pad=64,
    )  # fmt: skip
    plain, tuples = through_yaml(cfg)
    assert shapes(lazy_build.build(plain, tuples)) == shapes(instantiate(cfg))


def test_partial_comes_back_with_its_arguments():
    """Nested ones and positional arguments too."""
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    many = functools.partial(Conv2d, 3, (4, 5), norm=norm)
    plain, tuples = through_yaml(L(Keeper)(norm=norm, many=many))
    assert plain["norm"] == {"_target_": "torch.nn.modules.normalization.LayerNorm", "_partial_": True, "eps": 1e-6}
    back = lazy_build.build(plain, tuples, trusted=[HERE]).kwargs
    assert (back["norm"].func, back["norm"].keywords) == (nn.LayerNorm, {"eps": 1e-6})
    assert (back["many"].func, back["many"].args) == (Conv2d, (3, (4, 5)))
    assert back["many"].keywords["norm"].func is nn.LayerNorm


@pytest.mark.parametrize(
    "value",
    [nn.LayerNorm, FrozenBatchNorm2d, ResNet.make_stage, FrozenBatchNorm2d.convert_frozen_batchnorm, torch.float16,
     torch.device("cuda:1"), BoxMode.XYWH_ABS, ShapeSpec(channels=3, stride=4), (1, (2, [3])), [(), []], {"a": (1,)}, None,
     True, 1, 1.0, "1e5", "${not} an interpolation", [None, True]],
    ids=lambda value: str(value).partition(" at 0x")[0],
)  # fmt: skip
def test_argument_comes_back_as_it_was(value):
    """Tuples, named tuples, enums, types and devices of PyTorch, classes and functions."""
    back = kept(value=value)["value"]
    assert back == value
    assert type(back) is type(value)
    plain, tuples = lazy.to_plain({"_target_": Keeper, "value": value})
    assert lazy_build.build(plain, tuples, trusted=[HERE, "torch"]).kwargs["value"] == value


@pytest.mark.parametrize("value", [Color.RED, Pair(1, (2, 3)), Point(3, 4.0)], ids=["enum", "namedtuple", "dataclass"])
def test_value_of_a_type_of_the_users_own_comes_back_with_trust(value):
    assert kept(value=value)["value"] == value
    plain, tuples = through_yaml({"_target_": Keeper, "value": value})
    with pytest.raises(errors.UnsafeFileError, match="trusted="):
        lazy_build.build(plain["value"], [path[1:] for path in tuples])


def test_dataclass_in_a_lazy_call_comes_back_as_itself():
    """OmegaConf had made a node of it."""
    assert rebuilt(L(Keeper)(value=Point(3, 4.0))).kwargs["value"] == Point(3, 4.0)


def test_numbers_of_numpy_and_sizes_of_torch_become_plain_ones():
    plain, tuples = lazy.to_plain({"_target_": Keeper, "a": np.float64(1.5), "b": np.int64(2), "c": torch.Size([3, 4])})
    assert (plain["a"], plain["b"], plain["c"], tuples) == (1.5, 2, [3, 4], [("c",)])
    assert types_in(plain) <= {dict, list, str, int, float}


def test_calls_inside_plain_mappings_are_built():
    """As the zoo's SemSegFPNHead has them; Detectron2 leaves them as mappings that look alike."""
    back = rebuilt(L(Keeper)(shape={"p2": L(ShapeSpec)(stride=4)})).kwargs
    assert back["shape"] == {"p2": ShapeSpec(stride=4)}


def local_function():
    def inner(): ...

    return inner


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, b"bytes", 1j, torch.zeros(2), np.zeros(2), nn.ReLU(), Path("a"), lambda c: c, local_function(),
     nn.ReLU().forward, L(nn.ReLU), 2**70],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_plain_data_cannot_say_is_refused_with_its_place(value):
    with pytest.raises(errors.InvalidArgumentError, match=r"config\.a\.b\.0"):
        lazy.to_plain({"_target_": "a.b", "a": {"b": [value]}})


@pytest.mark.parametrize("value", ["${.nowhere}", "???", "${.a}"], ids=["missing key", "missing value", "itself"])
def test_what_cannot_be_resolved_is_refused_with_its_place(value):
    with pytest.raises(errors.InvalidArgumentError, match=r"config\.a"):
        lazy.to_plain(L(Keeper)(a=value))


def test_code_of_main_is_refused(monkeypatch):
    """The process that loads the model has another __main__."""
    monkeypatch.setattr(sys.modules["__main__"], "Keeper", Keeper, raising=False)
    monkeypatch.setattr(Keeper, "__module__", "__main__")
    with pytest.raises(errors.InvalidArgumentError, match="not in __main__"):
        lazy.to_plain(L(Keeper)())


def test_key_that_is_no_string_is_refused():
    with pytest.raises(errors.InvalidArgumentError, match=r"a key of config\.a must be a string, not int"):
        lazy.to_plain({"_target_": "a.b", "a": {7: 1}})


def test_config_that_holds_itself_is_refused():
    config: dict = {"_target_": "a.b"}
    config["a"] = config
    with pytest.raises(errors.InvalidArgumentError, match="nested deeper"):
        lazy.to_plain(config)


@pytest.mark.parametrize(
    "config", [None, {}, {"model": 1}, {"model": {"a": 1}}, CfgNode({"MODEL": CfgNode()}), "a.yaml", nn.ReLU()]
)
def test_what_holds_no_model_node_is_refused(config):
    with pytest.raises(errors.InvalidArgumentError, match="give the whole LazyConfig or its"):
        lazy.to_plain(config)


GOOD = "torch.nn.modules.activation.ReLU"
REFUSED = [
    # Plain foreign code.
    "os.system", "posix.system", "subprocess.Popen", "subprocess.run", "builtins.eval", "builtins.exec", "builtins.__import__",
    "builtins.open", "pickle.loads", "_pickle.loads", "marshal.loads", "numpy.load", "runpy.run_path",
    "importlib.import_module",
    "shutil.rmtree", "webbrowser.open", "pydoc.locate", "functools.partial", "torch.load", "torch.hub.load", "torch.jit.load",
    "torch.ops.load_library", "torch.utils.cpp_extension.load", "torch.nn", "torch.Tensor.numpy", "evil_on_disk.run",
    # Detectron2's and its relatives' own ways to files, addresses and other code.
    "detectron2.config.LazyConfig.load", "detectron2.config.lazy.builtins.eval", "detectron2.config.instantiate.instantiate",
    "detectron2.config.get_cfg", "detectron2.checkpoint.DetectionCheckpointer", "detectron2.model_zoo.get",
    "detectron2.utils.registry.locate", "detectron2.utils.env.setup_custom_environment", "detectron2.data.DatasetCatalog.get",
    "detectron2.engine.DefaultPredictor", "detectron2.data.transforms.ResizeShortestEdge", "detectron2.modeling",
    "detectron2.modeling.mmdet_wrapper.MMDetBackbone", "detectron2.modeling.test_time_augmentation.GeneralizedRCNNWithTTA",
    "fvcore.common.download.download", "fvcore.common.config.CfgNode.load_yaml_with_base",
    "iopath.common.file_io.PathManager", "omegaconf.OmegaConf.load", "hydra.utils.instantiate", "hydra.utils.get_class",
    "hydra.utils.get_method", "hydra.utils.call",
    # Under an allowed package's name, but led out of it, or not one of its modules.
    "detectron2.modeling_evil.Model", "detectron2.modelingevil.Model", "torch.nn_evil.ReLU", "fvcore.nnx.A",
    "detectron2.layers.wrappers.__builtins__.eval", "torch.nn.ReLU.__init__", "torch.nn.ReLU.__class__",
    "torch.nn.modules.conv._ConvNd", "detectron2.modeling.roi_heads.ROIHeads.__init__.__globals__",
    # Only spelled like names.
    "", " ", ".", "eval", "os", "os..system", ".os.system", "os.system.", " os.system", "os.system ", "os.system\n",
    "os system", "os/system", "torch.nn.ReLU()", "torch.nn.R\u0435LU", "torch.nn.\uff32eLU", "torch.nn.ReLU\x00", "torch.nn.0",
    "__main__.x",
    7, 1.5, True, None, [], ["os", "system"], {}, {"_target_": "os.system"},
]  # fmt: skip
# Allowed packages' own modules have to be looked into for these.
LED_OUT = [
    "detectron2.layers.wrappers.os.system", "torch.nn.modules.module.torch.hub.load", "torch.nn.modules.module.torch.load",
    "detectron2.modeling.meta_arch.rcnn.nn.ReLU", "detectron2.layers.Linear", "detectron2.layers.torch",
    "detectron2.modeling.backbone.fpn.math.sqrt", "detectron2.modeling.poolers.List", "detectron2.modeling.backbone",
    "detectron2.modeling.matcher", "torch.nn.functional", "torch.nn.functional.relu", "torch.nn.Parameter",
    "torch.nn.DataParallel", "torch.nn.ReLU.register_forward_hook", "torch.nn.Embedding.from_pretrained",
    "torch.nn.modules.module.register_module_forward_hook", "torch.nn.utils.parametrize.register_parametrization",
    "fvcore.nn.FlopCountAnalysis", "fvcore.nn.weight_init.c2_msra_fill", "detectron2.modeling.build_model",
    "detectron2.modeling.META_ARCH_REGISTRY", "detectron2.modeling.META_ARCH_REGISTRY.get", "detectron2.modeling.MMDetDetector",
    "detectron2.modeling.DatasetMapperTTA", "detectron2.modeling.GeneralizedRCNN.from_config",
    "detectron2.modeling.meta_arch.rcnn.get_event_storage", "detectron2.modeling.meta_arch.rcnn.GeneralizedRCNN.train",
    "detectron2.structures.Instances", "detectron2.structures.masks.polygons_to_bitmask",
    "detectron2.structures.BoxMode.convert", "detectron2.projects.panoptic_deeplab.panoptic_seg.np.load",
    "detectron2.projects.panoptic_deeplab.PanopticDeeplabDatasetMapper",
    "detectron2.projects.deeplab.add_deeplab_config", "detectron2.projects.importlib.import_module",
]  # fmt: skip


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module that can be imported and tells of it on disk; it stays unimported."""
    trace = tmp_path / "trace"
    (tmp_path / "evil_on_disk.py").write_text(
        f"open({str(trace)!r}, 'w').close()\ndef run(*args, **kwargs):\n    open({str(trace) + '2'!r}, 'w').close()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(Keeper, "__init__", lambda *args, **kwargs: trace.write_text("built"))
    yield "evil_on_disk.run"
    assert "evil_on_disk" not in sys.modules
    assert not list(tmp_path.glob("trace*"))


def refuse(monkeypatch, plain, error=errors.InvalidModelError, imports=()):
    """Builds plain data that must be refused, and sees that no module outside `imports` was asked for and nothing built."""

    def only(name):
        assert f"{name}.".startswith(tuple(f"{each}." for each in imports)), f"{name} was to be imported"
        return importlib.import_module(name)

    def never(*args, **kwargs):
        raise AssertionError("something was built")

    monkeypatch.setattr(lazy_build, "import_module", only)
    monkeypatch.setattr(lazy_build, "_build", never)
    with pytest.raises(error) as caught:
        lazy_build.build(plain)
    return caught.value


@pytest.mark.parametrize("name", REFUSED, ids=repr)
@pytest.mark.parametrize("place", ["target", "list", "mapping", "argument", "positional", "partial", "object"])
def test_forged_name_is_refused_before_anything_is_imported(name, place, evil, monkeypatch):
    """Wherever it stands, and although everything else in the config may be called."""
    call = {"_target_": name, "_args_": ["touch trace"]}
    plain = {
        "target": call,
        "list": {"_target_": GOOD, "a": [1, [call]]},
        "mapping": {"_target_": GOOD, "a": {"b": {"c": call}}},
        "argument": {"_target_": GOOD, "inplace": call},
        "positional": {"_target_": GOOD, "_args_": [call]},
        "partial": {"_target_": GOOD, "inplace": {**call, "_partial_": True}},
        "object": {"_target_": GOOD, "inplace": {"_target_": lazy_build.GET_OBJECT, "path": name}},
    }[place]
    found = refuse(monkeypatch, plain, errors.UnsafeFileError)
    if isinstance(name, str) and name.count(".") == 1 and name.isascii() and name.replace(".", "").isidentifier():
        assert f"trusted=[{name.partition('.')[0]!r}]" in str(found)


@pytest.mark.parametrize("name", LED_OUT)
@pytest.mark.parametrize("place", ["target", "object"])
def test_name_that_leads_out_of_an_allowed_package_is_refused(name, place, evil, monkeypatch):
    """Nothing else than that package's own modules is imported to find out."""
    forged = {"_target_": name} if place == "target" else {"_target_": lazy_build.GET_OBJECT, "path": name}
    plain = {"_target_": GOOD, "inplace": forged}
    found = refuse(monkeypatch, plain, imports=("detectron2", "torch", "torch.nn", "fvcore", "fvcore.nn"))
    assert name.rpartition(".")[2] in str(found)


def test_module_on_disk_could_have_been_imported(evil, tmp_path):
    """Which the tests above rely on."""
    plain = {"_target_": evil}
    lazy_build.build(plain, trusted=["evil_on_disk"])
    assert {path.name for path in tmp_path.glob("trace*")} == {"trace", "trace2"}
    for path in tmp_path.glob("trace*"):
        path.unlink()
    del sys.modules["evil_on_disk"]


def test_trusted_module_is_not_imported_for_a_config_that_is_refused(evil):
    for name in ("os.system", "detectron2.layers.wrappers.os.system", "torch.nn.modules.conv.Nothing"):
        with pytest.raises(errors.InvalidModelError):
            lazy_build.build({"_target_": GOOD, "a": [{"_target_": evil}, {"_target_": name}]}, trusted=["evil_on_disk"])


@pytest.mark.parametrize(
    "call",
    [
        {"_target_": GOOD, "_args_": "ab"},
        {"_target_": GOOD, "_args_": {"a": 1}},
        {"_target_": GOOD, "_args_": None},
        {"_target_": GOOD, "_partial_": "yes"},
        {"_target_": GOOD, "_partial_": {"_target_": GOOD}},
        {"_target_": lazy_build.GET_OBJECT},
        {"_target_": lazy_build.GET_OBJECT, "path": GOOD, "_args_": []},
        {"_target_": lazy_build.GET_OBJECT, "path": GOOD, "_partial_": True},
        {"_target_": lazy_build.GET_OBJECT, "_args_": [GOOD]},
    ],
    ids=str,
)
def test_malformed_call_is_refused(call, monkeypatch):
    refuse(monkeypatch, {"_target_": GOOD, "a": [call]})


@pytest.mark.parametrize(
    "name", ["detectron2.modeling.NoSuchModel", "torch.nn.modules.conv.Conv9d", "detectron2.projects.no.Model"]
)
def test_name_that_is_not_there_is_named(name):
    with pytest.raises(errors.UnknownEntryError, match=name):
        lazy_build.build({"_target_": name})


@pytest.mark.parametrize("call", [{"a": 1}, {"_args_": [1, 2, 3]}, {"inplace ": 1}], ids=str)
def test_arguments_that_do_not_fit_are_told_with_the_target(call):
    with pytest.raises(errors.InvalidModelError, match=GOOD) as caught:
        lazy_build.build({"_target_": GOOD, **call})
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize("path", [["nowhere"], ["a"], ["b", 1], [], ["b", "0"]], ids=str)
def test_tuples_that_are_not_there_are_refused(path):
    plain = {"_target_": f"{HERE}.Keeper", "a": 1, "b": [[]]}
    assert lazy_build.build(plain, [["b", 0], ["b"]], trusted=[HERE]).kwargs["b"] == ((),)
    with pytest.raises(errors.InvalidModelError, match="as a tuple"):
        lazy_build.build(plain, [path], trusted=[HERE])


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Packages pkg and pkg_evil, with a module pkg.part."""
    for name, text in {
        "pkg/__init__.py": "import os\nfrom pkg_evil import Evil\nfrom pkg.part import A\nRenamed = A\n",
        "pkg/part.py": "class A:\n    def __init__(self=None): pass\n    @classmethod\n    def make(cls): return cls()\n"
        "class B: pass\n",
        "pkg/_own.py": "class C: pass\n",
        "pkg/broken.py": "import not_installed_here\n",
        "pkg_evil.py": "class Evil: pass\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("pkg", "pkg_evil")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("trusted", "names"),
    [
        ("pkg", ["pkg.part.A", "pkg.part.B", "pkg.A", "pkg.part.A.make", "pkg._own.C"]),
        ("pkg.part", ["pkg.part.A", "pkg.part.B", "pkg.part.A.make"]),
        ("pkg.part.A", ["pkg.part.A", "pkg.part.A.make"]),
        ("pkg_evil", ["pkg_evil.Evil"]),
        ("par", []),
    ],
)
def test_trust_admits_what_it_names_and_no_more(trusted, names, packages):
    """Not what a trusted module imported, nor what only begins alike."""
    every = ["pkg.part.A", "pkg.part.B", "pkg.A", "pkg.part.A.make", "pkg._own.C", "pkg_evil.Evil", "pkg.Evil", "pkg.os.system",
             "pkg.part", "pkg.part.A.__subclasses__", "pkg.part.A.__init__", "pkg.Renamed", "pkg.__dict__.get"]  # fmt: skip
    admitted = []
    for name in every:
        try:
            lazy_build.build({"_target_": name}, trusted=[trusted])
            admitted.append(name)
        except errors.UnsafeFileError:
            pass
    assert admitted == names


@pytest.mark.parametrize("trusted", ["pkg", [""], ["pkg."], [1], ["a b"]], ids=str)
def test_trust_that_is_no_list_of_modules_is_refused(trusted):
    with pytest.raises(errors.InvalidArgumentError, match=r"give (a list|the names) of modules"):
        code.check_trusted(trusted)


def test_what_a_trusted_module_lacks_is_named(packages):
    with pytest.raises(errors.UnknownEntryError, match=r"pkg\.broken\.Model.*not_installed_here"):
        lazy_build.build({"_target_": "pkg.broken.Model"}, trusted=["pkg"])


def test_trusted_module_that_is_not_installed_is_named():
    with pytest.raises(errors.UnknownEntryError, match=r"no_such_package\.Model"):
        lazy_build.build({"_target_": "no_such_package.Model"}, trusted=["no_such_package"])


def test_names_that_detectron2_exports_are_admitted():
    """As users write them by hand, and Detectron2's LazyConfig.save does."""
    assert isinstance(lazy_build.build({"_target_": "torch.nn.ReLU"}), nn.ReLU)
    assert lazy_build.build({"_target_": "detectron2.layers.ShapeSpec", "channels": 3}) == ShapeSpec(channels=3)
    assert isinstance(
        lazy_build.build({"_target_": "detectron2.layers.FrozenBatchNorm2d", "num_features": 2}), FrozenBatchNorm2d
    )


def test_input_of_the_zoo():
    assert lazy.input_of(zoo("COCO-Detection/retinanet_R_50_FPN_1x.py")) == Input(
        format="BGR", min_size_test=800, max_size_test=1333
    )


def test_input_of_a_config_with_its_own_preparation():
    """The format is an interpolation into the mapper for training, as in the zoo."""
    cfg = zoo("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
    cfg.dataloader.train.mapper.image_format = "RGB"
    cfg.dataloader.test.mapper.augmentations[0].short_edge_length = (1024,)
    cfg.dataloader.test.mapper.augmentations[0].max_size = 1024
    assert lazy.input_of(cfg) == Input(format="RGB", min_size_test=1024, max_size_test=1024)
    assert lazy.dataset_names(cfg) == ["coco_2017_val", "coco_2017_train"]


def test_input_of_a_model_alone():
    assert lazy.input_of(L(Keeper)(input_format="RGB")) == Input(format="RGB", min_size_test=800, max_size_test=1333)
    assert lazy.input_of(L(Keeper)()) == Input(format="BGR", min_size_test=800, max_size_test=1333)


def test_square_that_a_model_pads_to_is_its_size_where_nothing_else_is_said():
    """ViTDet's: what is larger than that would be cut."""
    model = L(Keeper)(backbone=L(Keeper)(square_pad=1024))
    assert lazy.input_of(model) == Input(format="BGR", min_size_test=1024, max_size_test=1024)
    cfg = zoo("COCO-Detection/retinanet_R_50_FPN_1x.py")
    cfg.model.backbone.square_pad = 1024
    assert lazy.input_of(cfg).max_size_test == 1333


@pytest.mark.parametrize("change", ["another step", "two lengths", "no length", "none at all"])
def test_preparation_that_is_not_understood_is_told(change):
    import detectron2.data.transforms as T

    cfg = zoo("COCO-Detection/retinanet_R_50_FPN_1x.py")
    mapper = cfg.dataloader.test.mapper
    if change == "another step":
        mapper.augmentations = [L(T.FixedSizeCrop)(crop_size=(64, 64))]
    elif change == "two lengths":
        mapper.augmentations[0].short_edge_length = (64, 96)
    elif change == "no length":
        mapper.augmentations[0].max_size = 0
    else:
        del mapper.augmentations
    with pytest.warns(UserWarning, match="800 pixels, at most 1333"):
        assert lazy.input_of(cfg).min_size_test == 800


@pytest.mark.parametrize(
    ("names", "found"), [("a", ["a"]), (["b", "c"], ["b", "c"]), (("d",), ["d"]), ([], []), (None, []), ("???", [])]
)
def test_datasets_are_those_that_the_config_tests_on_before_those_it_trains_on(names, found):
    datasets = {"test": {"dataset": {"names": names}}, "train": {"dataset": {"names": "t"}}}
    cfg = OmegaConf.create({"model": {"_target_": "a.b"}, "dataloader": datasets})
    assert lazy.dataset_names(cfg) == [*found, "t"]
    assert lazy.dataset_names(cfg.model) == []


def test_function_of_lvis_models_may_be_named_by_any_model(monkeypatch):
    """Of Detectron2's main branch; it asks MetadataCatalog for the classes' counts, and reads no file."""
    from detectron2.data import detection_utils

    def get_fed_loss_cls_weights(dataset_names, power):
        return dataset_names, power

    get_fed_loss_cls_weights.__module__ = detection_utils.__name__
    get_fed_loss_cls_weights.__qualname__ = get_fed_loss_cls_weights.__name__
    monkeypatch.setattr(detection_utils, "get_fed_loss_cls_weights", get_fed_loss_cls_weights, raising=False)
    name = "detectron2.data.detection_utils.get_fed_loss_cls_weights"
    call = {"_target_": name, "_args_": ["a", 0.5], "_partial_": True}
    assert lazy_build.build(call)() == ("a", 0.5)
    with pytest.raises(errors.UntrustedCodeError):
        lazy_build.build({**call, "_target_": "detectron2.data.detection_utils.read_image"})
