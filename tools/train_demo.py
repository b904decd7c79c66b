"""Train the demo model: a small Mask R-CNN that finds and segments handwritten digits.

Nothing is downloaded. The digits are scikit-learn's (1,797 real handwritten digits of 8x8 pixels, from the UCI repository); the
images are composed of them at different sizes, rotations and overlaps, on plain, striped, noisy and photographic backgrounds.
Test images use digits and parts of photographs that no training image uses. The trainer is Detectron2's own.

Usage::

    python tools/train_demo.py                    # train, evaluate on 200 held-out images, write the package data
    python tools/train_demo.py --eval-only        # evaluate the shipped weights
    python tools/train_demo.py --max-iter 20 --output /tmp/a    # a short run, to compare two runs' digests

The run is deterministic for one version of PyTorch and one number of threads (two): it prints the SHA-256 of the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.structures import BitMasks, Boxes, Instances
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.datasets import load_digits, load_sample_image

SIZE = 192  # height and width of a composed image, in pixels
TEST_DIGITS = 360  # the last digits of the dataset, for test images only
TEST_IMAGES = 200
SHIPPED_IMAGES = 20
TEST_SEED = 1_000_000_000  # training images are seeded from 0 upwards
CLASSES = [str(digit) for digit in range(10)]
DEMO = Path(__file__).resolve().parent.parent / "src" / "bentoml_detectron" / "demo"


def demo_config() -> CfgNode:
    """A Mask R-CNN with FPN as in Detectron2's zoo, everything narrower."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 32
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 40
    cfg.MODEL.FPN.NORM = "BN"
    cfg.MODEL.PIXEL_MEAN = [127.5, 127.5, 127.5]
    cfg.MODEL.PIXEL_STD = [64.0, 64.0, 64.0]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 64
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = 300
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 200
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 150
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 100
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(CLASSES)
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 48
    cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 0.33
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.05
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 104
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 2
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 32
    cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
    cfg.INPUT.FORMAT = "BGR"
    cfg.INPUT.MIN_SIZE_TEST = SIZE
    cfg.INPUT.MAX_SIZE_TEST = 2 * SIZE
    cfg.DATASETS.TRAIN = ("handwritten_digits_train",)
    cfg.DATASETS.TEST = ("handwritten_digits",)
    cfg.TEST.DETECTIONS_PER_IMAGE = 50
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.SOLVER.IMS_PER_BATCH = 8
    cfg.SOLVER.BASE_LR = 0.04
    cfg.SOLVER.MAX_ITER = 4400
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    cfg.SOLVER.WARMUP_ITERS = 200
    cfg.SOLVER.WEIGHT_DECAY = 1e-4
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 5.0
    cfg.SOLVER.CHECKPOINT_PERIOD = 10**9
    cfg.SEED = 2
    return cfg


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return data.images.astype(np.float32) / 16.0, data.target.astype(np.int64)


@cache
def photographs() -> list[np.ndarray]:
    return [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]


def background(rng: np.random.Generator, test: bool) -> np.ndarray:
    """An (SIZE, SIZE, 3) float32 picture without digits; tests use the photographs' right thirds, training the rest."""
    kind = rng.integers(5)
    if kind == 0:
        photograph = photographs()[rng.integers(2)]
        border = photograph.shape[1] * 2 // 3
        photograph = photograph[:, border:] if test else photograph[:, :border]
        y, x = (rng.integers(0, side - SIZE + 1) for side in photograph.shape[:2])
        return photograph[y : y + SIZE, x : x + SIZE].astype(np.float32)
    first, second = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    if kind == 1:  # plain
        weight = np.zeros_like(x)
    elif kind == 2:  # gradient
        weight = (along - along.min()) / np.ptp(along)
    elif kind == 3:  # stripes
        weight = 0.5 + 0.5 * np.sin(along * rng.uniform(20, 90))
        second = first + (second - first) * 0.35
    else:  # clouds
        coarse = rng.uniform(0, 1, (rng.integers(3, 12),) * 2).astype(np.float32)
        weight = np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        second = first + (second - first) * 0.6
    return first + (second - first) * weight[..., None]


