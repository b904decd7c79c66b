"""`draw`: what is on the picture, where, and in which colors."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import supervision as sv
from PIL import Image

from bentoml_detectron import draw, masks
from bentoml_detectron.errors import DependencyMissingError, DetectronError, InvalidArgumentError
from bentoml_detectron.results import Detections, PanopticSegmentation, Segment

PALETTE = sv.ColorPalette.DEFAULT
SIZE = (100, 140)
BITMAP = np.zeros(SIZE, bool)
BITMAP[40:80, 30:90] = True


def found(boxes=((20, 30, 100, 90),), **parts):
    count = len(boxes)
    return Detections(SIZE, boxes, [0.9] * count, list(range(count)), ("cat",) * count, **parts)


def maps(**parts):
    return Detections(SIZE, [], [], [], (), **parts)


def picture(color=(128, 128, 128)):
    return np.full((*SIZE, 3), color, np.uint8)


def changed(one, image=None, **options):
    """Where drawing changes the picture, (H, W) bool."""
    image = picture() if image is None else image
    return (draw(image, one, **options) != image).any(axis=2)


def mixed(class_id, color=(128, 128, 128)):
    """The class's color over another, half of each."""
    return (np.array(PALETTE.by_idx(class_id).as_bgr()) + color) / 2


def test_the_result_is_a_new_bgr_array_and_the_picture_is_left_alone():
    image = picture()
    drawn = draw(image, found(masks=[masks.encode(BITMAP)]))
    assert drawn.dtype == np.uint8
    assert drawn.shape == image.shape
    assert (image == 128).all()
    assert not np.shares_memory(drawn, image)
    drawn[0, 0] = 1  # it is the caller's


@pytest.mark.parametrize("layout", ["C", "F", "reversed"])
def test_any_layout_of_the_picture_is_drawn_on_alike(layout):
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    other = {"C": image, "F": np.asfortranarray(image), "reversed": image[:, :, ::-1].copy()[:, :, ::-1]}[layout]
    assert np.array_equal(draw(other, found()), draw(image, found()))


def test_an_encoded_picture_is_drawn_on():
    buffer = io.BytesIO()
    Image.fromarray(picture((255, 0, 0))).save(buffer, "PNG")  # red, in RGB
    assert draw(buffer.getvalue(), maps())[0, 0].tolist() == [0, 0, 255]


def test_red_stays_red():
    drawn = draw(picture((0, 0, 255)), found())
    assert drawn[0, 0].tolist() == drawn[60, 60].tolist() == [0, 0, 255]


@pytest.mark.parametrize("labels", [True, False])
def test_nothing_found_gives_the_picture_as_it_was(labels):
    assert not changed(maps(), labels=labels).any()
    assert not changed(maps(masks=[], keypoints=np.empty((0, 3, 3))), labels=labels).any()


def test_a_mask_is_colored_and_what_is_outside_of_it_is_not():
    boxless = found(boxes=[(0, 0, 0, 0)], masks=[masks.encode(BITMAP)])
    drawn = draw(picture(), boxless, labels=False)
    drawn[0, 0] = 128
    assert np.array_equal((drawn != 128).any(axis=2), BITMAP)
    assert drawn[BITMAP] == pytest.approx(np.tile(mixed(0), (BITMAP.sum(), 1)), abs=1.5)


def test_the_smaller_of_two_masks_is_seen():
    inner = np.zeros(SIZE, bool)
    inner[50:60, 40:60] = True
    for order in (1, -1):
        one = found(boxes=[(0, 0, 0, 0)] * 2, masks=[masks.encode(inner), masks.encode(BITMAP)][::order])
        drawn = draw(picture(), one, labels=False)
        assert drawn[55, 50] == pytest.approx(mixed(0 if order == 1 else 1), abs=1.5)


@pytest.mark.parametrize("bitmap", [np.zeros(SIZE, bool), np.ones(SIZE, bool)], ids=["empty", "full"])
def test_a_mask_may_be_empty_or_full(bitmap):
    drawn = changed(found(boxes=[(0, 0, 0, 0)], masks=[masks.encode(bitmap)]), labels=False)
    assert np.array_equal(drawn[1:], bitmap[1:])


def test_a_box_is_outlined_in_its_classes_color():
    drawn = draw(picture(), found(), labels=False)
    for x, y in [(20, 30), (100, 30), (100, 90), (20, 90), (60, 30), (20, 60)]:
        assert drawn[y, x].tolist() == list(PALETTE.by_idx(0).as_bgr())
    assert (drawn[60, 60] == 128).all()


def test_classes_have_colors_of_their_own():
    drawn = draw(picture(), found(boxes=[(10, 10, 30, 30), (60, 60, 80, 80)]), labels=False)
    assert drawn[30, 30].tolist() != drawn[80, 80].tolist() == list(PALETTE.by_idx(1).as_bgr())


def test_the_best_of_two_is_on_top():
    one = found(boxes=[(20, 30, 100, 90)] * 2)
    assert draw(picture(), one, labels=False)[30, 20].tolist() == list(PALETTE.by_idx(0).as_bgr())


def test_labels_are_written_above_the_box():
    label = changed(found()) & ~changed(found(), labels=False)
    rows, columns = np.nonzero(label)
    assert len(rows) > 100
    assert rows.max() <= 30
    assert columns.min() >= 20


