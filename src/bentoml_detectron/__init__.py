"""Save, load and serve Detectron2 models with BentoML.

``bentoml.detectron`` has the same names. Importing this package imports neither PyTorch nor Detectron2 nor BentoML; each name
imports what it needs when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bentoml_detectron.dataset import Prediction, predict
    from bentoml_detectron.drawing import draw
    from bentoml_detectron.evaluation import Evaluation, compare, evaluate
    from bentoml_detectron.images import Limits
    from bentoml_detectron.predictor import Predictor
    from bentoml_detectron.results import Detections, PanopticSegmentation, Segment
    from bentoml_detectron.runnable import ModelOptions, get_runnable
    from bentoml_detectron.service import Settings, get_service
    from bentoml_detectron.store import get, load_model, load_predictor, save_model
    from bentoml_detectron.verification import VerifyReport, verify

__all__ = [
    "Detections",
    "Evaluation",
    "Limits",
    "ModelOptions",
    "PanopticSegmentation",
    "Prediction",
    "Predictor",
    "Segment",
    "Settings",
    "VerifyReport",
    "compare",
    "draw",
    "errors",
    "evaluate",
    "get",
    "get_runnable",
    "get_service",
    "load_model",
    "load_predictor",
    "predict",
    "save_model",
    "verify",
]
__version__ = "0.1.0"

_HOME = {
    "Detections": "results",
    "Evaluation": "evaluation",
    "Limits": "images",
    "ModelOptions": "runnable",
    "PanopticSegmentation": "results",
    "Prediction": "dataset",
    "Predictor": "predictor",
    "Segment": "results",
    "Settings": "service",
    "VerifyReport": "verification",
    "compare": "evaluation",
    "draw": "drawing",
    "evaluate": "evaluation",
    "get": "store",
    "get_runnable": "runnable",
    "get_service": "service",
    "load_model": "store",
    "load_predictor": "store",
    "predict": "dataset",
    "save_model": "store",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "errors":
        return import_module("bentoml_detectron.errors")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"bentoml_detectron.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
