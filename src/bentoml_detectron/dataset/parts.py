"""The folder of an unfinished run beside its output, ``OUT.parts``: what is finished, and how the output is made of it.

The folder holds the plan, the list of sources, and one folder per finished chunk. A chunk's folder appears by one rename. When
all outputs are written and a mark file says so, each output appears by one rename too, and the folders are removed. Whenever a
run is killed, the next run can go on from what is left. Only the process that holds the lock in the folder writes there, and
the workers that it has asked to work on chunks.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import xxhash

from bentoml_detectron.artifact.files import sync_folder
from bentoml_detectron.dataset.sources import RUN_LOCK, RUN_SUFFIX, Item
from bentoml_detectron.errors import InvalidArgumentError, OutputError

SUFFIX, LOCK = RUN_SUFFIX, RUN_LOCK
PLAN, FINISHED, SOURCES, CHUNKS, RESULT = "plan.json", "finished.json", "sources", "chunks", "result"
_SUMMARY = "done.json"
_SCRATCH = ".tmp"
_OURS = frozenset([PLAN, FINISHED, SOURCES, CHUNKS, RESULT, LOCK])


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a disk says into an error that says what to do.

    Raises:
        OutputError: The disk is full, or does not take something for another reason.
    """
    try:
        yield
    except OSError as exc:
        raise OutputError(
            f"cannot write {str(exc.filename or path)!r}: {exc.strerror or exc}; finished work is kept: fix this, "
            "then continue with --resume (resume=True)",
            value=str(path),
        ) from exc


@contextmanager
def held(outputs: Sequence[Path]) -> Iterator[list[Path]]:
    """The folders of some outputs, which no other run may touch meanwhile; they go at the end unless a plan is in them.

    Raises:
        OutputError: Another run has one, or they cannot be made.
        InvalidArgumentError: (``ValueError``) An output is named twice.
    """
    paths = [Path(os.path.abspath(each)) for each in outputs]  # noqa: PTH100 - links stay
    folders = [path.with_name(path.name + SUFFIX) for path in paths]
    for path in paths:
        if not path.parent.is_dir():
            raise OutputError(f"there is no folder {str(path.parent)!r}; create it, or give another name", value=str(path))
    if len({*folders}) < len(folders):
        raise InvalidArgumentError(
            "an output is named twice; give each a different name", value=[str(each) for each in outputs]
        )
    with ExitStack() as stack:
        for output, folder in zip(outputs, folders, strict=True):
            stack.enter_context(_locked(output, folder))
        yield folders


@contextmanager
def _locked(output: Path, folder: Path) -> Iterator[None]:
    with writing(folder):
        descriptor = _lock(output, folder)
    try:
        yield
    finally:
        if not (folder / PLAN).exists() and not (folder / FINISHED).exists():
            with suppress(OSError):  # of what is left, the next run takes care
                empty(folder)
                (folder / LOCK).unlink()
                folder.rmdir()
        os.close(descriptor)


def _lock(output: Path, folder: Path) -> int:
    """Takes the lock, also where a run that ends takes the folder away meanwhile.

    Raises:
        OutputError: Another run has it, or the folder is no run's.
    """
    while True:
        folder.mkdir(exist_ok=True)
        try:
            _check_ours(folder)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(
                f"another run is writing {str(output)!r}; wait for it to finish, or give another name", value=str(output)
            ) from None
        os.close(descriptor)


def _check_ours(folder: Path) -> None:
    """Refuses a folder that no run has made. Beside a plan and a lock there may be others' files, too, as file managers'."""
    names = {path.name for path in folder.iterdir()}
    is_begun = LOCK in names and not names.isdisjoint((PLAN, FINISHED))
    if not is_begun and (any(not _is_ours(name) for name in names) or (names and LOCK not in names)):
        raise OutputError(
            f"{str(folder)!r} exists, but does not belong to a run; move it, or give another name", value=str(folder)
        )


def _is_ours(name: str) -> bool:
    return name.removesuffix(_SCRATCH) in _OURS or name.startswith(".nfs")  # NFS's, of what was open when it was removed


