"""`verify`: checks whether a saved model is still what was saved, and still finds the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bentoml import Model, Tag

from bentoml_detectron import imports, store
from bentoml_detectron.artifact import code, files, manifest
from bentoml_detectron.errors import DetectronError, InvalidModelError, UnknownDeviceError

if TYPE_CHECKING:
    from bentoml_detectron.artifact.folder import SavedModel

__all__ = ["VerifyReport", "verify"]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        tag: The model's.
        problems: What is wrong, a line each; empty where the model is what was saved and finds what it found then.
        notes: What differs and may be right: the device, versions, or that there is no self-test to compare with.
        identical: Whether the self-test's results are the recorded ones to the last bit; None where none were compared.
        has_digests: Whether the model has digests of what was saved; those that BentoML's own adapter saved have none.
    """

    tag: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    identical: bool | None
    has_digests: bool = True

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


def verify(
    bento_model: str | Tag | Model,
    device_id: str = "cpu",
    *,
    trust_remote_code: bool = False,
    trusted: Sequence[str] = (),
) -> VerifyReport:
    """Checks a saved model: every file's size and SHA-256, that weights and config fit, and the recorded self-test.

    The self-test is compared within the tolerances of `selftest.Tolerance`, since other devices, thread counts and versions
    round differently; the report says which of these differ.

    Args:
        bento_model: The model, or its tag, in BentoML's model store.
        device_id: Where the self-test runs.
        trust_remote_code: As in `load_model`.
        trusted: As in `load_model`.

    Returns:
        The report; a damaged model is a report with problems, not an error.

    Raises:
        ModelNotFoundError: (``bentoml.exceptions.NotFound``) There is no model of that tag, or another framework saved it.
        InvalidArgumentError: (``ValueError``) `bento_model` is no tag.
        UnknownDeviceError: (``ValueError``) PyTorch has no such device here.
    """
    problems: list[str] = []
    notes: list[str] = []
    identical: bool | None = None
    has_digests = True
    try:
        model = store.resolve(bento_model)
    except InvalidModelError as exc:
        return VerifyReport(str(bento_model), (_line(exc),), (), None)

    with imports.for_less():
        from bentoml_detectron.model import check_device  # PyTorch, which takes seconds to import

    check_device(device_id)
    trusted = code.check_trusted(trusted)
    try:
        if model.info.api_version != "v1" or (Path(model.path) / manifest.MANIFEST).exists():
            problems += _file_problems(Path(model.path))
        saved = store.open_model(model, trust_remote_code=trust_remote_code, trusted=trusted)
        notes += _notes(saved)
        has_digests = saved.manifest is not None
        identical = _self_test(saved, device_id, problems, notes)
    except UnknownDeviceError:
        raise
    except DetectronError as exc:
        problems.append(_line(exc))
    return VerifyReport(str(model.tag), tuple(dict.fromkeys(problems)), tuple(notes), identical, has_digests)


def _line(exc: Exception) -> str:
    return " ".join(str(exc).split())


def _file_problems(folder: Path) -> Iterator[str]:
    content = manifest.read(folder)
    for name, due in content.files.items():
        try:
            if files.size(folder, name) != due.size or files.digests(folder, name)[0] != due.sha256:
                yield f"{name} differs from what was saved: its SHA-256 is not {due.sha256}"
        except DetectronError as exc:
            yield _line(exc)
    for path in sorted(folder.iterdir()):
        if path.name not in content.files and path.name != manifest.MANIFEST:
            yield f"{path.name} is not a file of this model; it was added later"


def _notes(saved: SavedModel) -> Iterator[str]:
    from bentoml_detectron.artifact import folder

    if saved.manifest is None:
        yield "this model was saved by BentoML's own adapter: there are no digests and no self-test to compare with"
        return
    here = folder.versions()
    for name, version in saved.manifest.versions.items():
        if here.get(name) != version:
            yield f"{name} is {here.get(name, 'absent')}; the model was saved with {version}"


def _self_test(saved: SavedModel, device_id: str, problems: list[str], notes: list[str]) -> bool | None:
    """Loads the model, which checks that weights and config fit, and compares what it finds; whether that is identical."""
    from bentoml_detectron import model, selftest

    module = model.module_of(model.load(saved, device_id))
    if saved.manifest is None:
        return None
    if saved.manifest.input != saved.input:
        problems.append(f"the manifest describes the input as {saved.manifest.input}, but the config as {saved.input}")
    due = saved.manifest.self_test
    if due is None:
        notes.append("no self-test was recorded when the model was saved")
        return None
    other_versions = bool(notes)
    try:
        got, found = selftest.check(due, module, saved.input, saved.dataset, other_versions=other_versions)
    except DetectronError:
        raise
    except Exception as exc:  # whatever the model raises
        problems.append(f"the self-test fails, although it ran when the model was saved: {exc!r}")
        return None
    if got.device != due.device:
        notes.append(f"the self-test ran on {got.device}; when the model was saved, on {due.device}")
    problems += found
    return (got.detections, got.tensors) == (due.detections, due.tensors)
