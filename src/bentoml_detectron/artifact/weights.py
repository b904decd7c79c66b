"""``saved_model.pth``: written by Checkpointer, read as tensors and nothing else, as are checkpoints from elsewhere."""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import sys
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
_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
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

    It does what ``torch.load(weights_only=True, mmap=True)`` does, for state dicts alone, faster, and with bounds on all that a
    file says.

    Returns:
        CPU tensors by name, on a private mapping: writing to them does not write to the file.

    Raises:
        CorruptFileError: The file is missing, cut short or no checkpoint.
        UnsafeFileError: It holds something else than plain tensors that it has the bytes for.
    """
    checkpoint = _checkpoint(folder, name)
    state = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        raise CorruptFileError(f"{name} in {folder} is not a checkpoint: it has no 'model'", file=name)
    _check_tensors(state, folder, name)
    return state


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint from elsewhere as `read` does: one of Detectron2's training, or a state dict alone.

    Returns:
        ``"model"``, a state dict, and what else is in the file, such as the optimizer's state: plain values and tensors.

    Raises:
        CorruptFileError: As in `read`.
        UnsafeFileError: As in `read`.
    """
    checkpoint = _checkpoint(path.parent, path.name)
    if not isinstance(checkpoint, dict):
        raise CorruptFileError(f"{path} must hold a state dict, not {type(checkpoint).__name__}", file=path.name)
    if "model" not in checkpoint:
        checkpoint = {"model": checkpoint}
    if not isinstance(checkpoint["model"], dict):
        raise CorruptFileError(f"{path} is not a checkpoint: its 'model' is not a state dict", file=path.name)
    _check_tensors(checkpoint["model"], path.parent, path.name)
    return checkpoint


def _checkpoint(folder: Path, name: str) -> Any:
    with open(files.open_inside(folder, name), "rb") as file:  # noqa: PTH123 (a descriptor, not a path)
        try:
            _check_layout(file)
            with zipfile.ZipFile(file) as archive:
                structure, records = _members(archive, file, name)
                mapped = torch.UntypedStorage.from_file(str(folder / name), False, file.seek(0, os.SEEK_END))
            pickles.check(structure, name, _OPCODES, lambda module, symbol: (module, symbol) in _KNOWN)
            checkpoint = _Reader(structure, mapped, records).load()
        except UnsafeFileError:
            raise
        except _NotPlainError as exc:
            raise UnsafeFileError(f"{name} in {folder} holds {exc}", file=name) from exc
        except Exception as exc:  # a damaged file fails in whatever way its bytes lead to
            raise CorruptFileError(
                f"{name} in {folder} is not a checkpoint of PyTorch 1.6 or later: {exc!r}", file=name
            ) from exc
    return checkpoint


def _check_tensors(state: dict[Any, Any], folder: Path, name: str) -> None:
    for key, value in state.items():
        if type(key) is not str or not isinstance(value, torch.Tensor):
            label = key[:200] if isinstance(key, str) else type(key).__name__
            raise UnsafeFileError(f"{name} in {folder}: {label!r} must be a tensor, not {type(value).__name__}", file=name)


def _members(archive: zipfile.ZipFile, file: IO[bytes], name: str) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The structure of a checkpoint, and where each of its records of values starts and how long it is, in bytes."""
    structures, records = [], {}
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise UnsafeFileError(f"{name} holds compressed data", file=name, value=member.filename)
        _, _, inner = member.filename.partition("/")
        if inner.startswith("code/"):
            raise UnsafeFileError(f"{name} is a TorchScript archive, which holds code", file=name)
        if inner.endswith(".pkl"):
            structures.append(member)
        elif inner == "byteorder" and archive.read(member) != sys.byteorder.encode():
            raise ValueError("it was written on a machine with a different byte order")
        elif inner.startswith("data/"):
            file.seek(member.header_offset)
            header = struct.unpack("<4s5H3L2H", file.read(30))
            start = member.header_offset + 30 + header[-2] + header[-1]
            records[inner[5:]] = start, member.file_size
    if len(structures) != 1 or structures[0].file_size > PICKLE_LIMIT:
        raise UnsafeFileError(
            f"{name} has {len(structures)} pickles; it must have one, of at most {PICKLE_LIMIT:,} bytes", file=name
        )
    return archive.read(structures[0]), records


class _NotPlainError(Exception):
    """Something in a checkpoint is no plain tensor."""


class _State(dict):  # type: ignore[type-arg]
    """Stands for an OrderedDict; of its attributes it keeps the modules' versions, which `load_state_dict` looks at."""

    _metadata: dict[str, dict[str, int]] | None = None

    def __setstate__(self, state: Any) -> None:
        metadata = state.get("_metadata") if isinstance(state, dict) else None
        if isinstance(metadata, dict):
            self._metadata = {
                prefix: {"version": local["version"]}
                for prefix, local in metadata.items()
                if isinstance(prefix, str) and isinstance(local, dict) and type(local.get("version")) is int
            }


