"""evaluate and compare: AP as COCO's tools give it, PQ and IoU as their papers say, classes by name, and honest intervals."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bentoml_detectron import compare, evaluate, masks
from bentoml_detectron.errors import ImageError, InvalidArgumentError
from bentoml_detectron.evaluation import ground_truth as truths
from bentoml_detectron.evaluation.average_precision import COCO_SIGMAS, KINDS
from bentoml_detectron.evaluation.report import tables
from bentoml_detectron.results import Detections, PanopticSegmentation, Segment
from coco import IDS, NAMES, SIZE, annotation, by_faster, content, detections, random_dataset

SEEDS = st.integers(0, 2**32 - 1)
BOX = [10, 10, 40, 50]
WRONG_RLES = [
    {"size": [60, 80], "counts": annotation(4, 1, "dog", BOX)["segmentation"]["counts"][:-3]},  # pycocotools would not end
    {"size": [60, 80], "counts": "o"},
    {"size": [60, 80], "counts": "\u1234"},
    {"size": [60, 80], "counts": [4800, 1]},
    {"size": [60, 80], "counts": [4805, -5]},
    {"size": [60, 80], "counts": [4800.0]},
    {"size": [80, 60], "counts": [4800]},
    {"size": ["60", "80"], "counts": [4800]},
    {"size": [60, 80]},
]


def or_nan(values):
    return np.where(np.asarray(values) < 0, np.nan, values)


# Average precision


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_average_precision_is_that_of_faster_coco_eval(seed):
    truth, found = random_dataset(seed)
    if not any(len(each) for each in found.values()):
        return
    measured = evaluate(found, truth)
    assert set(measured.tasks) == {"box"} | ({"mask", "keypoint"} if truth["annotations"] else set())
    for name, task in measured.tasks.items():
        stats, of_classes = by_faster(truth, found, KINDS[name])
        due = or_nan(stats)[: len(task.metrics)]
        assert list(task.metrics.values()) == pytest.approx(due, abs=1e-12, nan_ok=True), name
        due = dict(zip(IDS, or_nan(of_classes), strict=False))
        if name != "keypoint":  # of which only classes with any are evaluated
            assert dict(zip(task.classes, task.per_class[:, 0], strict=True)) == pytest.approx(due, abs=1e-12, nan_ok=True)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_matches_accumulate_to_what_cocoeval_says(seed):
    truth, found = random_dataset(seed)
    for task in evaluate(found, truth).tasks.values():
        means, classes = task.resampled(np.ones((1, len(found))))
        assert classes[0] == pytest.approx(task.per_class, abs=1e-12, nan_ok=True)
        due = {name: task.metrics[name] for name in task.columns}
        assert {name: value[0] for name, value in means.items()} == pytest.approx(due, abs=1e-12, nan_ok=True)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_images_weighed_anew_are_images_evaluated_anew(seed):
    truth, found = random_dataset(seed, images=3)
    times = np.random.default_rng(seed).multinomial(3, [1 / 3] * 3)
    drawn, images, annotations = {}, [], []
    for (image_id, each), count in zip(found.items(), times.tolist(), strict=True):
        for copied in range(count):
            drawn[1000 * copied + image_id] = each
            images.append(1000 * copied + image_id)
            annotations += [{**one, "image_id": images[-1]} for one in truth["annotations"] if one["image_id"] == image_id]
    anew = evaluate(drawn, content(images, annotations))
    for name, task in evaluate(found, truth).tasks.items():
        if name not in anew.tasks or task.classes != anew.tasks[name].classes:
            continue  # nothing of it was drawn
        _, classes = task.resampled(times[None].astype(float))
        assert classes[0] == pytest.approx(anew.tasks[name].per_class, abs=1e-12, nan_ok=True)


def test_what_is_all_found_has_an_average_precision_of_1():
    keypoints = np.tile([20.0, 30.0, 2.0], (1, 17, 1)).astype(np.float32)
    truth = content([1], [annotation(1, 1, "dog", BOX, keypoints=(keypoints[0] - [0.5, 0.5, 0]).ravel().tolist())])
    measured = evaluate({1: detections([BOX], [0.9], [1], keypoints)}, truth)
    assert {name: task.metrics["AP"] for name, task in measured.tasks.items()} == {
        "box": pytest.approx(1), "mask": pytest.approx(1), "keypoint": pytest.approx(1)
    }  # fmt: skip
    assert measured.tasks["box"].classes == ("bird", "cat", "dog")
    assert measured.tasks["box"].counts == (0, 0, 1)
    assert measured.tasks["keypoint"].classes == ("dog",)


def test_an_annotation_with_the_id_0_can_be_found():
    truth = content([1], [annotation(0, 1, "dog", BOX)])
    assert evaluate({1: detections([BOX], [0.9], [1])}, truth).tasks["box"].metrics["AP"] == pytest.approx(1)


def test_nothing_found_is_0_and_nothing_there_is_nothing():
    measured = evaluate({1: detections([], [], [])}, content([1], [annotation(1, 1, "dog", BOX)]))
    ((*_, dog),) = [[row[1][0] for row in measured.tasks["box"].rows()]]
    assert (measured.tasks["box"].metrics["AP"], dog) == (0, 0)
    assert math.isnan(measured.tasks["box"].per_class[0, 0])
    assert measured.to_dict()["tasks"]["box"]["classes"]["bird"] == {
        "AP": None, "AP50": None, "AP75": None, "AR": None, "instances": 0
    }  # fmt: skip


def test_what_lies_in_a_crowd_is_neither_right_nor_wrong():
    truth = content([1], [annotation(1, 1, "dog", BOX), annotation(2, 1, "dog", [50, 10, 79, 59], crowd=True)])
    inside = [[55, 20, 65, 40], [60, 25, 70, 45]]
    best = detections([*inside, BOX], [0.99, 0.98, 0.9], [1, 1, 1])
    assert evaluate({1: best}, truth).tasks["box"].metrics["AP"] == pytest.approx(1)
    truth["annotations"].pop()
    assert evaluate({1: best}, truth).tasks["box"].metrics["AP"] < 0.4


def test_without_masks_only_boxes_are_measured_and_a_file_without_segmentations_says_so():
    found = detections([BOX], [0.9], [1])
    truth = content([1], [annotation(1, 1, "dog", BOX)])
    boxes = Detections(SIZE, found.boxes, found.scores, found.class_ids, found.class_names)
    assert set(evaluate({1: boxes}, truth).tasks) == {"box"}
    del truth["annotations"][0]["segmentation"], truth["annotations"][0]["area"]
    measured = evaluate({1: found}, truth)
    assert set(measured.tasks) == {"box"}
    assert measured.notes == (
        "the ground truth has annotations without an area: the area of their boxes is used",
        "the ground truth has no segmentations, so there is no AP of masks",
    )


def test_sigmas_are_cocos_for_17_keypoints():
    from pycocotools.cocoeval import Params

    assert list(COCO_SIGMAS) == pytest.approx(Params("keypoints").kpt_oks_sigmas.tolist(), abs=1e-12)


def test_sigmas_of_other_keypoints_are_given_or_the_same_for_each():
    truth, found = random_dataset(3, keypoints=5)
    given_none = evaluate(found, truth)
    assert given_none.notes == (
        "the AP of 5 keypoints uses a sigma of 1/5 for each; set others with --keypoint-sigmas (keypoint_sigmas=)",
    )
    uniform = evaluate(found, truth, keypoint_sigmas=[0.2] * 5)
    assert uniform.to_dict()["tasks"] == given_none.to_dict()["tasks"]
    strict = evaluate(found, truth, keypoint_sigmas=[0.01] * 5)
    assert strict.tasks["keypoint"].metrics["AP"] < given_none.tasks["keypoint"].metrics["AP"]
    for wrong in ([0.1] * 4, [0.1, 0.1, 0.1, 0.1, 0.0], [math.nan] * 5):
        with pytest.raises(InvalidArgumentError, match="give 5 numbers above 0"):
            evaluate(found, truth, keypoint_sigmas=wrong)


@pytest.mark.parametrize("unseen", [None, [], [0] * 51])
@pytest.mark.parametrize("crowd", [0, 1])
def test_who_was_annotated_without_keypoints_is_nothing_to_find_and_nothing_found_wrongly(unseen, crowd):
    points = [value for x in range(17) for value in (12 + 2 * x, 20 + 2 * x, 2)]
    without = annotation(5, 1, "dog", [55, 5, 75, 25], crowd=crowd)
    truth = content([1], [annotation(4, 1, "dog", BOX, keypoints=points), without])
    if unseen is not None:
        without["keypoints"] = unseen
    other = [value + 40 if place % 3 == 0 else value - 15 for place, value in enumerate(points)]
    poses = np.array([points, other], np.float32).reshape(2, 17, 3)
    found = detections([BOX, [55, 5, 75, 25]], [0.8, 0.9], [1, 1], poses)
    assert evaluate({1: found}, truth).tasks["keypoint"].metrics["AP"] == pytest.approx(1)


@pytest.mark.slow
def test_nothing_is_printed_and_threads_keep_their_output(capsys):
    """Another `sys.stdout`, meanwhile, would be that of all threads, and the last to go could leave its own there."""
    truth, found = random_dataset(1)
    before = sys.stdout
    with ThreadPoolExecutor(4) as pool:
        several = [pool.submit(evaluate, found, truth) for _ in range(12)]
        seen = {id(sys.stdout) for _ in range(2000) if not time.sleep(0.0001)}
        assert len({json.dumps(each.result().to_dict()) for each in several}) == 1
    assert seen == {id(before)}
    assert sys.stdout is before
    assert capsys.readouterr().out == ""


# Classes by name


def test_classes_go_by_their_names_and_not_by_their_order():
    truth, found = random_dataset(1)
    renamed = {key: detections(each.boxes, each.scores, [2 - label for label in each.class_ids], each.keypoints, NAMES[::-1])
               for key, each in found.items()}  # fmt: skip
    assert evaluate(renamed, truth).to_dict() == evaluate(found, truth).to_dict()


def test_a_class_that_the_model_lacks_is_an_error_that_names_near_ones():
    truth, found = random_dataset(1)
    with pytest.raises(InvalidArgumentError, match="the model has no class 'bird' of the ground truth; it has birds") as error:
        evaluate(found, truth, thing_classes=["cat", "dog", "birds"])
    assert error.value.value == ["bird"]
    only = evaluate(found, truth, thing_classes=["cat", "dog", "birds"], classes=["dog", "cat"])
    whole = evaluate(found, truth)
    assert only.tasks["box"].classes == ("cat", "dog")
    assert np.array_equal(only.tasks["box"].per_class, whole.tasks["box"].per_class[1:], equal_nan=True)
    assert only.notes == ("the model's classes 'birds' are not evaluated: the ground truth does not have them",)
    with pytest.raises(InvalidArgumentError, match="has no class 'dogg'; it has dog"):
        evaluate(found, truth, classes=["dogg"])
    with pytest.raises(InvalidArgumentError, match="several classes named 'dog'"):
        evaluate(found, truth, thing_classes=["cat", "dog", "bird", "dog"])


def test_a_class_that_the_annotations_lack_is_left_out_and_noted():
    truth, found = random_dataset(1)
    truth["categories"] = [each for each in truth["categories"] if each["name"] != "cat"]
    truth["annotations"] = [each for each in truth["annotations"] if each["category_id"] != IDS["cat"]]
    measured = evaluate(found, truth, thing_classes=NAMES)
    assert measured.tasks["box"].classes == ("bird", "dog")
    assert measured.notes == ("the model's classes 'cat' are not evaluated: the ground truth does not have them",)


def test_without_names_ids_are_places_as_in_detectron2():
    truth, found = random_dataset(1)
    places = {"bird": 0, "cat": 1, "dog": 2}
    bare = {key: detections(each.boxes, each.scores, [places[name] for name in each.class_names], each.keypoints, ())
            for key, each in found.items()}  # fmt: skip
    measured = evaluate(bare, truth)
    assert measured.to_dict()["tasks"] == evaluate(found, truth).to_dict()["tasks"]
    assert "has no class names" in measured.notes[0]
    with pytest.raises(InvalidArgumentError, match="the model found class 3, but the ground truth has 3 categories"):
        evaluate({1: detections([BOX], [1], [3], names=())}, content([1], []))


def test_without_names_chosen_classes_keep_their_places():
    truth, found = random_dataset(1)
    places = {"bird": 0, "cat": 1, "dog": 2}
    bare = {key: detections(each.boxes, each.scores, [places[name] for name in each.class_names], each.keypoints, ())
            for key, each in found.items()}  # fmt: skip
    due = evaluate(found, truth, classes=["dog"]).to_dict()["tasks"]
    assert evaluate(bare, truth, classes=["dog"]).to_dict()["tasks"] == due


def test_of_chosen_classes_no_note_says_that_the_others_are_not_there():
    truth, found = random_dataset(1)
    assert evaluate(found, truth, thing_classes=NAMES, classes=["dog"]).notes == ()
    assert evaluate(found, truth, classes=["dog"]).notes == ()


def test_names_that_the_annotations_lack_are_noted_also_where_the_model_s_names_are_not_given():
    truth = content([1], [annotation(1, 1, "dog", BOX)])
    measured = evaluate({1: detections([BOX], [1], [0], names=("Dog",))}, truth)
    assert measured.notes == ("detections of 'Dog' are ignored: the ground truth has no such class",)


# Panoptic quality


def panoptic(ids, categories):
    """`Detections` of a panoptic map; categories by segment id are of things ("cat") or of stuff ("sky")."""
    segments = tuple(
        Segment(each, 0, name, name in ("cat", "dog"), int((ids == each).sum())) for each, name in categories.items()
    )
    empty = np.zeros((0, 4), np.float32)
    return Detections(ids.shape, empty, empty[:, 0], [], (), panoptic=PanopticSegmentation(ids.astype(np.int32), segments))


PANOPTIC = {"cat": 3, "dog": 5, "sky": 9, "sea": 4}


def panoptic_file(folder, maps, crowds=()):
    """A panoptic file in a folder, of {image id: (map, category names by segment id)}."""
    (folder / "panoptic").mkdir()
    annotations = []
    for image_id, (ids, categories) in maps.items():
        bytes_of = np.ascontiguousarray(ids, dtype="<i4").view(np.uint8).reshape(*ids.shape, 4)
        Image.fromarray(bytes_of[..., :3].copy()).save(folder / "panoptic" / f"{image_id}.png")
        segments = [
            {"id": each, "category_id": PANOPTIC[name], "iscrowd": int(each in crowds)} for each, name in categories.items()
        ]
        annotations.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": segments})
    (folder / "panoptic.json").write_text(json.dumps({
        "images": [{"id": each, "file_name": f"{each}.jpg"} for each in maps],
        "annotations": annotations,
        "categories": [{"id": number, "name": name, "isthing": int(number in (3, 5))} for name, number in PANOPTIC.items()],
    }))  # fmt: skip
    return folder / "panoptic.json"


def random_maps(seed, images=3):
    """Panoptic maps in rectangles, void in between: {image id: (map, category names)}; stuff is one segment a class."""
    rng = np.random.default_rng(seed)
    maps = {}
    for image_id in range(images):
        ids, names = np.zeros((30, 40), np.int64), {}
        for name in rng.choice(list(PANOPTIC), 6):
            number = next((each for each, known in names.items() if known == name and name in ("sky", "sea")), len(names) + 300)
            y, x = rng.integers(0, 20, 2)
            ids[y : y + rng.integers(4, 20), x : x + rng.integers(4, 25)] = number
            names[number] = str(name)
        maps[image_id] = ids, {each: name for each, name in names.items() if (ids == each).any()}
    return maps


def moved(maps, seed):
    """The same shifted by a pixel or two, with one thing in three of another class."""
    rng = np.random.default_rng(seed)
    other = {"cat": "dog", "dog": "cat", "sky": "sky", "sea": "sea"}
    found = {}
    for image_id, (ids, names) in maps.items():
        shifted = np.roll(ids, rng.integers(-2, 3, 2), (0, 1))
        found[image_id] = shifted, {each: other[name] if rng.random() < 0.3 else name for each, name in names.items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_panoptic_quality_is_that_of_torchmetrics(seed, tmp_path):
    """Where the model leaves nothing void: torchmetrics, unlike COCO's panopticapi, does not count what it leaves as missed."""
    import torch
    from torchmetrics.detection import PanopticQuality

    maps, found = random_maps(seed), {}
    for image_id, (ids, names) in moved(maps, seed).items():
        sky = next((each for each, name in names.items() if name == "sky"), 77)
        found[image_id] = np.where(ids == 0, sky, ids), {**names, sky: "sky"}
    task = evaluate({key: panoptic(*each) for key, each in found.items()}, panoptic_file(tmp_path, maps)).tasks["panoptic"]
    metric = PanopticQuality({3, 5}, {9, 4}, allow_unknown_preds_category=True, return_sq_and_rq=True, return_per_class=True)
    void = metric.void_color

    def pairs(ids, names):
        categories = {each: PANOPTIC[name] for each, name in names.items()}
        rows = [(categories[each], each) if each else void for each in ids.ravel().tolist()]
        return torch.tensor(rows).reshape(1, *ids.shape, 2)

    for image_id, one in maps.items():
        metric.update(pairs(*found[image_id]), pairs(*one))
    due = metric.compute()  # things first, each in the order of their ids
    order = [due[[3, 5, 4, 9].index(PANOPTIC[name])].tolist() for name in task.classes]
    seen = [any(name in names.values() for _, names in [*maps.values(), *found.values()]) for name in task.classes]
    measured = np.where(np.isnan(task.per_class), 0, task.per_class)
    assert measured[seen] == pytest.approx(np.array(order)[seen], abs=1e-6)
    assert task.metrics["PQ"] == pytest.approx(np.mean([row[0] for row, is_seen in zip(order, seen, strict=True) if is_seen]))
    assert 0.1 < task.metrics["PQ"] < 0.95


