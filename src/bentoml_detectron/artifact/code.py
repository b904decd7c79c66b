"""``external_modules.zip``: source of the modules that a model needs and no distribution has, and its import.

Nothing of it is imported unless the caller trusts the model's code, and says so.
"""

from __future__ import annotations

import re
import sys
import threading
import zipfile
import zipimport
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from bentoml_detectron.artifact import files
from bentoml_detectron.errors import InvalidArgumentError, InvalidModelError

ARCHIVE = "external_modules.zip"
MAX_BYTES = 16 << 20
"""Most source that a model brings along; more is a distribution to install."""
_DATE = (1980, 1, 1, 0, 0, 0)  # zip's first: the same source is the same archive
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*\Z")
_lock = threading.Lock()


def write(folder: Path, modules: Sequence[ModuleType]) -> list[str]:
    """Writes the source of modules into a model's folder: of each the whole top-level package, its ``.py`` files alone.

    Returns:
        The modules' names; empty, and nothing written, where there are none.

    Raises:
        InvalidArgumentError: A module has no source, or there is too much of it.
    """
    names = sorted({_checked(module) for module in modules})
    if not names:
        return []
    left = MAX_BYTES
    with zipfile.ZipFile(folder / ARCHIVE, "w", zipfile.ZIP_DEFLATED) as archive:
        for top in sorted({name.partition(".")[0] for name in names}):
            for path, inside in _sources(top):
                text = path.read_bytes()
                left -= len(text)
                if left < 0:
                    raise InvalidArgumentError(
                        f"the source of {top!r} is larger than {MAX_BYTES:,} bytes; install it as a distribution instead and "
                        "load the model with trusted=[...]",
                        value=top,
                    )
                archive.writestr(zipfile.ZipInfo(inside, _DATE), text, zipfile.ZIP_DEFLATED)
    return names


def _checked(module: object) -> str:
    name = getattr(module, "__name__", None)
    if not isinstance(module, ModuleType) or not isinstance(name, str):
        raise InvalidArgumentError(f"external_modules holds {module!r}; give modules, as imported", value=module)
    if name == "__main__" or not _NAME.match(name):
        raise InvalidArgumentError(
            f"external_modules holds {name}, which another process cannot import; put the code into a module of its own",
            value=name,
        )
    return name


def _sources(top: str) -> Iterator[tuple[Path, str]]:
    """Source files of an imported top-level package or module, and their names inside the archive."""
    file = getattr(sys.modules.get(top), "__file__", None)
    if file is None or not file.endswith(".py") or not Path(file).is_file():
        raise InvalidArgumentError(f"the module {top!r} has no source file to bring along", value=top)
    path = Path(file)
    if path.name != "__init__.py":
        yield path, f"{top}.py"
        return
    for each in sorted(path.parent.rglob("*.py")):
        yield each, f"{top}/{each.relative_to(path.parent).as_posix()}"


def load(folder: Path, names: Sequence[str]) -> None:
    """Imports the modules that a model brings along; the caller has said that the code is trusted.

    A module that this process has already is left as it is: it is the caller's own.

    Raises:
        InvalidModelError: They cannot be imported, or another model brought other modules of these names into this process.
    """
    path = str(folder / ARCHIVE)
    with _lock:
        sys.path.insert(0, path)
        try:
            for name in names:
                _refuse_others(folder, name.partition(".")[0])
                import_module(name)
        except InvalidModelError:
            raise
        except Exception as exc:  # it is code: anything can happen
            raise InvalidModelError(
                f"importing {name}, which the model in {folder} brings along, failed: {exc!r}", file=ARCHIVE, value=name
            ) from exc
        finally:
            sys.path.remove(path)


def _refuse_others(folder: Path, top: str) -> None:
    loader = getattr(sys.modules.get(top), "__loader__", None)
    if not isinstance(loader, zipimport.zipimporter):
        return
    archive = Path(loader.archive)
    if archive.name == ARCHIVE and files.checksum(archive.parent, ARCHIVE) != files.checksum(folder, ARCHIVE):
        raise InvalidModelError(
            f"the model in {folder} brings another {top!r} along than the model in {archive.parent}, which this process has "
            "loaded; load one of them in a process of its own",
            file=ARCHIVE,
            value=top,
        )


def check_names(names: Sequence[str]) -> None:
    """Checks names that a manifest gives.

    Raises:
        InvalidModelError: One is no module's name.
    """
    for name in names:
        if not _NAME.match(name):
            raise InvalidModelError(f"{name!r} is no name of a module", file=ARCHIVE, value=name)
