"""From a saved model to a Detectron2 model on a device, and from a caller's model to what is saved of it."""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bentoml_detectron.artifact import config, lazy, lazy_build, weights
from bentoml_detectron.artifact.folder import Description, SavedModel
from bentoml_detectron.artifact.manifest import Dataset
from bentoml_detectron.errors import (
    DetectronError,
    InvalidArgumentError,
    InvalidModelError,
    UnknownDeviceError,
    UnknownEntryError,
)

# After artifact.config, which says how to install Detectron2 where it is missing.
from detectron2.config import CfgNode  # isort: skip
from detectron2.data.catalog import Metadata  # isort: skip
from detectron2.data.transforms import ResizeShortestEdge  # isort: skip
from detectron2.engine import DefaultPredictor  # isort: skip
from detectron2.modeling import build_model  # isort: skip

logger = logging.getLogger(__name__)

_RANDOM_FILLS: frozenset[Callable[..., Any]] = frozenset(
    [getattr(torch.Tensor, name) for name in ("normal_", "uniform_", "random_", "erfinv_", "exponential_")]
    # These hand themselves to the mode; the others of `nn.init` are seen by the methods that they call.
    + [nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_]
)
_FACTORIES = frozenset([torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn])


class _NoRandomInit(TorchFunctionMode):
    """While it is active in a thread, parameters there are not filled with random numbers.

    Loading replaces every parameter, and the random numbers take longer than all the rest of loading. Buffers are filled as
    always: some are not among the weights.

    It also ends the building of a model that a forged config made endless: after `MAX_CALLS` of PyTorch's functions, or when
    the tensors made are larger than `most_bytes` together.
    """

    MAX_CALLS = 200_000  # the zoo's largest models take some 10,000

    def __init__(self, most_bytes: float) -> None:
        super().__init__()
        self.calls = 0
        self.bytes_left = most_bytes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM_FILLS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, nn.Parameter):
                return tensor
        result = func(*args, **kwargs)
        self.calls += 1
        if func in _FACTORIES:
            self.bytes_left -= result.nbytes
        if self.calls > self.MAX_CALLS or self.bytes_left < 0:
            raise InvalidModelError("the config describes a model that is far larger than its weights")
        return result


def take_apart(checkpointables: object, cfg: object) -> tuple[nn.Module, CfgNode | Mapping[str, Any], bool]:
    """What `save_model` was given, as module, config and whether it is a ``DefaultPredictor``.

    Nothing of the caller's is changed; the config is the caller's own object.

    Raises:
        InvalidArgumentError: (a ``ValueError`` too) Either has the wrong type, or the config is missing.
    """
    if isinstance(checkpointables, DefaultPredictor):
        _check_unchanged(checkpointables)
        return _unwrapped(checkpointables.model), checkpointables.cfg, True
    if not isinstance(checkpointables, nn.Module):
        raise InvalidArgumentError(
            f"'checkpointables' must be a detectron2.engine.DefaultPredictor, or a torch.nn.Module with its config, not "
            f"{type(checkpointables).__name__}",
            value=checkpointables,
        )
    if cfg is None:
        raise InvalidArgumentError("config is required if 'checkpointables' is a torch.nn.Module; pass its CfgNode")
    if not isinstance(cfg, CfgNode):
        lazy.model_node(cfg)
    return _unwrapped(checkpointables), cfg, False