def compose(seed: int, test: bool = False) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """One image and its digits.

    Args:
        seed: Determines everything about the image.
        test: Whether to take the digits and photographs that are kept from training.

    Returns:
        The image, (SIZE, SIZE, 3) uint8 in BGR, and for each digit that is still visible its class and its visible pixels,
        (SIZE, SIZE) bool.
    """
    rng = np.random.default_rng(seed)
    glyphs, targets = digits()
    pool = range(len(glyphs) - TEST_DIGITS, len(glyphs)) if test else range(len(glyphs) - TEST_DIGITS)
    image = background(rng, test)
    full: list[np.ndarray] = []
    labels: list[int] = []
    for _ in range(rng.integers(2, 9)):
        index = int(rng.choice(pool))
        side = int(rng.uniform(22, 80))
        glyph = Image.fromarray(np.pad(glyphs[index], 1)).resize((side, side), Image.Resampling.BICUBIC)
        glyph = glyph.rotate(rng.uniform(-30, 30), Image.Resampling.BILINEAR, expand=True)
        alpha = np.clip((np.asarray(glyph) - 0.2) / 0.3, 0, 1)
        height, width = alpha.shape
        y, x = int(rng.integers(0, SIZE - height + 1)), int(rng.integers(0, SIZE - width + 1))
        mask = np.zeros((SIZE, SIZE), bool)
        mask[y : y + height, x : x + width] = alpha > 0.5
        if any((mask & other).sum() > 0.15 * min(mask.sum(), other.sum()) for other in full):
            continue
        window = image[y : y + height, x : x + width]
        around = window.reshape(-1, 3).mean(0)
        for _ in range(20):
            colour = rng.uniform(0, 255, 3).astype(np.float32)
            if np.abs(colour - around).mean() > 70:
                break
        image[y : y + height, x : x + width] = window + (colour - window) * alpha[..., None]
        full.append(mask)
        labels.append(int(targets[index]))
    image += rng.normal(0, rng.uniform(0, 10), image.shape).astype(np.float32)
    covered = np.zeros((SIZE, SIZE), bool)
    visible: list[tuple[int, np.ndarray]] = []
    for label, mask in zip(reversed(labels), reversed(full), strict=True):  # later digits lie on top
        visible.append((label, mask & ~covered))
        covered |= mask
    return np.clip(image, 0, 255).astype(np.uint8), visible[::-1]


def box_of(mask: np.ndarray) -> list[float]:
    """The tight XYXY box of a mask, in pixels."""
    ys, xs = np.nonzero(mask)
    return [float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)]


def training_example(record: dict[str, Any]) -> dict[str, Any]:
    image, visible = compose(record["image_id"])
    instances = Instances((SIZE, SIZE))
    instances.gt_boxes = Boxes(torch.tensor([box_of(mask) for _, mask in visible]).reshape(-1, 4))
    instances.gt_classes = torch.tensor([label for label, _ in visible], dtype=torch.int64)
    instances.gt_masks = BitMasks(torch.from_numpy(np.stack([mask for _, mask in visible])))
    return {**record, "image": torch.from_numpy(image.transpose(2, 0, 1).copy()), "instances": instances}


class DemoTrainer(DefaultTrainer):  # type: ignore[misc]
    """Detectron2's trainer over composed images; each is seen once."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        records = [
            {"image_id": seed, "height": SIZE, "width": SIZE} for seed in range(cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH)
        ]
        return build_detection_train_loader(
            records, mapper=training_example, total_batch_size=cfg.SOLVER.IMS_PER_BATCH, num_workers=0,
            aspect_ratio_grouping=False,
        )  # fmt: skip


def train(cfg: CfgNode, output: Path) -> Path:
    cfg = cfg.clone()
    cfg.DATASETS.TEST = ()  # evaluated afterwards
    cfg.OUTPUT_DIR = str(output)
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.SEED)
    np.random.seed(cfg.SEED)
    trainer = DemoTrainer(cfg)
    trainer.train()
    weights = output / "weights.pth"
    # Batch counters serve training alone.
    state = {k: v for k, v in trainer.model.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({"model": state}, weights)
    return weights


def digest(weights: Path) -> str:
    """SHA-256 over the names and values of the weights (a file's own digest would depend on its name)."""
    state = torch.load(weights, weights_only=True)["model"]
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(name.encode())
        sha.update(state[name].contiguous().numpy().tobytes())
    return sha.hexdigest()


def test_images(count: int) -> Iterator[tuple[str, np.ndarray, list[tuple[int, np.ndarray]]]]:
    for index in range(count):
        yield (f"digits_{index:02d}.jpg", *compose(TEST_SEED + index, test=True))


def coco_dataset(count: int) -> dict[str, Any]:
    """The first `count` test images as a COCO dataset; category ids are 1 to 10, as COCO counts from one."""
    images, annotations = [], []
    for image_id, (name, _, visible) in enumerate(test_images(count), start=1):
        images.append({"id": image_id, "file_name": name, "height": SIZE, "width": SIZE})
        for label, mask in visible:
            rle = coco_mask.encode(np.asfortranarray(mask))
            x0, y0, x1, y1 = box_of(mask)
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image_id, "category_id": label + 1, "iscrowd": 0,
                    "area": float(mask.sum()), "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": {"size": [SIZE, SIZE], "counts": rle["counts"].decode("ascii")},
                }
            )  # fmt: skip
    return {
        "info": {"description": "Composed of handwritten digits that training never saw; by tools/train_demo.py"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name, "supercategory": "digit"} for i, name in enumerate(CLASSES)],
    }