def test_the_same_map_has_a_panoptic_quality_of_1_of_things_and_of_stuff(tmp_path):
    maps = random_maps(5)
    measured = evaluate({key: panoptic(*each) for key, each in maps.items()}, panoptic_file(tmp_path, maps))
    assert set(measured.tasks["panoptic"].metrics) == {
        f"{name}{of}" for name in ("PQ", "SQ", "RQ") for of in ("", "_things", "_stuff")
    }
    assert set(measured.tasks["panoptic"].metrics.values()) == {1.0}
    assert dict(zip(measured.tasks["panoptic"].classes, measured.tasks["panoptic"].counts, strict=True)) == {
        name: sum(list(names.values()).count(name) for _, names in maps.values()) for name in ("cat", "sea", "dog", "sky")
    }


def test_panoptic_quality_by_hand(tmp_path):
    """One cat found with IoU 0.8, one missed, one found where there is none: SQ 0.8, RQ 1 / (1 + 1/2 + 1/2)."""
    due = np.zeros((10, 30), np.int64)
    due[:, :10], due[:, 10:20], due[:, 20:] = 1, 2, 3
    found = np.full((10, 30), 3)
    found[:, :8], found[:5, 22:] = 1, 2
    truth = panoptic_file(tmp_path, {0: (due, {1: "cat", 2: "cat", 3: "sky"})})
    rows = {name: values for name, values, _ in
            evaluate({0: panoptic(found, {1: "cat", 2: "cat", 3: "sky"})}, truth).tasks["panoptic"].rows()}  # fmt: skip
    assert rows["cat"] == pytest.approx([0.8 / 2, 0.8, 0.5])
    assert rows["sky"] == pytest.approx([0, 0, 0])
    assert np.isnan(rows["dog"]).all()


