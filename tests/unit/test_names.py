"""The public names, and what importing them brings along."""

from __future__ import annotations

from pathlib import Path

import pytest

import bentoml_detectron
from support import run_python


def test_all_is_what_is_there():
    for name in bentoml_detectron.__all__:
        assert getattr(bentoml_detectron, name) is not None
    assert set(dir(bentoml_detectron)) == {*bentoml_detectron.__all__, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bentoml_detectron.nothing  # noqa: B018


def test_version_is_the_distributions():
    from importlib.metadata import version

    assert version("bentoml-detectron") == bentoml_detectron.__version__


def test_tests_run_against_the_installed_wheel():
    assert "site-packages" in Path(bentoml_detectron.__file__).parts


def test_bentoml_has_the_same_objects():
    import bentoml

    for name in bentoml_detectron.__all__:
        assert getattr(bentoml.detectron, name) is getattr(bentoml_detectron, name)
    assert dir(bentoml.detectron) == sorted(bentoml_detectron.__all__)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import bentoml_detectron", ["torch", "detectron2", "bentoml", "numpy", "pydantic"]),
        ("import bentoml; bentoml.detectron.get", ["torch", "detectron2"]),
        ("import bentoml; bentoml.detectron.load_predictor; bentoml.detectron.verify", ["torch", "detectron2"]),
        ("import bentoml_detectron; bentoml_detectron.Detections", ["torch", "detectron2"]),
        ("import bentoml_detectron; bentoml_detectron.draw; bentoml_detectron.Limits", ["torch", "detectron2"]),
        ("import bentoml_detectron; bentoml_detectron.evaluate", ["torch", "detectron2", "pycocotools"]),
        ("import bentoml_detectron; bentoml_detectron.predict; bentoml_detectron.Prediction", ["torch", "pyarrow", "ray", "rich"]),
        ("import bentoml_detectron.cli", ["torch", "detectron2"]),
    ],
)
def test_imports_are_lean(statement, absent):
    code = f"import sys\n{statement}\nprint(sorted(set({absent}) & set(sys.modules)))"
    assert run_python(code).stdout.strip() == "[]"
