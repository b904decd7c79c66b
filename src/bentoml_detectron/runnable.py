"""BentoML's legacy runner API, for services of BentoML 1.3 and earlier that still run in 1.4."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import bentoml
import numpy as np
from bentoml._internal.models.model import ModelSignature
from bentoml._internal.models.model import PartialKwargsModelOptions as ModelOptions

from bentoml_detectron.errors import InvalidArgumentError
from bentoml_detectron.records import IS_PREDICTOR, check_framework
from bentoml_detectron.store import load_model

if TYPE_CHECKING:
    import torch
    from detectron2.engine import DefaultPredictor

__all__ = ["ModelOptions", "get_runnable"]


def get_runnable(bento_model: bentoml.Model) -> type[bentoml.legacy.Runnable]:
    """The runner's side of a saved model; users call ``bento_model.to_runner()``.

    Each signature becomes a method, run in PyTorch's inference mode, on the GPU where there is one.

    - A predictor's methods take what its own take: an image, (H, W, 3) uint8 in BGR.
    - A module's methods take images as positional arguments, (C, H, W) arrays or tensors in the model's channel order, and
      return one result an image, as the module does.
    - With ``"batchable": True`` a method takes one list or array of such images. BentoML joins the lists of concurrent calls;
      all images go through the model together, and the results come back as a list.

    Args:
        bento_model: A model saved with ``bentoml.detectron``.

    Raises:
        ModelNotFoundError: (``bentoml.exceptions.NotFound``) Another framework saved it.
        InvalidArgumentError: (``ValueError``) It is no model.

    Returns:
        The class; instances load the model, and raise what `load_model` raises. A batchable method that is called with anything
        but one argument raises `InvalidArgumentError`.
    """
    # Registers how BentoML batches tensors and sends them between processes.
    import bentoml._internal.frameworks.common.pytorch

    if not isinstance(bento_model, bentoml.Model):
        raise InvalidArgumentError(f"{bento_model!r} is not a bentoml.Model; pass the result of bentoml.detectron.get",
                                   value=bento_model)  # fmt: skip
    check_framework(bento_model)
    options = bento_model.info.options
    partial_kwargs = options.partial_kwargs if isinstance(options, ModelOptions) else {}
    is_predictor = bool(bento_model.info.metadata.get(IS_PREDICTOR, True))

    class DetectronRunnable(bentoml.legacy.Runnable):
        """Holds the loaded model; see `get_runnable`."""

        SUPPORTED_RESOURCES = ("nvidia.com/gpu", "cpu")
        SUPPORTS_CPU_MULTI_THREADING = True

        def __init__(self) -> None:
            import torch

            super().__init__()
            self.device_id = "cuda" if torch.cuda.is_available() else "cpu"
            self.model = load_model(bento_model, device_id=self.device_id)

    for name, signature in bento_model.info.signatures.items():
        DetectronRunnable.add_method(
            _method(name, signature, is_predictor, partial_kwargs.get(name, {})),
            name=name,
            batchable=signature.batchable,
            batch_dim=signature.batch_dim,
            input_spec=signature.input_spec,
            output_spec=signature.output_spec,
        )
    return DetectronRunnable


def _method(name: str, signature: ModelSignature, is_predictor: bool, fixed: dict[str, Any]) -> Callable[..., Any]:
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        method = getattr(self.model, name)
        kwargs = {**fixed, **kwargs}
        with torch.inference_mode():
            if not is_predictor:
                kwargs = {key: _as_tensor(value, self.device_id) for key, value in kwargs.items()}
                images = _one(args) if signature.batchable else args
                return method([_as_input(image, self.device_id) for image in images], **kwargs)
            if signature.batchable and name == "__call__":
                return self.model.model([_prepared(self.model, image) for image in _one(args)])
            return method(*args, **kwargs)

    return run


def _one(args: tuple[Any, ...]) -> Iterable[Any]:
    if len(args) != 1:
        raise InvalidArgumentError(f"a batchable method takes one list of images, not {len(args)} arguments", value=len(args))
    return args[0]  # type: ignore[no-any-return]


def _as_tensor(value: Any, device: str) -> Any:
    """NumPy arrays become float32 tensors; tensors and arrays go to the device; all else stays."""
    import torch

    if isinstance(value, np.ndarray):
        value = torch.as_tensor(np.ascontiguousarray(value), dtype=torch.float32)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _as_input(image: Any, device: str) -> Any:
    """One image as Detectron2's models take it; a dict is taken to be that already."""
    return image if isinstance(image, dict) else {"image": _as_tensor(image, device)}


def _prepared(predictor: DefaultPredictor, image: np.ndarray[Any, Any]) -> dict[str, torch.Tensor | int]:
    """What ``DefaultPredictor`` makes of an image, (H, W, 3) in BGR, before it calls its model with that one alone."""
    import torch

    if predictor.input_format == "RGB":
        image = image[:, :, ::-1]
    height, width = image.shape[:2]
    resized = predictor.aug.get_transform(image).apply_image(image)
    tensor = torch.as_tensor(np.ascontiguousarray(resized.astype("float32").transpose(2, 0, 1)))
    return {"image": tensor, "height": height, "width": width}