def test_void_and_crowds_are_not_held_against_a_model(tmp_path):
    due = np.zeros((10, 30), np.int64)
    due[:, :10], due[:, 20:] = 1, 2
    found = np.zeros((10, 30), np.int64)
    found[:, :15], found[:, 21:] = 1, 2  # a third of the first is in the void; the second is within the crowd
    truth = panoptic_file(tmp_path, {0: (due, {1: "cat", 2: "cat"})}, crowds={2})
    rows = {name: values for name, values, _ in
            evaluate({0: panoptic(found, {1: "cat", 2: "cat"})}, truth).tasks["panoptic"].rows()}  # fmt: skip
    assert rows["cat"] == pytest.approx([1, 1, 1])


# Semantic maps


def semantic(labels):
    empty = np.zeros((0, 4), np.float32)
    return Detections(labels.shape, empty, empty[:, 0], [], (), semantic=labels)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_mean_iou_is_scikit_learns_over_the_classes_that_are_there(seed):
    from tempfile import TemporaryDirectory

    from sklearn.metrics import jaccard_score, recall_score

    rng = np.random.default_rng(seed)
    due = rng.choice([0, 1, 3, 255], (2, 12, 9), p=[0.5, 0.2, 0.2, 0.1]).astype(np.uint8)
    found = np.where(rng.random(due.shape) < 0.7, due, rng.integers(0, 4, due.shape)).astype(np.uint8)
    with TemporaryDirectory() as folder:
        for number, each in enumerate(due):
            Image.fromarray(each).save(f"{folder}/{number}.png")
        measured = evaluate(((str(n), semantic(each)) for n, each in enumerate(found)), folder, stuff_classes=list("abcd"))
    task = measured.tasks["semantic"]
    known = due != 255
    options = {"labels": [0, 1, 2, 3], "average": None, "zero_division": 0}
    for column, score in (("IoU", jaccard_score), ("ACC", recall_score)):
        values = task.per_class[:, task.columns.index(column)]
        there = [0, 1, 3]
        assert values[there] == pytest.approx(score(due[known], found[known], **options)[there])
        assert np.isnan(values[2])
        assert task.metrics[f"m{column}"] == pytest.approx(values[there].mean())
    assert task.counts == tuple(int((due == each).sum()) for each in range(4))


