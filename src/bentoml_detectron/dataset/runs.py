"""A whole run: from sources and a model to outputs that appear whole or not at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import orjson

from bentoml_detectron import __version__
from bentoml_detectron.artifact.code import check_trusted
from bentoml_detectron.artifact.files import sync_folder
from bentoml_detectron.dataset import formats, parts
from bentoml_detectron.dataset.chunks import CHUNK, Clock, check_chunk
from bentoml_detectron.dataset.engine import Engine, Local
from bentoml_detectron.dataset.parts import CHUNKS, FINISHED, PLAN, RESULT, SOURCES, Listing
from bentoml_detectron.dataset.prediction import written
from bentoml_detectron.dataset.sources import Columns, Dataset, Source
from bentoml_detectron.dataset.work import Work
from bentoml_detectron.errors import InvalidArgumentError, OutputError
from bentoml_detectron.images import DEFAULT_LIMITS, Limits
from bentoml_detectron.options import Options, options, plain

if TYPE_CHECKING:
    from bentoml import Model, Tag

    from bentoml_detectron.artifact.manifest import Dataset as Classes
    from bentoml_detectron.engines import Precision

logger = logging.getLogger(__name__)

_CHOSEN = "chosen_precision"  # in a plan


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did.

    Attributes:
        images: How many there are.
        failures: How many of them could not be used.
        resumed: How many an earlier run had done.
        seconds: From the first image of this run to its last, and their parts; with Ray, also until its workers have begun.
        busy: The share of it that the model ran, in [0, 1]; with Ray, the mean of its workers.
    """

    images: int
    failures: int
    resumed: int
    seconds: float
    busy: float


class Progress:
    """Is told how far a run is; this one does nothing with it."""

    def start(self, total: int, done: int) -> None:
        """The run begins; an earlier one has done some of its images."""

    def advance(self, images: int) -> None:
        """So many more images came from the model; with Ray, a chunk of them."""

    def failed(self, message: str) -> None:
        """An image could not be used: "NAME: REASON"."""


