"""`save_model`, `load_model`, `load_predictor` and `get`, over BentoML's model store."""

from __future__ import annotations

import copy
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import bentoml
import cloudpickle
from bentoml import Model, Tag
from bentoml.exceptions import NotFound

from bentoml_detectron import imports, records
from bentoml_detectron.artifact import code, files, manifest
from bentoml_detectron.errors import (
    CorruptFileError,
    DetectronError,
    InvalidArgumentError,
    InvalidModelError,
    ModelNotFoundError,
    SaveError,
)
from bentoml_detectron.staging import check_free, publish, staged

# BentoML's adapters, its own and those of other distributions, all build on these.
from bentoml._internal.configuration.containers import BentoMLContainer  # isort: skip

if TYPE_CHECKING:
    from bentoml._internal.models.model import ModelInfo, ModelSignaturesType
    from detectron2.config import CfgNode
    from detectron2.engine import DefaultPredictor
    from torch import Tensor, nn

    from bentoml_detectron.artifact.folder import Description, SavedModel
    from bentoml_detectron.artifact.manifest import Dataset, SelfTest
    from bentoml_detectron.engines import Precision
    from bentoml_detectron.engines.int8 import Calibration
    from bentoml_detectron.images import Limits
    from bentoml_detectron.predictor import Predictor

logger = logging.getLogger(__name__)


def get(tag_like: str | Tag) -> Model:
    """Gets a saved Detectron2 model from BentoML's model store, without loading it.

    Args:
        tag_like: A tag such as ``"mask_rcnn:latest"``, or a name alone, which means the latest version.

    Raises:
        ModelNotFoundError: (``bentoml.exceptions.NotFound``) There is no such model, or another framework saved it.
        InvalidArgumentError: (``ValueError``) `tag_like` is no tag.
        CorruptFileError: Its record is damaged.
    """
    tag = records.check_tag(tag_like)
    tag = Tag(tag.name, tag.version)  # BentoML writes the version that it found into the tag that it is given
    try:
        model: Model = bentoml.models.get(tag, _model_store=records.Store(BentoMLContainer.model_store_dir.get()))
    except NotFound as exc:
        raise ModelNotFoundError(str(exc), value=str(tag_like)) from exc
    except (DetectronError, Warning, ImportError):
        raise
    except Exception as exc:  # a damaged record fails in BentoML in whatever way its bytes lead to
        raise CorruptFileError(f"BentoML cannot read {records.RECORD} of {tag_like}: {exc!r}", file=records.RECORD) from exc
    records.check_framework(model)
    return model


def resolve(bento_model: str | Tag | Model) -> Model:
    """The saved model itself, of its tag or as it is; errors as in `get`."""
    if isinstance(bento_model, Model):
        records.check_framework(bento_model)
        return bento_model
    return get(bento_model)


def load_model(
    bento_model: str | Tag | Model,
    device_id: str = "cpu",
    *,
    trust_remote_code: bool = False,
    trusted: Sequence[str] = (),
) -> DefaultPredictor | nn.Module:
    """Loads a saved model from its stored weights.

    Nothing is unpickled and nothing is fetched: the config is read as plain data, the weights as tensors. They are mapped into
    memory, so that processes on one machine share them until one writes to its copy.

    Args:
        bento_model: The model, or its tag, in BentoML's model store.
        device_id: Where the model shall live: ``"cpu"``, ``"cuda"``, ``"cuda:0"``.
        trust_remote_code: Whether to import the source that the model brings along (`save_model`'s `external_modules`).
        trusted: Installed modules, or packages above them, that may be imported because the model names them:
            ``["my_package.backbones"]``. Detectron2's own always may.

    Returns:
        A ``detectron2.engine.DefaultPredictor`` if one was saved, else the ``torch.nn.Module``; in evaluation mode, on that
        device. A predictor's ``cfg.MODEL.WEIGHTS`` is the stored file.

    Raises:
        ModelNotFoundError: (``bentoml.exceptions.NotFound``) There is no such model, or another framework saved it.
        InvalidArgumentError: (``ValueError``) `bento_model` is no tag.
        UnknownDeviceError: (``ValueError``) PyTorch has no such device here.
        InvalidModelError: A file is damaged, unsafe or missing, or weights and config do not belong together.
        UntrustedCodeError: The model needs code that is not trusted.
        UnknownEntryError: Its config names a registry entry that is not there.
        DetectronMissingError: (``bentoml.exceptions.MissingDependencyException``) Detectron2 is not installed.

    Example::

        predictor = bentoml.detectron.load_model("mask_rcnn:latest")
        outputs = predictor(image)  # (H, W, 3) uint8, BGR
    """
    saved = open_model(bento_model, trust_remote_code=trust_remote_code, trusted=trusted)
    from bentoml_detectron.model import load

    return load(saved, device_id)


