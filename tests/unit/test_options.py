"""What a caller may ask of results, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bentoml_detectron.artifact.manifest import Dataset
from bentoml_detectron.errors import InvalidArgumentError
from bentoml_detectron.options import MAX_TOP_K, Options, options, plain

COCO = Dataset(name="coco", thing_classes=["person", "car", "cat"], stuff_classes=["things", "sky", "grass"])


def test_nothing_asked_is_the_models_own():
    assert options(COCO) == options(None) == Options()


def test_names_and_ids_are_thing_classes_and_stuff_goes_by_name():
    wanted = options(COCO, classes=["cat", 0, "sky"])
    assert wanted.things == {2, 0}
    assert wanted.stuff == {1}
    assert wanted.semantic == {1, 0}


def test_digits_are_a_name_where_there_is_one_and_an_id_otherwise():
    dataset = Dataset(name="digits", thing_classes=["1", "2", "3", "car"])
    assert options(dataset, classes=["1"]).things == {0}
    assert options(dataset, classes=[1]).things == {1}
    assert options(COCO, classes=["1"]).things == {1}
    assert options(None, classes=["1200"]).things == {1200}
    with pytest.raises(InvalidArgumentError, match="from 0 to 2"):
        options(COCO, classes=["3"])


def test_ids_have_a_bound_where_the_number_of_classes_is_not_known():
    with pytest.raises(InvalidArgumentError, match="ids are whole numbers"):
        options(None, classes=[2**63])


def test_empty_list_of_classes_is_no_class():
    assert options(COCO, classes=[]).things == frozenset()


def test_blanks_around_a_name_need_not_be_given():
    """As Detectron2's ADE20K has them."""
    dataset = Dataset(name="ade", stuff_classes=["wall", "window ", "window"])
    assert options(dataset, classes=["window"]).stuff == {1, 2}
    assert options(dataset, classes=["window "]).stuff == {1}


def test_name_that_two_classes_have_is_both():
    dataset = Dataset(name="two", thing_classes=["bow", "tie", "bow"])
    assert options(dataset, classes=["bow"]).things == {0, 2}


def test_ids_without_names_are_taken_as_they_are():
    assert options(None, classes=[1200]).things == {1200}


@pytest.mark.parametrize("value", [0, 0.0, 1, 0.5])
def test_thresholds_are_from_0_to_1(value):
    assert options(None, score_threshold=value).score_threshold == value


def test_numbers_may_be_numpys():
    wanted = options(COCO, score_threshold=np.float32(0.5), classes=[np.int64(1)], top_k=np.int32(5))
    assert wanted == Options(0.5, 5, frozenset([1]), frozenset(), frozenset([1]))
    assert [type(each) for each in (wanted.score_threshold, wanted.top_k, *wanted.things)] == [float, int, int]
    assert [*map(type, plain(["a", np.int64(1), 2]))] == [str, int, int]


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf, "0.5", True, [0.5]])
def test_other_thresholds_are_refused_by_name(value):
    with pytest.raises(InvalidArgumentError, match="score_threshold") as caught:
        options(None, score_threshold=value)
    assert caught.value.value is value


@pytest.mark.parametrize("value", [0, -1, MAX_TOP_K + 1, 1.5, "3", True])
def test_other_numbers_of_detections_are_refused_by_name(value):
    with pytest.raises(InvalidArgumentError, match="top_k") as caught:
        options(None, top_k=value)
    assert caught.value.value is value


@pytest.mark.parametrize("classes", ["person", b"person", 3, {"person"}, iter(["person"])])
def test_classes_that_are_no_list_are_refused(classes):
    with pytest.raises(InvalidArgumentError, match=r"give a list of names or ids"):
        options(COCO, classes=classes)


@pytest.mark.parametrize("unknown", [3, -1, True, 1.0, None])
def test_unknown_id_is_refused_with_the_range(unknown):
    with pytest.raises(InvalidArgumentError, match="from 0 to 2") as caught:
        options(COCO, classes=[unknown])
    assert caught.value.value is unknown


def test_unknown_name_is_refused_with_names_that_are_near():
    with pytest.raises(InvalidArgumentError, match="no class 'persn'; it has person"):
        options(COCO, classes=["persn"])


def test_name_is_refused_where_the_model_carries_none():
    with pytest.raises(InvalidArgumentError, match="it has no class names, so give ids"):
        options(None, classes=["person"])