def empty(folder: Path) -> None:
    """Removes what a run has made but for the lock, what says whose it is last."""
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == FINISHED, path.name == PLAN)):
        if path.name != LOCK and _is_ours(path.name):
            remove(path)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes a small file, whole or not at all."""
    new = path.with_name(path.name + _SCRATCH)
    with new.open("wb") as file:
        file.write(orjson.dumps(content, option=orjson.OPT_INDENT_2))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """Its content; None where there is no such file.

    Raises:
        OutputError: It cannot be read.
    """
    try:
        return orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise OutputError(f"{str(path)!r} cannot be read ({exc}); delete {str(path.parent)!r}", value=str(path)) from exc


class Listing:
    """The images of a dataset, in a file, so that a million take no memory; chunks are read from there.

    Attributes:
        path: The file.
        count: How many images there are.
        digest: Of all that is known of them.
        text_ids: Whether their ids are strings.
        size: Images in a chunk.
    """

    def __init__(self, path: Path, items: Iterable[Item], size: int) -> None:
        """Writes the list.

        Args:
            path: The file.
            items: Are gone through once.
            size: Images in a chunk.

        Raises:
            OutputError: It cannot be written.
        """
        self.count = 0
        self.text_ids = False
        self.size = size
        self.path = path
        self._starts = array("Q")
        digest = xxhash.xxh3_128()
        every = iter(items)
        place = 0
        with writing(path), path.open("wb") as file:
            while some := list(islice(every, size)):
                self._starts.append(place)
                self.text_ids = isinstance(some[0].image_id, str)
                lines = b"".join(_line(item) for item in some)
                digest.update(lines)
                place += file.write(lines)
                self.count += len(some)
        self._starts.append(place)
        self.digest = digest.hexdigest()

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return len(self._starts) - 1

    def first(self, number: int) -> int:
        """The position of a chunk's first image, from 1."""
        return number * self.size + 1

    def place(self, number: int) -> tuple[int, int]:
        """Where a chunk's images are in the file: the first byte, and how many bytes."""
        return self._starts[number], self._starts[number + 1] - self._starts[number]

    def items(self, number: int) -> list[Item]:
        """A chunk's images."""
        return listed(self.path, *self.place(number))


def listed(path: Path, start: int, size: int) -> list[Item]:
    """The images in some bytes of a list, which `Listing.place` tells."""
    with path.open("rb") as file:
        file.seek(start)
        return [_item(line) for line in file.read(size).splitlines()]


def _line(item: Item) -> bytes:
    # Names of files are bytes, which JSON has no place for.
    name, path = (each.encode("utf-8", "surrogateescape").decode("latin-1") for each in (item.file_name, item.path))
    return orjson.dumps([name, item.image_id, None if path == name else path, item.row], option=orjson.OPT_APPEND_NEWLINE)


def _item(line: bytes) -> Item:
    name, image_id, path, row = orjson.loads(line)
    name, path = (each.encode("latin-1").decode("utf-8", "surrogateescape") for each in (name, name if path is None else path))
    return Item(name, image_id, path, row)


def scratch(folder: Path, number: int) -> Path:
    """A new folder for a chunk that is being made; `publish_chunk` takes it."""
    with writing(folder):
        return Path(tempfile.mkdtemp(prefix=f"{number:08d}.", suffix=_SCRATCH, dir=folder))


@contextmanager
def trying(folder: Path, number: int, most: int) -> Iterator[bool]:
    """Tells whether a chunk may be tried once more, where trying it may end the process.

    Args:
        folder: Of the chunks.
        number: The chunk's.
        most: How many tries may end without a word before there are no more; going on with the run forgets them.
    """
    tries = [folder / f"{number:08d}.try{each}{_SCRATCH}" for each in range(most)]
    with writing(folder):
        begun = next((path for path in tries if _is_new(path)), None)
    yield begun is not None
    if begun is not None:
        for path in tries:
            remove(path)


def _is_new(path: Path) -> bool:
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def publish_chunk(made: Path, folder: Path, number: int, images: int, failures: int) -> None:
    """Makes a chunk's parts durable and lets it appear; where it has appeared meanwhile, by someone else, that one stays."""
    (made / _SUMMARY).write_bytes(orjson.dumps({"images": images, "failures": failures}))
    sync_tree(made)
    try:
        made.rename(folder / f"{number:08d}")
    except OSError:
        if not (folder / f"{number:08d}" / _SUMMARY).exists():
            raise
        shutil.rmtree(made)
    sync_folder(folder)


def finished_chunks(folder: Path) -> tuple[set[int], int, int]:
    """Numbers of the finished chunks, and how many images and failures they have; takes away what others left."""
    numbers, images, failures = set(), 0, 0
    for path in list(folder.iterdir()):
        summary = read_json(path / _SUMMARY) if path.name.isdigit() else None
        if summary is None:
            _take_away(path)
            continue
        numbers.add(int(path.name))
        images, failures = images + summary["images"], failures + summary["failures"]
    return numbers, images, failures


def _take_away(path: Path) -> None:
    """Removes a folder in which somebody may be writing: a worker that has not heard yet that its run is over.

    Under another name nobody finds it any more; so the worker can neither add to what is half gone, nor publish it.
    """
    gone = Path(tempfile.mkdtemp(prefix="gone.", suffix=_SCRATCH, dir=path.parent))
    with suppress(FileNotFoundError):  # it was published meanwhile, by its worker
        path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def parts(folder: Path, count: int, index: int) -> Iterator[Path]:
    """One output's parts in their order."""
    return (folder / f"{number:08d}" / str(index) for number in range(count))


def sync_tree(path: Path) -> None:
    """Makes a file, or a folder with all below it, durable."""
    for folder, _, names in os.walk(path) if path.is_dir() else [(path.parent, (), (path.name,))]:
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        if path.is_dir():
            sync_folder(Path(folder))
