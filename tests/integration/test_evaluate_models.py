"""evaluate on what models of each task really give: against their own findings as the ground truth they are perfect."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from bentoml_detectron import evaluate
from bentoml_detectron.artifact import config
from bentoml_detectron.artifact.manifest import Dataset
from bentoml_detectron.predictor import Predictor
from support import built, picture
from zoo import ZOO, zoo_config

pytestmark = pytest.mark.slow
PICTURES = {seed: picture(seed=seed) for seed in range(1, 4)}


def found_by(name, **names):
    """What a narrow model of the zoo finds, by image id; its three best detections, if there are any."""
    cfg = zoo_config(ZOO[name])
    predictor = Predictor(built(cfg), config.input_of(cfg), Dataset(name="things", **names), batch="exact")
    found = predictor(list(PICTURES.values()), top_k=3)
    return dict(zip(PICTURES, found, strict=True))


def images():
    return [{"id": each, "file_name": f"{each}.png", "height": 64, "width": 80} for each in PICTURES]


def test_keypoints_of_a_model():
    found = found_by("Keypoint R-CNN", thing_classes=["person"])
    annotations = []
    for image_id, each in found.items():
        for row in each.to_coco(image_id):
            points = np.array(row["keypoints"]).reshape(17, 3)
            points[:, 2] = 2
            annotations.append({
                "id": len(annotations), "image_id": image_id, "category_id": 1, "bbox": row["bbox"], "iscrowd": 0,
                "area": row["bbox"][2] * row["bbox"][3], "keypoints": points.ravel().tolist(),
            })  # fmt: skip
    assert annotations
    truth = {"images": images(), "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    tasks = evaluate(found, truth, thing_classes=["person"]).tasks
    assert {name: task.metrics["AP"] for name, task in tasks.items()} == {"box": pytest.approx(1), "keypoint": pytest.approx(1)}


def test_panoptic_segments_of_a_model(tmp_path):
    things, stuff = [f"thing {n}" for n in range(80)], ["things", *(f"stuff {n}" for n in range(1, 54))]
    found = found_by("Panoptic FPN", thing_classes=things, stuff_classes=stuff)
    ids = {name: 7 + 2 * place for place, name in enumerate([*things, *stuff[1:]])}
    annotations = []
    for image_id, each in found.items():
        (tmp_path / f"{image_id}.png").write_bytes(each.panoptic.to_png())
        segments = [{"id": segment.id, "category_id": ids[segment.class_name]} for segment in each.panoptic.segments]
        annotations.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": segments})
    assert sum(len(each["segments_info"]) for each in annotations) > 0
    categories = [{"id": number, "name": name, "isthing": int(name in things)} for name, number in ids.items()]
    file = tmp_path / "panoptic.json"
    file.write_text(json.dumps({"images": images(), "annotations": annotations, "categories": categories}))
    measured = evaluate(found, file, thing_classes=things, stuff_classes=stuff, panoptic_root=tmp_path)
    assert measured.tasks["panoptic"].metrics["PQ"] == 1
    assert measured.notes == ()


def test_a_semantic_map_of_a_model(tmp_path):
    stuff = ["things", *(f"stuff {n}" for n in range(1, 54))]
    found = found_by("Semantic FPN", stuff_classes=stuff)
    for image_id, each in found.items():
        Image.fromarray(each.semantic).save(tmp_path / f"{image_id}.png")
    task = evaluate({str(key): each for key, each in found.items()}, tmp_path, stuff_classes=stuff).tasks["semantic"]
    assert task.metrics == {"mIoU": 1, "mACC": 1}
    assert sum(task.counts) == 3 * 64 * 80


def test_mean_iou_is_that_of_detectron2s_evaluator(tmp_path, monkeypatch):
    import torch
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.evaluation import SemSegEvaluator

    for name, kind in (("int", int), ("float", float)):  # which Detectron2 0.6 still uses
        monkeypatch.setattr(np, name, kind, raising=False)
    stuff = ["things", *(f"stuff {n}" for n in range(1, 54))]
    found = found_by("Semantic FPN", stuff_classes=stuff)
    rng = np.random.default_rng(0)
    (tmp_path / "maps").mkdir()
    for image_id, each in found.items():
        noise = np.where(rng.random((64, 80)) < 0.1, 255, rng.integers(0, 54, (64, 80)))
        due = np.where(rng.random((64, 80)) < 0.6, each.semantic, noise).astype(np.uint8)
        Image.fromarray(due).save(tmp_path / "maps" / f"{image_id}.png")
    rows = [{"file_name": f"{each}.jpg", "sem_seg_file_name": str(tmp_path / "maps" / f"{each}.png")} for each in found]
    DatasetCatalog.register("maps", lambda: rows)
    MetadataCatalog.get("maps").set(stuff_classes=stuff, ignore_label=255)
    try:
        evaluator = SemSegEvaluator("maps", distributed=False)
        evaluator.reset()
        for row, each in zip(rows, found.values(), strict=True):
            logits = torch.nn.functional.one_hot(torch.tensor(each.semantic.astype(np.int64)), 54).permute(2, 0, 1)
            evaluator.process([row], [{"sem_seg": logits}])
        due = evaluator.evaluate()["sem_seg"]
    finally:
        DatasetCatalog.remove("maps")
        MetadataCatalog.remove("maps")
    task = evaluate({str(key): each for key, each in found.items()}, tmp_path / "maps", stuff_classes=stuff).tasks["semantic"]
    assert 0.1 < 100 * task.metrics["mIoU"] < 90
    assert 100 * task.metrics["mIoU"] == pytest.approx(due["mIoU"])
    assert 100 * task.metrics["mACC"] == pytest.approx(due["mACC"])