def evaluate(predict: Callable[[np.ndarray], dict[str, Instances]], count: int = TEST_IMAGES) -> dict[str, np.ndarray]:
    """COCO metrics on the first `count` test images: {"box": (12,), "mask": (12,)} as pycocotools' `stats`, in [0, 1]."""
    ground_truth = COCO()
    ground_truth.dataset = coco_dataset(count)
    ground_truth.createIndex()
    results = []
    for image_id, (_, image, _) in enumerate(test_images(count), start=1):
        instances = predict(image)["instances"].to("cpu")
        for box, score, label, mask in zip(
            instances.pred_boxes.tensor.tolist(), instances.scores.tolist(), instances.pred_classes.tolist(),
            instances.pred_masks.numpy(), strict=True,
        ):  # fmt: skip
            rle = coco_mask.encode(np.asfortranarray(mask))
            results.append(
                {
                    "image_id": image_id, "category_id": label + 1, "score": score,
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]], "segmentation": rle,
                }
            )  # fmt: skip
    stats = {}
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        stats[name] = evaluation.stats
    return stats


def print_table(stats: dict[str, np.ndarray]) -> None:
    print("| | AP | AP50 | AP75 |\n|---|---|---|---|")
    for name, values in stats.items():
        print(f"| {name} | {values[0]:.3f} | {values[1]:.3f} | {values[2]:.3f} |")


def write_package_data(cfg: CfgNode) -> None:
    """Writes the configuration, the shipped images and their annotations beside the weights."""
    clean = cfg.clone()
    clean.MODEL.WEIGHTS = ""
    clean.OUTPUT_DIR = "./output"
    (DEMO / "config.yaml").write_text(clean.dump())
    (DEMO / "images").mkdir(exist_ok=True)
    for name, image, _ in test_images(SHIPPED_IMAGES):
        Image.fromarray(image[:, :, ::-1]).save(DEMO / "images" / name, quality=92)
    (DEMO / "annotations.json").write_text(json.dumps(coco_dataset(SHIPPED_IMAGES), separators=(",", ":")) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval-only", action="store_true", help="evaluate the shipped weights")
    parser.add_argument("--max-iter", type=int, help="train for so many iterations and write to --output alone")
    parser.add_argument("--output", type=Path, default=Path("output"), help="where a run keeps its files")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    DatasetCatalog.register("handwritten_digits_train", list)
    MetadataCatalog.get("handwritten_digits").set(thing_classes=CLASSES)
    cfg = demo_config()
    if arguments.max_iter:
        cfg.SOLVER.MAX_ITER = arguments.max_iter
    start = time.perf_counter()
    weights = DEMO / "weights.pth"
    if not arguments.eval_only:
        weights = train(cfg, arguments.output)
        print(f"trained for {cfg.SOLVER.MAX_ITER} iterations in {(time.perf_counter() - start) / 60:.1f} minutes")
        if not arguments.max_iter:
            (DEMO / "weights.pth").write_bytes(weights.read_bytes())
            write_package_data(cfg)
    print(f"weights: {weights.stat().st_size / 1e6:.2f} MB, SHA-256 of names and values {digest(weights)}")
    if not arguments.max_iter:
        cfg.MODEL.WEIGHTS = str(weights)
        print_table(evaluate(DefaultPredictor(cfg)))


if __name__ == "__main__":
    main()