def test_maps_of_many_classes_have_65535_where_nothing_is_known(tmp_path):
    due = np.array([[255, 300], [65535, 0]], np.uint16)
    Image.fromarray(due).save(tmp_path / "a.png")
    task = evaluate({"a": semantic(np.array([[255, 299], [7, -1]], np.int16))}, tmp_path).tasks["semantic"]
    assert {name: values[0] for name, values, count in task.rows() if count} == {"255": 1, "300": 0, "0": 0}


def test_a_map_that_does_not_fit_is_named(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(
        InvalidArgumentError, match=r"a\.png has the shape \(4, 4\); give one value per pixel, at the image's size \(4, 5\)"
    ):
        evaluate({"a": semantic(np.zeros((4, 5), np.uint8))}, tmp_path)
    Image.fromarray(np.full((4, 5), 2, np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(InvalidArgumentError, match=r"a\.png has class 2, but the model has 2 classes; give maps"):
        evaluate({"a": semantic(np.zeros((4, 5), np.uint8))}, tmp_path, stuff_classes=["x", "y"])
    (tmp_path / "a.png").write_bytes(b"none")
    with pytest.raises(InvalidArgumentError, match=r"cannot read the map .*a\.png"):
        evaluate({"a": semantic(np.zeros((4, 5), np.uint8))}, tmp_path)


def test_a_model_that_gives_nothing_of_what_is_annotated_is_told_so(tmp_path):
    maps = random_maps(0, images=1)
    file = panoptic_file(tmp_path, maps)
    with pytest.raises(InvalidArgumentError, match=r"panoptic\.json is panoptic, but the model is not"):
        evaluate({0: detections([], [], [])}, file)
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "0.png")
    with pytest.raises(InvalidArgumentError, match="holds semantic maps, but the model predicts none"):
        evaluate({"0": detections([], [], [])}, tmp_path)
    with pytest.raises(InvalidArgumentError, match="boxes are rotated"):
        evaluate(
            {1: Detections((4, 5), [[1, 1, 2, 2, 30]], [1], [0], ("dog",))},
            {**content([1], []), "images": [{"id": 1, "file_name": "a"}]},
        )


# Images


def test_predictions_are_of_all_images_once():
    truth, found = random_dataset(2, images=6)
    assert evaluate(reversed(found.items()), truth).to_dict() == evaluate(found, truth).to_dict()
    with pytest.raises(
        InvalidArgumentError, match=r"no prediction for 13\.jpg, 23\.jpg, 33\.jpg and 2 more; give one for every"
    ):
        evaluate({3: found[3]}, truth)
    with pytest.raises(InvalidArgumentError, match="prediction for image 3 is given twice"):
        evaluate([*found.items(), (3, found[3])], truth)
    with pytest.raises(InvalidArgumentError, match="prediction for image 4 is for no image of the ground truth"):
        evaluate({4: found[3]}, truth)


def test_images_of_another_size_than_annotated_are_an_error():
    truth, found = random_dataset(2, images=1)
    higher = copy.deepcopy(truth)
    higher["images"][0]["height"] = 61
    for each in higher["annotations"]:
        del each["segmentation"]
    with pytest.raises(InvalidArgumentError, match=r"3\.jpg has 60 rows and 80 columns, but the ground truth says 61 and 80"):
        evaluate(found, higher)
    del truth["images"][0]["height"]
    assert evaluate(found, truth).tasks.keys() == {"box", "mask", "keypoint"}


def test_image_ids_may_be_names():
    truth, found = random_dataset(2)
    named = copy.deepcopy(truth)
    for each in named["images"]:
        each["id"] = f"image {each['id']}"
    for each in named["annotations"]:
        each["image_id"] = f"image {each['image_id']}"
    renamed = {f"image {key}": each for key, each in found.items()}
    assert evaluate(renamed, named).to_dict() == evaluate(found, truth).to_dict()


def test_files_that_are_not_there_are_named(tmp_path):
    truth = truths.read(content([1, 2], []))
    (tmp_path / "1.jpg").touch()
    with pytest.raises(ImageError, match=r"2\.jpg of the ground truth is not in"):
        truth.files(tmp_path)
    with pytest.raises(ImageError, match="is not a folder"):
        truth.files(tmp_path / "none")
    (tmp_path / "2.jpg").touch()
    assert truth.files(tmp_path) == {1: tmp_path / "1.jpg", 2: tmp_path / "2.jpg"}


def test_images_of_maps_are_those_of_the_same_name(tmp_path):
    (tmp_path / "maps").mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "maps" / f"{name}.png")
    (tmp_path / "a.JPG").touch()
    (tmp_path / "b.webp").touch()
    assert truths.read(tmp_path / "maps").files(tmp_path) == {"a": tmp_path / "a.JPG", "b": tmp_path / "b.webp"}


def test_maps_in_the_folder_of_their_images_are_no_images(tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / name)
    (tmp_path / "a.jpe").touch()
    (tmp_path / "b.JFIF").touch()
    assert truths.read(tmp_path).files(tmp_path) == {"a": tmp_path / "a.jpe", "b": tmp_path / "b.JFIF"}


def test_two_images_of_one_map_are_an_error_that_names_them(tmp_path):
    (tmp_path / "maps").mkdir()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "maps" / "a.png")
    for name in ("a.jpg", "a.png", "other.jpg", "other.png"):
        (tmp_path / name).touch()
    with pytest.raises(ImageError, match=r"a\.jpg, a\.png in .* could both be"):
        truths.read(tmp_path / "maps").files(tmp_path)


