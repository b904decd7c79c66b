"""Imports PyTorch and Detectron2 in six tenths of the usual time; each process that loads a model begins with it."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

from bentoml_detectron.errors import NO_DETECTRON2, DetectronMissingError

_UTILITIES = "torch._dynamo.utils"


@contextmanager
def for_less() -> Iterator[None]:
    """For imports of PyTorch and Detectron2: what neither needs yet is put off (``benchmarks/bench_import.py``).

    Python's garbage collector rests meanwhile. They make a great many objects, all of which stay, and it looks through them
    again and again.

    PyTorch's compiler is not imported with torchvision, of which Detectron2 needs operators, but when something is first asked
    of it. torchvision imports it for one function, which says whether the compiler is there, and which it calls where its
    operators are missing or, on GPUs, where deterministic ones are asked for. What is already imported stays as it is.

    Raises:
        DetectronMissingError: (``bentoml.exceptions.MissingDependencyException``) PyTorch or Detectron2 is not installed.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        _import_torchvision()
        yield
    except ModuleNotFoundError as exc:
        if exc.name not in ("torch", "torchvision", "detectron2"):
            raise
        raise DetectronMissingError(NO_DETECTRON2) from exc
    finally:
        if was_enabled:
            gc.enable()


class _Utilities(ModuleType):
    """Stands for ``torch._dynamo.utils``, which it imports when something is asked of it."""

    def is_compile_supported(self, device_type: Any) -> Any:
        return _real().is_compile_supported(device_type)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of Python's own, which looks for some in each module
            raise AttributeError(name)
        return getattr(_real(), name)


def _real() -> ModuleType:
    if isinstance(sys.modules.get(_UTILITIES), _Utilities):
        del sys.modules[_UTILITIES]
    return importlib.import_module(_UTILITIES)


def _import_torchvision() -> None:
    if "torchvision" in sys.modules or _UTILITIES in sys.modules:
        return
    sys.modules[_UTILITIES] = utilities = _Utilities(_UTILITIES)
    try:
        # Where it is missing Detectron2 says so, or this package says it of Detectron2.
        with suppress(ImportError):
            importlib.import_module("torchvision")
    finally:
        if sys.modules.get(_UTILITIES) is utilities:
            del sys.modules[_UTILITIES]
