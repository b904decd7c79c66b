"""``external_modules.zip``: source of the modules that a model needs and that no distribution has, and its import.

Nothing of it is imported unless the caller says that the model's code is trusted. The archive is read once, checked, and
imported from memory. So later changes to the file, and Python's own cache of archives, have no effect.
"""

from __future__ import annotations

import ast
import io
import sys
import threading
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec
from importlib.metadata import packages_distributions
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

from bentoml_detectron.artifact import files
from bentoml_detectron.errors import CorruptFileError, InvalidArgumentError, InvalidModelError

ARCHIVE = "external_modules.zip"
MAX_BYTES = 16 << 20
"""Most source that a model brings along; more is a distribution to install."""
_DATE = (1980, 1, 1, 0, 0, 0)  # zip's first: the same source is the same archive
_lock = threading.RLock()

Sources = Mapping[str, bytes]
"""Source files of one top-level package or module, by their names inside the archive: ``pkg/heads.py``."""


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
    sources: dict[str, bytes] = {}
    for top in sorted({_top(name) for name in names}):
        sources.update(_sources(top))
    if sum(map(len, sources.values())) > MAX_BYTES:
        raise InvalidArgumentError(
            f"the source of {', '.join(names)} is larger than {MAX_BYTES:,} bytes; install it as a distribution instead and "
            "load the model with --trusted MODULE (trusted=[...])",
            value=names,
        )
    if left := sorted(not_installed(_imported(sources) - {_top(name) for name in names})):
        warnings.warn(
            f"the model's external_modules import {', '.join(left)}, which no installed package provides: elsewhere the model "
            "cannot be loaded; add what is missing to external_modules",
            stacklevel=3,
        )
    with zipfile.ZipFile(folder / ARCHIVE, "w", zipfile.ZIP_DEFLATED) as archive:
        for inside, text in sources.items():
            archive.writestr(zipfile.ZipInfo(inside, _DATE), text, zipfile.ZIP_DEFLATED)
    return names


def check_trusted(trusted: object) -> tuple[str, ...]:
    """The names of modules that a caller trusts.

    Raises:
        InvalidArgumentError: (``ValueError``) They are not a list of dotted names.
    """
    if isinstance(trusted, (str, bytes)) or not isinstance(trusted, Iterable):
        raise InvalidArgumentError(f"trusted is {trusted!r}; give a list of modules, as ['my_package']", value=trusted)
    names = tuple(trusted)
    for each in names:
        if not isinstance(each, str) or not _is_name(each):
            raise InvalidArgumentError(f"trusted has {each!r}; give the names of modules, as ['my_package.models']", value=each)
    return names


def check_external(modules: object) -> list[ModuleType]:
    """The modules that a model shall bring along.

    Raises:
        InvalidArgumentError: (``ValueError``) They are not a list of modules that another process can import.
    """
    if modules is None:
        return []
    if isinstance(modules, (str, bytes)) or not isinstance(modules, Iterable):
        raise InvalidArgumentError(
            f"external_modules is {modules!r:.200}; give a list of modules, as [my_package]", value=modules
        )
    found = list(modules)
    for each in found:
        _checked(each)
    return found


def not_installed(modules: Iterable[str]) -> set[str]:
    """Those of some imported modules that neither Python nor an installed distribution provides, so others may lack them."""
    left = {each for each in modules if not _is_beside_packages(_top(each))}
    # As an editable install's are; looking through all distributions takes half a second.
    distributed = packages_distributions() if left else {}
    return {each for each in left if _top(each) not in distributed}


