"""The install script keeps a Detectron2 that is there and stops where it cannot go on. That it installs, the set-up shows."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "tools" / "install_detectron2.py"


def run(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *flags, str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=60)


def test_detectron2_that_is_there_is_kept():
    before = importlib.metadata.version("detectron2")
    result = run()
    assert result.returncode == 0
    assert result.stdout.strip() == f"install_detectron2: found Detectron2 {before}; keeping it"


def test_detectron2_in_a_checkout_is_kept(tmp_path):
    """Importable from a folder, with no distribution metadata."""
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("raise SystemExit('imported')")
    result = run("-S", PYTHONPATH=str(tmp_path))
    assert result.stdout.strip() == "install_detectron2: found Detectron2 without metadata; keeping it"


def test_pytorch_is_needed_first():
    result = run("-I", "-S")
    assert result.returncode == 1
    assert "PyTorch is needed first: pip install torch torchvision" in result.stderr


def test_source_that_changed_is_not_half_repaired(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import install_detectron2

    file = tmp_path / "source.py"
    for text in ("nothing of it", "old old"):
        file.write_text(text)
        with pytest.raises(SystemExit, match="expected 'old' once"):
            install_detectron2.replace_once(file, "old", "new")
        assert file.read_text() == text


def test_download_of_another_content_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import install_detectron2

    monkeypatch.setattr(install_detectron2, "run_pip", lambda *a, **k: (tmp_path / "a.tar.gz").write_bytes(b"other"))
    with pytest.raises(SystemExit, match="SHA-256"):
        install_detectron2.download(tmp_path)


def test_repaired_build_has_the_projects_and_says_what_it_lacks():
    if not importlib.metadata.version("detectron2").endswith("+pure"):
        pytest.skip("this Detectron2 was not built by the script")
    import detectron2.export
    from detectron2 import _C, model_zoo
    from detectron2.projects import deeplab, panoptic_deeplab, point_rend

    assert detectron2.export.TracingAdapter
    assert deeplab.add_deeplab_config
    assert panoptic_deeplab.add_panoptic_deeplab_config
    assert point_rend.add_pointrend_config
    assert Path(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")).is_file()
    with pytest.raises(ImportError, match=r"modulated_deform_conv_forward.*--no-build-isolation"):
        _C.modulated_deform_conv_forward()
