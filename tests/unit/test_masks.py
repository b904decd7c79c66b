"""Masks as run lengths: the same as pasting with Detectron2 and encoding with pycocotools, and nothing else is read."""

from __future__ import annotations

import sys

import numpy as np
import pycocotools.mask
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bentoml_detectron import masks
from bentoml_detectron.errors import InvalidArgumentError
from support import run_python

BITMAPS = st.tuples(st.integers(1, 40), st.integers(1, 40)).flatmap(lambda shape: arrays.arrays(np.bool_, shape))
SOLID = [np.full(shape, value) for shape in ((1, 1), (1, 7), (7, 1), (5, 3), (300, 200)) for value in (False, True)]


def coco(bitmap):
    """pycocotools' RLE, with its counts as str."""
    rle = pycocotools.mask.encode(np.asfortranarray(bitmap.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def pasted(soft, boxes, image_size, threshold=0.5):
    """Detectron2's bitmaps, one at a time; empty where it raises because the box is outside the image."""
    from detectron2.layers.mask_ops import paste_masks_in_image

    for mask, box in zip(soft, boxes, strict=True):
        try:
            yield paste_masks_in_image(mask[None], box[None], image_size, threshold)[0].numpy()
        except RuntimeError as exc:
            if "inconsistent with step sign" not in str(exc):
                raise
            yield np.zeros(image_size, np.bool_)


def soft_masks(rng, kind, count, side, threshold):
    """Masks (count, side, side) float32 of one kind."""
    noise = rng.random((count, side, side), dtype=np.float32)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    height = rng.random((count, 1, 1)) - x**2 - y**2
    return {
        "smooth": 1 / (1 + np.exp(-8 * height)),
        "saturated": np.clip(0.5 + 20 * height, 0, 1),
        "binary": noise > 0.5,
        "noise": noise,
        "constant": np.full_like(noise, threshold),
        "at the threshold": np.where(noise > 0.7, np.float32(threshold), noise),
        "quarters": np.round(noise * 4) / 4,
    }[kind].astype(np.float32)


def boxes_around(rng, count, height, width):
    """Boxes from far below a pixel to three times the image, in it, across its border and outside, some without an inside."""
    centres = rng.uniform(-0.2, 1.2, (count, 2)) * (width, height)
    sides = np.exp(rng.uniform(-3, np.log(3 * max(height, width)), (count, 2)))
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
    boxes = np.where(rng.random((count, 1)) < 0.3, np.round(boxes), boxes)
    boxes = np.where(rng.random((count, 1)) < 0.05, boxes[:, [0, 1, 0, 3]], boxes)
    return np.where(rng.random((count, 1)) < 0.05, boxes[:, [2, 1, 0, 3]], boxes).astype(np.float32)


def compare_random_masks(seed, count, largest):
    """Compares that many masks with Detectron2's and pycocotools'; returns how many pixels were on."""
    rng, pixels = np.random.default_rng(seed), 0
    kinds = ["smooth", "saturated", "binary", "noise", "constant", "at the threshold", "quarters"]
    for turn in range(count // 10):
        height, width = (int(np.exp(rng.uniform(0, np.log(side)))) for side in largest)
        side, threshold = int(rng.choice([7, 14, 28, 56])), float(rng.choice([0.5, 0.5, 0.5, 0.3, 1.0, 0.0]))
        kind = kinds[turn % len(kinds)]
        soft = torch.tensor(soft_masks(rng, kind, 10, side, threshold))
        boxes = torch.tensor(boxes_around(rng, 10, height, width))
        rles = masks.from_roi_masks(soft, boxes, (height, width), threshold)
        for rle, bitmap in zip(rles, pasted(soft, boxes, (height, width), threshold), strict=True):
            assert rle == coco(bitmap), (kind, side, height, width, threshold)
            pixels += int(bitmap.sum())
    return pixels


def test_300_masks_equal_pasting_and_encoding():
    assert compare_random_masks(1, 300, (300, 400)) > 0


@pytest.mark.slow
def test_10_000_masks_equal_pasting_and_encoding():
    assert compare_random_masks(2, 10_000, (600, 800)) > 0


@pytest.mark.parametrize("side", [1, 2, 112, 224])
def test_masks_of_unusual_sides_equal_pasting_and_encoding(side):
    rng = np.random.default_rng(side)
    soft = torch.tensor(soft_masks(rng, "smooth" if side > 2 else "noise", 6, side, 0.5))
    boxes = torch.tensor(boxes_around(rng, 6, 400, 500))
    assert masks.from_roi_masks(soft, boxes, (400, 500)) == [coco(bitmap) for bitmap in pasted(soft, boxes, (400, 500))]


def test_a_mask_worked_on_in_many_blocks_is_put_together(monkeypatch):
    rng = np.random.default_rng(5)
    soft = torch.tensor(np.concatenate([soft_masks(rng, kind, 2, 14, 0.5) for kind in ("noise", "constant", "smooth")]))
    boxes = torch.tensor([[3.3, 4.4, 90.9, 140.1]]).repeat(6, 1)
    monkeypatch.setattr(masks, "_BLOCK", 100)
    assert masks.from_roi_masks(soft, boxes, (150, 100)) == [coco(bitmap) for bitmap in pasted(soft, boxes, (150, 100))]


def test_many_masks_in_one_call_are_kept_apart(monkeypatch):
    """Some are on in the last pixel, and the next in the first; some have no pixel; some are strange."""
    rng = np.random.default_rng(3)
    soft = np.concatenate([soft_masks(rng, kind, 30, 14, 0.5) for kind in ("smooth", "noise", "constant")])
    boxes = boxes_around(rng, 90, 60, 70)
    soft[::9], boxes[::9] = 1, (-30, -30, 100, 90)
    soft[4], boxes[7] = np.nan, (500, 5, 600, 9)
    order = np.append(rng.permutation(90), [0, 9, 18])
    soft, boxes = torch.tensor(soft[order]), torch.tensor(boxes[order])
    due = [coco(bitmap) for bitmap in pasted(soft, boxes, (60, 70))]
    for block in (masks._BLOCK, 1000):
        monkeypatch.setattr(masks, "_BLOCK", block)
        assert masks.from_roi_masks(soft, boxes, (60, 70)) == due


def test_a_pixel_is_sampled_alike_wherever_it_is():
    """What `from_roi_masks` relies on where it samples only some columns."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(1, 1, 28, 28, generator=generator)
    grid = torch.rand(1, 61, 47, 2, generator=generator) * 2.4 - 1.2
    whole = torch.nn.functional.grid_sample(mask, grid, align_corners=False)[0, 0].ravel()
    order = torch.randperm(len(whole), generator=generator)
    for length in [*range(1, 70), len(whole)]:
        part = grid.reshape(-1, 2)[order[:length]].reshape(1, length, 1, 2)
        assert torch.equal(torch.nn.functional.grid_sample(mask, part, align_corners=False).ravel(), whole[order[:length]])


def test_values_that_rounding_decides_are_sampled(monkeypatch):
    """Without sampling, this mask comes out differently."""
    soft, boxes = torch.full((1, 28, 28), 0.3), torch.tensor([[3.7, 2.2, 61.3, 49.6]])
    due = [coco(bitmap) for bitmap in pasted(soft, boxes, (60, 70), 0.3)]
    assert masks.from_roi_masks(soft, boxes, (60, 70), 0.3) == due
    nothing = np.empty(0, np.int64)
    monkeypatch.setattr(masks, "_sampled", lambda *args: (nothing, nothing))
    assert masks.from_roi_masks(soft, boxes, (60, 70), 0.3) != due


def test_smooth_masks_are_hardly_sampled(monkeypatch):
    """Otherwise the result would be right, and slow."""
    soft = soft_masks(np.random.default_rng(0), "smooth", 20, 28, 0.5)
    boxes = np.tile(np.float32([10.3, 20.7, 410.9, 320.2]), (20, 1))
    sampled, sample = [], masks._sampled
    monkeypatch.setattr(masks, "_sampled", lambda mask, x, *rest: sampled.append(len(x)) or sample(mask, x, *rest))
    masks.from_roi_masks(soft, boxes, (400, 500))
    assert sum(sampled) < 0.03 * 20 * 400


@pytest.mark.parametrize(
    "change",
    [
        lambda soft: soft.numpy(),
        lambda soft: soft.half(),
        lambda soft: soft.bfloat16(),
        lambda soft: soft.double(),
        lambda soft: soft > 0.5,
        lambda soft: (soft > 0.5).to(torch.uint8),
        lambda soft: soft.transpose(1, 2),
        lambda soft: soft.repeat_interleave(2, 1)[:, ::2],
        lambda soft: soft.clone().requires_grad_(),
    ],
    ids=["ndarray", "half", "bfloat16", "double", "bool", "uint8", "transposed", "strided", "requires grad"],
)
def test_masks_of_other_types_and_layouts_are_taken_as_float32(change):
    rng = np.random.default_rng(0)
    soft = change(torch.tensor(soft_masks(rng, "noise", 5, 14, 0.5)))
    boxes = torch.tensor(boxes_around(rng, 5, 90, 80))
    plain = torch.as_tensor(soft).detach().float().contiguous()
    assert masks.from_roi_masks(soft, boxes, (90, 80)) == [coco(bitmap) for bitmap in pasted(plain, boxes, (90, 80))]


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf, -3.0])
@pytest.mark.filterwarnings("error:.*encountered:RuntimeWarning")
def test_strange_values_in_a_mask_are_sampled_as_pytorch_does(strange):
    soft = soft_masks(np.random.default_rng(0), "noise", 1, 14, 0.5)
    soft[0, 3:5, 6:9] = strange
    boxes = np.float32([[3, 2, 60, 50]])
    (bitmap,) = pasted(torch.tensor(soft), torch.tensor(boxes), (60, 70))
    assert masks.from_roi_masks(soft, boxes, (60, 70)) == [coco(bitmap)]


def test_read_only_arrays_are_taken_and_nothing_is_changed():
    soft, boxes = np.full((1, 7, 7), 0.5, np.float32), np.float32([[0, 0, 9, 9]])
    soft.flags.writeable = boxes.flags.writeable = False
    masks.from_roi_masks(soft, boxes, (10, 10))
    assert (soft == 0.5).all()


def test_no_masks_give_none():
    assert masks.from_roi_masks(torch.empty(0, 28, 28), torch.empty(0, 4), (10, 10)) == []


def test_boxes_outside_the_image_give_empty_masks():
    boxes = np.float32([[50, 5, 60, 9], [-60, 5, -50, 9], [5, 50, 9, 60], [5, -60, 9, -50], [1e30, 0, 2e30, 9]])
    rles = masks.from_roi_masks(np.ones((5, 7, 7), np.float32), boxes, (20, 30))
    assert rles == [coco(np.zeros((20, 30)))] * 5


GOOD = {
    "masks": np.zeros((2, 7, 7), np.float32), "boxes": np.zeros((2, 4), np.float32), "image_size": (9, 9), "threshold": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"masks": np.zeros((2, 1, 7, 7))}, r"\(2, 1, 7, 7\); give \(N, M, M\), such as masks\[:, 0\]"),
        ({"masks": np.zeros((2, 7, 8))}, r"masks have the shape \(2, 7, 8\)"),
        ({"masks": np.zeros((2, 0, 0))}, r"masks have the shape \(2, 0, 0\)"),
        ({"masks": [[[0.5]]]}, "masks must be a tensor or an array, not list"),
        ({"masks": np.array([[["a"]]])}, "masks must be float32, not <U1"),
        ({"boxes": np.zeros((3, 4))}, r"boxes have the shape \(3, 4\); give \(2, 4\)"),
        ({"boxes": np.array([[0, 0, 1, 1], [0, 0, np.nan, 1]])}, "box 1 is .*nan.*; remove boxes"),
        ({"boxes": np.array([[0, 0, np.inf, 1], [0, 0, 1, 1]])}, "box 0 is .*inf.*; remove boxes"),
        ({"image_size": (0, 9)}, "the size is 0 x 9; give 1 to"),
        ({"image_size": (20_000, 20_000)}, "the size is 20000 x 20000; give 1 to 268,435,456 pixels"),
        ({"image_size": (9, 9, 3)}, "give height and width"),
        ({"image_size": (9.0, 9)}, "as two integers"),
        ({"threshold": 1.5}, "threshold is 1.5; it must be a number from 0 to 1"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": "0.5"}, "threshold is '0.5'"),
    ],
)
def test_unfit_arguments_are_named(wrong, message):
    with pytest.raises(InvalidArgumentError, match=message):
        masks.from_roi_masks(**{**GOOD, **wrong})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_100_masks_at_3840_x_2160_take_less_than_64_mb():
    """Their bitmaps would take 829 MB. Masks all at the threshold, sampled everywhere, count too."""
    code = """
import pathlib
import numpy as np
from bentoml_detectron.masks import from_roi_masks

def kilobytes(field):
    return int(pathlib.Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

rng = np.random.default_rng(0)
soft = rng.random((100, 28, 28), dtype=np.float32)
soft[:3] = 0.5
corners = rng.uniform(0, (3840, 2160), (100, 2, 2))
boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
boxes[0] = 0, 0, 3840, 2160
from_roi_masks(soft[:1], boxes[:1] / 100, (30, 40))
pathlib.Path("/proc/self/clear_refs").write_text("5")
idle = kilobytes("VmRSS")
assert len(from_roi_masks(soft, boxes, (2160, 3840))) == 100
print((kilobytes("VmHWM") - idle) * 1024)
"""
    assert int(run_python(code).stdout) < 64e6


def test_importing_the_module_needs_no_pytorch():
    code = "import sys, bentoml_detectron.masks; print({'torch', 'pycocotools', 'detectron2'} & set(sys.modules))"
    assert run_python(code).stdout.strip() == "set()"


@settings(deadline=None)
@given(BITMAPS)
def test_encode_and_decode_equal_pycocotools(bitmap):
    rle = coco(bitmap)
    assert masks.encode(bitmap) == masks.encode(np.asfortranarray(bitmap)) == masks.encode(bitmap.astype(np.uint8)) == rle
    decoded = masks.decode(rle)
    assert decoded.dtype == np.bool_
    assert np.array_equal(decoded, bitmap)


@settings(deadline=None)
@given(BITMAPS, st.integers(0, 3))
def test_bitmaps_together_are_encoded_as_each_alone(bitmap, more):
    rng = np.random.default_rng(more)
    together = np.stack([bitmap, *(rng.random((more, *bitmap.shape)) < 0.5), ~bitmap])
    assert masks.from_bitmaps(torch.from_numpy(together)) == [masks.encode(each) for each in together]


def test_no_bitmaps_are_no_masks():
    assert masks.from_bitmaps(torch.zeros((0, 4, 5), dtype=torch.bool)) == []


@pytest.mark.parametrize("wrong", [torch.zeros(4, 5, dtype=torch.bool), torch.zeros(1, 4, 5)])
def test_bitmaps_of_another_kind_are_named(wrong):
    with pytest.raises(InvalidArgumentError, match=r"the bitmaps must be \(N, H, W\) of bool, not torch\.\w+ "):
        masks.from_bitmaps(wrong)


@settings(deadline=None)
@given(BITMAPS)
def test_area_and_bounding_box_are_the_bitmaps(bitmap):
    rle = masks.encode(bitmap)
    assert masks.area(rle) == bitmap.sum() == pycocotools.mask.area(rle)
    y, x = np.nonzero(bitmap)
    tight = (x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1) if len(x) else (0, 0, 0, 0)
    assert masks.bounding_box(rle) == tight == tuple(pycocotools.mask.toBbox(rle))


@pytest.mark.parametrize("bitmap", SOLID, ids=lambda bitmap: f"{bitmap.shape} {bitmap[0, 0]}")
def test_solid_bitmaps_equal_pycocotools(bitmap):
    rle = masks.encode(bitmap)
    assert rle == coco(bitmap)
    assert np.array_equal(masks.decode(rle), bitmap)
    assert masks.area(rle) == bitmap.sum()


@pytest.mark.parametrize("density", [0.0001, 0.5, 0.9999])
def test_large_counts_equal_pycocotools(density):
    bitmap = np.random.default_rng(0).random((1200, 1700)) < density
    assert masks.encode(bitmap) == coco(bitmap)
    assert np.array_equal(masks.decode(coco(bitmap)), bitmap)


def test_runs_without_pixels_do_not_count_in_the_box():
    """pycocotools never writes them, others may: here 5 off, none on, 1 off, 2 on, 1 off."""
    rle = {"size": [3, 3], "counts": "50120"}
    counts = masks._counts(rle)[0].tolist()
    assert counts == [5, 0, 1, 2, 1]
    assert masks.bounding_box(rle) == (2, 0, 1, 2)
    assert masks.area(rle) == 2


@pytest.mark.parametrize(
    "bitmap",
    [np.zeros((2, 2, 2), np.bool_), np.zeros((2, 2)), np.zeros((0, 2), np.bool_), [[True]], np.zeros((2, 2), np.int64)],
)
def test_encode_refuses_what_is_no_bitmap(bitmap):
    with pytest.raises(InvalidArgumentError, match=r"bitmap|size"):
        masks.encode(bitmap)


MALFORMED = {
    "no dict": "9",
    "no counts": {"size": [3, 3]},
    "no size": {"counts": "9"},
    "counts as bytes": {"size": [3, 3], "counts": b"9"},
    "counts as list": {"size": [3, 3], "counts": [9]},
    "counts as None": {"size": [3, 3], "counts": None},
    "no runs": {"size": [3, 3], "counts": ""},
    "too few pixels": {"size": [3, 3], "counts": "8"},
    "too many pixels": {"size": [3, 3], "counts": "92"},
    "negative run": {"size": [3, 3], "counts": ":O"},
    "negative by difference": {"size": [3, 3], "counts": "352O5"},
    "character below": {"size": [3, 3], "counts": "9/"},
    "character above": {"size": [3, 3], "counts": "9p"},
    "not ASCII": {"size": [3, 3], "counts": "9é"},
    "lone surrogate": {"size": [3, 3], "counts": "9\ud800"},
    "ends inside a count": {"size": [3, 3], "counts": "9P"},
    "only continued": {"size": [3, 3], "counts": "PPP"},
    "a count of 8 characters": {"size": [3, 3], "counts": "9PPPPPPP0"},
    "more characters than pixels can need": {"size": [1, 1], "counts": "1" + "0" * 14},
    "sum beyond 64 bits": {"size": [9000, 9000], "counts": "oooooo7" * 60_000},
    "size of three": {"size": [3, 3, 1], "counts": "9"},
    "size of fractions": {"size": [3.0, 3], "counts": "9"},
    "size of strings": {"size": "33", "counts": "9"},
    "size None": {"size": None, "counts": "9"},
    "size of 0": {"size": [0, 3], "counts": "0"},
    "negative size": {"size": [-3, -3], "counts": "9"},
    "absurd size": {"size": [1 << 20, 1 << 20], "counts": "PPPPPPP1"},
}


@pytest.mark.parametrize("rle", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize(
    "read", [masks.decode, masks.area, masks.bounding_box, masks.to_polygons, lambda x: masks.check(x, (3, 3))]
)
def test_malformed_rles_are_refused(read, rle):
    with pytest.raises(InvalidArgumentError):
        read(rle)


@settings(deadline=None)
@given(st.text(st.characters(min_codepoint=47, max_codepoint=112), max_size=20), st.integers(1, 50), st.integers(1, 50))
def test_any_string_is_refused_or_read_as_pycocotools_reads_it(counts, height, width):
    rle = {"size": [height, width], "counts": counts}
    try:
        bitmap = masks.decode(rle)
    except InvalidArgumentError:
        return
    assert np.array_equal(bitmap, pycocotools.mask.decode(rle))


def test_nothing_is_allocated_for_pixels_that_the_counts_do_not_make_up():
    import tracemalloc

    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgumentError, match="do not add up to 16384 x 16384 pixels"):
            masks.decode({"size": [16384, 16384], "counts": "9"})
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_check_tells_a_mask_of_another_image():
    rle = masks.encode(np.ones((3, 5), np.bool_))
    assert masks.check(rle, (3, 5)) is None
    with pytest.raises(InvalidArgumentError, match=r"the RLE's size is \[3, 5\], but the image's is \[5, 3\]"):
        masks.check(rle, (5, 3))


def rasterised(polygons, height, width):
    objects = pycocotools.mask.frPyObjects(polygons, height, width)
    return pycocotools.mask.decode(pycocotools.mask.merge(objects)).astype(np.bool_)


@pytest.mark.slow
@settings(deadline=None)
@given(BITMAPS)
def test_polygons_give_back_the_mask_with_its_holes_filled(bitmap):
    """A hole is what no path of pixels, across corners too, connects with the outside."""
    outside = ~np.pad(bitmap, 1)
    reached = np.zeros_like(outside)
    reached[0, 0] = True
    while True:
        wider = np.pad(reached, 1)
        wider = (
            np.any([np.roll(wider, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)], axis=0)[1:-1, 1:-1] & outside
        )
        if (wider == reached).all():
            break
        reached = wider
    polygons = masks.to_polygons(masks.encode(bitmap))
    assert all(len(polygon) >= 8 and len(polygon) % 2 == 0 for polygon in polygons)
    assert bool(polygons) == bool(bitmap.any())
    if polygons:
        assert np.array_equal(rasterised(polygons, *bitmap.shape), ~reached[1:-1, 1:-1])


def test_polygons_of_smooth_masks_rasterise_to_the_same_mask():
    soft = soft_masks(np.random.default_rng(0), "smooth", 10, 28, 0.5)
    boxes = np.tile(np.float32([5.5, 10.2, 290.1, 180.7]), (10, 1))
    for rle in masks.from_roi_masks(soft, boxes, (200, 300)):
        assert np.array_equal(rasterised(masks.to_polygons(rle), 200, 300), masks.decode(rle))


def test_a_polygon_runs_along_the_pixels_edges_and_is_plain_floats():
    bitmap = np.zeros((9, 9), np.bool_)
    bitmap[2:4, 3:8] = True
    (polygon,) = masks.to_polygons(masks.encode(bitmap))
    assert polygon == [3.0, 2.0, 8.0, 2.0, 8.0, 4.0, 3.0, 4.0]
    assert {type(value) for value in polygon} == {float}


def test_an_empty_mask_has_no_polygons():
    assert masks.to_polygons(masks.encode(np.zeros((4, 5), np.bool_))) == []


@given(BITMAPS)
@settings(deadline=None, max_examples=200)
def test_crop_is_the_mask_in_its_tight_box(bitmap):
    x, y, width, height, runs = masks.crop(masks.encode(bitmap))
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    whole = np.zeros_like(bitmap)
    whole[y : y + height, x : x + width] = inside
    assert np.array_equal(whole, bitmap)
    assert (runs[1:-1] > 0).all()
    if bitmap.any():
        assert (x, y, width, height) == masks.bounding_box(masks.encode(bitmap))