# Files


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.pop("images"), "it needs all of images, annotations, categories"),
        (lambda file: file["images"].clear(), "has no image, so there is nothing"),
        (lambda file: file["categories"].clear(), "has no category, so there is nothing"),
        (lambda file: file["images"][0].pop("file_name"), r"is not a COCO annotation file: KeyError\('file_name'\)"),
        (lambda file: file["images"][0].update(id=[1]), "is not a COCO annotation file: TypeError"),
        (lambda file: file["images"][0].update(neg_category_ids=[7]), "is an LVIS file: each image says for which classes"),
        (lambda file: file["images"][0].update(not_exhaustive_category_ids=[1]), "is an LVIS file"),
        (lambda file: file["images"].append(file["images"][0]), "has the image id 1 twice"),
        (lambda file: file["categories"].append({"id": 5, "name": "dog"}), "has the category 'dog' twice"),
        (lambda file: file["annotations"][0].update(image_id=9), "the annotation 4 belongs to the image 9, which does not"),
        (lambda file: file["annotations"][0].update(image_id=[1]), r"the annotation 4 belongs to the image \[1\], which"),
        (lambda file: file["annotations"][0].update(area=None), "the annotation 4 has the area None"),
        (lambda file: file["annotations"][0].update(area=math.inf), "the annotation 4 has the area inf"),
        (lambda file: file["annotations"][0].update(area=-5), "the annotation 4 has the area -5"),
        (lambda file: file["annotations"][0].update(bbox=[40, 50, -30, 10]), "the annotation 4 has the box .*x, y, width"),
        (lambda file: file["images"].append(None), "is not a COCO annotation file: AttributeError"),
        (lambda file: file["images"][0].update(id=1.5), "the image id 1.5 is neither a whole number nor a string"),
        (lambda file: file["annotations"][0].update(category_id=9), "the annotation 4 has the category 9, which"),
        (lambda file: file["annotations"][0].update(bbox=[1, 2, 3]), r"the annotation 4 has the box \[1, 2, 3\]; it should be"),
        (lambda file: file["annotations"][0].update(bbox=[1, 2, 3, math.nan]), r"the annotation 4 has the box .*nan\]"),
        (lambda file: file["annotations"][0].update(segmentation=[[1, 2, 3]]), "the annotation 4 has a segmentation that"),
        (lambda file: file["annotations"][0].update(segmentation=[[1, 2, 3, 4]]), "segmentations, but none for the ann.* 4"),
        *(
            (lambda file, rle=rle: file["annotations"][0].update(segmentation=rle), "the annotation 4 has a segmentation that")
            for rle in WRONG_RLES
        ),
        (lambda file: file["annotations"][0].update(keypoints=[1, 2]), "the annotation 4 has keypoints that"),
        (lambda file: file["annotations"][0].update(iscrowd="0"), "the annotation 4 has iscrowd '0'; it should be 0 or 1"),
        (lambda file: file["annotations"][0].update(category_id=[1]), r"the annotation 4 has the category \[1\], which"),
        (lambda file: file["categories"][0].update(id=1.7), "annotation file: .*the category id 1.7 is not a whole number"),
        (lambda file: file["images"][0].update(height=math.inf), "not a COCO annotation file: OverflowError"),
        (lambda file: file["annotations"][1].pop("segmentation"), "has segmentations, but none for the annotations 5"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_an_error_that_says_where(change, said):
    file = content([1], [annotation(4, 1, "dog", BOX), annotation(5, 1, "cat", BOX)])
    change(file)
    with pytest.raises(InvalidArgumentError, match=said):
        evaluate({1: detections([BOX], [1], [1])}, file)


def test_an_rle_of_another_size_is_an_error_also_where_the_file_has_no_sizes():
    file = content([1], [annotation(4, 1, "dog", BOX)])
    del file["images"][0]["height"]
    file["annotations"][0]["segmentation"] = {"size": [30, 160], "counts": [4800]}
    with pytest.raises(InvalidArgumentError, match=r"an RLE of 30 rows and 160 columns, but 1\.jpg has 60 and 80"):
        evaluate({1: detections([BOX], [1], [1])}, file)


def test_boxes_may_be_tuples_and_rles_as_pycocotools_gives_them():
    file = content([1], [annotation(4, 1, "dog", BOX)])
    found = evaluate({1: detections([BOX], [1], [1])}, file)
    file["annotations"][0]["bbox"] = tuple(file["annotations"][0]["bbox"])
    file["annotations"][0]["segmentation"]["counts"] = file["annotations"][0]["segmentation"]["counts"].encode()
    assert evaluate({1: detections([BOX], [1], [1])}, file).to_dict() == found.to_dict()


def test_a_predictions_malformed_mask_is_an_error_that_names_the_image():
    """pycocotools would not end on it."""
    good = detections([BOX], [0.9], [1])
    cut = {"size": [60, 80], "counts": good.masks[0]["counts"][:-3]}
    found = Detections(SIZE, good.boxes, good.scores, good.class_ids, good.class_names, [cut])
    with pytest.raises(InvalidArgumentError, match=r"1\.jpg: the RLE"):
        evaluate({1: found}, content([1], [annotation(4, 1, "dog", BOX)]))


def test_polygons_without_an_inside_are_left_out_and_boxes_measured_all_the_same():
    found = detections([BOX], [0.9], [1])
    boxes = Detections(SIZE, found.boxes, found.scores, found.class_ids, found.class_names)
    corners = [10, 10, 40, 10, 40, 50, 10, 50]
    for segmentation in ([[]], [[10, 10, 40, 50]], [corners, [1, 1, 2, 2]]):
        truth = content([1], [{**annotation(4, 1, "dog", BOX), "segmentation": segmentation}])
        assert evaluate({1: boxes}, truth).tasks["box"].metrics["AP"] == pytest.approx(1)
    square = Detections(SIZE, *(getattr(boxes, name) for name in ("boxes", "scores", "class_ids", "class_names")),
                        [masks.encode(np.pad(np.ones((40, 30), bool), ((10, 10), (10, 40))))])  # fmt: skip
    assert evaluate({1: square}, truth).tasks["mask"].metrics["AP"] == pytest.approx(1)


def test_ids_and_numbers_may_be_of_any_type_that_other_tools_give():
    """As pandas writes ids, and as NumPy's numbers."""
    found = {1: detections([BOX], [0.9], [1])}
    truth = content([1], [annotation(4, 1, "dog", BOX)])
    due = evaluate(found, truth).to_dict()
    row = truth["annotations"][0]
    truth["images"][0]["id"], row["image_id"], row["category_id"] = 1.0, np.int64(1), 90.0
    row["bbox"], row["area"] = np.array(row["bbox"]), np.int64(row["area"])
    assert evaluate(found, truth).to_dict() == due


def test_a_file_says_itself_how_many_keypoints_count():
    """An object of which it says none is not looked for, as COCOeval has it, whatever its points say."""
    points = [value for x in range(17) for value in (12 + 2 * x, 20 + 2 * x, 2)]
    truth = content([1], [annotation(4, 1, "dog", BOX, keypoints=points), annotation(5, 1, "dog", BOX, keypoints=points)])
    found = detections([BOX], [0.8], [1], np.array([points], np.float32).reshape(1, 17, 3))
    assert evaluate({1: found}, truth).tasks["keypoint"].metrics["AP"] < 0.6
    truth["annotations"][1]["num_keypoints"] = 0
    assert evaluate({1: found}, truth).tasks["keypoint"].metrics["AP"] == pytest.approx(1)


def test_where_nothing_is_found_no_masks_are_missing():
    truth = content([1, 2], [annotation(4, 1, "dog", BOX), annotation(5, 2, "dog", BOX)])
    points = np.ones((1, 17, 3), np.float32)
    nothing = Detections(SIZE, np.zeros((0, 4)), [], [], ())
    found = detections([BOX], [0.9], [1], points)
    assert set(evaluate({1: found, 2: nothing}, truth).tasks) == {"box", "mask"}
    of_none = Detections(SIZE, np.zeros((0, 4)), [], [], (), keypoints=np.zeros((0, 0, 3), np.float32))
    assert set(evaluate({1: found, 2: of_none}, truth).tasks) == {"box", "mask"}
    without = Detections(SIZE, found.boxes, found.scores, found.class_ids, found.class_names)
    measured = evaluate({1: found, 2: without}, truth)
    assert set(measured.tasks) == {"box"}
    assert measured.notes[0] == "detections on some images have masks and on others do not, so there is no AP of masks"
    none = evaluate({1: detections([], [], []), 2: detections([], [], [])}, truth)
    assert none.tasks["mask"].metrics["AP"] == 0


def test_what_has_no_class_beside_names_is_an_error_and_no_first_class():
    """As an RPN's proposals."""
    found = detections([BOX], [0.9], [0], names=())
    truth = content([1], [annotation(4, 1, "bird", BOX)])
    assert evaluate({1: found}, truth).tasks["box"].metrics["AP"] == pytest.approx(1)
    with pytest.raises(InvalidArgumentError, match="none for class 0, which it found; name all classes"):
        evaluate({1: found}, truth, thing_classes=NAMES)


def test_predictions_that_are_none_are_errors_that_say_what_to_give():
    truth = content([1], [annotation(4, 1, "dog", BOX)])
    with pytest.raises(InvalidArgumentError, match="the prediction for image 1 must be Detections, not ImageError") as error:
        evaluate({1: ImageError("it is empty")}, truth)
    assert isinstance(error.value.__cause__, ImageError)
    with pytest.raises(
        InvalidArgumentError, match="a prediction must be a pair of an image id and its Detections, not Detections"
    ):
        evaluate([detections([BOX], [0.9], [1])], truth)


def test_of_a_panoptic_file_what_the_model_names_otherwise_is_noted(tmp_path):
    maps = random_maps(1, images=2)
    file = panoptic_file(tmp_path, maps)
    found = {key: panoptic(*each) for key, each in maps.items()}
    assert evaluate(found, file).notes == ()
    content_ = json.loads(file.read_text())
    stuff = next(each for each in content_["categories"] if not each["isthing"])
    del stuff["isthing"]
    file.write_text(json.dumps(content_))
    (note,) = evaluate(found, file).notes
    assert note.startswith(f"{stuff['name']!r} is ignored: stuff in one of the model and panoptic.json, a thing in the other")
    names = [[each["name"] for each in content_["categories"] if each.get("isthing", 0) is kind] for kind in (1, 0)]
    with pytest.raises(InvalidArgumentError, match=f"{stuff['name']!r} is a thing in panoptic.json, but stuff to the model"):
        evaluate(found, file, thing_classes=names[0], stuff_classes=[*names[1], stuff["name"]])
    stuff.update(isthing=0, name="elsewhere")
    file.write_text(json.dumps(content_))
    (note,) = evaluate(found, file).notes
    assert note.endswith("are ignored: panoptic.json has no such class")


def test_segments_have_ids_of_their_own(tmp_path):
    for ids, said in (([0], "whose id is not a whole number of 1 or more"), ([7, 7], "segment of the image 1, 7 twice")):
        segments = [{"id": each, "category_id": 2} for each in ids]
        with pytest.raises(InvalidArgumentError, match=said):
            truths.read(
                content([1], [{"image_id": 1, "file_name": "1.png", "segments_info": segments}]), panoptic_root=tmp_path
            )


def test_maps_may_end_in_capitals_and_classes_have_one_name(tmp_path):
    for name in ("a.png", "b.PNG"):
        Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8)).save(tmp_path / name, "PNG")
    semantic = Detections((2, 2), np.zeros((0, 4)), [], [], (), semantic=np.array([[0, 1], [1, 0]], np.uint8))
    measured = evaluate({"a": semantic, "b": semantic}, tmp_path, stuff_classes=["x", "y", "x"])
    assert measured.images == ("a", "b")
    assert list(measured.to_dict()["tasks"]["semantic"]["classes"]) == ["x (0)", "y", "x (2)"]


