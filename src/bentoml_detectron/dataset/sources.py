"""Finds the images of a dataset, in order: files, folders, globs, annotation files, Parquet, or a list on stdin.

Nothing is decoded and nothing is fetched here. A named file's kind is told by its first bytes; in a folder, images are told by
their usual suffixes.
"""

from __future__ import annotations

import codecs
import glob
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from bentoml_detectron.dataset import parquet_source
from bentoml_detectron.errors import InvalidArgumentError
from bentoml_detectron.images import SUFFIXES

STDIN = "-"
RUN_SUFFIX, RUN_LOCK = ".parts", "lock"
"""The ending of the folder beside its output in which a run has what is finished, and a file that is always in it."""

_LOOKED_FOR = 20  # images of an annotation file, before its names are taken for those of another folder

Source = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a dataset, not read yet.

    Attributes:
        file_name: As in `Prediction`.
        image_id: As in `Prediction`.
        path: The image, or the Parquet file that it is in, from the root of the file system on.
        row: Its row there, from 0; None for a file of its own.
    """

    file_name: str
    image_id: int | str
    path: str
    row: int | None = None


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of Parquet files; None where the usual names shall be looked for.

    Attributes:
        image: With the encoded images.
        key: With the images' names.
    """

    image: str | None = None
    key: str | None = None


