"""Reading a checkpoint gives what PyTorch's own loader gives, tensor for tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from bentoml_detectron import errors
from bentoml_detectron.artifact import weights

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


@st.composite
def tensors(draw):
    """Any dtype and shape, zero-dimensional and empty ones too; whole, transposed, or a part of something larger."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    tensor = (torch.randint(0, 255, [size + 1 for size in shape]) % 7).to(draw(st.sampled_from(DTYPES)))
    kind = draw(st.sampled_from(["whole", "part", "transposed", "channels last"]))
    tensor = tensor[tuple(slice(1 if kind == "part" else 0, None) for _ in shape)]
    if kind == "transposed":
        tensor = tensor.permute(list(range(tensor.dim() - 1, -1, -1)))
    if kind == "channels last" and tensor.dim() == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
        and torch.equal(one, other)
        and not one.requires_grad
    )


@given(state=st.dictionaries(st.text(max_size=20), tensors(), max_size=5))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_reads_what_torch_reads(state, tmp_path):
    torch.save({"model": state}, tmp_path / weights.WEIGHTS)
    expected = torch.load(tmp_path / weights.WEIGHTS, weights_only=True)["model"]
    found = weights.read(tmp_path)
    assert list(found) == list(expected)
    assert all(same(found[name], expected[name]) for name in expected)


def test_reads_what_checkpointer_wrote(tmp_path):
    """With the versions of its modules, which `load_state_dict` looks at, and parameters as plain tensors."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    weights.write(module, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [weights.WEIGHTS]
    found = weights.read(tmp_path)
    assert found._metadata["1"] == {"version": nn.BatchNorm2d._version}
    assert all(torch.equal(value, found[name]) for name, value in module.state_dict().items())
    assert weights.differ(found, tmp_path, weights.WEIGHTS) is False


def test_saved_parameters_and_shared_tensors_are_read(tmp_path):
    shared = torch.arange(6.0)
    torch.save({"model": {"a": nn.Parameter(shared), "b": shared, "c": shared[2:4]}}, tmp_path / weights.WEIGHTS)
    found = weights.read(tmp_path)
    assert torch.equal(found["a"], shared)
    assert found["a"].data_ptr() == found["b"].data_ptr()
    assert torch.equal(found["c"], shared[2:4])


def test_what_is_read_can_be_saved_again(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    weights.write(module, tmp_path)
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    weights.assign(weights.read(tmp_path), other)
    (tmp_path / "again").mkdir()
    weights.write(other, tmp_path / "again")
    size = (tmp_path / weights.WEIGHTS).stat().st_size
    assert (tmp_path / "again" / weights.WEIGHTS).stat().st_size == size
    assert weights.differ(weights.read(tmp_path), tmp_path / "again", weights.WEIGHTS) is False


def test_what_is_missing_unexpected_and_misshaped_is_listed():
    state = {"weight": torch.zeros(2, 3), "more": torch.zeros(1)}
    with pytest.raises(errors.WeightsMismatchError) as caught:
        weights.check(state, nn.Linear(2, 2), "do not fit")
    assert (caught.value.missing, caught.value.unexpected) == (("bias",), ("more",))
    assert caught.value.misshaped == {"weight": ((2, 3), (2, 2))}
