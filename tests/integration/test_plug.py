"""``bentoml.detectron`` is this package, both after ``import bentoml`` and by ``import bentoml.detectron``."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import run_python

SAYS = "print(bentoml.detectron.save_model.__module__)"


def test_after_a_plain_import():
    assert run_python(f"import bentoml; {SAYS}").stdout.strip() == "bentoml_detectron.store"


@pytest.mark.slow
def test_by_its_own_import():
    assert run_python(f"import bentoml.detectron; {SAYS}").stdout.strip() == "bentoml_detectron.store"
    assert run_python("from bentoml.detectron import get; print(get.__module__)").stdout.strip() == "bentoml_detectron.store"
    assert run_python(f"from bentoml import detectron as d; {SAYS.replace('bentoml.detectron', 'd')}").stdout.strip() == (
        "bentoml_detectron.store"
    )


def test_attribute_becomes_the_module_when_it_is_used():
    code = """
import sys, bentoml
assert "bentoml_detectron.store" not in sys.modules
first = bentoml.detectron
assert "load_model" in dir(first)
assert first.save_model is bentoml.detectron.save_model
assert type(bentoml.detectron) is type(sys) and bentoml.detectron is not first
"""
    run_python(code)


@pytest.mark.slow
def test_no_deprecation_warning():
    """BentoML warns whoever uses its own adapter; whoever uses this one is not warned."""
    code = "import warnings; warnings.simplefilter('always')\nimport bentoml; bentoml.detectron.save_model"
    assert "deprecated" not in run_python(code).stderr
    off = run_python(code, BENTOML_DETECTRON_PLUG="0")
    assert "`bentoml.detectron` is deprecated" in off.stderr


@pytest.mark.slow
def test_off_switch_leaves_bentoml_as_it_is():
    off = run_python(f"import bentoml; {SAYS}", BENTOML_DETECTRON_PLUG="0")
    assert off.stdout.strip() == "bentoml._internal.frameworks.detectron"
    # BentoML's own place for adapters of other distributions still works.
    off = run_python(f"import bentoml.detectron; {SAYS}", BENTOML_DETECTRON_PLUG="0")
    assert off.stdout.strip() == "bentoml_detectron.store"


@pytest.mark.slow
def test_plug_changes_nothing_else_of_bentoml():
    code = """
import sys, bentoml, importlib, importlib.resources
assert type(bentoml.__spec__.loader).__name__ == "SourceFileLoader"
assert "exec_module" not in vars(bentoml.__loader__)
assert importlib.resources.files("bentoml").joinpath("exceptions.py").is_file()
importlib.reload(bentoml)
print(bentoml.detectron.get.__module__, bentoml.sklearn.__name__)
"""
    assert run_python(code).stdout.split()[0] == "bentoml_detectron.store"


def test_starting_python_imports_nothing():
    """The line that runs at each start names the plug's module, which is imported with BentoML and not before."""
    modules = set(run_python("import sys; print(*sys.modules)").stdout.split())
    assert "_bentoml_detectron_plug" not in modules
    assert "BentoMLDetectronPlug" in run_python("import sys; print(sys.meta_path)").stdout
    packages = Path(importlib.util.find_spec("_bentoml_detectron_plug").origin).parent
    line = (packages / "bentoml_detectron_plug.pth").read_text().splitlines()[-1]
    code = f"import sys; before = set(sys.modules); exec({line!r}); print(set(sys.modules) - before)"
    assert subprocess.check_output([sys.executable, "-I", "-S", "-c", code], text=True).strip() == "set()"


def test_model_record_leads_here():
    """BentoML imports a model's framework by the name in its record."""
    code = "import importlib; print(importlib.import_module('bentoml.detectron').get_runnable.__module__)"
    assert run_python(code).stdout.strip() == "bentoml_detectron.runnable"


@pytest.mark.slow
def test_editable_install_is_plugged_too(tmp_path):
    """In a virtual environment of its own that sees this one's packages."""
    root = Path(__file__).resolve().parent.parent.parent
    shutil.copytree(root / "src", tmp_path / "project" / "src")
    shutil.copytree(root / "docs", tmp_path / "project" / "docs")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path / "project" / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(
        subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip()
    )
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", str(site), "-e", "."],
        cwd=tmp_path / "project",
        check=True,
        capture_output=True,
    )
    here = subprocess.check_output([sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    # Its packages, without its .pth files, which would plug the other install in.
    code = f"import sys; sys.path.append({here.strip()!r}); import bentoml; {SAYS}; print(bentoml.detectron.__file__)"
    lines = subprocess.check_output([python, "-c", code], text=True, cwd=tmp_path).split()
    assert lines[0] == "bentoml_detectron.store"
    assert Path(lines[1]).is_relative_to(tmp_path / "project" / "src")
