"""Install Detectron2 where there is none.

Detectron2's official install builds C++ from GitHub::

    pip install 'git+https://github.com/facebookresearch/detectron2.git' --no-build-isolation

Where that is possible, do it: this script finds any Detectron2 that is already importable and leaves it alone. Where it is
not (no access to GitHub, no compiler), the Python half of the official v0.6 is on PyPI as the source distribution
``pb1-detectron2``, which lacks the C++ sources and does not build as it is. This script downloads it, checks its digest, makes
the four repairs that it needs to run on today's libraries, builds a wheel named ``detectron2`` and installs that.

What needs the compiled ops (rotated boxes, modulated deformable convolution) raises ``ImportError`` with the official install
line when it is called.

Usage::

    python tools/install_detectron2.py
"""

from __future__ import annotations

import ensurepip
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SDIST = "pb1-detectron2==0.6"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
OFFICIAL_INSTALL = "pip install 'git+https://github.com/facebookresearch/detectron2.git' --no-build-isolation"

PYPROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "detectron2"
version = "0.6+pure"
description = "The Python half of Detectron2 0.6, without its compiled ops"
license = { text = "Apache-2.0" }
requires-python = ">=3.10"
dependencies = [
    "cloudpickle", "fvcore", "hydra-core>=1.1", "iopath", "matplotlib", "omegaconf>=2.1", "Pillow",
    "pycocotools", "tabulate", "termcolor>=1.1", "tqdm", "yacs>=0.1.8",
]

[tool.setuptools.packages.find]
include = ["detectron2*"]

[tool.setuptools.package-data]
"detectron2.model_zoo" = ["configs/**/*.yaml", "configs/**/*.py"]
"""

# The official extension both exports functions and registers the operators of `torch.ops.detectron2`.
COMPILED_OPS_STUB = f'''\
"""Stands for Detectron2's compiled extension, which this build does not have."""

import torch

_CURE = (
    "Detectron2's compiled op '%s' is not in this build, which is pure Python. "
    "Install the official one: {OFFICIAL_INSTALL.replace(chr(34), "")}"
)


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(_CURE % name)


_library = torch.library.Library("detectron2", "DEF")


def _declare(schema):
    name = schema.partition("(")[0]

    def missing(*args):
        raise ImportError(_CURE % name)

    _library.define(schema)
    _library.impl(name, missing, "CompositeExplicitAutograd")


_declare("nms_rotated(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
_declare("box_iou_rotated(Tensor boxes1, Tensor boxes2) -> Tensor")
'''


def say(message: str) -> None:
    print(f"install_detectron2: {message}", flush=True)


def replace_once(path: Path, old: str, new: str) -> None:
    """Replaces text that must occur exactly once, so that a changed source cannot pass half repaired."""
    text = path.read_text()
    if text.count(old) != 1:
        raise SystemExit(f"install_detectron2: expected {old!r} once in {path}, found it {text.count(old)} times")
    path.write_text(text.replace(old, new))


def repair(source: Path) -> None:
    """Makes the unpacked source distribution a pure-Python project that runs on current libraries."""
    package = source / "detectron2"
    # 1. `detectron2._C`, imported at the top of layers/deform_conv.py.
    (package / "_C.py").write_text(COMPILED_OPS_STUB)
    # 2. `pkg_resources`, gone from setuptools >= 81.
    zoo = package / "model_zoo" / "model_zoo.py"
    replace_once(zoo, "import pkg_resources\n", "from importlib.resources import files\n")
    replace_once(
        zoo,
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )',
        'str(files("detectron2.model_zoo") / "configs" / config_path)',
    )
    # 3. `Image.LINEAR`, gone from Pillow 10; BILINEAR is the same filter.
    replace_once(package / "data" / "transforms" / "transform.py", "Image.LINEAR", "Image.BILINEAR")
    # 4. `caffe2`, imported at the top of detectron2.export; its tracing parts do not need it.
    replace_once(
        package / "export" / "__init__.py",
        "from .api import *\n",
        "try:\n    from .api import *\nexcept ImportError:  # needs caffe2, which PyTorch no longer has\n    pass\n",
    )
    # And, for inference with Panoptic-DeepLab: `panopticapi`, which is on GitHub only and needed only to train it.
    replace_once(
        source / "projects" / "Panoptic-DeepLab" / "panoptic_deeplab" / "dataset_mapper.py",
        "from panopticapi.utils import rgb2id\n",
        "\ndef rgb2id(color):\n    from panopticapi.utils import rgb2id\n\n    return rgb2id(color)\n\n",
    )
    # The official setup.py installs these three as detectron2.projects.*; the finder in that package then finds them.
    for project in ("PointRend/point_rend", "DeepLab/deeplab", "Panoptic-DeepLab/panoptic_deeplab"):
        shutil.move(source / "projects" / project, package / "projects" / Path(project).name)
    (source / "setup.py").unlink()
    (source / "setup.cfg").unlink()
    (source / "pyproject.toml").write_text(PYPROJECT)


def run_pip(*arguments: str, pip: str | None = None) -> None:
    command = [sys.executable, *([pip] if pip else ["-m", "pip"]), *arguments]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"install_detectron2: {' '.join(command)} failed:\n{result.stdout}{result.stderr}")


def download(folder: Path) -> Path:
    """Downloads the source distribution and checks its digest.

    The pip that comes with Python does it: newer ones (26.3) refuse this project for an extra that is declared by URL.
    """
    bundled = sorted((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"))
    pip = str(bundled[-1] / "pip") if bundled else None
    run_pip("download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", str(folder), SDIST, pip=pip)
    (archive,) = folder.glob("*.tar.gz")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SDIST_SHA256:
        raise SystemExit(f"install_detectron2: {archive.name} has SHA-256 {digest}, expected {SDIST_SHA256}")
    return archive


def main() -> None:
    if importlib.util.find_spec("detectron2") is not None:
        try:
            version = importlib.metadata.version("detectron2")
        except importlib.metadata.PackageNotFoundError:
            version = "without metadata"
        say(f"found Detectron2 {version}; keeping it")
        return
    if importlib.util.find_spec("torch") is None:
        raise SystemExit("install_detectron2: PyTorch is needed first: pip install torch torchvision")
    with tempfile.TemporaryDirectory(prefix="detectron2-") as temporary:
        folder = Path(temporary)
        say(f"no Detectron2 here; downloading {SDIST}")
        archive = download(folder)
        with tarfile.open(archive) as tar:
            # Python 3.11 before 3.11.4 has no filters; the archive's digest is the known one.
            filters = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extractall(folder / "source", **filters)
        (source,) = (folder / "source").iterdir()
        repair(source)
        say("building and installing the wheel")
        run_pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder / "wheel"), str(source))
        (wheel,) = (folder / "wheel").glob("detectron2-*.whl")
        run_pip("install", str(wheel))
    say("installed Detectron2 0.6 (pure Python)")


if __name__ == "__main__":
    main()