def load_predictor(
    bento_model: str | Tag | Model,
    device_id: str = "cpu",
    *,
    precision: Precision = "fp32",
    trust_remote_code: bool = False,
    trusted: Sequence[str] = (),
    batch: Literal["padded", "exact"] = "padded",
    max_batch_pixels: int | None = None,
    limits: Limits | None = None,
) -> Predictor:
    """Loads a saved model as a `Predictor`: many images a call, encoded or not, and results that leave Python.

    Args:
        bento_model: The model, or its tag, in BentoML's model store; a ``DefaultPredictor`` or a module was saved.
        device_id: As in `load_model`.
        precision: "fp32": results are those of ``DefaultPredictor`` but for rounding: boxes within 0.05 pixels, scores within
            1e-3. "bf16": faster, on processors and GPUs that compute in it. "fp16": for GPUs, older ones too; features over
            65,504 overflow. "int8": faster still, for models that ``bentoml detectron optimize`` has calibrated, on x86
            processors with AVX2. "auto": the fastest of these whose results on a fixed test image match fp32's: at least three
            of four detections, boxes within 2 pixels, scores within 0.04.
        trust_remote_code: As in `load_model`.
        trusted: As in `load_model`.
        batch: "padded": images of one padded shape go through the model together. "exact": each on its own, so that its results
            do not depend, to the last bit, on what else is in the call. See `Predictor`.
        max_batch_pixels: Most pixels in a batch, padding included. None: as many as fit in half of the free memory, on the CPU
            at most 400,000, since larger batches are slower there.
        limits: Size limits for input images. None: 25 megapixels, and 50 MB encoded.

    Returns:
        The predictor.

    Raises:
        InvalidArgumentError: (``ValueError``) An argument is out of range.
        DetectronError: Any other error that `load_model` raises.

    Example::

        predictor = bentoml.detectron.load_predictor("mask_rcnn:latest")
        for found in predictor(["street.jpg", "park.png"], score_threshold=0.6, classes=["person"]):
            print(found.to_json())
    """
    saved = open_model(bento_model, trust_remote_code=trust_remote_code, trusted=trusted)
    return load_both(saved, device_id, precision, batch=batch, max_batch_pixels=max_batch_pixels, limits=limits)[1]


def load_both(saved: SavedModel, device_id: str, precision: Precision, **options: Any) -> tuple[nn.Module, Predictor]:
    """A model as Detectron2 runs it, and its predictor with these options; as `load_predictor`."""
    from bentoml_detectron import engines
    from bentoml_detectron.engines import int8
    from bentoml_detectron.fastest import fastest
    from bentoml_detectron.model import check_device, load, module_of, usual_device
    from bentoml_detectron.predictor import Predictor

    calibration = saved.manifest.calibration if saved.manifest is not None else None
    engines.check(precision, check_device(device_id), is_calibrated=calibration is not None)
    module = module_of(load(saved, device_id))
    others = {str(each.dtype) for each in module.parameters()} - {"torch.float32"}
    if others and (saved.manifest is None or saved.manifest.self_test is None):  # which would tell that it runs so
        raise InvalidModelError(
            f"weights are {', '.join(sorted(others))}, but a predictor's images are float32; save module.float(), and choose a "
            "lower precision when loading (--precision, precision=)",
            value=sorted(others),
        )
    ranges = None if calibration is None else int8.from_plain(calibration)
    with usual_device():
        if precision == "auto":
            chosen = fastest(module, saved.input, ranges)
            view, precision = chosen.model, chosen.precision
        else:
            view = engines.accelerated(module, precision, ranges)
    predictor = Predictor(view, saved.input, saved.dataset, **options)
    predictor.precision = precision
    return module, predictor


def check_precision(bento_model: Model, precision: Precision, device_id: str = "cpu") -> None:
    """Sees to it that a saved model can be computed in a precision on a device here, without loading it.

    Raises:
        InvalidArgumentError: (``ValueError``) It cannot.
        UnknownDeviceError: There is no such device.
        InvalidModelError: Its manifest is damaged.
    """
    with imports.for_less():
        from bentoml_detectron import engines
        from bentoml_detectron.model import check_device

    folder = Path(bento_model.path)
    is_calibrated = (folder / manifest.MANIFEST).is_file() and manifest.read(folder).calibration is not None
    engines.check(precision, check_device(device_id), is_calibrated=is_calibrated)