def write(
    bento_model: str | Tag | Model,
    source: Source | Iterable[Source],
    outputs: Source | Sequence[Source],
    *,
    errors: Source | None = None,
    resume: bool = False,
    parquet_rows: Literal["detection", "image"] = "detection",
    device_id: str = "cpu",
    precision: Precision = "fp32",
    trust_remote_code: bool = False,
    trusted: Sequence[str] = (),
    limits: Limits | None = None,
    score_threshold: float | None = None,
    classes: Sequence[str | int] | None = None,
    top_k: int | None = None,
    image_root: Source | None = None,
    image_column: str | None = None,
    key_column: str | None = None,
    chunk: int = CHUNK,
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    ray_workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Runs a model over a dataset and writes what it finds; what ``bentoml detectron predict`` does.

    Args:
        bento_model: The model, or its tag, in BentoML's model store.
        source: As in `predict`.
        outputs: One, or several: paths that end with .json (COCO results), .jsonl, .parquet, or with nothing (a folder of
            annotated pictures). They appear when all is done. Nothing may be there.
        errors: Where to write the images that could not be used, as JSON lines.
        resume: Whether to go on with an unfinished run of the same model, sources and options, where there is one.
        parquet_rows: One a "detection", or one an "image".
        device_id: Device to run on, such as "cpu" or "cuda:0".
        precision: See `load_predictor`; what "auto" chooses is kept when a run is resumed.
        trust_remote_code: See `load_model`.
        trusted: See `load_model`.
        limits: Size limits for input images; see `Limits`.
        score_threshold: See `Predictor.__call__`.
        classes: See `Predictor.__call__`.
        top_k: See `Predictor.__call__`.
        image_root: Folder that the file names of an annotation file start from. None: that file's folder.
        image_column: Parquet column with the encoded images. None: "image", or the only column of bytes.
        key_column: Parquet column with the images' names. None: the first of "file_name", "path", "key", "id".
        chunk: Images of which batches are formed, and which a run that is killed may do again.
        engine: "local", this process; or "ray", the workers of a Ray cluster, which share the model store, the images and the
            outputs' folder with this process (docs/scaling.md).
        ray_address: The cluster's "HOST:PORT". None: RAY_ADDRESS in the environment, else the cluster on this machine.
        ray_workers: How many processes load the model; one a GPU, or with `device_id` "cpu" one a node, unless given.
        progress: Is told how far the run is.

    Returns:
        What was done.

    Raises:
        OutputError: An output is there already, belongs to another run, or cannot be written. What is finished is kept.
        InvalidArgumentError: (``ValueError``) An argument is out of range, or a source is none.
        DetectronError: Any other error that `load_predictor` raises; or the cluster is not there, or its workers die again and
            again.
    """
    from bentoml_detectron.store import fingerprint, resolve

    where = _engine(engine, ray_address, ray_workers)
    if classes is not None and (isinstance(classes, (str, bytes)) or not isinstance(classes, Sequence)):
        raise InvalidArgumentError(f"classes is {classes!r}; give a list", value=classes)
    # What the model knows nothing of is checked before it is loaded, and taken as plain values, which can be written.
    wanted = options(None, score_threshold=score_threshold, top_k=top_k)
    files = [(Path(each), formats.named(Path(each), parquet_rows)) for each in _several(outputs)]
    files += [] if errors is None else [(Path(errors), formats.FAILURES)]
    model = resolve(bento_model)
    work = Work(
        model=str(model.tag),
        fingerprint=fingerprint(model),
        device_id=device_id,
        precision=precision,
        trust_remote_code=trust_remote_code,
        trusted=check_trusted(trusted),
        limits=limits or DEFAULT_LIMITS,
        score_threshold=wanted.score_threshold,
        classes=None if classes is None else plain(classes),
        top_k=wanted.top_k,
        image_column=image_column,
        formats=tuple(each for _, each in files),
    )
    work.writers()  # what they need is installed
    paths = [path for path, _ in files]
    with parts.held(paths) as folders:
        dataset = Dataset(source, image_root=image_root, columns=Columns(image_column, key_column), left_out=[*paths, *folders])
        return _Run(work, paths, folders, where, progress or Progress()).do(dataset, check_chunk(chunk), resume)


def _several(outputs: Source | Sequence[Source]) -> Sequence[Source]:
    found = [outputs] if isinstance(outputs, (str, os.PathLike)) else outputs
    if not found:
        raise InvalidArgumentError("no output is given; give at least one path", value=outputs)
    return found


def _engine(name: str, ray_address: str | None, ray_workers: int | None) -> Engine:
    if name == "ray":
        from bentoml_detectron.dataset.on_ray import Ray

        return Ray(ray_address, ray_workers)
    if name != "local":
        raise InvalidArgumentError(f"engine is {name!r}; give 'local' or 'ray'", value=name)
    if ray_address is not None or ray_workers is not None:
        raise InvalidArgumentError(
            "--ray-address and --ray-workers (ray_address, ray_workers) need --engine ray (engine='ray')", value=name
        )
    return Local()


class _Run:
    """One run, whose outputs' folders are held."""

    def __init__(self, work: Work, outputs: list[Path], folders: list[Path], engine: Engine, progress: Progress) -> None:
        self._main = folders[0]
        self._engine = engine
        self._work = replace(work, folder=str(self._main / CHUNKS))
        self._outputs, self._folders, self._progress = outputs, folders, progress

    def do(self, dataset: Dataset, chunk: int, resume: bool) -> Report:
        before, report = self._before(resume)
        if before is None and all(map(os.path.lexists, self._outputs)):
            return Report(0, 0, 0, 0.0, 0.0)  # an earlier run has ended
        listing = Listing(self._main / SOURCES, dataset, chunk)
        if not listing.count:
            raise InvalidArgumentError("there are no images in the sources", value=None)
        plan = self._plan(listing, dataset.categories)
        if before is not None:
            _check_same(before, plan, self._main)
        if report is None:
            report = self._predict(listing, dataset.categories, plan, before)
        with parts.writing(self._main):
            self._publish()
        return report

    def _before(self, resume: bool) -> tuple[dict[str, Any] | None, Report | None]:
        """The plan of the unfinished run of these outputs, and its report if only its outputs have to appear."""
        mark = parts.read_json(self._main / FINISHED)
        before = mark["plan"] if mark else parts.read_json(self._main / PLAN)
        for folder in self._folders[1:]:
            theirs = parts.read_json(folder / PLAN)
            if (theirs and theirs["outputs"] != self._names()) or (folder / FINISHED).exists():
                raise OutputError(
                    f"{str(folder)!r} belongs to an unfinished run with other outputs; finish that run, or delete the folder"
                )
        if before is not None and not resume:
            raise OutputError(
                f"{str(self._main)!r} holds an unfinished run; continue it with --resume (resume=True), or delete the folder",
                value=str(self._main),
            )
        if odd := [str(each) for each in self._outputs if each.exists() and not each.is_file() and not each.is_dir()]:
            raise OutputError(
                f"{', '.join(odd)}: not a regular file or folder, so it cannot be replaced; give another name", value=odd
            )
        there = [str(each) for each in self._outputs if os.path.lexists(each)]
        if there and not mark and not (resume and before is None and len(there) == len(self._outputs)):
            raise OutputError(f"{', '.join(there)}: already exists; delete it, or give another name", value=there)
        return before, Report(**mark["report"]) if mark else None

    def _names(self) -> list[list[str]]:
        paths = [written(str(folder).removesuffix(parts.SUFFIX)) for folder in self._folders]
        return [list(each) for each in zip(paths, self._work.formats, strict=True)]

    def _plan(self, listing: Listing, categories: dict[str, int] | None) -> dict[str, Any]:
        """What has to be the same for a run to go on."""
        skipped = ("formats", "categories", "text_ids", "folder", "max_batch_pixels")
        plan: dict[str, Any] = orjson.loads(
            orjson.dumps(
                {
                    "outputs": self._names(),
                    "version": __version__,
                    "images": listing.count,
                    "sources": listing.digest,
                    "categories": categories,
                    "chunk": listing.size,
                    **{name: value for name, value in asdict(self._work).items() if name not in skipped},
                }
            )
        )
        return plan

    def _predict(
        self, listing: Listing, categories: dict[str, int] | None, plan: dict[str, Any], before: dict[str, Any] | None
    ) -> Report:
        with self._engine as engine:
            work = self._work
            if before is not None:  # what was chosen then
                work = replace(work, max_batch_pixels=before["max_batch_pixels"], precision=before.get(_CHOSEN, work.precision))
            model = engine.model(work)
            ids = None if categories is None else category_ids(model.dataset, model.wanted, categories)
            chosen = {"max_batch_pixels": model.budget, _CHOSEN: model.precision}
            work = replace(
                work, max_batch_pixels=model.budget, precision=model.precision, categories=ids, text_ids=listing.text_ids
            )
            with parts.writing(self._main):
                if before is None:
                    self._begin({**plan, **chosen})
                done, images, failures = parts.finished_chunks(self._main / CHUNKS)
            self._progress.start(listing.count, images)
            clock = Clock()
            left = [number for number in range(listing.chunks) if number not in done]
            with closing(engine.run(work, listing, left, clock, self._progress.advance)) as finished:
                for each in finished:
                    failures += len(each.failures)
                    for message in each.failures:
                        self._progress.failed(message)
            seconds = clock.seconds
        report = Report(listing.count, failures, images, seconds, clock.busy / seconds if seconds else 0.0)
        with parts.writing(self._main):
            self._join(work, listing.chunks)
            parts.write_json(self._main / FINISHED, {"plan": plan, "report": asdict(report)})
        return report

    def _begin(self, plan: dict[str, Any]) -> None:
        (self._main / CHUNKS).mkdir(exist_ok=True)
        for folder in reversed(self._folders):  # the first one's last: it says that all are there
            parts.write_json(folder / PLAN, plan)

    def _join(self, work: Work, count: int) -> None:
        for index, (writer, folder) in enumerate(zip(work.writers(), self._folders, strict=True)):
            result = folder / RESULT
            parts.remove(result)
            writer.join(parts.parts(self._main / CHUNKS, count, index), result)
            parts.sync_tree(result)

    def _publish(self) -> None:
        """Lets the outputs appear; what has appeared before a run was killed is no more in its folder."""
        for output, folder in zip(self._outputs, self._folders, strict=True):
            if os.path.lexists(folder / RESULT):
                if os.path.lexists(output):
                    raise OutputError(
                        f"{str(output)!r} has appeared in the meantime; delete it, then continue with --resume (resume=True)",
                        value=output,
                    )
                (folder / RESULT).rename(output)
                sync_folder(folder.parent)
        for folder in reversed(self._folders):  # the first one's last: its mark says that the outputs are there
            parts.empty(folder)


def _check_same(before: dict[str, Any], plan: dict[str, Any], folder: Path) -> None:
    """Sees to it that an unfinished run is the same one.

    Raises:
        OutputError: It is not.
    """
    changed = [name for name, value in plan.items() if before.get(name) != value]
    other = [f"{name} was {before.get(name)!r:.100}, but is now {plan[name]!r:.100}" for name in changed]
    if other:
        raise OutputError(
            f"the unfinished run in {str(folder)!r} is a different one: {'; '.join(other)}; use the same settings, or "
            "delete it",
            value=other,
        )


def category_ids(classes: Classes | None, wanted: Options, categories: dict[str, int]) -> dict[int, int] | None:
    """Ids of an annotation file's categories by the model's class ids, where they have the same names.

    Raises:
        InvalidArgumentError: (``ValueError``) A class has no category of its name, and its own id is another category's.
    """
    from bentoml_detectron.outputs import Names

    names = (classes and classes.thing_classes) or []
    if not names and categories:
        logger.warning("the model has no class names, so its own ids are kept; they may differ from the annotation file's")
        return None
    kept = {index: name for index, name in enumerate(names) if wanted.things is None or index in wanted.things}
    known = {index: categories[name] for index, name in kept.items() if name in categories}
    if not known:
        if kept and categories:
            logger.warning(
                "no class of the model is named like a category in the annotation file; the model's own ids are kept"
            )
        return None
    own = Names(classes).categories(np.array([*kept], np.int64))
    ids = dict(zip(kept, kept if own is None else own.tolist(), strict=True))
    lost = [name for index, name in kept.items() if index not in known and ids[index] in categories.values()]
    if lost:
        raise InvalidArgumentError(
            f"the annotation file has no category for {', '.join(lost):.300}, and uses the ids of these classes for others; "
            "select only classes that it has (--classes, classes=)",
            value=lost,
        )
    return known
