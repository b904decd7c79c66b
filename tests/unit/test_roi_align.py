"""RoIAlign as a sum of rows gives what torchvision's kernel gives."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st

from bentoml_detectron.engines.pooler import Pooler
from bentoml_detectron.engines.roi_align import roi_align

numbers = st.floats(-60, 160, width=32)
boxes = st.lists(st.tuples(st.integers(0, 1), numbers, numbers, numbers, numbers), max_size=6)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


def features(size, batch=2, channels=5, seed=0):
    made = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))
    return made.contiguous(memory_format=torch.channels_last)


def one_level(pixels, rois, scale, output_size, sampling_ratio, aligned):
    levels = torch.zeros(len(rois), dtype=torch.int64)
    return roi_align([pixels], rois, levels, [scale], output_size, sampling_ratio, aligned)


@settings(max_examples=300, deadline=None)
@given(
    boxes,
    sizes,
    st.sampled_from([1.0, 0.5, 0.25]),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.integers(0, 4),
    st.booleans(),
    st.booleans(),
)
def test_is_torchvisions_for_any_boxes(rois, size, scale, output_size, sampling_ratio, aligned, channels_last):
    """Boxes of no extent, with their corners the wrong way round, and outside of the image are among them."""
    pixels = features(size) if channels_last else features(size).contiguous()
    rois = torch.tensor(rois, dtype=torch.float32).reshape(-1, 5)
    if sampling_ratio == 0:  # torchvision cannot count the samples of boxes with their corners the wrong way round
        rois = torch.cat([rois[:, :1], rois[:, 1:3].minimum(rois[:, 3:]), rois[:, 1:3].maximum(rois[:, 3:])], dim=1)
    due = torchvision.ops.roi_align(pixels, rois, output_size, scale, sampling_ratio, aligned)
    found = one_level(pixels, rois, scale, output_size, sampling_ratio, aligned)
    assert found.shape == due.shape
    torch.testing.assert_close(found, due, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_large_boxes_at_many_pixels_a_bin(sampling_ratio, aligned):
    pixels = features((150, 200))
    rois = torch.tensor([[0, 0, 0, 200, 150], [1, 3, 5, 190, 9.5], [1, 50, 2, 53, 149], [0, 10, 10, 10.5, 10.25]])
    due = torchvision.ops.roi_align(pixels, rois, (2, 2), 1.0, sampling_ratio, aligned)
    found = one_level(pixels, rois, 1.0, (2, 2), sampling_ratio, aligned)
    torch.testing.assert_close(found, due, atol=2e-5, rtol=1e-5)


def test_boxes_larger_than_any_picture_take_no_more_memory_than_the_picture():
    pixels = features((20, 30))
    rois = torch.tensor([[0, -1e9, -1e9, 1e9, 1e9], [1, 0, 0, 1e30, 1e30]])
    assert one_level(pixels, rois, 1.0, (7, 7), 0, True).shape == (2, 5, 7, 7)


def test_bf16_is_within_its_rounding():
    pixels = features((40, 50)).bfloat16()
    rois = torch.tensor([[0, 1, 2, 30, 35], [1, 10, 20, 12, 28]], dtype=torch.float32)
    due = torchvision.ops.roi_align(pixels.float(), rois, (7, 7), 1.0, 0, True)
    found = one_level(pixels, rois, 1.0, (7, 7), 0, True)
    assert found.dtype == torch.bfloat16
    assert (found.float() - due).abs().max() < 2**-6


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.tuples(*[st.floats(-20, 600, width=32)] * 4), max_size=8), min_size=1, max_size=2), st.booleans())
def test_pooler_is_detectron2s_over_a_pyramid(images, aligned):
    kind = "ROIAlignV2" if aligned else "ROIAlign"
    theirs = ROIPooler(7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, kind)
    pyramid = [features((math.ceil(512 / 4 / 2**i), math.ceil(640 / 4 / 2**i)), len(images), seed=i) for i in range(4)]
    lists = [Boxes(torch.tensor(each, dtype=torch.float32).reshape(-1, 4)) for each in images]
    for each in lists:
        each.clip((512, 640))
    assert Pooler.takes(theirs)
    torch.testing.assert_close(Pooler(theirs)(pyramid, lists), theirs(pyramid, lists), atol=2e-5, rtol=1e-5)


def test_pooler_of_rotated_boxes_stays():
    assert not Pooler.takes(ROIPooler(7, [1 / 4], 0, "ROIPool"))