def check_code(bento_model: Model, *, trust_remote_code: bool, trusted: Sequence[str]) -> None:
    """Sees to it that a saved model's code may be imported, without loading the model; of most models that costs nothing.

    Raises:
        UntrustedCodeError: It may not.
        DetectronError: Any other error that `load_model` raises.
    """
    folder = Path(bento_model.path)
    if not (folder / manifest.MANIFEST).is_file():
        return
    content = manifest.read(folder)
    if (
        content.config == "lazy"
        or content.external_modules
        or any(not each.module.startswith("detectron2.") for each in content.registry_entries)
    ):
        open_model(bento_model, trust_remote_code=trust_remote_code, trusted=trusted)


def class_names(bento_model: Model) -> list[str]:
    """Names of a saved model's classes, of things and stuff, without loading it; none of models that BentoML's adapter saved.

    Raises:
        InvalidModelError: Its manifest is damaged.
    """
    folder = Path(bento_model.path)
    dataset = manifest.read(folder).dataset if (folder / manifest.MANIFEST).is_file() else None
    return [] if dataset is None else [*(dataset.thing_classes or ()), *(dataset.stuff_classes or ())]


def fingerprint(bento_model: Model) -> str:
    """What tells a saved model from another of the same tag: that of its manifest, which has the digests of all its files.

    Models that BentoML's adapter saved have none; of these it is when they were saved.
    """
    folder = Path(bento_model.path)
    if (folder / manifest.MANIFEST).is_file():
        return files.checksum(folder, manifest.MANIFEST)
    return str(bento_model.creation_time)


def open_model(bento_model: str | Tag | Model, *, trust_remote_code: bool = False, trusted: Sequence[str] = ()) -> SavedModel:
    """Finds a saved model and reads all of it but its weights; arguments and errors as in `load_model`."""
    bento_model = resolve(bento_model)
    trusted = code.check_trusted(trusted)
    with imports.for_less():
        from bentoml_detectron import model  # noqa: F401 all that loading needs
        from bentoml_detectron.artifact import folder

    is_predictor = bento_model.info.metadata.get(records.IS_PREDICTOR, True)
    if not isinstance(is_predictor, bool):
        raise CorruptFileError(
            f"{records.RECORD} of {bento_model.tag} says {records.IS_PREDICTOR}: {is_predictor!r}", file=records.RECORD
        )
    path = Path(bento_model.path)
    if bento_model.info.api_version == "v1":
        return folder.open_bentoml_v1(path, is_predictor=is_predictor)
    return folder.open_saved(path, is_predictor=is_predictor, trusted=trusted, trust_remote_code=trust_remote_code)


