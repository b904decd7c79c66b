"""Convolutions by fewer products give what PyTorch's give."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import Conv2d
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bentoml_detectron.engines import fusion, winograd

pytestmark = pytest.mark.skipif(not fusion.is_there(), reason="this PyTorch has no fused convolutions")


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    """Small maps are taken, and a strip has few rows."""
    monkeypatch.setattr(winograd, "_LEAST_CHANNELS", 1)
    monkeypatch.setattr(winograd, "_LEAST_PIXELS", 1)
    monkeypatch.setattr(winograd, "_BYTES", 20_000)


def pixels(*size: int) -> torch.Tensor:
    made = torch.randn(*size, generator=torch.Generator().manual_seed(0))
    return made.contiguous(memory_format=torch.channels_last)


def sped_up(*modules: nn.Module) -> nn.Module:
    module = nn.Sequential(*modules).eval()
    winograd.speed_up(fusion.fuse(module).to(memory_format=torch.channels_last))
    return module


def windows(module: nn.Module, x: torch.Tensor) -> list[tuple[int, ...]]:
    """Those of the convolutions that oneDNN computes, one after another."""
    with torch.inference_mode(), torch.profiler.profile(record_shapes=True) as profiled:
        module(x)
    return [tuple(each.input_shapes[1][2:]) for each in profiled.events() if each.name == "mkldnn::_convolution_pointwise"]


def assert_is_same(module: nn.Module, x: torch.Tensor, due: torch.Tensor) -> None:
    before = x.clone()
    with torch.inference_mode():
        found = module(x)
    assert found.shape == due.shape
    assert not len(x) or found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, due, atol=1e-4, rtol=1e-4)
    assert torch.equal(x, before)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(0, 7), st.integers(1, 9), st.integers(1, 60), st.integers(1, 20)),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
)
def test_is_pytorchs_for_any_size(size, channels, has_bias, rectifies):
    """Maps of few rows, in strips and many images at once, are among them."""
    torch.manual_seed(0)
    conv = nn.Conv2d(size[1], channels, 3, padding=1, bias=has_bias)
    x = pixels(*size)
    due = conv(x).relu() if rectifies else conv(x)
    assert_is_same(sped_up(conv, *[nn.ReLU()] * rectifies), x, due.detach())


@pytest.mark.parametrize("rows", [5, 6])
def test_error_is_a_few_times_that_of_the_convolution_itself(rows):
    torch.manual_seed(0)
    conv = nn.Conv2d(256, 256, 3, padding=1)
    x = pixels(1, 256, 3 * rows, 30).relu()
    with torch.inference_mode():
        plain, due = conv(x), conv.double()(x.double())
        error = (winograd.Convolution(conv.float())(x, False, None) - due).square().mean().sqrt()
    assert error < 6 * (plain - due).square().mean().sqrt()
    assert error < 3e-6 * due.square().mean().sqrt()


@pytest.mark.parametrize(("height", "count"), [(30, 8), (14, 7)])
def test_products_have_windows_of_one_row(height, count, monkeypatch):
    monkeypatch.setattr(winograd, "_BYTES", 1 << 20)
    module = sped_up(nn.Conv2d(2, 2, 3, padding=1))
    found = windows(module, pixels(1, 2, height, 4))
    assert found == [(1, 3)] * count


def test_a_norm_and_an_activation_follow():
    torch.manual_seed(0)
    conv = Conv2d(4, 6, 3, padding=1, norm=nn.GroupNorm(2, 6), activation=torch.sigmoid).eval()
    x = pixels(2, 4, 20, 7)
    due = conv(x).detach()
    assert_is_same(sped_up(conv), x, due)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
    ],
    ids=["strides", "dilation", "groups", "no zeros", "named padding", "reflection", "window"],
)
def test_other_convolutions_stay(conv):
    x = pixels(1, 4, 20, 9)
    due = conv(x).detach()
    assert_is_same(sped_up(conv), x, due)
    assert len(windows(conv, x)) <= 1


def test_what_is_added_is_added():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    x, add = pixels(1, 4, 20, 9), pixels(1, 4, 20, 9) + 1
    due = (conv(x) + add).detach()
    with torch.inference_mode():
        found = winograd.Convolution(conv)(x, False, add.clone(memory_format=torch.preserve_format))
    torch.testing.assert_close(found, due, atol=1e-5, rtol=1e-4)


def test_small_ones_stay(monkeypatch):
    """Their weights would take more memory than that is worth."""
    monkeypatch.setattr(winograd, "_LEAST_PIXELS", 271)
    conv = nn.Conv2d(4, 4, 3, padding=1)
    assert len(windows(sped_up(conv), pixels(1, 4, 30, 9))) == 1


def test_it_computes_after_inference_mode_too():
    winograd._matrices.cache_clear()
    conv, x = nn.Conv2d(4, 4, 3, padding=1), pixels(1, 4, 20, 9)
    with torch.inference_mode():
        winograd.Convolution(conv)(x, False, None)
    found = winograd.Convolution(conv)(x.requires_grad_(), False, None)
    torch.testing.assert_close(found, conv(x), atol=1e-5, rtol=1e-4)
