"""Plain files of a saved model: bounded reads, digests, and names that stay inside."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from pathlib import Path

import xxhash

from bentoml_detectron.errors import CorruptFileError, UnsafeFileError

SMALL = 4 << 20
"""Most bytes that a manifest, a config or a pickled config may have; real ones have some 20 KB."""

_CHUNK = 1 << 20


def open_inside(folder: Path, name: str) -> int:
    """Opens a regular file directly inside a folder for reading and returns its descriptor.

    Links are not followed, and what is no regular file (a pipe, a device) is refused without waiting for it.

    Raises:
        CorruptFileError: The file is not there.
        UnsafeFileError: The name leads elsewhere, or to something that is no regular file.
    """
    if name != os.path.basename(name) or name in ("", ".", ".."):  # noqa: PTH119 (a name, not a path)
        raise UnsafeFileError(f"{name!r} is not a valid file name in a saved model", file=name, value=name)
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CorruptFileError(f"{name} is missing from {folder}; save the model again", file=name) from None
    except OSError as exc:
        # ELOOP: the name is a symbolic link.
        raise UnsafeFileError(f"{name} in {folder} is not a regular file ({exc.strerror})", file=name) from exc
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnsafeFileError(f"{name} in {folder} is not a regular file", file=name)
    return descriptor


def read_small(folder: Path, name: str, limit: int = SMALL) -> bytes:
    """Reads a file of at most `limit` bytes.

    Raises:
        CorruptFileError: The file is not there.
        UnsafeFileError: It is larger, or no regular file.
    """
    with os.fdopen(open_inside(folder, name), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UnsafeFileError(f"{name} in {folder} is larger than {limit:,} bytes", file=name)
    return content


def checksum(folder: Path, name: str) -> str:
    """XXH3-128 of a file, in hexadecimal, in one call that leaves the interpreter to other threads.

    It finds damage at the speed of memory, which SHA-256 does not; it does not stop someone who means to deceive. Neither does
    a SHA-256 that lies beside the file.
    """
    digest = xxhash.xxh3_128()
    with os.fdopen(open_inside(folder, name), "rb") as file:
        if os.fstat(file.fileno()).st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                digest.update(content)
    return digest.hexdigest()


def digests(folder: Path, name: str) -> tuple[str, str]:
    """SHA-256 and XXH3-128 of a file, in hexadecimal, in one reading that takes no memory."""
    secure, fast = hashlib.sha256(), xxhash.xxh3_128()
    buffer = memoryview(bytearray(_CHUNK))
    with os.fdopen(open_inside(folder, name), "rb", buffering=0) as file:
        while length := file.readinto(buffer):
            secure.update(buffer[:length])
            fast.update(buffer[:length])
    return secure.hexdigest(), fast.hexdigest()


def size(folder: Path, name: str) -> int:
    """Size of a file in bytes."""
    descriptor = open_inside(folder, name)
    try:
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def sync(folder: Path) -> None:
    """Makes a folder's files, and the folder itself, durable."""
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Makes a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
