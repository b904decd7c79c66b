"""Every test process has a model store of its own, set before BentoML first looks for it."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

_HOME = tempfile.mkdtemp(prefix="bentoml-home-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ["BENTOML_HOME"] = _HOME
os.environ["BENTOML_DO_NOT_TRACK"] = "True"
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session")
def store() -> Path:
    """This process's model store."""
    folder = Path(_HOME) / "models"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def bentoml_home(tmp_path: Path) -> Path:
    """An empty BENTOML_HOME for the processes that a test starts."""
    home = tmp_path / "home"
    (home / "models").mkdir(parents=True)
    return home


@pytest.fixture(scope="session")
def digits_home(tmp_path_factory) -> Path:
    """A BENTOML_HOME with the demo model as ``digits``, for servers; who changes it takes a copy."""
    from servers import SAVE_DEMO
    from support import run_python

    home = tmp_path_factory.mktemp("digits")
    run_python(SAVE_DEMO, BENTOML_HOME=str(home))
    return home


@pytest.fixture(scope="session")
def demo_predictor():
    """The demo model as Detectron2 itself builds and loads it."""
    from bentoml_detectron import demo

    return demo.predictor()


@pytest.fixture(scope="session")
def demo_image():
    """A sample image, (192, 192, 3) uint8 in BGR."""
    import numpy as np
    from PIL import Image

    from bentoml_detectron import demo

    return np.ascontiguousarray(np.asarray(Image.open(demo.images()[0]).convert("RGB"))[:, :, ::-1])


@pytest.fixture
def one_core() -> Iterator[Path]:
    """A control group whose processes get one core's worth of time, on a machine that has more."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one core")
    first, second = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    group = (first if first.is_dir() else second) / f"test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no control group can be made here")
    try:
        try:
            if first.is_dir():
                (group / "cpu.cfs_period_us").write_text("100000")
                (group / "cpu.cfs_quota_us").write_text("100000")
            else:
                (group / "cpu.max").write_text("100000 100000")
        except OSError:
            pytest.skip("time cannot be limited here")
        yield group
    finally:
        with suppress(OSError):
            group.rmdir()