class _Values:
    """A record of values that a tensor may be a view of."""

    def __init__(self, values: torch.UntypedStorage, dtype: torch.dtype) -> None:
        self.values, self.dtype = values, dtype


def _tensor(
    record: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = None, hooks: Any = None, metadata: Any = None
) -> torch.Tensor:
    """Stands for ``torch._utils._rebuild_tensor_v2``: a view of a record that the record has the bytes for."""
    if not isinstance(record, _Values) or metadata:
        raise _NotPlainError("something other than a plain tensor")
    numbers = (offset, *size, *stride)
    if any(type(number) is not int or not 0 <= number < 2**48 for number in numbers) or len(size) != len(stride):
        raise _NotPlainError(f"a tensor of size {size} and stride {stride}")
    available = record.values.nbytes() // record.dtype.itemsize
    count = math.prod(size)
    if count > available or (count and offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= available):
        raise _NotPlainError(f"a tensor of shape {tuple(size)}, for which the file has only {record.values.nbytes()} bytes")
    return torch.empty(0, dtype=record.dtype, device="cpu").set_(record.values, offset, size, stride)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
    """Stands for ``torch._utils._rebuild_parameter``: the tensor in it."""
    return data


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _State,
    ("collections", "Counter"): dict,  # in the schedulers of training checkpoints
    ("torch._utils", "_rebuild_tensor_v2"): pickles.Inert(_tensor),
    ("torch._utils", "_rebuild_parameter"): pickles.Inert(_parameter),
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}


class _Reader(pickle.Unpickler):
    """Builds a checkpoint from its checked structure; knows the names above, and gives for each a thing of this module."""

    def __init__(self, structure: bytes, mapped: Any, records: dict[str, tuple[int, int]]) -> None:
        super().__init__(io.BytesIO(structure))
        self.mapped, self.records = mapped, records
        self.seen: dict[str, _Values] = {}

    def find_class(self, module: str, name: str) -> Any:
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> _Values:
        _, dtype, key, *_ = pid
        if key not in self.seen:
            start, length = self.records[key]
            if not isinstance(dtype, torch.dtype) or start % dtype.itemsize or start + length > self.mapped.nbytes():
                raise _NotPlainError(f"the invalid record {key!r}")
            self.seen[key] = _Values(self.mapped[start : start + length], dtype)
        if self.seen[key].dtype != dtype:
            raise _NotPlainError(f"the record {key!r} with two different dtypes")
        return self.seen[key]


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
            raise ValueError("its zip64 directory is not where it should be")
        for short, full in ((length, record[8]), (offset, record[9])):
            if short not in (full, 0xFFFFFFFF):
                raise ValueError("its two end records differ")
        length, offset = record[8:]
    if signature != b"PK\5\6" or comment or offset + length != ends_at:
        raise ValueError("its directory is not at its end")


def is_optional(key: str) -> bool:
    """Whether the name of a weight may be on one side only, as in Detectron2's own DetectionCheckpointer.

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
    missing = [key for key in due if key not in state and not is_optional(key)]
    unexpected = [key for key in state if key not in due and not is_optional(key)]
    for key in due:
        if key in state and isinstance(due[key], torch.Tensor) and _kind(state[key]) != _kind(due[key]):
            raise WeightsMismatchError(f"{message}: {key} is {state[key].dtype}, but should be {due[key].dtype}", file=file)
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
    keys, others = ({key for key in names if not is_optional(key)} for names in (state, other))
    return keys != others or any(not torch.equal(state[key], other[key]) for key in keys)
