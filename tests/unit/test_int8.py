"""Convolutions in 8-bit integers give what floats give, to a step of the output's range."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import Conv2d
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from bentoml_detectron import engines
from bentoml_detectron.engines import fusion, int8
from bentoml_detectron.engines.pooler import Pooler
from bentoml_detectron.engines.quantized import Quantized, Range, mapped, quantize

pytestmark = pytest.mark.skipif(not engines.has_int8(), reason="int8 needs AVX2")

shapes = st.tuples(st.integers(1, 2), st.sampled_from([8, 16, 24]), st.integers(1, 40), st.integers(1, 40))


def range_of(x):
    return Range(min(float(x.min()), 0.0), max(float(x.max()), 0.0))


@settings(max_examples=60, deadline=None)
@given(
    shapes, st.integers(0, 1000), st.sampled_from([8, 16]), st.sampled_from([1, 3]), st.integers(1, 2), st.sampled_from([1, 8]),
    st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(sorted({63, int8.largest_weight()})),
)  # fmt: skip
def test_a_convolution_is_within_one_step(
    shape, seed, given_channels, size, stride, groups, relu, adds, is_signed, goes_on, largest
):
    stride = stride if size == 1 else 1  # windows with strides stay in floats
    generator = torch.Generator().manual_seed(seed)
    conv = Conv2d(shape[1], given_channels, size, stride=stride, padding=size // 2, groups=groups)
    conv.weight.data = torch.randn(conv.weight.shape, generator=generator)
    conv.bias.data = torch.randn(conv.bias.shape, generator=generator)
    x = torch.randn(shape, generator=generator).to(memory_format=torch.channels_last)
    x = quantize(x if is_signed else x.abs(), range_of(x))
    weight = conv.weight.detach()
    steps = weight.abs().amax(dim=(1, 2, 3), keepdim=True) / largest
    exact = functional.conv2d(x.float(), (weight / steps).round() * steps, conv.bias, stride, size // 2, 1, groups)
    add = None
    if adds:
        add = torch.randn(exact.shape, generator=generator).to(memory_format=torch.channels_last)
        add = quantize(add, range_of(add))
        exact = exact + add.float()
    exact = (exact.relu() if relu else exact).detach()
    wide = range_of(exact)
    found = int8.Convolution(conv, range_of(x.float()), wide if goes_on else None, torch.float32, largest)(x, relu, add)
    assert isinstance(found, Quantized) == goes_on
    assert found.shape == exact.shape
    allowed = 1.01 * wide.scale if goes_on else 1e-4 * float(exact.abs().max() + 1)
    assert float((found.float() - exact).abs().max()) <= allowed


@settings(max_examples=60, deadline=None)
@given(
    shapes, st.sampled_from([16, 64, 512]), st.sampled_from([8, 16, 24, 40]), st.sampled_from([1, 3]), st.sampled_from([1, 8]),
    st.sampled_from([1, -1]), st.sampled_from([0, 100]),
)  # fmt: skip
def test_sums_of_the_largest_products_are_exact(shape, channels, given_channels, size, groups, sign, zero):
    """Of any two neighbours too, which some processors add in 16 bits."""
    conv = Conv2d(channels, given_channels, size, padding=size // 2, groups=groups, bias=False)
    conv.weight.data = torch.full(conv.weight.shape, float(sign))
    x = torch.full((shape[0], channels, *shape[2:]), 255.0 - zero).to(memory_format=torch.channels_last)
    exact = functional.conv2d(x, conv.weight, None, 1, size // 2, 1, groups).detach()
    taken = Range(-float(zero), 255.0 - zero)
    found = int8.Convolution(conv, taken, None, torch.float32, int8.largest_weight())(x, False, None)
    assert torch.allclose(found, exact, rtol=1e-5)


def test_weights_have_seven_bits_where_a_processor_adds_in_sixteen(monkeypatch):
    for features, due in [
        ({"avx2"}, 63), ({"avx2", "avx512f", "avx512bw"}, 63), ({"avx2", "avx_vnni"}, 127), ({"avx2", "avx512_vnni"}, 127)
    ]:  # fmt: skip
        monkeypatch.setattr(int8.processor, "features", lambda features=features: frozenset(features))
        assert int8.largest_weight() == due
        assert 2 * 255 * 63 <= 2**15 - 1 < 2 * 255 * 127


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_a_number_is_within_half_a_step_and_zero_is_zero(numbers):
    x = torch.tensor([*numbers, 0.0])
    found = quantize(x, range_of(x))
    assert float((found.float() - x).abs().max()) <= 0.5001 * found.scale + 1e-6 * float(x.abs().max())
    assert float(found.float()[-1]) == 0


def test_what_is_outside_of_the_range_gets_its_end():
    found = quantize(torch.tensor([-9.0, 9.0, float("inf")]), Range(-1.0, 2.0)).float()
    assert found.tolist() == pytest.approx([-1.0, 2.0, 2.0], abs=0.02)


def test_what_moves_numbers_moves_both_kinds():
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert torch.equal(mapped(lambda each: each[:, :, ::2], quantize(x, Range(0, 255))).float(), x[:, :, ::2])


def test_ranges_survive_being_saved():
    calibration = {"backbone.conv": int8.Ranges(Range(-1.5, 2.0), Range(0.0, 3.25))}
    assert int8.from_plain(int8.to_plain(calibration)) == calibration


def test_pooling_integers_is_pooling_what_they_stand_for():
    """Also where a box sticks out, and with a scale and a zero a level."""
    generator = torch.Generator().manual_seed(0)
    pooler = Pooler(ROIPooler((5, 5), (0.25, 0.125), 0, "ROIAlignV2"))
    features = [torch.randn(2, 8, size, size + 3, generator=generator) * 3**level for level, size in enumerate((40, 20))]
    features = [quantize(each.to(memory_format=torch.channels_last), range_of(each)) for each in features]
    first = torch.tensor([[-50.0, -20.0, 40.0, 60.0], [10.0, 10.0, 30.0, 20.0]])
    boxes = [Boxes(first), Boxes(torch.tensor([[0.0, 0.0, 170.0, 300.0]]))]
    due = pooler([each.float().to(memory_format=torch.channels_last) for each in features], boxes)
    found = pooler(features, boxes)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - due).abs().max()) < 0.02 * float(due.abs().max())


def test_windows_with_strides_and_an_images_own_colors_stay_in_floats():
    """Of the first, oneDNN's kernel for integers computes something else on maps that are narrow and high."""
    graph = nn.Sequential(
        Conv2d(3, 16, 3, padding=1, activation=nn.ReLU()),
        Conv2d(16, 16, 3, stride=2, padding=1, activation=nn.ReLU()),
        Conv2d(16, 16, 1, stride=2, activation=nn.ReLU()),
        Conv2d(16, 16, 3, padding=1, activation=nn.ReLU()),
    )
    found = {}
    with torch.inference_mode():
        int8.observe(fusion.fuse(graph), "part", found)(torch.rand(1, 3, 40, 9))
    assert set(found) == {"part.2", "part.3"}
