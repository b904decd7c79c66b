"""Results in COCO's formats: the same as Detectron2's own writer gives, and the same average precision."""

from __future__ import annotations

import contextlib
import copy
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bentoml_detectron import demo, masks
from bentoml_detectron.artifact.manifest import Dataset, Input
from bentoml_detectron.predictor import Predictor
from bentoml_detectron.results import Detections, PanopticSegmentation, Segment
from support import assert_same

pytestmark = pytest.mark.slow

DATASET = "the_demos_ground_truth"
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def stats(ground_truth, results, kind):
    """COCOeval's numbers, with areas of masks from the masks, as Detectron2's COCOEvaluator does it."""
    results = copy.deepcopy(results)
    if kind == "segm":
        for each in results:
            del each["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = ground_truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.fixture(scope="module")
def of_default_predictor(demo_predictor):
    """The demo's images by their id in the ground truth, as arrays, and what DefaultPredictor finds on each."""
    ids = {each["file_name"]: each["id"] for each in demo.ground_truth()["images"]}
    images = {ids[path.name]: np.asarray(Image.open(path).convert("RGB"))[:, :, ::-1].copy() for path in demo.images()}
    return images, {each: demo_predictor(image)["instances"] for each, image in images.items()}


@pytest.fixture(scope="module")
def ours(demo_predictor, of_default_predictor):
    """`Detections` of each image, by its id, of a model that knows the dataset's category ids."""
    dataset = Dataset(
        name=DATASET, thing_classes=list(demo.CLASSES), thing_dataset_id_to_contiguous_id={i + 1: i for i in range(10)}
    )
    cfg = demo_predictor.cfg
    image_input = Input(format=cfg.INPUT.FORMAT, min_size_test=cfg.INPUT.MIN_SIZE_TEST, max_size_test=cfg.INPUT.MAX_SIZE_TEST)
    predictor = Predictor(demo_predictor.model, image_input, dataset, batch="exact")
    images = of_default_predictor[0]
    return dict(zip(images, predictor(list(images.values())), strict=True))


@pytest.fixture(scope="module")
def of_evaluator(of_default_predictor, tmp_path_factory):
    """What COCOEvaluator makes of DefaultPredictor's results: its metrics, and the results that it evaluates."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances
    from detectron2.evaluation import COCOEvaluator

    folder = tmp_path_factory.mktemp("coco")
    annotations = folder / "annotations.json"
    annotations.write_text(json.dumps(demo.ground_truth()))
    register_coco_instances(DATASET, {}, str(annotations), str(demo.images()[0].parent))
    try:
        DatasetCatalog.get(DATASET)  # fills in the category ids
        evaluator = COCOEvaluator(DATASET, distributed=False, output_dir=str(folder), use_fast_impl=False)
        evaluator.reset()
        for image_id, instances in of_default_predictor[1].items():
            evaluator.process([{"image_id": image_id}], [{"instances": instances}])
        metrics = evaluator.evaluate()
    finally:
        DatasetCatalog.remove(DATASET)
        MetadataCatalog.remove(DATASET)
    return metrics, json.loads((folder / "coco_instances_results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_average_precision_is_that_of_detectron2s_evaluator(kind, ours, of_evaluator):
    metrics, its_results = of_evaluator
    results = [each for image_id, one in ours.items() for each in one.to_coco(image_id)]
    found = stats(demo.ground_truth(), results, kind)
    assert 0.3 < found[0] < 1
    assert found * 100 == pytest.approx(stats(demo.ground_truth(), its_results, kind) * 100, abs=5e-5)
    due = [metrics[kind][name] for name in METRICS]
    assert np.where(found[:6] < 0, np.nan, found[:6] * 100) == pytest.approx(due, abs=5e-5, nan_ok=True)


@pytest.mark.slow
def test_results_are_those_of_detectron2_field_for_field_with_the_datasets_categories(ours, of_evaluator):
    results = [each for image_id, one in ours.items() for each in one.to_coco(image_id)]
    assert results == of_evaluator[1]
    assert {each["category_id"] for each in results} <= set(range(1, 11))


@pytest.mark.slow
def test_instances_are_those_of_default_predictor(ours, of_default_predictor):
    for image_id, instances in of_default_predictor[1].items():
        assert_same({"instances": ours[image_id].to_instances()}, {"instances": instances})
        assert ours[image_id].to_instances().image_size == instances.image_size


def random_instances(count=5, size=(60, 80), keypoints=17, seed=0):
    """A model's output with every field, and the same as `Detections`."""
    from detectron2.structures import Boxes, Instances

    rng = np.random.default_rng(seed)
    corner, side = rng.uniform(0, 40, (count, 2)), rng.uniform(5, 30, (count, 2))
    boxes = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
    scores = np.sort(rng.random(count, dtype=np.float32))[::-1].copy()
    points = np.concatenate(
        [corner[:, None] + side[:, None] * rng.random((count, keypoints, 2)), rng.random((count, keypoints, 1))], axis=2
    ).astype(np.float32)
    bitmaps = rng.random((count, *size)) > 0.5
    classes = np.zeros(count, np.int64)
    instances = Instances(size, pred_boxes=Boxes(torch.tensor(boxes)), scores=torch.tensor(scores))
    instances.pred_classes, instances.pred_masks = torch.tensor(classes), torch.tensor(bitmaps)
    instances.pred_keypoints = torch.tensor(points)
    rles = [masks.encode(bitmap) for bitmap in bitmaps]
    return instances, Detections(size, boxes, scores, classes, ("person",) * count, rles, points)


def test_results_are_those_of_instances_to_coco_json_field_for_field():
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json

    instances, one = random_instances()
    before = one.keypoints.copy()
    results = one.to_coco(7)
    assert results == instances_to_coco_json(one.to_instances(), 7) == instances_to_coco_json(instances, 7)
    assert np.array_equal(one.keypoints, before)
    assert json.loads(json.dumps(results)) == results


def test_keypoints_are_shifted_by_half_a_pixel():
    _, one = random_instances()
    shifted = np.array([each["keypoints"] for each in one.to_coco(1)]).reshape(5, 17, 3)
    assert shifted == pytest.approx(one.keypoints - [0.5, 0.5, 0], abs=1e-5)


def test_without_the_datasets_ids_categories_are_the_contiguous_ones():
    one = Detections((4, 5), np.zeros((2, 4)), [1, 0.5], [3, 0], ("", ""))
    assert [each["category_id"] for each in one.to_coco(1)] == [3, 0]


@pytest.mark.parametrize("count", [0, 1])
def test_a_model_of_one_class_has_its_datasets_id(count):
    one = Detections((4, 5), np.zeros((count, 4)), [1.0] * count, [0] * count, ("a",) * count, category_ids=[7] * count)
    assert [each["category_id"] for each in one.to_coco(1)] == [7] * count


def test_rotated_boxes_stay_as_they_are_as_in_detectron2s_rotated_evaluator():
    from detectron2.evaluation import RotatedCOCOEvaluator

    one = Detections((60, 80), [[10, 20, 8, 4, 30], [5, 5, 3, 3, -100]], [1, 0.5], [0, 1], ("", ""))
    assert one.to_coco(3) == RotatedCOCOEvaluator.instances_to_json(None, one.to_instances(), 3)


def test_what_is_written_shares_nothing_with_the_detections():
    _, one = random_instances()
    one.to_coco(1)[0]["segmentation"]["size"].clear()
    assert one.masks[0]["size"] == [60, 80]


def test_average_precision_of_keypoints_is_that_of_detectron2s_evaluator(tmp_path):
    from detectron2.data import MetadataCatalog
    from detectron2.evaluation import COCOEvaluator

    found = {image_id: random_instances(seed=image_id) for image_id in range(1, 9)}
    rng = np.random.default_rng(0)
    annotations = []
    for image_id, (_, one) in found.items():
        for each in one.to_coco(image_id)[:-1]:
            points = np.array(each["keypoints"]).reshape(17, 3)
            points[:, :2] += rng.normal(0, rng.uniform(0, 8), (17, 2))
            points[:, 2] = rng.integers(0, 3, 17)
            annotations.append({
                "id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0, "bbox": each["bbox"],
                "area": each["bbox"][2] * each["bbox"][3] * 30, "keypoints": points.ravel().tolist(),
                "num_keypoints": int((points[:, 2] > 0).sum()),
            })  # fmt: skip
    ground_truth = {
        "info": {}, "images": [{"id": each, "height": 60, "width": 80} for each in found], "annotations": annotations,
        "categories": [{"id": 1, "name": "person"}],
    }  # fmt: skip
    (tmp_path / "people.json").write_text(json.dumps(ground_truth))
    MetadataCatalog.get("people").set(
        json_file=str(tmp_path / "people.json"), thing_dataset_id_to_contiguous_id={1: 0}, thing_classes=["person"]
    )
    try:
        evaluator = COCOEvaluator("people", ["keypoints"], distributed=False, use_fast_impl=False)
        evaluator.reset()
        for image_id, (instances, _) in found.items():
            evaluator.process([{"image_id": image_id}], [{"instances": instances}])
        due = evaluator.evaluate()["keypoints"]
    finally:
        MetadataCatalog.remove("people")
    results = [{**each, "category_id": 1} for image_id, (_, one) in found.items() for each in one.to_coco(image_id)]
    numbers = stats(ground_truth, results, "keypoints")
    assert 0.1 < numbers[0] < 0.95
    assert np.where(numbers[:5] < 0, np.nan, numbers[:5] * 100) == pytest.approx(
        [due[name] for name in ("AP", "AP50", "AP75", "APm", "APl")], abs=5e-5, nan_ok=True
    )


def panoptic():
    ids = np.zeros((4, 6), np.int32)
    ids[:2], ids[3] = 1 + 256 * 2 + 65536 * 3, 255
    return PanopticSegmentation(
        ids,
        (Segment(1 + 256 * 2 + 65536 * 3, 0, "cat", True, 12, 0.9, 17, 0), Segment(255, 4, "sky", False, 6)),
    )


def test_a_panoptic_png_is_read_by_cocos_rule():
    """panopticapi's rgb2id: red + 256 green + 65536 blue."""
    pixels = np.asarray(Image.open(io.BytesIO(panoptic().to_png()))).astype(np.int64)
    assert pixels.shape == (4, 6, 3)
    assert np.array_equal(pixels @ [1, 256, 65536], panoptic().ids)


def test_segments_info_has_cocos_keys_and_ids():
    assert panoptic().segments_info() == [
        {"id": 197121, "category_id": 17, "isthing": 1, "area": 12, "score": 0.9},
        {"id": 255, "category_id": 4, "isthing": 0, "area": 6},
    ]
    assert json.loads(json.dumps(panoptic().segments_info())) == panoptic().segments_info()


def test_each_segments_pixels_are_its_area():
    pixels = np.asarray(Image.open(io.BytesIO(panoptic().to_png()))).astype(np.int64) @ [1, 256, 65536]
    assert {each["id"]: int((pixels == each["id"]).sum()) for each in panoptic().segments_info()} == {197121: 12, 255: 6}
