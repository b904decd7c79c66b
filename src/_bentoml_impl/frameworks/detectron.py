"""Where BentoML looks for the adapter behind ``bentoml.detectron``: names only, since each import runs this file again."""

from bentoml_detectron import ModelOptions, get, get_runnable, load_model, save_model

__all__ = ["ModelOptions", "get", "get_runnable", "load_model", "save_model"]
