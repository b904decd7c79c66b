"""Building without random numbers: in this thread, for parameters alone, and with an end."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from bentoml_detectron import errors
from bentoml_detectron.model import _NoRandomInit


def test_parameters_keep_what_they_have_and_buffers_are_filled():
    with _NoRandomInit(1e9):
        linear = nn.Parameter(torch.full((10, 10), 7.0))
        for fill in (nn.init.normal_, nn.init.kaiming_uniform_, nn.init.xavier_normal_, nn.init.kaiming_normal_):
            fill(linear)
        buffer = torch.empty(1000).normal_()
    assert torch.equal(linear.detach(), torch.full((10, 10), 7.0))
    assert 0.5 < buffer.std() < 1.5


def test_other_threads_are_left_alone():
    built: list[nn.Parameter] = []

    def build() -> None:
        parameter = nn.Parameter(torch.full((1000,), 7.0))
        nn.init.normal_(parameter)
        built.append(parameter)

    with _NoRandomInit(1e9):
        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
    assert abs(built[0].mean()) < 1


def test_building_ends():
    with pytest.raises(errors.InvalidModelError, match="far larger"), _NoRandomInit(1000):
        torch.empty(1000)
    with pytest.raises(errors.InvalidModelError, match="far larger"), _NoRandomInit(1e9):
        for _ in range(_NoRandomInit.MAX_CALLS + 1):
            torch.is_tensor(torch.empty(0))
