"""What is on a dataset's images: COCO's annotation files, and folders of semantic maps, read and checked."""

from __future__ import annotations

import codecs
import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bentoml_detectron import masks
from bentoml_detectron.errors import ImageError, InvalidArgumentError
from bentoml_detectron.images import SUFFIXES

ImageId = int | str

_MAP = ".png"
_NAMED = 3
"""Names that a message lists; of the others it says how many they are."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One image of the ground truth.

    Attributes:
        id: COCO's image id; of a folder of semantic maps, the map's name without its suffix.
        file_name: Below the folder of images; of a folder of semantic maps without a suffix.
        size: Height and width in pixels, where the file has them.
    """

    id: ImageId
    file_name: str
    size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Category:
    """One class of the ground truth: COCO's id, the name, and whether it is of things; instances always are."""

    id: int
    name: str
    is_thing: bool = True


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """What `evaluate` compares with; made by `read`.

    Attributes:
        kind: What it is of: COCO's instances (and keypoints), COCO's panoptic segments, or semantic maps.
        source: Where it comes from, for messages.
        images: In the order of their ids.
        categories: In the order of their ids; none of semantic maps, whose pixels are the model's class ids.
        annotations: COCO's, of instances one each, of panoptic segments one an image.
        folder: Of the PNGs, where there are any.
        every: All of the file's categories, also where some were `chosen`.
    """

    kind: Literal["instances", "panoptic", "semantic"]
    source: str
    images: tuple[Picture, ...]
    categories: tuple[Category, ...] = ()
    annotations: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    folder: Path | None = None
    every: tuple[Category, ...] = ()

    def files(self, folder: str | Path) -> dict[ImageId, Path]:
        """Each image's file, by its id.

        Args:
            folder: Of the images.

        Raises:
            ImageError: Some are not there, or two could be one; the message names them.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ImageError(f"{folder} is no folder; give that of the images", value=str(folder))
        there = self._by_stem(folder) if self.kind == "semantic" else {}
        found = {each.id: there.get(each.file_name, folder / each.file_name) for each in self.images}
        if absent := [path.name for path in found.values() if not _is_file(path)]:
            raise ImageError(
                f"{listed(absent)} of {self.source} {_is_are(absent)} not in {folder}; give the folder with its images",
                value=absent,
            )
        return found

    def _by_stem(self, folder: Path) -> dict[str, Path]:
        """A folder's images by their names without the suffix; the maps, which may be in it, too, are none."""
        due = {each.file_name for each in self.images}
        maps = self.folder is not None and self.folder.resolve() == folder.resolve()
        there: dict[str, Path] = {}
        for path in sorted(folder.iterdir()):
            is_image = path.suffix.lower() in SUFFIXES and not (maps and path.suffix == _MAP)
            if not is_image or path.stem not in due:
                continue
            if path.stem in there:
                names = [there[path.stem].name, path.name]
                raise ImageError(f"{listed(names)} in {folder} could both be the map's image; leave one", value=names)
            there[path.stem] = path
        return there


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no system has a name so long, or with such characters
        return False


