"""YAML of a saved model, checked event by event before anything is built.

PyYAML's safe loaders build no foreign objects, but that is not enough: libyaml's composer overflows the C stack on deep
nesting, aliases unfold without end, and base-60 integers (``1:1:1:...``) take time that grows with the square of their length.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from bentoml_detectron.errors import CorruptFileError, UnsafeFileError

MAX_DEPTH = 50
"""Deepest nesting; Detectron2's configs have 5."""
MAX_VALUES = 10_000
"""Most values in a file; Detectron2's configs have some 400."""
_MAX_PLAIN = 400  # characters of a scalar without quotes that may be a number
_NUMBER_LIKE = re.compile(r"[-+.0-9][-+.0-9A-Fa-fxob_:\sTtZz]*\Z")  # nothing else is taken for a number, or for a date
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?\Z")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def dump(plain: dict[str, Any]) -> bytes:
    """Plain data as YAML, keys sorted."""
    text: str = yaml.dump(plain, Dumper=_DUMPER, sort_keys=True, default_flow_style=None, allow_unicode=True)
    return text.encode()


def load(text: bytes, file: str) -> Any:
    """Builds what a file of plain data says.

    Raises:
        CorruptFileError: It is no YAML.
        UnsafeFileError: See `check`.
    """
    check(text, file)
    try:
        return yaml.load(text, Loader=_LOADER)
    except Exception as exc:  # dates that are none, numbers too large for a float, ...
        raise CorruptFileError(f"{file} cannot be read: {exc}", file=file) from exc


def check(text: bytes, file: str, *, aliases: int = 0, tags: frozenset[str] = frozenset(), may_have_base: bool = False) -> None:
    """Refuses what plain data never has.

    Args:
        text: The file's content.
        file: Its name, for the errors.
        aliases: How many aliases it may have.
        tags: The explicit tags that it may have.
        may_have_base: Whether it may have ``_BASE_``.

    Raises:
        CorruptFileError: It is no YAML.
        UnsafeFileError: It has tags, aliases or ``_BASE_``, or is too deep, too large or made to take long.
    """
    depth = values = 0
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            values += 1
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            elif isinstance(event, yaml.AliasEvent):
                aliases -= 1
            found = _offence(event, tags, aliases, may_have_base)
            if depth > MAX_DEPTH:
                found = f"nesting deeper than {MAX_DEPTH}"
            elif values > 2 * MAX_VALUES:
                found = f"more than {MAX_VALUES:,} values"
            if found:
                raise UnsafeFileError(f"{file} holds {found}", file=file, value=found)
    except yaml.YAMLError as exc:
        raise CorruptFileError(f"{file} is not YAML: {exc}", file=file) from exc


def _offence(event: Any, tags: frozenset[str], aliases: int, may_have_base: bool) -> str | None:
    tag = getattr(event, "tag", None)
    if tag is not None and tag not in tags:
        return f"the tag {tag!r}"
    if isinstance(event, yaml.AliasEvent) and aliases < 0:
        return f"the alias {event.anchor!r}"
    if not isinstance(event, yaml.ScalarEvent):
        return None
    if event.value == "_BASE_" and not may_have_base:
        return "_BASE_, which would load another file"
    is_long = len(event.value) > _MAX_PLAIN and _NUMBER_LIKE.match(event.value)
    if event.implicit[0] and (is_long or _BASE_60.match(event.value)):
        return f"the unquoted value {event.value[:50]!r}..., too long or a base-60 number"
    return None