def save_model(
    name: Tag | str,
    checkpointables: DefaultPredictor | nn.Module,
    config: CfgNode | Mapping[str, Any] | None = None,
    *,
    signatures: ModelSignaturesType | None = None,
    labels: dict[str, str] | None = None,
    custom_objects: dict[str, Any] | None = None,
    external_modules: list[ModuleType] | None = None,
    metadata: dict[str, Any] | None = None,
    self_test: bool = True,
) -> Model:
    """Saves a Detectron2 model, weights and all, to BentoML's model store.

    The model appears in the store whole or not at all. No argument is changed.

    Args:
        name: The model's name, or a tag with a version of your own.
        checkpointables: A ``detectron2.engine.DefaultPredictor``, or a ``torch.nn.Module`` built by Detectron2.
        config: The CfgNode that the module was built with, or its LazyConfig: the ``model`` node, or the whole config, whose
            ``dataloader.test`` gives the size of images and the dataset. Required for a module, ignored for a predictor. Class
            names come from Detectron2's ``MetadataCatalog``: those of the first test or training dataset that has as many in
            this process as the model has classes, or else of the first that has any. Register and load a dataset of your own
            before you save.
        signatures: The model's methods that a legacy runner offers; ``{"__call__": {"batchable": False}}`` unless given.
        labels: BentoML's labels, such as ``{"stage": "dev"}``.
        custom_objects: Python objects to pickle beside the model for `bentoml.Model.custom_objects`; ``"config"`` is set to
            the model's config. This package never reads them back.
        external_modules: Modules that the model needs and that no installed package provides. The source of each one's whole
            top-level package is stored with the model, and imported only by ``load_model(..., trust_remote_code=True)``. As in
            BentoML, they are also pickled by value with the custom objects.
        metadata: BentoML's metadata, such as ``{"box_ap": 0.4}``.
        self_test: Whether to run the model on a small fixed image, to check that the model rebuilt from its config gives the
            same result, and to store that result for `verify`. Skipped for models that need more input than an image. While it
            runs, the module is in evaluation mode and the process-wide random generators are seeded, so do not train in another
            thread.

    Returns:
        The saved model.

    Raises:
        InvalidArgumentError: (``ValueError``) An argument has the wrong type, `name` is no tag, or `config` is missing.
        InvalidModelError: The config does not build a model with these weights, or one that finds something else.
        SaveError: The version exists already, or the disk would not take it.
        DetectronMissingError: (``bentoml.exceptions.MissingDependencyException``) Detectron2 is not installed.

    Example::

        predictor = DefaultPredictor(cfg)
        bento_model = bentoml.detectron.save_model("mask_rcnn", predictor)
    """
    tag = check_new(name)
    if custom_objects is not None and not isinstance(custom_objects, Mapping):
        raise InvalidArgumentError(f"custom_objects must be a dict, not {type(custom_objects).__name__}", value=custom_objects)
    modules = code.check_external(external_modules)
    with imports.for_less():
        from bentoml_detectron.artifact import folder
        from bentoml_detectron.model import check_saveable, class_counts, take_apart

    module, cfg, is_predictor = take_apart(checkpointables, config)
    things, stuff = class_counts(module)
    description = folder.describe(cfg, things, stuff)
    _compare_names(description.dataset, things)
    _warn_of_code(description, [each.__name__ for each in modules])
    if is_predictor and config is not None:
        logger.warning("config is ignored if 'checkpointables' is a DefaultPredictor, which has its own")
    info = records.new(tag, is_predictor, folder.detectron2_version(), signatures, labels, metadata)
    rebuilt = check_saveable(module, description)
    _warn_of_values(module)
    tested = _self_test(module, rebuilt, description) if self_test else None
    del rebuilt
    with _saving(info) as content:
        carried = code.write(content, modules)
        _pickle_objects(content / "custom_objects.pkl", custom_objects or {}, cfg, modules)
        folder.write_parts(content, module, description.plain)
        folder.seal(content, description, is_predictor=is_predictor, external_modules=carried, self_test=tested)
    return get(info.tag)


def save_calibrated(
    bento_model: Model, saved: SavedModel, name: Tag | str, calibration: Calibration, metadata: Mapping[str, Any]
) -> Model:
    """Saves a saved model once more, with what int8 needs; weights, config and all else are the same.

    Args:
        bento_model: The saved model.
        saved: The same, opened.
        name: Of the new one, or a tag with a version.
        calibration: Of its module.
        metadata: What to add to BentoML's metadata.

    Returns:
        The new model.

    Raises:
        InvalidArgumentError: (``ValueError``) `name` is no tag.
        InvalidModelError: BentoML's own adapter saved the model, or a file of it is damaged.
        SaveError: The version exists already, or the disk would not take it.
    """
    from bentoml_detectron.artifact import folder
    from bentoml_detectron.engines import int8

    own = manifest_of(bento_model, saved)
    old = bento_model.info
    info = records.new(
        check_new(name), saved.is_predictor, own.versions["detectron2"], dict(old.signatures), old.labels,
        {**old.metadata, **metadata},
    )  # fmt: skip
    with _saving(info) as content:
        folder.copy_calibrated(saved.folder, content, own, int8.to_plain(calibration))
    return get(info.tag)


def manifest_of(bento_model: Model, saved: SavedModel) -> manifest.Manifest:
    """What a saved model says of itself; InvalidModelError where BentoML's own adapter saved it, which writes no manifest."""
    if saved.manifest is None:
        raise InvalidModelError(
            f"{bento_model.tag} was saved by BentoML's own adapter; load it and save it with bentoml.detectron.save_model",
            value=str(bento_model.tag),
        )
    return saved.manifest


def _compare_names(dataset: Dataset | None, classes: int | None) -> None:
    """Warns where a dataset names more or fewer classes of things than a model has, where that is known."""
    names = (dataset and dataset.thing_classes) or []
    if dataset and names and classes and len(names) != classes:
        logger.warning("the dataset %r names %d classes, but the model has %d", dataset.name, len(names), classes)