def test_segments_that_are_none_and_names_that_no_file_has_are_errors_that_say_so(tmp_path):
    row = {"image_id": 1, "file_name": "1.png", "segments_info": [3]}
    with pytest.raises(InvalidArgumentError, match="has the segment 3, whose category does not exist"):
        truths.read(content([1], [row]), panoptic_root=tmp_path)
    file = content([1], [])
    file["images"][0]["file_name"] = "a" * 300
    with pytest.raises(ImageError, match="aaa of the ground truth is not in"):
        truths.read(file).files(tmp_path)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(content([1], [annotation(4, 1, "dog", BOX)])), encoding="utf-8-sig")
    assert evaluate({1: detections([BOX], [1], [1])}, file).tasks["box"].metrics["AP"] > 0.999
    assert [each.name for each in truths.read(file).categories] == ["bird", "cat", "dog"]


def test_masks_may_be_uncompressed_rles():
    """As COCO's own crowds are."""
    file = content([1], [annotation(4, 1, "dog", BOX)])
    found = evaluate({1: detections([BOX], [1], [1])}, file)
    bits = masks.decode(file["annotations"][0]["segmentation"]).T.ravel().astype(int)
    ends = np.flatnonzero(np.diff(bits)) + 1
    file["annotations"][0]["segmentation"] = {"size": [60, 80], "counts": np.diff([0, *ends, bits.size]).tolist()}
    again = evaluate({1: detections([BOX], [1], [1])}, file)
    assert again.tasks["mask"].metrics == pytest.approx(found.tasks["mask"].metrics, nan_ok=True)