@pytest.mark.parametrize("box", [(0, 0, 50, 50), (130, 0, 140, 60), (135, 95, 140, 100), (-50, -50, 500, 500)], ids=str)
def test_a_label_stays_inside_the_picture(box):
    """Whole: in a larger picture around this one it is no larger."""
    one = found(boxes=[box])
    rows, columns = np.nonzero(changed(one) & ~changed(one, labels=False))
    middle = found(boxes=[(40, 50, 90, 90)])
    due_rows, due_columns = np.nonzero(changed(middle) & ~changed(middle, labels=False))
    assert np.ptp(rows) >= np.ptp(due_rows) - 2
    assert np.ptp(columns) >= np.ptp(due_columns) - 2


def test_the_class_id_stands_for_a_name_that_is_not_known():
    one = found()
    unnamed = Detections(SIZE, one.boxes, one.scores, [7], ("",))
    named = Detections(SIZE, one.boxes, one.scores, [7], ("7",))
    assert np.array_equal(draw(picture(), unnamed), draw(picture(), named))


@pytest.mark.parametrize("angle", [0, 30, 90, -45, 200])
def test_rotated_boxes_are_turned_as_detectron2_turns_them(angle):
    """Their corners are on the outline, and their tight box is that of Detectron2's own conversion."""
    import torch
    from detectron2.structures import BoxMode

    box = [70, 50, 60, 20, angle]
    rows, columns = np.nonzero(changed(found(boxes=[box]), labels=False))
    tight = BoxMode.convert(torch.tensor([box], dtype=torch.float64), BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS)[0]
    assert [columns.min(), rows.min(), columns.max(), rows.max()] == pytest.approx(tight.tolist(), abs=1.5)


def test_a_rotated_box_turns_counter_clockwise():
    """As RotatedBoxes has it: at 30 degrees the right end is up."""
    drawn = changed(found(boxes=[(70, 50, 80, 4, 30)]), labels=False)
    assert drawn[:50, 75:].any()
    assert not drawn[55:, 75:].any()


def test_rotated_boxes_have_labels():
    assert changed(found(boxes=[(70, 50, 60, 20, 30)])).sum() > changed(found(boxes=[(70, 50, 60, 20, 30)]), labels=False).sum()


def test_keypoints_are_drawn_but_for_those_of_no_score():
    points = np.array([[[40, 50, 0.9], [70, 60, 0.01]]], np.float32)
    drawn = draw(picture(), found(keypoints=points), labels=False)
    assert drawn[50, 40].tolist() == [0, 255, 0]
    assert (drawn[60, 70] == 128).all()


def test_detections_without_keypoints_of_theirs_are_drawn():
    assert changed(found(keypoints=np.empty((1, 0, 3)))).any()


def segmentation():
    ids = np.zeros(SIZE, np.int32)
    ids[:30], ids[60:] = 2**24 - 1, 3
    return PanopticSegmentation(ids, (Segment(2**24 - 1, 1, "cat", True, 30 * 140), Segment(3, 1, "sky", False, 40 * 140)))


def test_segments_are_colored_and_the_rest_is_not():
    drawn = draw(picture(), maps(panoptic=segmentation()))
    assert drawn[10, 10] == pytest.approx(mixed(1), abs=1.5)
    assert (drawn[45, 10] == 128).all()
    assert (drawn[80, 10] != 128).any()


def test_things_and_stuff_of_one_id_have_colors_of_their_own():
    drawn = draw(picture(), maps(panoptic=segmentation()))
    assert drawn[10, 10].tolist() != drawn[80, 10].tolist()


def test_masks_are_not_drawn_over_the_segments():
    one = found(boxes=[(0, 0, 0, 0)], masks=[masks.encode(BITMAP)], panoptic=segmentation())
    assert not changed(one, labels=False)[45:60].any()


@pytest.mark.parametrize(("dtype", "void"), [(np.uint8, 255), (np.int16, -1)])
def test_a_semantic_map_is_colored_but_for_what_is_no_class(dtype, void):
    semantic = np.full(SIZE, void, dtype)
    semantic[:50] = 2
    drawn = draw(picture(), maps(semantic=semantic))
    assert drawn[10, 10] == pytest.approx(mixed(2), abs=1.5)
    assert (drawn[80] == 128).all()


def test_a_class_id_above_the_number_of_colors_has_one():
    semantic = np.full(SIZE, 300, np.int16)
    assert changed(maps(semantic=semantic)).all()


@pytest.mark.parametrize("number", [3.4e38, -3.4e38, 1e10])
def test_numbers_far_outside_are_drawn_without_an_error(number):
    points = np.full((1, 2, 3), number, np.float32)
    draw(picture(), found(boxes=[[number] * 4], keypoints=points))
    draw(picture(), found(boxes=[[number] * 5]))


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (3000, 40)])
def test_pictures_of_any_shape_are_drawn_on(shape):
    one = Detections(shape, [[0, 0, 1, 1]], [0.5], [0], ("cat",), [masks.encode(np.ones(shape, bool))])
    assert draw(np.zeros((*shape, 3), np.uint8), one).shape == (*shape, 3)


def test_a_picture_larger_than_the_default_limit_is_drawn_on():
    one = Detections((5200, 5000), [], [], [], ())
    assert draw(np.zeros((5200, 5000, 3), np.uint8), one).shape == (5200, 5000, 3)


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"140x100") as caught:
        draw(np.zeros((140, 100, 3), np.uint8), found())
    assert caught.value.value == (140, 100)


@pytest.mark.parametrize("image", [b"no picture", np.zeros(SIZE, np.uint8), None])
def test_what_is_no_picture_is_refused(image):
    with pytest.raises(DetectronError):
        draw(image, found())


def test_without_supervision_the_install_line_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(DependencyMissingError, match="pip install supervision"):
        draw(picture(), found())