def _check_unchanged(predictor: DefaultPredictor) -> None:
    """Checks that a predictor still does with images what its config says, which is all that is saved of that.

    Raises:
        InvalidArgumentError: It does not.
    """
    shortest, longest = predictor.cfg.INPUT.MIN_SIZE_TEST, predictor.cfg.INPUT.MAX_SIZE_TEST
    resize: Any = getattr(predictor, "aug", None)  # a subclass may have none
    order = getattr(predictor, "input_format", None)
    is_due = type(resize) is ResizeShortestEdge and set(resize.short_edge_length) == {shortest} and resize.max_size == longest
    if resize is not None and not is_due:
        raise InvalidArgumentError(
            f"the predictor's aug differs from its config, whose sizes are {shortest} and {longest}; set INPUT.MIN_SIZE_TEST "
            "and MAX_SIZE_TEST in the config, and create the predictor from it",
            value=resize,
        )
    if order is not None and order != predictor.cfg.INPUT.FORMAT:
        raise InvalidArgumentError(
            f"the predictor's input_format is {order!r}, but its config's is {predictor.cfg.INPUT.FORMAT!r}; set INPUT.FORMAT "
            "in the config, and create the predictor from it",
            value=order,
        )
    if type(predictor).__call__ is not DefaultPredictor.__call__:
        logger.warning(
            "%s overrides __call__, which is not saved; it will be loaded as a plain DefaultPredictor", type(predictor).__name__
        )


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside what runs it on several devices or compiled."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):  # of torch.compile
            module = inner
        else:
            return module


def check_saveable(module: nn.Module, description: Description) -> nn.Module:
    """Checks that what will be saved can be loaded: the config builds, and the module's weights are those it asks for.

    Returns:
        What was built, in evaluation mode, on the module's device and with the module's own tensors as its weights.

    Raises:
        InvalidModelError: It does not, or they are not.
    """
    if any(each.is_meta for each in module.parameters()):
        raise InvalidModelError("the module's weights are on the device 'meta', without values; load its checkpoint first")
    plain, tuples = copy.deepcopy(description.plain), description.tuples

    def build() -> Any:
        if description.kind == "lazy":
            return lazy_build.build(plain, tuples, trusted=lazy_build.targets(plain))
        return build_model(_without_weights(config.from_plain(plain, tuples), torch.device("cpu")))

    with own_random_numbers(torch.device("cpu")):
        rebuilt: nn.Module = build_safely(build).requires_grad_(False)  # tensors that inference mode made cannot have it
    state = module.state_dict()
    names = rebuilt.state_dict().keys()
    inner = next((name for name, child in module.named_children() if names <= child.state_dict().keys()), None)
    message = "the module's weights do not fit its config; save it with the config that it was built with"
    if inner is not None:
        message = f"the model is inside {type(module).__name__}; save its attribute {inner!r}"
    weights.check(state, rebuilt, message)
    weights.assign(state, rebuilt)
    return rebuilt.eval().to(device_of(module))


@contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """The same random numbers each time, on the CPU and this device, and the caller's own afterwards."""
    numbers, states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            torch.default_generator.manual_seed(0)  # torch.manual_seed would seed other devices too
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(0)
            np.random.seed(0)
            random.seed(0)
            yield
        finally:
            random.setstate(numbers)
            np.random.set_state(states)


def class_counts(module: nn.Module) -> tuple[int | None, int | None]:
    """How many classes of things, and of semantic segmentation, a model of Detectron2's has; None where it has no such head."""
    heads = getattr(module, "roi_heads", None)
    things = getattr(module if heads is None else heads, "num_classes", None)
    predictor = getattr(getattr(module, "sem_seg_head", None), "predictor", None)
    stuff = getattr(predictor, "out_channels", None)
    return (things if isinstance(things, int) else None), (stuff if isinstance(stuff, int) else None)


def device_of(module: nn.Module) -> torch.device:
    """Where a module lives, as far as that is one device."""
    return next((tensor.device for tensors in (module.parameters(), module.buffers()) for tensor in tensors),
                torch.device("cpu"))  # fmt: skip


def check_device(device_id: str) -> torch.device:
    """The device of that name, if tensors can live there.

    Raises:
        UnknownDeviceError: They cannot.
    """
    try:
        device = torch.device(device_id)
        torch.empty(1, device=device)
    except Exception as exc:  # each backend fails in its own way
        reason = str(exc).strip().partition("\n")[0]
        raise UnknownDeviceError(
            f"PyTorch has no device {device_id!r} here ({reason}); use 'cpu', or 'cuda:0' with a CUDA build and a GPU",
            value=device_id,
        ) from exc
    if device.type == "meta":
        raise UnknownDeviceError("nothing can run on the device 'meta'; use 'cpu' or 'cuda:0'", value=device_id)
    return device