def _warn_of_code(description: Description, carried: Sequence[str]) -> None:
    """Warns of code that the model needs and that whoever loads it elsewhere may not have."""
    from bentoml_detectron.artifact import config, lazy_build

    needed = {entry.module: entry.name for entry in description.entries}
    if description.kind == "lazy":
        needed = {module: module for module in lazy_build.untrusted(description.plain)}
    known = ["detectron2", *(name.partition(".")[0] for name in carried)]
    for module in sorted(code.not_installed([each for each in needed if not config.is_trusted(each, known)])):
        name = needed[module]
        where = (
            "this program's own file" if module == "__main__" else f"the module {module}, which no installed package provides"
        )
        cure = "put it into a module of its own, and pass" if module == "__main__" else "pass"
        warnings.warn(
            f"the model needs {name}, which is defined in {where}: elsewhere it cannot be loaded; {cure} "
            "external_modules=[module] to keep its source with the model",
            stacklevel=3,
        )


def _warn_of_values(module: nn.Module) -> None:
    """Warns of weights that are no numbers, as those of a training that diverged: the model finds nothing, or nonsense."""
    wrong = [name for name, each in module.named_parameters() if not _is_finite(each)]
    if wrong:
        warnings.warn(
            f"{len(wrong)} of the model's weights hold NaN or infinity, the first is {wrong[0]}: its training has diverged; "
            "save an earlier checkpoint",
            stacklevel=3,
        )


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are numbers; their sum, which takes less time, is none where one of them is none."""
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def _self_test(module: nn.Module, rebuilt: nn.Module, description: Description) -> SelfTest | None:
    """Records what a module finds, provided that what its config builds finds the same.

    Raises:
        InvalidModelError: It does not.
    """
    from bentoml_detectron import selftest

    try:
        due = selftest.record(module, description.input, description.dataset)
    except Exception as exc:  # whatever the model raises that takes more than an image
        logger.warning("no self-test is recorded: the model does not run on an image alone (%s: %s)", type(exc).__name__, exc)
        return None
    try:
        due, problems = selftest.check_rebuilt(due, rebuilt, description.input, description.dataset)
    except Exception as exc:
        raise InvalidModelError(f"the model built from the config fails where the module does not: {exc!r}") from exc
    if problems:
        raise InvalidModelError(
            f"loaded from its config, the model would give other results: {'; '.join(problems[:5])}. Make the changes to the "
            "module in the config, too, or save it with self_test=False",
            value=problems,
        )
    return due


def _pickle_objects(path: Path, objects: dict[str, Any], cfg: CfgNode | Mapping[str, Any], by_value: list[ModuleType]) -> None:
    """Writes what BentoML's contract asks for and this package never reads."""
    cfg = copy.deepcopy(cfg)
    if hasattr(cfg, "defrost"):
        cfg.defrost()  # BentoML's own adapter sets the device in it
    with _by_value(by_value), path.open("wb") as file:
        cloudpickle.dump({**objects, "config": cfg}, file)


def check_new(name: Tag | str) -> Tag:
    """The tag of a model that is to be saved; InvalidArgumentError where it is none, SaveError where it is there already."""
    tag = records.check_tag(name)
    if tag.version is not None:
        check_free(Path(BentoMLContainer.model_store_dir.get()), tag.name, tag.version)
    return tag


_cloudpickle_lock = threading.Lock()


@contextmanager
def _by_value(modules: list[ModuleType]) -> Iterator[None]:
    registered: list[ModuleType] = []
    with _cloudpickle_lock:  # its register is the process's
        try:
            Model.enter_cloudpickle_context(modules, registered)
            yield
        finally:
            Model.exit_cloudpickle_context(registered)


@contextmanager
def _saving(info: ModelInfo) -> Iterator[Path]:
    """A folder for a new model's files, which has its record; it appears in the store when the block has ended well."""
    store = Path(BentoMLContainer.model_store_dir.get())
    with staged(store) as scratch, _one_error(info.tag):
        content = scratch / "model"
        content.mkdir()
        records.write(content, info)
        yield content
        publish(content, store, info.tag.name, str(info.tag.version), is_newer=lambda path: records.is_newer(info, path))


@contextmanager
def _one_error(tag: Tag) -> Iterator[None]:
    """Turns what can go wrong while the files are written into one of this package's errors."""
    try:
        yield
    except DetectronError:
        raise
    except Exception as exc:
        raise SaveError(f"cannot save {tag}: {type(exc).__name__}: {exc}", value=str(tag)) from exc
