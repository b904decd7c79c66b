"""``saved_model.pth``: a Checkpointer's file, written once, read as tensors and nothing else."""

from __future__ import annotations

import os
import pickle  # for its error class alone
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from bentoml_detectron.artifact import files, pickles
from bentoml_detectron.errors import CorruptFileError, UnsafeFileError, WeightsMismatchError

WEIGHTS = "saved_model.pth"
PICKLE_LIMIT = 8 << 20
"""Most bytes for a checkpoint's structure (names and shapes, without the values); R50's has 60 KB."""
_OPCODES = pickles.COMMON | {"BINPERSID"}
_NAMES = {
    ("collections", "OrderedDict"),
    ("collections", "Counter"),  # in the schedulers of training checkpoints
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}

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
    _check_archive(folder, name)
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
            label = key[:200] if isinstance(key, str) else type(key).__name__
            raise UnsafeFileError(f"{name} in {folder}: {label!r} is {problem}", file=name, value=label)
    return state


def _check_archive(folder: Path, name: str) -> None:
    """Refuses what unpacks to more than it is, and a structure that would do more than make tensors."""
    with open(files.open_inside(folder, name), "rb") as file:  # noqa: PTH123 (a descriptor, not a path)
        try:
            _check_layout(file)
            with zipfile.ZipFile(file) as archive:
                structure = _structure(archive, name)
        except UnsafeFileError:
            raise
        except Exception as exc:
            raise CorruptFileError(f"{name} in {folder} is no checkpoint of PyTorch 1.6 or later: {exc}", file=name) from exc
    try:
        pickles.check(structure, name, _OPCODES, lambda m, n: (m, n) in _NAMES or (m == "torch" and n.endswith("Storage")))
    except (IndexError, KeyError, ValueError) as exc:
        raise CorruptFileError(f"{name} in {folder} has a structure that is no pickle: {exc!r}", file=name) from exc


def _structure(archive: zipfile.ZipFile, name: str) -> bytes:
    structures = []
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise UnsafeFileError(f"{name} holds compressed data", file=name, value=member.filename)
        if "/code/" in member.filename:
            raise UnsafeFileError(f"{name} is a TorchScript archive, which holds code", file=name)
        if member.filename.endswith(".pkl"):
            structures.append(member)
    if len(structures) != 1 or structures[0].file_size > PICKLE_LIMIT:
        raise UnsafeFileError(f"{name} has {len(structures)} pickles, or one over {PICKLE_LIMIT:,} bytes", file=name)
    return archive.read(structures[0])


def _check_layout(file: IO[bytes]) -> None:
    """Requires that an archive ends with its one directory, as PyTorch writes it.

    Python looks for the directory right before the end record, PyTorch where the end record says. An archive with two would be
    checked by one and loaded by the other.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 98, 0))
    tail = file.read()
    signature, *_, length, offset, comment = struct.unpack("<4s4H2LH", tail[-22:])
    ends_at = size - 22
    if tail[-42:-38] == b"PK\6\7":  # PyTorch always writes the 64-bit records too
        record = struct.unpack("<4sQ2H2L4Q", tail[:56])
        ends_at = size - 98
        if record[0] != b"PK\6\6" or struct.unpack("<4sLQL", tail[-42:-22])[2] != ends_at:
            raise ValueError("its 64-bit directory is not where it should be")
        for short, full in ((length, record[8]), (offset, record[9])):
            if short not in (full, 0xFFFFFFFF):
                raise ValueError("its two end records differ")
        length, offset = record[8:]
    if signature != b"PK\5\6" or comment or offset + length != ends_at:
        raise ValueError("its directory is not at its end")


def _problem(key: Any, value: Any) -> str | None:
    """What is wrong with one tensor of a state dict, if anything."""
    if type(key) is not str:
        return "no name"
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}, not a tensor"
    if value.is_nested or value.is_quantized or value.is_conj() or value.is_neg():
        return "no plain tensor"
    if value.layout is not torch.strided or value.device.type != "cpu":
        return f"no plain tensor ({value.layout}, {value.device})"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"of shape {tuple(value.shape)}, for which the file has only {value.untyped_storage().nbytes()} bytes"
    return None


def _ignored(key: str) -> bool:
    """Whether a name may be on one side only, as in Detectron2's own DetectionCheckpointer.

    Pixel statistics and anchors come from the config; some versions of Detectron2 also kept them among the weights. Batches are
    counted for training alone, by FrozenBatchNorm2d in later versions only.
    """
    return key in ("pixel_mean", "pixel_std") or "anchor_generator.cell_anchors" in key or key.endswith(".num_batches_tracked")


def _kind(tensor: torch.Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def check(state: Mapping[str, Any], module: nn.Module, message: str, file: str | None = None) -> None:
    """Checks that a state dict is exactly a module's: every name, every shape.

    Raises:
        WeightsMismatchError: It is not; the error lists what is missing, unexpected and misshaped.
    """
    due = module.state_dict()
    missing = [key for key in due if key not in state and not _ignored(key)]
    unexpected = [key for key in state if key not in due and not _ignored(key)]
    for key in due:
        if key in state and isinstance(due[key], torch.Tensor) and _kind(state[key]) != _kind(due[key]):
            raise WeightsMismatchError(f"{message}: {key} is {state[key].dtype}, should be {due[key].dtype}", file=file)
    misshaped = {
        key: (tuple(state[key].shape), tuple(due[key].shape))
        for key in due
        if key in state and isinstance(due[key], torch.Tensor) and state[key].shape != due[key].shape
    }
    if missing or unexpected or misshaped:
        raise WeightsMismatchError(message, missing=missing, unexpected=unexpected, misshaped=misshaped, file=file)


def assign(state: State, module: nn.Module) -> None:
    """Makes a checked state dict a module's own tensors, without copying them. Parameters that it ties stay tied."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    module.load_state_dict(state, strict=False, assign=True)
    for first, *others in names.values():
        for other in others:
            parent, _, attribute = other.rpartition(".")
            setattr(module.get_submodule(parent), attribute, module.get_parameter(first))


def differ(state: State, folder: Path, name: str) -> bool | None:
    """Whether a checkpoint elsewhere has other weights than `state`; None where it cannot be read safely."""
    try:
        other = read(folder, name)
    except (CorruptFileError, UnsafeFileError):
        return None
    keys, others = ({key for key in names if not _ignored(key)} for names in (state, other))
    return keys != others or any(not torch.equal(state[key], other[key]) for key in keys)