class Dataset:
    """The images of some sources, found while one iterates over them, once.

    Attributes:
        columns: Of Parquet files.
        categories: Ids by name of an annotation file's categories, once it was read; None without such a file.
    """

    def __init__(
        self,
        source: Source | Iterable[Source],
        *,
        image_root: Source | None = None,
        columns: Columns | None = None,
        left_out: Iterable[Source] = (),
    ) -> None:
        """Takes the sources as they are; nothing is read yet.

        Args:
            source: One, or several in their order: the path of an image, a folder (with those in it), a glob, a COCO annotation
                file (then it is the only one), a Parquet file, or "-" for a list of images' paths on stdin, one a line.
            image_root: What an annotation file's ``file_name`` starts from; the folder of that file unless given.
            columns: Of Parquet files.
            left_out: Files and folders that no folder and no glob is to give, as what a run itself writes.

        Raises:
            InvalidArgumentError: (``ValueError``) The source is neither.
        """
        if not isinstance(source, (str, os.PathLike, Iterable)):
            raise InvalidArgumentError(f"the source is {source!r:.80}; give a path or a list of paths", value=source)
        self.categories: dict[str, int] | None = None
        self._given = [source] if isinstance(source, (str, os.PathLike)) else source
        self._root = image_root
        self.columns = columns or Columns()
        self._count = 0
        self._left_out = {os.path.realpath(each) for each in left_out}
        self._folders: dict[str, str | None] = {}  # by what globs call them, as they are; None of those that are left out
        self._here = Path.cwd()  # whoever reads an image may be elsewhere

    def __iter__(self) -> Iterator[Item]:
        """Goes through the images.

        Raises:
            InvalidArgumentError: (``ValueError``) A source is none, or there are no images in it.
        """
        given: object = None
        for given in self._given:
            yield from self._of(given)
        if given is None:
            raise InvalidArgumentError("there are no sources; give a file, a folder or a glob", value=self._given)

    def _of(self, given: object) -> Iterator[Item]:
        if not isinstance(given, (str, os.PathLike)):
            raise InvalidArgumentError(f"a source must be a path, not {type(given).__name__}", value=given)
        name = os.fspath(given)
        if self.categories is not None:
            raise _not_alone(name)
        if "://" in name or name[:5].lower() == "data:":
            raise InvalidArgumentError(f"URLs are not supported; give a path, not {name[:80]!r}", value=name)
        if name == STDIN:
            return self._images(_lines())
        if os.path.lexists(name):
            found = self._existing(name)
            return _some(name, "no image", found) if Path(name).is_dir() else found
        if not glob.has_magic(name):
            raise InvalidArgumentError(f"{name!r} does not exist; give a file, a folder or a glob", value=name)
        return _some(name, "nothing", (item for match in self._matches(name) for item in self._existing(match)))

    def _matches(self, pattern: str) -> Iterator[str]:
        """What a glob fits, in order; of one with ``**``, which fits what is in a folder, too, files alone."""
        for match in sorted({*_expanded(pattern)}):
            if not ("**" in pattern and os.path.isdir(match)) and not self._is_left_out(match):  # noqa: PTH112 - as below
                yield match

    def _is_left_out(self, path: str) -> bool:
        """Whether it is, or what it is in."""
        if not self._left_out:
            return False
        folder, name = os.path.split(path)
        if folder not in self._folders:
            real = Path(os.path.realpath(folder))
            self._folders[folder] = None if any(str(each) in self._left_out for each in (real, *real.parents)) else str(real)
        above = self._folders[folder]
        return above is None or os.path.join(above, name) in self._left_out  # noqa: PTH118

    def _existing(self, name: str) -> Iterator[Item]:
        if self.categories is not None:
            raise _not_alone(name)
        return self._images(self._folder(name)) if Path(name).is_dir() else self._file(name)

    def _folder(self, name: str) -> Iterator[str]:
        """The images below a folder, those of each folder before those below it; links to folders are not followed."""
        for folder, folders, files in os.walk(name, onerror=_fail):
            folders.sort()
            if _is_of_a_run(folder) or (self._left_out and os.path.realpath(folder) in self._left_out):
                folders.clear()
                continue
            for file in sorted(files):
                if file.lower().endswith(SUFFIXES):
                    yield os.path.join(folder, file)  # noqa: PTH118 - a Path takes five times as long

    def _images(self, paths: Iterable[str]) -> Iterator[Item]:
        for path in paths:
            yield self._item(path, path)

    def _item(self, file_name: str, path: str, row: int | None = None) -> Item:
        self._count += 1
        return Item(file_name, self._count, os.path.join(self._here, path), row)  # noqa: PTH118 - ".." stays, and it is fast

    def _file(self, path: str) -> Iterator[Item]:
        start = _start(path)
        if start.startswith(parquet_source.MAGIC):
            for row, key in enumerate(parquet_source.keys(path, self.columns.image, self.columns.key)):
                yield self._item(key, path, row)
        elif start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
            yield from self._annotated(path)
        else:
            yield self._item(path, path)

    def _annotated(self, path: str) -> Iterator[Item]:
        if self._count:
            raise _not_alone(path)
        images, self.categories = annotated_images(path)
        root = self._here / (Path(path).parent if self._root is None else self._root)
        first = [root / file_name for _, file_name in images[:_LOOKED_FOR]]
        if first and not any(map(os.path.exists, first)):
            raise InvalidArgumentError(
                f"none of the first {len(first)} images of {path!r} is there, as {str(first[0])!r}; give the folder that their "
                "names start from by --image-root (image_root=)",
                value=str(root),
            )
        for image_id, file_name in images:
            yield Item(file_name, image_id, str(root / file_name))


