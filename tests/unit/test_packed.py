"""Weights are put in order for the sizes that come, a few times however many there are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bentoml_detectron import engines
from bentoml_detectron.engines import int8
from bentoml_detectron.engines.packed import Packed, layout_of
from bentoml_detectron.engines.quantized import Quantized, Range

pytestmark = pytest.mark.skipif(not engines.has_int8(), reason="its weights are those of int8, which needs AVX2")
CHANNELS, MORE = 64, 512


class Counting:
    """Packs int8 weights of a window of one pixel, and notes for which sizes."""

    def __init__(self) -> None:
        self.sizes: list[torch.Size] = []
        self._values = torch.ones(MORE, CHANNELS, 1, 1, dtype=torch.int8)

    def __call__(self, size: torch.Size) -> torch.Tensor:
        self.sizes.append(size)
        how = ([1, 1], [0, 0], [1, 1], 1, list(size))
        values = self._values[: self._rows(size)]
        return torch.ops.onednn.qconv_prepack(values, torch.ones(len(values)), 1.0, 0, *how)

    def _rows(self, size: torch.Size) -> int:
        return MORE


class OneEach(Counting):
    """Packs weights of another shape for each height: no processor wants one layout for these."""

    def _rows(self, size: torch.Size) -> int:
        return size[2]


def size(height: int, width: int) -> torch.Size:
    return torch.Size([1, CHANNELS, height, width])


def test_a_size_gets_what_one_about_as_large_has_until_it_comes_again():
    pack = Counting()
    packed = Packed(pack, None, 3)
    first, alike = size(50, 68), size(50, 67)
    given = packed.of(first)
    assert pack.sizes == [first]
    assert packed.of(alike) is given
    assert pack.sizes == [first]
    assert layout_of(packed.of(alike)) == layout_of(Counting()(alike))
    assert pack.sizes == [first, alike]
    packed.of(alike)
    assert pack.sizes == [first, alike]


def test_a_size_of_which_nothing_is_near_gets_its_own_at_once():
    pack = Counting()
    packed = Packed(pack, None, 3)
    for each in (size(200, 272), size(5, 6), size(13, 17)):
        assert layout_of(packed.of(each)) == layout_of(Counting()(each))
    assert len(pack.sizes) == 3


def test_sizes_that_want_one_layout_share_it():
    """oneDNN's descriptions of a layout hold bytes that nothing has set, which differ from width to width."""
    weight = torch.randn(256, 256, 1, 3).contiguous(memory_format=torch.channels_last)
    how = ((0, 1), (1, 1), (1, 1), 1)
    packed = Packed(lambda size: torch.ops.mkldnn._reorder_convolution_weight(weight, *how, list(size)), None, 100)
    sizes = [torch.Size([1, 256, 40, width]) for width in range(100, 260, 4)]
    for each in sizes + sizes:
        packed.of(each)
    assert len({id(packed.of(each)) for each in sizes}) <= 4


def test_of_too_many_layouts_the_one_that_rested_longest_goes():
    """As those of the image of noise that parts are tried with."""
    large, small = size(200, 272), size(5, 6)
    pack = OneEach()
    packed = Packed(pack, None, 1)
    for each in (small, large, large, small):
        assert layout_of(packed.of(each)) == layout_of(OneEach()(each))
        assert len(packed._layouts) == 1
    assert pack.sizes == [small, large, small]


def test_many_sizes_are_packed_as_often_as_they_double():
    pack = Counting()
    packed = Packed(pack, None, 3)
    for height in range(20, 220):
        packed.of(size(height, 2 * height - 3))
    assert pack.sizes[0] == size(20, 37)
    assert len(pack.sizes) <= 8  # the largest has 128 times as many pixels as the smallest


def test_plain_weights_serve_what_never_came_before_and_what_is_too_much():
    pack, plain = Counting(), torch.zeros(1)
    packed = Packed(pack, plain, 0)
    assert packed.of(size(5, 6)) is plain
    assert not pack.sizes
    assert packed.of(size(5, 6)) is plain
    assert pack.sizes == [size(5, 6)]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=8),
    st.sampled_from([0, 100]),
    st.sampled_from([1, 3]),
)
def test_any_sizes_in_any_order_give_the_same_numbers(sizes, zero, window):
    """Also where zero is another integer, for which oneDNN keeps sums beside the weights."""
    torch.manual_seed(0)
    conv = nn.Conv2d(CHANNELS, 96, window, padding=window // 2)

    def made():
        return int8.Convolution(conv, Range(-float(zero), 255.0 - zero), None, torch.float32, int8.largest_weight())

    one = made()
    for batch, *shape in sizes + sizes:
        values = torch.randint(0, 255, (batch, CHANNELS, *shape), dtype=torch.uint8).to(memory_format=torch.channels_last)
        x = Quantized(values, 1.0, zero)
        assert torch.equal(one(x, False, None), made()(x, False, None))
    assert len(one._packed._layouts) <= int8._LAYOUTS
