"""Publishing a folder: `latest` follows the newest, and what goes wrong is undone."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from bentoml_detectron import errors, staging
from support import tree


def put(store: Path, version: str, newer: bool = True) -> Path:
    with staging.staged(store) as scratch:
        content = scratch / "model"
        content.mkdir()
        (content / "file").write_text(version)
        return staging.publish(content, store, "name", version, is_newer=lambda present: newer)


def test_folder_appears_and_latest_names_it(tmp_path):
    store = tmp_path / "models"
    put(store, "one")
    assert tree(store) == {"name": b"<folder>", "name/latest": b"one", "name/one": b"<folder>", "name/one/file": b"one"}
    assert tree(tmp_path / "models.staging") == {"lock": b""}


def test_those_who_share_a_store_share_the_folder_in_which_saves_are_made(tmp_path):
    store = tmp_path / "models"
    store.mkdir()
    store.chmod(0o2775)
    before = os.umask(0o077)
    try:
        put(store, "one")
    finally:
        os.umask(before)
    area = tmp_path / "models.staging"
    assert area.stat().st_mode & 0o7777 == 0o2775
    assert (area / "lock").stat().st_mode & 0o444 == 0o444
    os.utime(area / "lock", (7, 7))
    put(store, "two")
    assert (area / "lock").stat().st_mtime == 7  # only its owner could have touched it


def test_latest_stays_where_the_present_one_is_newer(tmp_path):
    store = tmp_path / "models"
    put(store, "two")
    put(store, "one", newer=False)
    assert (store / "name" / "latest").read_text() == "two"


def test_version_that_exists_is_left_alone(tmp_path):
    store = tmp_path / "models"
    put(store, "one")
    before = tree(store)
    with pytest.raises(errors.SaveError, match="name:one"):
        put(store, "one")
    assert tree(store) == before


def test_failure_after_the_rename_is_undone(tmp_path):
    store = tmp_path / "models"
    put(store, "one")
    before = tree(store)

    def fail(present: Path) -> bool:
        raise OSError(5, "Input/output error")

    with pytest.raises(errors.SaveError, match="Input/output error"), staging.staged(store) as scratch:
        (scratch / "model").mkdir()
        staging.publish(scratch / "model", store, "name", "two", is_newer=fail)
    assert tree(store) == before


def test_failure_before_the_rename_leaves_no_trace(tmp_path):
    store = tmp_path / "models"
    with pytest.raises(KeyError), staging.staged(store) as scratch:
        (scratch / "half").write_text("of a model")
        raise KeyError
    assert tree(store) == {}
    assert tree(tmp_path / "models.staging") == {"lock": b""}


def test_abandoned_folders_are_swept_and_those_in_use_are_not(tmp_path):
    store = tmp_path / "models"
    with staging.staged(store) as in_use:
        abandoned = tmp_path / "models.staging" / "save-abandoned"
        abandoned.mkdir()
        (abandoned / "file").write_text("")
        put(store, "one")
        assert in_use.is_dir()
        assert not abandoned.exists()


def test_threads_of_one_process_do_not_disturb_each_other(tmp_path):
    store = tmp_path / "models"
    threads = [threading.Thread(target=put, args=(store, f"v{i}")) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list((store / "name").glob("v*"))) == 20


def test_store_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(errors.SaveError, match="cannot write next to the model store"),
        staging.staged(tmp_path / "file" / "models"),
    ):
        pass


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT])
@pytest.mark.parametrize("first", [True, False])
def test_failure_after_latest_was_replaced_is_undone(first, number, tmp_path, monkeypatch):
    """`latest` names again what it named before, and is gone where there was none."""
    store = tmp_path / "models"
    if first:
        store.mkdir()
    else:
        put(store, "one")
    before = tree(store)
    synced: list[Path] = []

    def fail_late(folder: Path) -> None:
        synced.append(folder)
        if (store / "name" / "latest").is_file() and (store / "name" / "latest").read_text() == "two":
            raise OSError(number, "it fails")

    monkeypatch.setattr(staging, "sync_folder", fail_late)
    with pytest.raises(errors.SaveError):
        put(store, "two")
    assert len(synced) > 2
    assert tree(store) == before


@pytest.mark.parametrize("latest", [b"\xff\xfe", b"x" * 5000, b"../../elsewhere", b"gone", b""])
def test_latest_that_leads_nowhere_does_not_stop_saving_and_is_mended(latest, tmp_path):
    store = tmp_path / "models"
    put(store, "one")
    (store / "name" / "latest").write_bytes(latest)
    put(store, "two", newer=False)
    assert (store / "name" / "latest").read_text() == "two"


def test_child_that_was_forked_inside_the_lock_does_not_hold_it(tmp_path):
    area = tmp_path / "models.staging"
    area.mkdir()
    with staging._locked(area):
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
    saving = threading.Thread(target=put, args=(tmp_path / "models", "one"), daemon=True)
    saving.start()
    saving.join(10)
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert not saving.is_alive()
    assert (tmp_path / "models" / "name" / "one").is_dir()


def test_store_behind_a_link(tmp_path):
    """The link may lead to another file system; what is staged lies beside what it leads to."""
    (tmp_path / "real").mkdir()
    (tmp_path / "models").symlink_to(tmp_path / "real")
    put(tmp_path / "models", "one")
    assert (tmp_path / "real" / "name" / "one").is_dir()
    assert (tmp_path / "real.staging").is_dir()


@pytest.mark.slow
def test_name_whose_last_version_is_deleted_meanwhile(tmp_path):
    """BentoML removes a name's folder with its last version, and takes no lock for it."""
    store, end, times = tmp_path / "models", threading.Event(), 0

    def remove():
        nonlocal times
        while not end.is_set():
            if times:
                with contextlib.suppress(OSError):  # it has a model, or is gone
                    (store / "name").rmdir()
                    times -= 1

    remover = threading.Thread(target=remove)
    remover.start()
    try:
        for number in range(5):
            times = 3
            shutil.rmtree(put(store, str(number)))
            (store / "name" / "latest").unlink()
    finally:
        end.set()
        remover.join()
