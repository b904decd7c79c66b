"""Makes ``bentoml.detectron`` mean this package after a plain ``import bentoml``.

``bentoml_detectron_plug.pth``, which Python runs when it starts, puts a finder at the head of ``sys.meta_path``. The finder
asks this module about two names. The environment variable ``BENTOML_DETECTRON_PLUG=0`` leaves BentoML's own attribute as it
is. ARCHITECTURE.md, "The plug", explains why this is needed.
"""

import os
from importlib import import_module, util
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

FRAMEWORK = "_bentoml_impl.frameworks.detectron"

_searching = False


def find_spec(name: str) -> ModuleSpec | None:
    """Answers for the finder: where a module is, or None to let the other finders look."""
    if _searching or os.environ.get("BENTOML_DETECTRON_PLUG", "1") == "0":
        return None
    return _framework_spec() if name == FRAMEWORK else _bentoml_spec()


def _bentoml_spec() -> ModuleSpec | None:
    """BentoML's own spec, with one step after its module ran."""
    global _searching
    _searching = True  # in a virtual environment Python runs each .pth file twice, so there may be two finders
    try:
        spec = util.find_spec("bentoml")
    finally:
        _searching = False
    if spec is None or spec.loader is None:
        return spec
    loader: Any = spec.loader
    original = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        # The loader belongs to this one spec: give it its own method back before anything can look.
        vars(loader).pop("exec_module", None)
        original(module)
        module.detectron = _LazyAdapter("bentoml.detectron", "Detectron2 models; see the package bentoml-detectron.")  # type: ignore[attr-defined]

    loader.exec_module = exec_module
    return spec


def _framework_spec() -> ModuleSpec | None:
    """Our adapter's file, also where an editable install leaves it in the source tree, outside BentoML's package."""
    package = util.find_spec("bentoml_detectron")
    if package is None or package.origin is None:
        return None
    file = Path(package.origin).parent.parent / "_bentoml_impl" / "frameworks" / "detectron.py"
    return util.spec_from_file_location(FRAMEWORK, file) if file.is_file() else None


class _LazyAdapter(ModuleType):
    """Stands at ``bentoml.detectron`` until it is first used; importing the adapter puts the module itself there."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module("bentoml.detectron"), name)

    def __dir__(self) -> list[str]:
        return dir(import_module("bentoml.detectron"))
