"""A config survives being written as plain YAML, whatever plain data it holds."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bentoml_detectron import errors
from bentoml_detectron.artifact import config, plain_yaml

KEYS = st.text(min_size=1, max_size=10).filter(lambda key: key != "_BASE_")
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**64) + 1, 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20).filter(lambda text: text != "_BASE_"),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=20,
)
TREES = st.dictionaries(KEYS, VALUES, max_size=5)


def exactly(one, other) -> bool:
    """Equal, and of the same types all the way down: 1, 1.0 and True differ, and so do lists and tuples."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(exactly(one[key], other[key]) for key in one)
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(exactly, one, other))
    return one == other and (not isinstance(one, float) or math.copysign(1, one) == math.copysign(1, other))


def there_and_back(tree, folder: Path):
    plain, tuples = config.to_plain(tree)
    (folder / config.CONFIG).write_bytes(plain_yaml.dump(plain))
    return config.from_plain(config.read(folder), tuples)


@pytest.mark.slow
@given(tree=TREES)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_plain_data_comes_back_exactly(tree, tmp_path):
    """Strings that look like numbers, empty containers, tuples inside lists, and all of Unicode."""
    original = copy.deepcopy(tree)
    back = there_and_back(tree, tmp_path)
    assert exactly(tree, original)
    assert exactly({key: back[key] for key in tree}, tree)


@pytest.mark.parametrize(
    "name",
    ["COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml", "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
     "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"],
)  # fmt: skip
def test_zoo_config_comes_back_exactly(name, tmp_path):
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(name))
    cfg.freeze()
    back = there_and_back(cfg, tmp_path)
    assert exactly(back, cfg)
    assert type(back.MODEL) is CfgNode


def test_keys_that_a_later_detectron2_needs_are_added(tmp_path):
    cfg = get_cfg()
    del cfg.MODEL.RPN["HEAD_NAME"]
    del cfg.MODEL["FPN"]
    cfg.MODEL.OWN = CfgNode({"KEY": (1, 2)})
    back = there_and_back(cfg, tmp_path)
    assert back.MODEL.RPN.HEAD_NAME == "StandardRPNHead"
    assert back.MODEL.FPN == get_cfg().MODEL.FPN
    assert back.MODEL.OWN.KEY == (1, 2)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", complex(1), len, CfgNode])
def test_what_yaml_cannot_say_is_refused_with_its_place(value):
    with pytest.raises(errors.InvalidArgumentError, match=r"config\.A\.B\.0"):
        config.to_plain({"A": {"B": [value]}})


def test_key_that_is_no_string_is_refused():
    with pytest.raises(errors.InvalidArgumentError, match="a key under A must be a string, not int"):
        config.to_plain({"A": {7: 1}})


def test_numbers_of_numpy_become_plain_ones(tmp_path):
    """Anchors and pixel means are often computed."""
    back = there_and_back({"A": [np.float64(1.5), np.int64(3)], "B": np.bool_(True)}, tmp_path)
    assert exactly({"A": back.A, "B": back.B}, {"A": [1.5, 3], "B": True})


def test_dataset_metadata_of_odd_types_does_not_stop_a_save():
    MetadataCatalog.get("odd").set(thing_classes=[1, 2], thing_colors=[(0.5, 0.5, 0.5)])
    cfg = get_cfg()
    cfg.DATASETS.TEST = ("odd",)
    with pytest.warns(UserWarning, match="thing_colors"):
        dataset = config.dataset_of(cfg)
    assert dataset.thing_classes == ["1", "2"]
    assert dataset.thing_colors is None


def test_registry_entries_are_found_with_their_modules():
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"))
    found = {(entry.registry, entry.name): entry.module for entry in config.entries_of(cfg)}
    assert found["META_ARCH", "GeneralizedRCNN"] == "detectron2.modeling.meta_arch.rcnn"
    assert found["BACKBONE", "build_resnet_fpn_backbone"] == "detectron2.modeling.backbone.fpn"
    assert found["ROI_MASK_HEAD", "MaskRCNNConvUpsampleHead"] == "detectron2.modeling.roi_heads.mask_head"


def test_dataset_that_this_process_knows_is_kept():
    cfg = get_cfg()
    cfg.DATASETS.TEST = ("keypoints_coco_2017_val",)
    dataset = config.dataset_of(cfg)
    assert dataset.thing_classes == ["person"]
    assert dataset.keypoint_names[0] == "nose"
    MetadataCatalog.get("of_test_config").set(thing_classes=["a"], thing_dataset_id_to_contiguous_id={7: 0}, other=object())
    cfg.DATASETS.TEST = ("of_test_config",)
    assert config.dataset_of(cfg).thing_dataset_id_to_contiguous_id == {7: 0}
    assert config.dataset_of(get_cfg()) is None
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("of_test_config",), ()  # as Detectron2's tutorial has it
    assert config.dataset_of(cfg).name == "of_test_config"
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ("nobody_registered_this",)
    assert config.dataset_of(cfg).model_dump(exclude_none=True) == {"name": "nobody_registered_this"}


def of_datasets(test, train):
    cfg = get_cfg()
    cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = test, train
    return config.dataset_of(cfg)


def test_class_names_are_those_of_the_first_dataset_that_has_some():
    """Of several to test on, and where only the training's was loaded."""
    MetadataCatalog.get("first_known_named").set(thing_classes=["cat"])
    assert of_datasets(("first_known_a", "first_known_named"), ("coco_2017_train",)).name == "first_known_named"
    assert of_datasets(("first_known_a",), ("first_known_named",)).thing_classes == ["cat"]


def test_dataset_without_names_here_is_the_first():
    dataset = of_datasets(("first_known_a",), ("first_known_b",))
    assert (dataset.name, dataset.thing_classes) == ("first_known_a", None)
    assert of_datasets((), ()) is None


def test_category_ids_of_lvis_are_from_1():
    """As Detectron2 reads and evaluates it, without a mapping."""
    dataset = of_datasets(("lvis_v1_val",), ())
    assert [dataset.thing_dataset_id_to_contiguous_id[each] for each in (1, 1203)] == [0, 1202]


LONG = [
    "a word " * 200 + "end",
    "/home/a path" * 100,
    "2026-11-28 notes on a run: " * 30 + "x",
    "7" * 5000,
    "1:" * 300 + "1",
    "0x" + "f" * 999,
]


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:10])
def test_long_strings_come_back(text, tmp_path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = text
    assert text == there_and_back(cfg, tmp_path).OUTPUT_DIR


@pytest.mark.parametrize(
    "number", ["1" * 401, "1:" * 300 + "1", "0b" + "1_" * 300, "1." + "0" * 400, "-0x" + "fF" * 200, "5e" + "+1" * 300]
)
def test_numbers_that_would_take_long_to_read_are_refused(number, tmp_path):
    (tmp_path / config.CONFIG).write_text(f"A: {number}\n")
    with pytest.raises(errors.UnsafeFileError, match="the unquoted value"):
        config.read(tmp_path)