def test_a_path_that_is_no_annotation_file_is_an_error_with_the_cure(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"cannot read .*none\.json \(No such file or directory\); give a COCO"):
        evaluate({}, tmp_path / "none.json")
    with pytest.raises(InvalidArgumentError, match="holds no PNG; give a folder of semantic maps"):
        evaluate({}, tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InvalidArgumentError, match=r"a\.json is not JSON"):
        evaluate({}, tmp_path / "a.json")
    file = panoptic_file(tmp_path, random_maps(0, images=1))
    (tmp_path / "panoptic").rename(tmp_path / "elsewhere")
    with pytest.raises(InvalidArgumentError, match=r"give the one with panoptic\.json's PNGs as --panoptic-root"):
        truths.read(file)
    assert truths.read(file, panoptic_root=tmp_path / "elsewhere").kind == "panoptic"


# Comparisons


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_a_model_is_no_better_than_itself(seed):
    truth, found = random_dataset(seed)
    measured = evaluate(found, truth)
    compared = compare(measured, evaluate(found, truth), resamples=20, seed=seed % 100)
    differences = [each for task in compared.metrics.values() for each in task.values()]
    differences += [each for task in compared.per_class.values() for row in task.values() for each in row.values()]
    assert differences
    numbers = {number for each in differences for number in (each.value, each.low, each.high) if not math.isnan(number)}
    assert numbers <= {0.0}
    assert not any(each.is_clear for each in differences)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_models_that_are_wide_apart_are_told_apart(seed):
    rng = np.random.default_rng(seed)
    annotations, good, bad = [], {}, {}
    for image_id in range(12):
        corner = rng.uniform(0, 30, 2)
        box, label = np.concatenate([corner, corner + rng.uniform(15, 28, 2)]), int(rng.integers(3))
        annotations.append(annotation(image_id + 1, image_id, NAMES[label], box))
        good[image_id] = detections([box + rng.normal(0, 0.3, 4)], [rng.uniform(0.5, 1)], [label])
        bad[image_id] = detections([box + [9, 9, -5, 0]], [rng.uniform(0.5, 1)], [label])
    truth = content(range(12), annotations)
    one, other = evaluate(good, truth), evaluate(bad, truth)
    compared = compare(one, other, resamples=200)
    for task in ("box", "mask"):
        found = compared.metrics[task]["AP"]
        assert 0 < found.low <= found.value <= found.high
        assert found.value == one.tasks[task].metrics["AP"] - other.tasks[task].metrics["AP"]
    assert compare(other, one, resamples=200).metrics["box"]["AP"].high < 0


