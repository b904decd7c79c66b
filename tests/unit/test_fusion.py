"""Modules whose convolutions do what follows them compute what they computed before."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from bentoml_detectron import engines
from bentoml_detectron.engines import fusion

pytestmark = pytest.mark.skipif(not fusion.is_there(), reason="this PyTorch has no fused convolutions")
needs_bf16 = pytest.mark.skipif(not engines.has_bf16(), reason="this processor does not compute in bf16")
every_float = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)])


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


@needs_bf16
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40))
def test_stem_pools_bf16_as_pytorch_does(batch, height, width):
    torch.manual_seed(0)
    stem = BasicStem(3, 4, norm="").bfloat16().eval()
    fused = fusion.fuse(copy.deepcopy(stem)).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, height, width).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        due = nn.functional.max_pool2d(fusion.convolved(fused.conv1, x, relu=True), 3, 2, 1)
        found = fused(x)
    assert torch.equal(found, due)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", [BasicBlock, BottleneckBlock])
def test_blocks_overwrite_only_what_is_theirs(kind):
    """The first block of a stage may get what others take, too."""
    torch.manual_seed(0)
    more = {"bottleneck_channels": 4} if kind is BottleneckBlock else {}
    stage = nn.Sequential(*(kind(8, 8, norm="", **more) for _ in range(3)))
    x = torch.randn(2, 8, 9, 7).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    assert stage[0].shortcut is None
    assert_fused_is_same(stage, x)
    assert_fused_is_same(stage[1], x)
    assert torch.equal(x, before)


@pytest.mark.slow
@every_float
def test_convolutions_of_inputs_of_any_size_in_any_order(dtype):
    """Sizes that want their weights in another layout, as these do on some processors, and none at all, are among them."""
    torch.manual_seed(0)
    conv = nn.Conv2d(256, 720, 3, padding=1).to(dtype)
    sizes = [(1, 20, 24), (1, 50, 68), (0, 5, 5), (2, 1, 1), (1, 20, 24)]
    inputs = [torch.randn(batch, 256, *size).to(dtype).contiguous(memory_format=torch.channels_last) for batch, *size in sizes]
    with torch.inference_mode():
        due = [conv(x) for x in inputs * 3]
        found = [fusion.convolved(conv, x) for x in inputs * 3]  # weights are packed at the second time
    for one, other in zip(found, due, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 if dtype == torch.float32 else 0.02, rtol=1e-3)


@every_float
@pytest.mark.parametrize("window", [1, 3])
def test_same_input_gives_the_same_each_time(dtype, window):
    torch.manual_seed(0)
    conv = nn.Conv2d(24, 40, window, padding=window // 2).to(dtype).to(memory_format=torch.channels_last)
    for size in range(1, 100, 3):
        x = torch.randn(1, 24, size, 9).to(dtype).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            first = fusion.convolved(conv, x)
            assert all(torch.equal(fusion.convolved(conv, x), first) for _ in range(3))


@needs_bf16
@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.sampled_from([3, 16, 256]), st.integers(1, 80), st.integers(1, 9)),
    st.sampled_from([(1, 2, 0), (3, 1, 1), (3, 2, 1), (3, 2, 0), (7, 2, 3), (5, 4, 2), (2, 2, 0)]),
    st.booleans(),
    st.booleans(),
)
def test_narrow_maps_in_bf16(size, how, relu, adds):
    """With strides, oneDNN's kernel for bf16 gives numbers out of the blue where its output is one pixel wide and many high."""
    torch.manual_seed(0)
    conv = nn.Conv2d(size[1], 32, *how).bfloat16().to(memory_format=torch.channels_last)
    x = torch.randn(size).bfloat16().contiguous(memory_format=torch.channels_last)
    assume(min(each + 2 * how[2] for each in size[2:]) >= how[0])
    with torch.inference_mode():
        due = copy.deepcopy(conv).float()(x.float())
        add = torch.randn(due.shape).bfloat16().contiguous(memory_format=torch.channels_last) if adds else None
        due = due if add is None else due + add.float()
        for _ in range(3):
            found = fusion.convolved(conv, x, relu, None if add is None else add.clone())
            torch.testing.assert_close(found.float(), due.relu() if relu else due, atol=0.05, rtol=0.02)
        if add is None:
            found = fusion.fuse(nn.Sequential(conv))(x)
            torch.testing.assert_close(found.float(), due, atol=0.05, rtol=0.02)


def test_biases_that_are_kept_are_those_that_are_added():
    head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, 2), nn.ReLU(), Conv2d(4, 2, 1)).eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        due = head(x)
        fused = fusion.fuse(copy.deepcopy(head))
        fusion.keep_float_biases(fused)
        for each in fused.modules():
            if getattr(each, "bias", None) is not None:
                each.bias = nn.Parameter(torch.full_like(each.bias, torch.nan), requires_grad=False)
        torch.testing.assert_close(fused(x), due, atol=1e-5, rtol=1e-4)


@needs_bf16
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("adds", [False, True])
def test_biases_are_not_rounded_to_bf16(kernel, adds):
    """Of which little is left when the sums are added, as where a norm's mean is in them; by layouts that come later, too."""
    if not fusion.adds_float_biases():
        pytest.skip("this PyTorch adds biases of the convolutions' own type alone")
    conv = nn.Conv2d(16, 16, kernel).eval()
    due = torch.arange(16) * 2**-12
    conv.weight.data, conv.bias.data = torch.zeros_like(conv.weight), 1 + due
    conv.weight.data[:, :, kernel // 2, kernel // 2] = -1 / 16
    fused = fusion.fuse(nn.Sequential(conv, nn.ReLU()))
    fusion.keep_float_biases(fused)
    fused.to(torch.bfloat16).to(memory_format=torch.channels_last)
    for height in (9, 9, 9, 5):
        x = torch.ones(1, 16, height, 7, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        inside = (height - kernel + 1, 8 - kernel)
        add = torch.zeros(1, 16, *inside, dtype=torch.bfloat16) if adds else None
        with torch.inference_mode():
            found = fusion.convolved(conv, x, relu=True, add=add)
        assert torch.equal(found.float(), due[None, :, None, None].expand(1, 16, *inside))


@needs_bf16
def test_narrow_maps_keep_their_own_statistics():
    """The column that is left out takes no part in a norm."""
    torch.manual_seed(0)
    conv = Conv2d(64, 64, 3, 2, 1, norm=nn.GroupNorm(4, 64)).bfloat16().to(memory_format=torch.channels_last)
    x = torch.randn(1, 64, 50, 1).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        due = copy.deepcopy(conv).float()(x.float())
        found = fusion.fuse(nn.Sequential(conv))(x)
    torch.testing.assert_close(found.float(), due, atol=0.1, rtol=0.05)


@needs_bf16
def test_weights_are_in_memory_a_few_times_however_many_sizes_come():
    conv = nn.Conv2d(256, 256, 3, padding=1).bfloat16().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for size in range(1, 40):
            x = torch.zeros(1, 256, size, 60 - size).bfloat16().contiguous(memory_format=torch.channels_last)
            for _ in range(2):
                fusion.convolved(conv, x)
    assert 1 <= len(conv.__dict__["_packed"]._layouts) <= 2