def annotated_images(path: Source) -> tuple[list[tuple[int | str, str]], dict[str, int]]:
    """Ids and file names of an annotation file's images, in its order, and its categories' ids by name.

    The whole file is read into memory, once.

    Raises:
        InvalidArgumentError: (``ValueError``) It is no such file.
    """
    try:
        content = orjson.loads(Path(path).read_bytes().removeprefix(codecs.BOM_UTF8))
        images = [(each["id"], each["file_name"]) for each in content["images"]]
        named = [(each["name"], each["id"]) for each in content.get("categories", [])]
        categories = dict(named)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise InvalidArgumentError(
            f"{str(path)!r} is not a COCO annotation file ({exc!r}): it needs 'images' with 'id' and 'file_name'",
            value=path,
        ) from exc
    kinds = {type(image_id) for image_id, _ in images}
    if not (kinds <= {int} or kinds <= {str}) or any(type(name) is not str for _, name in images):
        raise _unfit(path, "image ids must be whole numbers or strings, and file names must be strings")
    if any(type(name) is not str or type(number) is not int for name, number in categories.items()):
        raise _unfit(path, "category names must be strings, and category ids must be whole numbers")
    if len(categories) < len(named):
        raise _unfit(path, "no two categories may have the same name")
    numbers = [each for each in (*(image_id for image_id, _ in images), *categories.values()) if isinstance(each, int)]
    if any(not -(2**63) <= each < 2**63 for each in numbers):
        raise _unfit(path, "ids must fit into 64 bits")
    if len({image_id for image_id, _ in images}) < len(images):
        raise _unfit(path, "no two images may have the same id")
    return images, categories


def _not_alone(name: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name!r}: an annotation file has its own image ids; it must be the only source", value=name)


def _unfit(path: Source, due: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{str(path)!r} is not a valid COCO annotation file: {due}", value=path)


def _expanded(pattern: str) -> Iterator[str]:
    """What a glob fits, in no order; ``**`` is this folder and all below it, but for hidden ones, those of runs, and links."""
    names = pattern.split("/")
    if "**" not in names:
        yield from glob.iglob(pattern)  # noqa: PTH207 - Path.glob takes no absolute patterns
        return
    place = names.index("**")
    before, after = "".join(f"{name}/" for name in names[:place]), "/".join(names[place + 1 :] or "*")
    for top in glob.iglob(before) if before.strip("/") else [before]:  # noqa: PTH207
        for folder, folders, _ in os.walk(top or ".", onerror=_fail):
            if _is_of_a_run(folder):
                folders.clear()
                continue
            folders[:] = [each for each in folders if not each.startswith(".")]
            here = os.path.join(folder if top else folder[2:], "")  # noqa: PTH118 - as below
            yield from _expanded(glob.escape(here) + after)


def _is_of_a_run(folder: str) -> bool:
    """Whether a run has made it, to go on from there: it may hold pictures, of an output that is not there yet."""
    return folder.endswith(RUN_SUFFIX) and Path(folder, RUN_LOCK).is_file()


def _some(name: str, what: str, found: Iterator[Any]) -> Iterator[Any]:
    """The same, of which there is at least one.

    Raises:
        InvalidArgumentError: There is none.
    """
    empty = True
    for each in found:
        empty = False
        yield each
    if empty:
        raise InvalidArgumentError(
            f"there is {what} in {name!r}; images in a folder must end with {' '.join(SUFFIXES)}; name other files one by one",
            value=name,
        )


def _fail(error: OSError) -> None:
    """A folder that cannot be read is an error: its images would be missed without a word.

    Raises:
        InvalidArgumentError: Always.
    """
    name = os.fspath(error.filename)
    raise InvalidArgumentError(
        f"the folder {name!r} cannot be read ({error.strerror}); fix this, or give the other sources one by one", value=name
    ) from error


def _lines() -> Iterator[str]:
    """Paths on stdin, one a line."""
    if sys.stdin is None:  # where the process has none
        raise InvalidArgumentError(
            "stdin is closed, so no paths can be read from it; give a file, a folder or a glob", value=STDIN
        )
    for number, line in enumerate(sys.stdin.buffer):
        if b"\0" in line:
            raise InvalidArgumentError(
                "the list of paths contains NUL characters; give one path per line, as from find without -print0", value=STDIN
            )
        if name := (line if number else line.removeprefix(codecs.BOM_UTF8)).rstrip(b"\r\n"):
            yield os.fsdecode(name)


def _start(path: str) -> bytes:
    """The first bytes of a regular file; nothing of anything else, and of what cannot be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(descriptor, 64) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    finally:
        os.close(descriptor)
