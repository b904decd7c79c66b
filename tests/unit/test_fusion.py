"""Modules whose convolutions do what follows them compute what they computed before."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.layers import Conv2d
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bentoml_detectron.engines import fusion

pytestmark = pytest.mark.skipif(not fusion.is_there(), reason="this PyTorch has no fused convolutions")


def assert_fused_is_same(module: nn.Module, x: torch.Tensor) -> nn.Module:
    fused = fusion.fuse(copy.deepcopy(module).eval()).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        due, found = module(x), fused(x.contiguous(memory_format=torch.channels_last))
    assert found.shape == due.shape
    torch.testing.assert_close(found, due, atol=1e-5, rtol=1e-4)
    return fused


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 6), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 7), st.integers(1, 4)),
    st.booleans(),
)
def test_end_of_a_mask_head_of_any_size(size, square, channels, has_bias):
    """No boxes, maps that are higher than wide, and squares that are none, are among them."""
    torch.manual_seed(0)
    head = nn.Sequential(
        nn.ConvTranspose2d(size[1], channels[0], square, square, bias=has_bias), nn.ReLU(), Conv2d(channels[0], channels[1], 1)
    )
    assert fusion.is_skipped(assert_fused_is_same(head, torch.randn(size))[1])


def test_callers_random_numbers_stay():
    head = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), nn.ReLU(), Conv2d(4, 2, 1))
    before = torch.random.get_rng_state()
    fusion.fuse(head)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "head",
    [
        (nn.ConvTranspose2d(4, 4, 4, 2, padding=1), nn.ReLU(), Conv2d(4, 2, 1)),  # its squares overlap
        (nn.ConvTranspose2d(4, 4, 2, 2, groups=2), nn.ReLU(), Conv2d(4, 2, 1)),
        (nn.ConvTranspose2d(4, 4, 2, 2), nn.ReLU(), Conv2d(4, 2, 3, padding=1)),  # it looks at neighbours
        (nn.ConvTranspose2d(4, 4, 2, 2), nn.Sigmoid(), Conv2d(4, 2, 1)),
        (nn.ConvTranspose2d(4, 4, 2, 2), nn.ReLU(), Conv2d(4, 2, 1, norm=nn.GroupNorm(1, 2))),
    ],
    ids=["overlap", "groups", "window", "other activation", "norm"],
)
def test_what_looks_like_the_end_of_a_mask_head_and_is_none_stays(head):
    torch.manual_seed(0)
    assert not fusion.is_skipped(assert_fused_is_same(nn.Sequential(*head), torch.randn(2, 4, 5, 3))[1])