def _is_beside_packages(top: str) -> bool:
    if top in sys.stdlib_module_names:
        return top != "__main__"
    file = getattr(sys.modules.get(top), "__file__", None)
    return file is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def _imported(sources: Sources) -> set[str]:
    """The top-level modules of this process that source files import."""
    found = set()
    for text in sources.values():
        with suppress(SyntaxError, ValueError):  # a file that nobody imports may be anything
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Import):
                    found |= {_top(each.name) for each in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(_top(node.module))
    return found & sys.modules.keys()


def _top(name: str) -> str:
    return name.partition(".")[0]


def _is_name(name: str) -> bool:
    return name.isascii() and all(part.isidentifier() for part in name.split("."))


def _checked(module: object) -> str:
    name = getattr(module, "__name__", None)
    if not isinstance(module, ModuleType) or not isinstance(name, str):
        raise InvalidArgumentError(f"external_modules holds {module!r}; pass imported modules", value=module)
    if name in ("__main__", "__mp_main__") or not _is_name(name):
        raise InvalidArgumentError(
            f"external_modules holds {name}, which another process cannot import; move the code into a module of its own",
            value=name,
        )
    if _top(name) in sys.stdlib_module_names:
        raise InvalidArgumentError(f"external_modules holds {name}, which comes with Python; remove it", value=name)
    return name


def _sources(top: str) -> dict[str, bytes]:
    """Source files of an imported top-level package or module.

    Raises:
        InvalidArgumentError: It has none, or part of it has none.
    """
    module = sys.modules.get(top)
    if isinstance(loader := getattr(module, "__loader__", None), _Loader):
        return dict(loader.sources)
    file = getattr(module, "__file__", None)
    if file is None or not file.endswith(".py") or not Path(file).is_file():
        what = "is a folder without __init__.py" if hasattr(module, "__path__") and file is None else "is not a .py file"
        raise InvalidArgumentError(f"the module {top!r} has no source file to bundle with the model: it {what}", value=top)
    path = Path(file)
    if path.name != "__init__.py":
        return {f"{top}.py": path.read_bytes()}
    for name, part in sorted(sys.modules.items()):
        inner = getattr(part, "__file__", None)
        if name.startswith(f"{top}.") and inner is not None and not inner.endswith(".py"):
            raise InvalidArgumentError(
                f"{name} is compiled ({inner}), and only source code can be bundled; install {top!r} as a distribution and "
                f"load the model with --trusted {top} (trusted=[{top!r}])",
                value=name,
            )
    relative = [each.relative_to(path.parent) for each in sorted(path.parent.rglob("*.py"))]
    # Folders such as .ipynb_checkpoints hold nothing that can be imported.
    inside = [each for each in relative if all(part.isidentifier() for part in each.with_suffix("").parts)]
    return {f"{top}/{each.as_posix()}": (path.parent / each).read_bytes() for each in inside}


def load(folder: Path, names: Sequence[str]) -> None:
    """Imports the modules that a model brings along; the caller has said that the code is trusted.

    A module that this process has already is left as it is: it is the caller's own. Where its source is another, a warning says
    so.

    Raises:
        CorruptFileError: The archive cannot be read.
        InvalidModelError: They cannot be imported, or another model brought other modules of these names into this process.
    """
    sources = _read(folder)
    tops = {_top(name) for name in names}
    offered = {
        top: _Loader(
            str(folder / ARCHIVE),
            {name: text for name, text in sources.items() if name.partition("/")[0] in (top, f"{top}.py")},
        )
        for top in tops
    }
    with _lock:
        for top, loader in offered.items():
            if top in sys.modules:
                _check_present(folder, top, loader.sources)
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
        before, _finder.offered = _finder.offered, {**_finder.offered, **offered}
        try:
            for name in names:
                import_module(name)
        except Exception as exc:  # it is code: anything can happen
            raise InvalidModelError(
                f"importing {name}, which is bundled with the model in {folder}, failed: {exc!r}", file=ARCHIVE, value=name
            ) from exc
        finally:
            _finder.offered = before


def _read(folder: Path) -> dict[str, bytes]:
    """The archive's source files by name; it may say anything, and nothing in it is imported for being there."""
    content = files.read_small(folder, ARCHIVE, MAX_BYTES + (1 << 20))
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > MAX_BYTES:
                raise ValueError(f"it holds more than {MAX_BYTES:,} bytes")
            return {member.filename: archive.read(member) for member in members}
    except Exception as exc:  # a damaged archive fails in whatever way its bytes lead to
        raise CorruptFileError(f"{ARCHIVE} in {folder} cannot be read: {exc!r}", file=ARCHIVE) from exc


def _check_present(folder: Path, top: str, sources: Sources) -> None:
    """Compares a module that this process has with the one that a model brings along.

    Raises:
        InvalidModelError: Another model brought it, and it is another.
    """
    present: Sources = {}
    with suppress(InvalidArgumentError, OSError):
        present = _sources(top)
    if present == sources:
        return
    loader = getattr(sys.modules[top], "__loader__", None)
    if isinstance(loader, _Loader):
        raise InvalidModelError(
            f"the {top!r} bundled with the model in {folder} differs from the one in {loader.archive}, which this process has "
            "already loaded; load one of the models in a process of its own",
            file=ARCHIVE,
            value=top,
        )
    warnings.warn(
        f"this process has already imported a {top!r} that differs from the one bundled with the model in {folder}; the "
        "imported one is used. verify() tells whether the model still gives the same results",
        stacklevel=6,  # the caller of load_model
    )


class _Loader(SourceLoader):
    """Loads the modules of one top-level package from source in memory."""

    def __init__(self, archive: str, sources: Sources) -> None:
        self.archive, self.sources = archive, sources

    def get_filename(self, fullname: str) -> str:
        path = fullname.replace(".", "/")
        for inside in (f"{path}/__init__.py", f"{path}.py"):
            if inside in self.sources:
                return f"{self.archive}/{inside}"
        raise ImportError(f"{self.archive} has no {fullname}", name=fullname)

    def get_data(self, path: str | bytes) -> bytes:
        try:
            return self.sources[str(path).removeprefix(f"{self.archive}/")]
        except KeyError:
            raise OSError(f"{path!r} is not in the source code bundled with the model") from None


class _Finder(MetaPathFinder):
    """Finds what a model brings along: its packages while `load` imports them, and what is inside them at any time."""

    def __init__(self) -> None:
        self.offered: Mapping[str, _Loader] = {}

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        top = _top(fullname)
        loader = self.offered.get(top) if fullname == top else getattr(sys.modules.get(top), "__loader__", None)
        if not isinstance(loader, _Loader):
            return None
        try:
            filename = loader.get_filename(fullname)
        except ImportError:
            return None
        return spec_from_file_location(fullname, filename, loader=loader)


_finder = _Finder()


def check_names(names: Sequence[str]) -> None:
    """Checks names that a manifest gives.

    Raises:
        InvalidModelError: One is no module's name, or one of Python's own.
    """
    for name in names:
        if not _is_name(name) or _top(name) in sys.stdlib_module_names:
            raise InvalidModelError(f"{name!r} is not a valid name for a module bundled with a model", file=ARCHIVE, value=name)
