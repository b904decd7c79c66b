"""Makes ``bentoml.detectron`` after a plain ``import bentoml`` mean this package.

``bentoml_detectron_plug.pth`` imports this module when the interpreter starts, so it must cost next to nothing: it imports
nothing more than ``sys`` and waits at the head of ``sys.meta_path`` for BentoML to be imported. Set the environment variable
``BENTOML_DETECTRON_PLUG=0`` to leave BentoML's own attribute as it is. ARCHITECTURE.md explains why it is needed.
"""

import sys

FRAMEWORK = "_bentoml_impl.frameworks.detectron"


class Plug:
    """A finder that lets everyone else find BentoML and adds one step after its import."""

    searching = False

    def find_spec(self, name, path=None, target=None):
        if name == "bentoml" and not self.searching:
            return self.bentoml_spec()
        if name == FRAMEWORK:
            return self.framework_spec()
        return None

    def bentoml_spec(self):
        from importlib.util import find_spec

        self.searching = True
        try:
            spec = find_spec("bentoml")
        finally:
            self.searching = False
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return spec
        loader = spec.loader
        original = loader.exec_module

        def exec_module(module):
            # The loader belongs to this one spec: give it its own method back before anything can look.
            vars(loader).pop("exec_module", None)
            original(module)
            bind(module)

        loader.exec_module = exec_module
        return spec

    def framework_spec(self):
        # BentoML looks in its own package alone; an editable install leaves our file outside it, in the source tree.
        from importlib.util import find_spec, spec_from_file_location
        from pathlib import Path

        package = find_spec("bentoml_detectron")
        if package is None or package.origin is None:
            return None
        file = Path(package.origin).parent.parent / "_bentoml_impl" / "frameworks" / "detectron.py"
        return spec_from_file_location(FRAMEWORK, file) if file.is_file() else None


def bind(bentoml):
    """Puts a stand-in at ``bentoml.detectron`` that imports the adapter when it is first used."""

    class LazyAdapter(type(sys)):
        def __getattr__(self, name):
            return getattr(load(), name)

        def __dir__(self):
            return dir(load())

    def load():
        from importlib import import_module

        return import_module("bentoml.detectron")  # this sets bentoml.detectron to the module itself

    bentoml.detectron = LazyAdapter("bentoml.detectron", "Detectron2 models; see the package bentoml-detectron.")


def install():
    """Installs the plug once, unless it is switched off; in a virtual environment, Python runs each .pth file twice."""
    from os import environ

    if environ.get("BENTOML_DETECTRON_PLUG", "1") == "0" or any(isinstance(finder, Plug) for finder in sys.meta_path):
        return
    if "bentoml" in sys.modules:
        bind(sys.modules["bentoml"])
    sys.meta_path.insert(0, Plug())
