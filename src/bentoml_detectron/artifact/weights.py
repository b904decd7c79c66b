"""``saved_model.pth``: a Checkpointer's file, written once, read as tensors and nothing else."""

from __future__ import annotations

import pickle  # for its error class alone
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from bentoml_detectron.artifact import files
from bentoml_detectron.errors import CorruptFileError, UnsafeFileError, WeightsMismatchError

WEIGHTS = "saved_model.pth"
PICKLE_LIMIT = 64 << 20
"""Most bytes for a checkpoint's structure (names and shapes, without the values); R50's has 60 KB."""

State = Mapping[str, torch.Tensor]


class _OneFile(Checkpointer):  # type: ignore[misc]
    """Leaves out the file ``last_checkpoint``, which would have one possible content."""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        pass


def write(module: nn.Module, folder: Path) -> None:
    """Writes a module's weights into a folder, straight from their memory to the file."""
    _OneFile(module, str(folder)).save(Path(WEIGHTS).stem)


def read(folder: Path, name: str = WEIGHTS) -> State:
    """Maps a checkpoint's tensors into memory; nothing is copied and nothing in the file can run.

    Returns:
        CPU tensors by name, on a private mapping: writing to them does not write to the file.

    Raises:
        CorruptFileError: The file is missing, cut short or no checkpoint.
        UnsafeFileError: It holds something else than plain tensors that it has the bytes for.
    """
    path = folder / name
    _check_zip(folder, name)
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as exc:
        raise UnsafeFileError(f"{name} in {folder} holds more than tensors: {exc}", file=name) from exc
    except Exception as exc:
        raise CorruptFileError(f"{name} in {folder} cannot be read: {exc}", file=name) from exc
    state = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        raise CorruptFileError(f"{name} in {folder} is no checkpoint: it has no 'model'", file=name)
    for key, value in state.items():
        problem = _problem(key, value)
        if problem:
            raise UnsafeFileError(f"{name} in {folder}: {key!r} is {problem}", file=name, value=key)
    return state


def _check_zip(folder: Path, name: str) -> None:
    """Refuses archives that unpack to more than they are."""
    descriptor = files.open_inside(folder, name)
    with open(descriptor, "rb") as file:  # noqa: PTH123 (a descriptor, not a path)
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, ValueError, OSError) as exc:
            raise CorruptFileError(f"{name} in {folder} is no checkpoint of PyTorch 1.6 or later: {exc}", file=name) from exc
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise UnsafeFileError(f"{name} in {folder} holds compressed data", file=name, value=member.filename)
        if "/code/" in member.filename:
            raise UnsafeFileError(f"{name} in {folder} is a TorchScript archive, which holds code", file=name)
        if member.filename.endswith(".pkl") and member.file_size > PICKLE_LIMIT:
            raise UnsafeFileError(f"{name} in {folder} holds a pickle of {member.file_size:,} bytes", file=name)


def _problem(key: Any, value: Any) -> str | None:
    """What is wrong with one tensor of a state dict, if anything."""
    if type(key) is not str:
        return "no name"
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}, not a tensor"
    if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
        return f"no plain tensor ({value.layout}, {value.device})"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"of shape {tuple(value.shape)}, for which the file has only {value.untyped_storage().nbytes()} bytes"
    return None


def _ignored(key: str) -> bool:
    """Whether a name may be on one side only, as in Detectron2's own DetectionCheckpointer.

    Pixel statistics and anchors come from the config; some versions of Detectron2 also kept them among the weights.
    """
    return key in ("pixel_mean", "pixel_std") or "anchor_generator.cell_anchors" in key


def check(state: Mapping[str, Any], module: nn.Module, message: str, file: str | None = None) -> None:
    """Checks that a state dict is exactly a module's: every name, every shape.

    Raises:
        WeightsMismatchError: It is not; the error lists what is missing, unexpected and misshaped.
    """
    due = module.state_dict()
    missing = [key for key in due if key not in state and not _ignored(key)]
    unexpected = [key for key in state if key not in due and not _ignored(key)]
    misshaped = {
        key: (tuple(state[key].shape), tuple(due[key].shape))
        for key in due
        if key in state and isinstance(due[key], torch.Tensor) and state[key].shape != due[key].shape
    }
    if missing or unexpected or misshaped:
        raise WeightsMismatchError(message, missing=missing, unexpected=unexpected, misshaped=misshaped, file=file)


def assign(state: State, module: nn.Module) -> None:
    """Makes a checked state dict a module's own tensors, without copying them."""
    every = sum(1 for _ in module.named_parameters(remove_duplicate=False))
    tied = every != sum(1 for _ in module.parameters())
    # Assigning would untie parameters that the module shares; then copy instead.
    module.load_state_dict(state, strict=False, assign=not tied)


def differ(state: State, folder: Path, name: str) -> bool | None:
    """Whether a checkpoint elsewhere has other weights than `state`; None where it cannot be read safely."""
    try:
        other = read(folder, name)
    except (CorruptFileError, UnsafeFileError):
        return None
    return state.keys() != other.keys() or any(not torch.equal(state[key], other[key]) for key in state)