def load(saved: SavedModel, device_id: str) -> DefaultPredictor | nn.Module:
    """Builds a saved model on a device, in evaluation mode: a ``DefaultPredictor`` or a module, as it was saved.

    Raises:
        InvalidModelError: The config does not build, a file is damaged, or weights and config do not belong together.
        UnknownDeviceError: There is no such device.
    """
    device = check_device(device_id)

    def build() -> Any:
        if not isinstance(saved.cfg, CfgNode):
            return lazy_build.build(saved.cfg, saved.manifest.config_tuples if saved.manifest else (), trusted=saved.trusted)
        cfg = _without_weights(saved.cfg, device)
        return DefaultPredictor(cfg) if saved.is_predictor else build_model(cfg)

    with ThreadPoolExecutor(1, thread_name_prefix="check-weights") as pool:
        checked = pool.submit(saved.check_weights_file)
        # With no weights named, DefaultPredictor leaves its model as it was built.
        most_bytes = 4 * saved.weights_size() + (1 << 30)
        built = build_safely(build, most_bytes)
        try:
            state = weights.read(saved.folder)
        finally:
            checked.result()  # damage explains whatever else is wrong
    module = module_of(built)
    message = f"{weights.WEIGHTS} in {saved.folder} does not fit the model's config"
    weights.check(state, module, message, weights.WEIGHTS)
    saved.warn_of_other_weights(state)
    weights.assign(state, module)
    module.eval()
    if device.type != "cpu":
        module.to(device)
    if saved.is_predictor:
        built.cfg.MODEL.WEIGHTS = str(saved.folder / weights.WEIGHTS)
        if saved.dataset is not None:
            _complete_metadata(built, saved.dataset)
    return built


def module_of(built: DefaultPredictor | nn.Module) -> nn.Module:
    """The module of what `load` gives."""
    module: nn.Module = built.model if isinstance(built, DefaultPredictor) else built
    return module


def _without_weights(cfg: CfgNode, device: torch.device) -> CfgNode:
    """A copy of a config whose model is built on a device and loads nothing."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = str(device)
    cfg.MODEL.WEIGHTS = ""
    return cfg


def build_safely(build: Callable[[], Any], most_bytes: float = math.inf) -> Any:
    """What `build` builds, a module or a predictor, on the CPU; its parameters are left unfilled, for weights to come.

    Raises:
        InvalidModelError: It fails, or makes tensors of more than `most_bytes` together.
        UnknownEntryError: It asks for an entry that no registry has.
    """
    try:
        with _usual_defaults(), _NoRandomInit(most_bytes):
            built = build()
        if not isinstance(module_of(built), nn.Module):
            raise InvalidModelError(f"the config builds a {type(built).__name__}, not a torch.nn.Module")
        return built
    except DetectronError:
        raise
    except KeyError as exc:
        if "registry" in str(exc):
            raise UnknownEntryError(f"{exc.args[0]}; import the module that registers it first", value=exc.args[0]) from exc
        raise InvalidModelError(f"Detectron2 cannot build the model from its config: {exc!r}") from exc
    except Exception as exc:  # a config may be wrong in as many ways as Detectron2 has lines
        raise InvalidModelError(f"Detectron2 cannot build the model from its config: {exc!r}") from exc


@contextmanager
def _usual_defaults() -> Iterator[None]:
    """PyTorch's own: Detectron2 builds on the CPU and in float32 unless the caller has changed them."""
    dtype = torch.get_default_dtype()
    if dtype != torch.float32:
        torch.set_default_dtype(torch.float32)
    try:
        with usual_device():
            yield
    finally:
        if dtype != torch.float32:
            torch.set_default_dtype(dtype)


def usual_device() -> AbstractContextManager[object]:
    """PyTorch's own default device, the CPU, for this thread: what Detectron2 makes elsewhere, it says where."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _complete_metadata(predictor: DefaultPredictor, dataset: Dataset) -> None:
    """Gives a predictor its own class names, whatever this process knows of a dataset with that name."""
    known = getattr(predictor, "metadata", Metadata())  # it has none where the config names no dataset to test on
    predictor.metadata = Metadata(**{**known.as_dict(), **dataset.model_dump(exclude_none=True)})
