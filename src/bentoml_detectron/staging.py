"""Puts a folder into BentoML's store whole or not at all.

BentoML makes the final folder and copies file after file into it. A reader, a crash or a full disk in between finds or leaves
half a model, which `get` returns, or which breaks `list` for the whole store. Here a model is written beside the store, made
durable, and appears under its final name by one rename. `latest` is replaced by one rename too.

A save that is killed leaves its staging folder. The next save removes it, once no process holds its lock.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bentoml_detectron.artifact.files import sync, sync_folder
from bentoml_detectron.errors import SaveError

_PREFIX = "save-"
_TRIES = 5  # where others remove the folder into which a model is moved
_VERSION = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z")


@contextmanager
def staged(store: Path) -> Iterator[Path]:
    """A new empty folder beside the store, on its file system, which is gone afterwards.

    Args:
        store: BentoML's model store, such as ``~/bentoml/models``.

    Raises:
        SaveError: It cannot be made.
    """
    area = _area(store)
    try:
        store.mkdir(parents=True, exist_ok=True)
        if not area.exists():
            area.mkdir(exist_ok=True)
            area.chmod(store.stat().st_mode & 0o7777)  # whoever may save in the store shares it
        if store.stat().st_dev != area.stat().st_dev:
            raise SaveError(
                f"{store} and {area} are on different file systems, so a model cannot be added to the store atomically; set "
                "BENTOML_HOME to a folder on the same file system as its 'models'",
                value=str(store),
            )
        with _locked(area):
            _sweep(area)
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=area))
            held = _lock(folder, fcntl.LOCK_EX)
    except OSError as exc:
        raise SaveError(f"cannot write next to the model store {store}: {exc}", value=str(store)) from exc
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(held)


def publish(content: Path, store: Path, name: str, version: str, *, is_newer: Callable[[Path], bool]) -> Path:
    """Moves a folder with a finished model into the store.

    Args:
        content: The folder, inside one that `staged` gave.
        store: BentoML's model store.
        name: The model's name.
        version: Its version.
        is_newer: Given the folder of the present latest version, whether the new one is at least as new.

    Returns:
        The model's folder in the store.

    Raises:
        SaveError: The version exists, or the store cannot take it; then nothing of it is there.
    """
    final = store / name / version
    try:
        sync(content)
        with _locked(_area(store)):
            check_free(store, name, version)
            for left in reversed(range(_TRIES)):
                final.parent.mkdir(exist_ok=True)
                try:
                    _move_in(content, final, is_newer)
                    break
                except BaseException as exc:
                    with suppress(OSError):
                        final.parent.rmdir()  # succeeds only where this save made it
                    # BentoML removes a name's folder with its last version, and holds no lock.
                    if not (isinstance(exc, FileNotFoundError) and left):
                        raise
    except OSError as exc:
        raise SaveError(f"cannot put {name}:{version} into the model store {store}: {exc}", value=str(final)) from exc
    return final


def check_free(store: Path, name: str, version: str) -> None:
    """Checks that a version is not in the store, which spares the work on what could not be put there.

    Raises:
        SaveError: It is.
    """
    final = store / name / version
    if final.exists():
        raise SaveError(f"{name}:{version} is already in the model store; give a new version", value=str(final))


def _move_in(content: Path, final: Path, is_newer: Callable[[Path], bool]) -> None:
    """Renames a folder to its final name and points `latest` to it; undoes both if either fails."""
    latest = final.parent / "latest"
    before = latest.read_bytes() if latest.is_file() else None
    content.rename(final)
    try:
        sync_folder(final.parent.parent)
        sync_folder(final.parent)
        _point_latest(content.parent, final, is_newer)
    except BaseException:
        final.rename(content)
        if before is None:
            latest.unlink(missing_ok=True)
        else:
            (content.parent / "before").write_bytes(before)
            (content.parent / "before").replace(latest)
        raise


def _point_latest(scratch: Path, final: Path, is_newer: Callable[[Path], bool]) -> None:
    latest = final.parent / "latest"
    present = latest.read_bytes()[:100].decode("ascii", "replace").strip() if latest.is_file() else ""
    if _VERSION.match(present) and (final.parent / present).is_dir() and not is_newer(final.parent / present):
        return
    new = scratch / "latest"
    new.write_text(final.name)
    sync(scratch)
    new.replace(latest)
    sync_folder(final.parent)


def _area(store: Path) -> Path:
    store = store.resolve()  # a link may lead to another file system
    return store.with_name(f"{store.name}.staging")


@contextmanager
def _locked(area: Path) -> Iterator[None]:
    """Holds the one lock of a store. It is held for a few renames, never while weights are written."""
    path = area / "lock"
    if not path.exists():
        path.touch()
        path.chmod(0o644)  # to be read, and so locked, by all who may come here
    held = _lock(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        _unlock(held)


def _lock(path: Path, kind: int) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, kind)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _unlock(descriptor: int) -> None:
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone leaves it to a child that was forked meanwhile
    os.close(descriptor)


def _sweep(area: Path) -> None:
    """Removes what killed saves left: staging folders that nobody holds."""
    for folder in area.glob(f"{_PREFIX}*/"):
        try:
            held = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its save goes on
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(held)
