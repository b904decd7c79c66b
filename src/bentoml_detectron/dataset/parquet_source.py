"""Images in Parquet files: encoded images as bytes in one column, with their names in another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from bentoml_detectron.errors import DependencyMissingError, InvalidArgumentError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet

MAGIC = b"PAR1"
KEYS = ("file_name", "path", "key", "id")
"""Columns that name an image, the first that is there."""
IMAGE = "image"
"""The column with the images, where there are several of bytes."""
_IMAGES, _KEYS = 8, 1000  # rows that are in memory at a time
_BUFFER = 1 << 20


def require() -> Any:
    """pyarrow's module of Parquet.

    Raises:
        DependencyMissingError: It is not installed.
    """
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as exc:
        raise DependencyMissingError("Parquet needs pyarrow: pip install pyarrow") from exc
    return parquet


def keys(path: str, image: str | None = None, key: str | None = None) -> Iterator[str]:
    """The names of a file's images, in order: the key, as text; where there is none, ``PATH#ROW``.

    Args:
        path: The file.
        image: The column of the images, of bytes or of Hugging Face's structs of "bytes" and "path".
        key: The column of the names.

    Raises:
        InvalidArgumentError: (``ValueError``) It is damaged, or a column is not there.
        DependencyMissingError: pyarrow is not installed.
    """
    with _opened(path) as file:
        schema = file.schema_arrow
        column = _image_column(path, schema, image)
        if key is not None and key not in schema.names:
            raise _absent(path, schema, key, "key")
        name = key or next((each for each in KEYS if each in schema.names and each != column), None)
        if name is None and "path" in _fields(schema.field(column)):
            name = f"{column}.path"
        row = 0
        for number in range(file.num_row_groups):
            rows = file.metadata.row_group(number).num_rows
            found = _values(file, number, name, _KEYS) if name is not None else iter([None] * rows)
            for each in found:
                if each is None:
                    yield f"{path}#{row}"
                else:
                    yield os.fsdecode(each) if isinstance(each, bytes) else str(each)
                row += 1


def contents(path: str, start: int, image: str | None = None) -> Iterator[bytes | None]:
    """The images of a file from a row on, in order, a few of them in memory at a time; None where there is none.

    Args:
        path: The file.
        start: The first row, from 0.
        image: As in `keys`.

    Raises:
        InvalidArgumentError: (``ValueError``) It is damaged, or a column is not there.
        DependencyMissingError: pyarrow is not installed.
    """
    with _opened(path) as file:
        column = _image_column(path, file.schema_arrow, image)
        leaf = f"{column}.bytes" if _fields(file.schema_arrow.field(column)) else column
        for number in range(file.num_row_groups):
            rows = file.metadata.row_group(number).num_rows
            if start >= rows:
                start -= rows
                continue
            yield from islice(_values(file, number, leaf, _IMAGES), start, None)
            start = 0


@contextmanager
def _opened(path: str) -> Iterator[parquet.ParquetFile]:
    parquet = require()
    import pyarrow as pa

    try:
        # Without these two, a whole row group is read into memory.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as file:
            yield file
    except (OSError, UnicodeError, pa.ArrowException) as exc:
        raise InvalidArgumentError(
            f"{path!r} cannot be read as Parquet: {' '.join(str(exc).split())[:300]}", value=path
        ) from exc


def _values(file: parquet.ParquetFile, group: int, leaf: str, rows: int) -> Iterator[Any]:
    """A column's values, or those of a struct's part, of one row group."""
    for batch in file.iter_batches(rows, row_groups=[group], columns=[leaf], use_threads=False):
        column = batch.column(0)
        for value in column if len(batch.schema.names) == 1 else ():
            plain = value.as_py()
            yield plain.get(leaf.rsplit(".", 1)[-1]) if isinstance(plain, dict) else plain


def _fields(field: pa.Field) -> list[str]:
    """The parts of a struct; none of anything else."""
    from pyarrow import types

    return [each.name for each in field.type.fields] if types.is_struct(field.type) else []


def _image_column(path: str, schema: pa.Schema, given: str | None) -> str:
    if given is not None and given not in schema.names:
        raise _absent(path, schema, given, "image")
    fitting = [field.name for field in schema if _is_bytes(field)]
    if given is None and IMAGE in fitting:
        return IMAGE
    if given is not None:
        fitting = [given] if given in fitting else []
    if len(fitting) != 1:
        raise InvalidArgumentError(
            f"{path!r} has {len(fitting) or 'no'} columns of bytes{f' named {given!r}' if given else ''} "
            f"({', '.join(f'{field.name}: {field.type}' for field in schema):.300}); name the one with the images",
            value=fitting,
        )
    return str(fitting[0])


def _is_bytes(field: pa.Field) -> bool:
    from pyarrow import types

    kinds = [each.type for each in field.type.fields if each.name == "bytes"] if types.is_struct(field.type) else [field.type]
    return any(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind) for kind in kinds)


def _absent(path: str, schema: pa.Schema, name: str, what: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{path!r} has no {what} column {name!r}; it has {', '.join(schema.names):.300}", value=name)