def read(annotations: str | Path | Mapping[str, Any], *, panoptic_root: str | Path | None = None) -> GroundTruth:
    """Reads a ground truth of whatever kind it is.

    Args:
        annotations: The path of a COCO file (instances, person keypoints or panoptic) or its content; or a folder of semantic
            maps as PNG, named as the images are, whose pixels are the model's class ids, and 255 where nothing is known.
        panoptic_root: Folder of the PNGs of a panoptic file; the file's path without ".json" unless given.

    Raises:
        InvalidArgumentError: (``ValueError``) It is none of these, or its parts do not fit together.
    """
    if isinstance(annotations, Mapping):
        return _of_content(dict(annotations), "the ground truth", panoptic_root)
    path = Path(annotations)
    if path.is_dir():
        return _of_folder(path)
    import orjson

    try:
        content = orjson.loads(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except OSError as exc:
        cure = "give a COCO annotation file, or a folder of semantic maps"
        raise InvalidArgumentError(f"cannot read {path} ({exc.strerror}); {cure}", value=str(path)) from exc
    except ValueError as exc:
        raise InvalidArgumentError(f"{path} is no JSON ({exc}); give a COCO annotation file", value=str(path)) from exc
    return _of_content(content, path.name, panoptic_root if panoptic_root is not None else path.with_suffix(""))


def listed(names: Iterable[object]) -> str:
    """Some names for a message, and how many more there are."""
    texts = [str(each) for each in names]
    more = len(texts) - _NAMED
    return ", ".join(texts[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def check_names(truth: GroundTruth, names: Sequence[str], *, is_thing: bool) -> list[str]:
    """Checks that a model has each of a ground truth's classes of things, or of stuff, by its name.

    Args:
        truth: The ground truth.
        names: The model's, by contiguous id.
        is_thing: Whether they are things'.

    Returns:
        Names of the model's classes that the ground truth has not.

    Raises:
        InvalidArgumentError: (``ValueError``) The model lacks one, or has two of one name.
    """
    due = [each.name for each in truth.categories if each.is_thing is is_thing]
    known = Counter(names)
    if absent := [name for name in due if name not in known]:
        near = difflib.get_close_matches(absent[0], known, 3) or list(known)
        raise InvalidArgumentError(
            f"the model has no class {listed(map(repr, absent))} of {truth.source}; it has {listed(near)}. Name them alike, or "
            "give the classes to evaluate",
            value=absent,
        )
    if twice := [name for name in due if known[name] > 1]:
        raise InvalidArgumentError(
            f"the model has several classes of the name {twice[0]!r}; evaluate without it: give the classes", value=twice
        )
    there = {each.name for each in truth.every}
    return [name for name in known if name not in there and not (name == "things" and not is_thing)]


def chosen(truth: GroundTruth, classes: Sequence[str]) -> GroundTruth:
    """The ground truth's part of these classes alone.

    Raises:
        InvalidArgumentError: (``ValueError``) There is no such class.
    """
    known = [each.name for each in truth.categories]
    if unknown := [name for name in classes if name not in known]:
        there = f"it has {listed(difflib.get_close_matches(str(unknown[0]), known, 3) or known)}" if known else "it names none"
        raise InvalidArgumentError(f"{truth.source} has no class {listed(map(repr, unknown))}; {there}", value=unknown)
    kept = tuple(each for each in truth.categories if each.name in classes)
    ids = {each.id for each in kept}
    annotations = truth.annotations
    if truth.kind == "instances":
        annotations = tuple(each for each in annotations if each["category_id"] in ids)
    # Of a panoptic map all segments stay: what is on an excluded one is no void.
    return replace(truth, categories=kept, annotations=annotations)


def _is_are(names: Sequence[object]) -> str:
    return "is" if len(names) == 1 else "are"


def _of_folder(folder: Path) -> GroundTruth:
    names = sorted(path.stem for path in folder.glob(f"*{_MAP}"))
    if not names:
        raise InvalidArgumentError(f"{folder} holds no PNG; give a folder of semantic maps", value=str(folder))
    return GroundTruth("semantic", folder.name, tuple(Picture(name, name) for name in names), folder=folder)


def _of_content(content: Any, source: str, panoptic_root: str | Path | None) -> GroundTruth:
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in _LISTS):
        raise InvalidArgumentError(f"{source} is no COCO annotation file: it has not all of {', '.join(_LISTS)}", value=source)
    try:
        images = sorted((_picture(each) for each in content["images"]), key=lambda each: (isinstance(each.id, str), each.id))
        categories = sorted((_category(each) for each in content["categories"]), key=lambda each: each.id)
        is_panoptic = any("segments_info" in each for each in content["annotations"])
        annotations = [dict(each) for each in content["annotations"]]
    except (KeyError, TypeError, ValueError, OverflowError) as exc:
        raise InvalidArgumentError(f"{source} is no COCO annotation file: {exc!r}", value=source) from exc
    if not images or not categories:
        what = "image" if not images else "category"
        raise InvalidArgumentError(f"{source} has no {what}, so there is nothing to evaluate", value=source)
    _check_once("image id", (each.id for each in images), source)
    _check_once("category id", (each.id for each in categories), source)
    _check_once("category", (each.name for each in categories), source)
    if not is_panoptic:
        _check_instances(annotations, images, categories, source)
        return GroundTruth("instances", source, tuple(images), tuple(categories), tuple(annotations), every=tuple(categories))
    if panoptic_root is None or not Path(panoptic_root).is_dir():
        raise InvalidArgumentError(f"there is no folder {panoptic_root}; give that of {source}'s PNGs as panoptic_root",
                                   value=panoptic_root)  # fmt: skip
    _check_panoptic(annotations, images, categories, source)
    root = Path(panoptic_root)
    return GroundTruth("panoptic", source, tuple(images), tuple(categories), tuple(annotations), root, tuple(categories))


_LISTS = ("images", "annotations", "categories")


def _picture(given: dict[str, Any]) -> Picture:
    size = (int(given["height"]), int(given["width"])) if given.get("height") and given.get("width") else None
    if not isinstance(given["id"], (int, str)):
        raise TypeError(f"the image id {given['id']!r} is neither a number nor a string")
    return Picture(given["id"], str(given["file_name"]), size)


def _category(given: dict[str, Any]) -> Category:
    if int(given["id"]) != given["id"]:
        raise ValueError(f"the category id {given['id']!r} is no whole number")
    return Category(int(given["id"]), str(given["name"]), bool(given.get("isthing", 1)))


def _check_once(what: str, values: Iterable[object], source: str) -> None:
    if twice := [value for value, count in Counter(values).items() if count > 1]:
        raise InvalidArgumentError(f"{source} has the {what} {twice[0]!r} twice", value=twice[0])


def _check_instances(
    annotations: Sequence[dict[str, Any]], images: Sequence[Picture], categories: Sequence[Category], source: str
) -> None:
    """Checks each annotation, and fills in what COCO's tools need and other tools' files lack."""
    sizes, category_ids = {each.id: each.size for each in images}, {each.id for each in categories}
    for place, each in enumerate(annotations):
        fault = None
        box = each.get("bbox")
        if not isinstance(each.get("image_id"), (int, str)) or each["image_id"] not in sizes:
            fault = f"is of the image {each.get('image_id')!r}, which is not there"
        elif not _is_one_of(each.get("category_id"), category_ids):
            fault = f"is of the category {each.get('category_id')!r}, which is not there"
        elif not isinstance(box, (list, tuple)) or len(box) != 4 or not all(_is_number(number) for number in box):
            fault = f"has the box {box!r:.80}; it should be x, y, width, height"
        elif each.get("segmentation") and not _is_mask(each["segmentation"], sizes[each["image_id"]]):
            fault = "has a segmentation that is neither polygons of three points and more nor an RLE of its image's size"
        elif "area" in each and not _is_number(each["area"]):
            fault = f"has the area {each['area']!r:.80}; it should be a number of pixels"
        elif "keypoints" in each and not _are_points(each["keypoints"]):
            fault = "has keypoints that are not x, y, visibility of each"
        elif each.get("iscrowd") not in (None, 0, 1):
            fault = f"has iscrowd {each['iscrowd']!r:.80}; it should be 0 or 1"
        if fault:
            raise InvalidArgumentError(f"{source}: the annotation {each.get('id', place)!r} {fault}", value=each.get("id"))
        each["bbox"] = list(each["bbox"])
        each["iscrowd"] = int(bool(each.get("iscrowd")))
        if "keypoints" in each:
            each["num_keypoints"] = sum(visibility > 0 for visibility in each["keypoints"][2::3])


def _is_one_of(value: object, ids: Collection[int]) -> bool:
    return isinstance(value, (int, float)) and value in ids


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9  # not NaN, not infinite


def _is_mask(given: object, size: tuple[int, int] | None) -> bool:
    if isinstance(given, dict):
        return _is_rle(given, size)
    return isinstance(given, list) and all(
        isinstance(each, list) and len(each) >= 6 and len(each) % 2 == 0 and all(map(_is_number, each)) for each in given
    )


def _is_rle(given: Mapping[str, Any], image_size: tuple[int, int] | None) -> bool:
    """Whether it is a mask in COCO's RLE, compressed or not. pycocotools reads on behind the end of one that is cut short."""
    size, counts = given.get("size"), given.get("counts")
    if isinstance(counts, bytes):  # as pycocotools.mask.encode gives them
        counts = counts.decode("latin-1")
    if not isinstance(size, list) or [type(each) for each in size] != [int, int] or tuple(size) != (image_size or tuple(size)):
        return False
    if isinstance(counts, list):
        return all(type(each) is int and each >= 0 for each in counts) and min(size) > 0 and sum(counts) == size[0] * size[1]
    try:
        masks.check({"size": size, "counts": counts}, (size[0], size[1]))  # type: ignore[typeddict-item]
    except InvalidArgumentError:
        return False
    return True


def _are_points(given: object) -> bool:
    return isinstance(given, list) and len(given) % 3 == 0 and all(map(_is_number, given))


def _check_panoptic(
    annotations: Sequence[dict[str, Any]], images: Sequence[Picture], categories: Sequence[Category], source: str
) -> None:
    category_ids = {each.id for each in categories}
    of_image = Counter(each.get("image_id") for each in annotations if isinstance(each.get("image_id"), (int, str)))
    if absent := [each.file_name for each in images if of_image[each.id] != 1]:
        raise InvalidArgumentError(f"{source} has not one annotation of each image: see {listed(absent)}", value=absent)
    for each in annotations:
        segments = each.get("segments_info")
        if not isinstance(each.get("file_name"), str) or not isinstance(segments, list):
            raise InvalidArgumentError(f"{source}: the image {each.get('image_id')!r} has no PNG or no segments", value=source)
        for segment in segments:
            if (
                not isinstance(segment, dict)
                or not isinstance(segment.get("id"), int)
                or not _is_one_of(segment.get("category_id"), category_ids)
            ):
                raise InvalidArgumentError(f"{source}: the image {each['image_id']!r} has the segment {segment!r:.80}, of no "
                                           "category that is there", value=segment)  # fmt: skip
