"""A COCO file's categories as the class names of a model."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from torch import nn

from bentoml_detectron.errors import InvalidArgumentError
from bentoml_detectron.model import class_counts

from detectron2.data import MetadataCatalog  # isort: skip

__all__ = ["Categories", "read", "register"]


@dataclass(frozen=True)
class Categories:
    """The categories of a COCO file, by rising id, which is the order of Detectron2's contiguous ids.

    Attributes:
        file: Where they were read.
        ids: The file's own ids.
        names: As many.
        are_things: Whether each is countable; a file of panoptic segmentation says so, in others all are.
    """

    file: Path
    ids: tuple[int, ...]
    names: tuple[str, ...]
    are_things: tuple[bool, ...]


def read(file: Path) -> Categories:
    """Reads the categories of a COCO annotation file.

    Raises:
        InvalidArgumentError: (``ValueError``) It is not there, no JSON, or its categories are none of COCO's.
    """
    cure = 'give a COCO annotation file, with "categories": [{"id": 1, "name": "person"}, ...]'
    try:
        content = orjson.loads(file.read_bytes().removeprefix(codecs.BOM_UTF8))
    except OSError as exc:
        raise InvalidArgumentError(f"{file} cannot be read ({exc.strerror}); {cure}", value=str(file)) from exc
    except ValueError as exc:
        raise InvalidArgumentError(f"{file} is not JSON: {exc}; {cure}", value=str(file)) from exc
    listed = content.get("categories") if isinstance(content, dict) else None
    if not isinstance(listed, list) or not listed or not all(_is_category(each) for each in listed):
        raise InvalidArgumentError(f"{file} has no valid list of categories; {cure}", value=str(file))
    ordered = sorted(listed, key=lambda each: each["id"])
    ids = tuple(each["id"] for each in ordered)
    if len(set(ids)) < len(ids):
        raise InvalidArgumentError(f"{file} has two categories with the same id; give each its own", value=ids)
    are_things = tuple(bool(each.get("isthing", 1)) for each in ordered)
    return Categories(file, ids, tuple(each["name"] for each in ordered), are_things)


def _is_category(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("id")) is int and isinstance(value.get("name"), str)


def register(categories: Categories, module: nn.Module, dataset: str | None) -> str:
    """Makes categories known to Detectron2's catalog as the classes of a model's dataset.

    Args:
        categories: As many as the model has classes.
        module: The model.
        dataset: The dataset that its config names.

    Returns:
        The name under which they are known: `dataset`, or the file's where that is the name of another one.

    Raises:
        InvalidArgumentError: (``ValueError``) They are not the model's.
    """
    fields = _fields(categories, module)
    stem = categories.file.stem
    names = (each for each in (dataset, stem, f"{stem}_classes") if each)
    for name in names:
        known = MetadataCatalog.get(name)
        if all(known.get(key, value) == value for key, value in fields.items()):
            known.set(**fields)
            return name
    raise InvalidArgumentError(
        f"Detectron2 already has other classes for the datasets {dataset!r} and {stem!r}; rename {categories.file}",
        value=str(categories.file),
    )


def _fields(categories: Categories, module: nn.Module) -> dict[str, Any]:
    """What Detectron2's catalog calls them."""
    things, stuff = class_counts(module)
    everything = list(zip(categories.ids, categories.names, strict=True))
    countable = [each for each, is_thing in zip(everything, categories.are_things, strict=True) if is_thing]
    rest = [each for each, is_thing in zip(everything, categories.are_things, strict=True) if not is_thing]
    fields: dict[str, Any] = {}
    if things is not None:
        chosen = everything if len(everything) == things else countable
        _check_count(categories, len(chosen), things, "classes")
        fields |= _named("thing", chosen)
    if stuff is not None and things is None:
        _check_count(categories, len(everything), stuff, "semantic classes")
        fields |= _named("stuff", everything)
    elif stuff is not None and rest:
        # Where things are segmented apart, Detectron2's semantic class 0 is all of them together.
        first = 1 if len(rest) + 1 == stuff else 0
        _check_count(categories, len(rest) + first, stuff, "semantic classes")
        fields |= _named("stuff", rest, first)
        fields["stuff_classes"] = ["things"] * first + fields["stuff_classes"]
    if not fields:
        raise InvalidArgumentError(
            f"{type(module).__name__} has no classes for {categories.file} to name; omit --classes-from",
            value=str(categories.file),
        )
    return fields


def _named(kind: str, chosen: list[tuple[int, str]], first: int = 0) -> dict[str, Any]:
    return {
        f"{kind}_classes": [name for _, name in chosen],
        f"{kind}_dataset_id_to_contiguous_id": {own: first + number for number, (own, _) in enumerate(chosen)},
    }


def _check_count(categories: Categories, found: int, due: int, what: str) -> None:
    if found != due:
        raise InvalidArgumentError(
            f"{categories.file} has {found} categories, but the model has {due} {what}; give the file, or the config, "
            "that it was trained with",
            value=found,
        )