def test_panoptic_and_semantic_models_are_compared_too(tmp_path):
    maps = random_maps(1, images=6)
    file = panoptic_file(tmp_path, maps)
    right = evaluate({key: panoptic(*each) for key, each in maps.items()}, file)
    wrong = evaluate({key: panoptic(*each) for key, each in moved(maps, 3).items()}, file)
    compared = compare(right, wrong, resamples=100)
    assert compared.metrics["panoptic"]["PQ"].is_clear
    assert compared.metrics["panoptic"]["PQ_things"].value == 1 - wrong.tasks["panoptic"].metrics["PQ_things"]


def test_intervals_are_the_same_for_the_same_seed_and_wider_for_more_confidence():
    truth, found = random_dataset(11, images=8)
    _, other = random_dataset(11, images=8, noise=10)
    one, two = evaluate(found, truth), evaluate(other, truth)
    first = compare(one, two, resamples=100)
    assert compare(one, two, resamples=100) == first
    assert compare(one, two, resamples=100, seed=1) != first
    narrow = compare(one, two, resamples=100, confidence=0.5)
    interval, inner = first.metrics["box"]["AP"], narrow.metrics["box"]["AP"]
    assert interval.low < inner.low < inner.high < interval.high


def ten_to_one(images, rare):
    """Evaluations of two models on images with a cat each, and the first few with a dog; the first one's boxes are better."""
    annotations, good, bad = [], {}, {}
    for place in range(images):
        labels = ["cat", "dog"][: 1 + (place < rare)]
        annotations += [annotation(len(annotations) + number + 1, place, name, BOX) for number, name in enumerate(labels)]
        ids, count = [NAMES.index(name) for name in labels], len(labels)
        good[place] = detections([BOX] * count, [0.9, 0.8][:count], ids)
        bad[place] = detections([[10, 10, 40, 40]] * count, [0.9, 0.8][:count], ids)
    truth = content(range(images), annotations)
    return evaluate(good, truth), evaluate(bad, truth)


def test_a_class_on_one_image_of_many_tells_nothing_clearly():
    compared = compare(*ten_to_one(20, 1))
    dog, cat = (compared.per_class["box"][name]["AP"] for name in ("dog", "cat"))
    assert dog.value > 0.3
    assert dog.low == 0
    assert not dog.is_clear
    assert cat.is_clear


def test_one_image_or_a_few_draws_give_no_interval():
    for evaluations, resamples in ((ten_to_one(1, 1), 1000), (ten_to_one(20, 20), 19)):
        found = compare(*evaluations, resamples=resamples).metrics["box"]["AP"]
        assert found.value > 0.3
        assert math.isnan(found.low)
        assert not found.is_clear


@pytest.mark.parametrize("images", [5, 8, 30])
def test_intervals_of_few_images_are_wider_as_students_t_is(images):
    """Against SciPy's t, from the same draws."""
    from scipy.special import ndtr, stdtrit

    truth, found = random_dataset(11, images=images)
    _, other = random_dataset(11, images=images, noise=10)
    one, two = evaluate(found, truth), evaluate(other, truth)
    draws = np.random.default_rng(0)
    parts = []
    for size in (50, 50):
        weights = draws.multinomial(images, np.full(images, 1 / images), size=size).astype(np.float64)
        parts.append(one.tasks["box"].resampled(weights)[0]["AP"] - two.tasks["box"].resampled(weights)[0]["AP"])
    tail = ndtr(stdtrit(images - 1, 0.05) * np.sqrt(images / (images - 1)))
    due = np.quantile(np.concatenate(parts), [tail, 1 - tail])
    interval = compare(one, two, resamples=100, confidence=0.9).metrics["box"]["AP"]
    assert [interval.low, interval.high] == pytest.approx(due, abs=2e-3)


def test_what_cannot_be_compared_is_an_error():
    truth, found = random_dataset(1)
    measured = evaluate(found, truth)
    with pytest.raises(InvalidArgumentError, match="different images"):
        compare(measured, evaluate({1: detections([], [], [])}, content([1], [])))
    with pytest.raises(InvalidArgumentError, match="different classes"):
        compare(measured, evaluate(found, truth, classes=["dog"]))
    fewer = {**truth, "annotations": truth["annotations"][1:]}
    with pytest.raises(InvalidArgumentError, match="different annotations"):
        compare(measured, evaluate(found, fewer))
    for wrong in ({"resamples": 0}, {"resamples": 10.5}, {"confidence": 1.0}, {"seed": -1}, {"seed": 1.5}):
        with pytest.raises(InvalidArgumentError, match="they must be at least 1"):
            compare(measured, measured, **wrong)


def test_tables_are_plain_text_in_columns():
    truth = content([1, 2], [annotation(1, 1, "dog", BOX)])
    measured = evaluate({1: detections([BOX], [0.9], [1]), 2: detections([], [], [])}, truth, classes=["dog"])
    over_all, classes, differences, *_ = tables(measured, compare(measured, measured, resamples=20))
    assert str(over_all).splitlines()[:3] == ["all classes, 2 images", "         box    mask", "AP    1.0000  1.0000"]
    assert str(classes) == (
        "box, by class\nclass      AP    AP50    AP75      AR  instances\ndog    1.0000  1.0000  1.0000  1.0000          1"
    )
    assert str(differences).splitlines()[:2] == [
        "box, difference", "          difference  95% from       to  clear"
    ]  # fmt: skip
