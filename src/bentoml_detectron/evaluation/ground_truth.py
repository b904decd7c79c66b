"""Ground truths, read and checked: COCO's annotation files, and folders of semantic maps."""

from __future__ import annotations

import codecs
import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

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
        annotations: COCO's, of instances one each, of panoptic segments one an image; of semantic maps their files.
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
            raise ImageError(f"{folder} is not a folder; give the folder with the images", value=str(folder))
        there = self._by_stem(folder) if self.kind == "semantic" else {}
        found = {each.id: there.get(each.file_name, folder / each.file_name) for each in self.images}
        if absent := [each.file_name for each in self.images if not _is_file(found[each.id])]:
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
            is_image = path.suffix.lower() in SUFFIXES and not (maps and path.suffix.lower() == _MAP)
            if not is_image or path.stem not in due:
                continue
            if path.stem in there:
                names = [there[path.stem].name, path.name]
                raise ImageError(f"{listed(names)} in {folder} could both be the image of one map; keep one", value=names)
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
        raise InvalidArgumentError(f"{path} is not JSON ({exc}); give a COCO annotation file", value=str(path)) from exc
    return _of_content(content, path.name, panoptic_root if panoptic_root is not None else path.with_suffix(""))


def listed(names: Iterable[object]) -> str:
    """Some names for a message, and how many more there are."""
    texts = [str(each) for each in names]
    more = len(texts) - _NAMED
    return ", ".join(texts[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def check_names(truth: GroundTruth, names: Sequence[str], *, is_thing: bool, others: Sequence[str] = ()) -> list[str]:
    """Checks that a model has each of a ground truth's classes of things, or of stuff, by its name.

    Args:
        truth: The ground truth.
        names: The model's, by contiguous id.
        is_thing: Whether they are things'.
        others: The model's other names: stuff's, or things'.

    Returns:
        Names of the model's classes that the ground truth has not.

    Raises:
        InvalidArgumentError: (``ValueError``) The model lacks one, or has two of one name.
    """
    due = [each.name for each in truth.categories if each.is_thing is is_thing]
    known = Counter(names)
    if absent := [name for name in due if name not in known]:
        if absent[0] in others:
            ours, theirs = ("a thing", "stuff") if is_thing else ("stuff", "a thing")
            raise InvalidArgumentError(
                f"{absent[0]!r} is {ours} in {truth.source}, but {theirs} to the model; correct 'isthing' (1 or 0) in the file",
                value=absent,
            )
        near = difflib.get_close_matches(absent[0], known, 3) or list(known)
        raise InvalidArgumentError(
            f"the model has no class {listed(map(repr, absent))} of {truth.source}; it has {listed(near)}. Use the same "
            "names, or choose the classes to evaluate (--classes, classes=)",
            value=absent,
        )
    if twice := [name for name in due if known[name] > 1]:
        raise InvalidArgumentError(
            f"the model has several classes named {twice[0]!r}; choose the classes to evaluate, without "
            "it (--classes, classes=)",
            value=twice,
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
        there = (
            f"it has {listed(difflib.get_close_matches(str(unknown[0]), known, 3) or known)}" if known else "it has no names"
        )
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
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() == _MAP)
    names = [path.stem for path in paths]
    if not names:
        raise InvalidArgumentError(f"{folder} holds no PNG; give a folder of semantic maps", value=str(folder))
    _check_once("map", names, folder.name)
    maps = tuple({"file_name": path.name} for path in paths)
    return GroundTruth("semantic", folder.name, tuple(Picture(name, name) for name in names), annotations=maps, folder=folder)


def _of_content(content: Any, source: str, panoptic_root: str | Path | None) -> GroundTruth:
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in _LISTS):
        raise InvalidArgumentError(f"{source} is not a COCO annotation file: it needs all of {', '.join(_LISTS)}", value=source)
    if any(isinstance(each, dict) and (each.get("neg_category_ids") or each.get("not_exhaustive_category_ids"))
           for each in content["images"]):  # fmt: skip
        raise InvalidArgumentError(
            f"{source} is an LVIS file: each image says for which classes its annotations are complete, which COCO's AP does "
            "not regard, so that it would be too low. Write COCO results ('bentoml detectron predict TAG IMAGES -o "
            "found.json'), and evaluate them with LVIS's own tool",
            value=source,
        )
    try:
        images = sorted((_picture(each) for each in content["images"]), key=lambda each: (isinstance(each.id, str), each.id))
        categories = sorted((_category(each) for each in content["categories"]), key=lambda each: each.id)
        is_panoptic = any("segments_info" in each for each in content["annotations"])
        annotations = [dict(each) for each in content["annotations"]]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as exc:
        raise InvalidArgumentError(f"{source} is not a COCO annotation file: {exc!r}", value=source) from exc
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
        raise InvalidArgumentError(
            f"there is no folder {panoptic_root}; give the one with {source}'s PNGs as --panoptic-root (panoptic_root)",
            value=panoptic_root,
        )
    _check_panoptic(annotations, images, categories, source)
    root = Path(panoptic_root)
    return GroundTruth("panoptic", source, tuple(images), tuple(categories), tuple(annotations), root, tuple(categories))


_LISTS = ("images", "annotations", "categories")


def _picture(given: dict[str, Any]) -> Picture:
    size = (int(given["height"]), int(given["width"])) if given.get("height") and given.get("width") else None
    image_id = _id(given["id"])
    if image_id is None:
        raise TypeError(f"the image id {given['id']!r} is neither a whole number nor a string")
    return Picture(image_id, str(given["file_name"]), size)


def _category(given: dict[str, Any]) -> Category:
    category_id = _id(given["id"])
    if not isinstance(category_id, int):
        raise ValueError(f"the category id {given['id']!r} is not a whole number")
    return Category(category_id, str(given["name"]), bool(given.get("isthing", 1)))


def _id(value: object) -> ImageId | None:
    """An id, which other tools write as 1.0, too, or give as NumPy's number; None for what is none."""
    if isinstance(value, (float, np.integer, np.floating)):
        return int(value) if float(value).is_integer() else None
    return value if isinstance(value, (int, str)) else None


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
        box: Any = each.get("bbox")
        segmentation = each.get("segmentation")
        image_id, category_id = _id(each.get("image_id")), _id(each.get("category_id"))
        if image_id not in sizes:
            fault = f"belongs to the image {each.get('image_id')!r}, which does not exist"
        elif category_id not in category_ids:
            fault = f"has the category {each.get('category_id')!r}, which does not exist"
        elif not _are_numbers(box) or len(box) != 4 or min(box[2:]) < 0:
            fault = f"has the box {box!r:.80}; it should be x, y, width, height"
        elif segmentation and not _is_mask(segmentation, sizes[image_id]):
            fault = "has a segmentation that is neither polygons nor an RLE with its image's size"
        elif "area" in each and not (_is_number(each["area"]) and each["area"] >= 0):
            fault = f"has the area {each['area']!r:.80}; it should be a number of pixels"
        elif "keypoints" in each and not _are_points(each["keypoints"]):
            fault = "has keypoints that are not a list of x, y, visibility for each"
        elif each.get("iscrowd") not in (None, 0, 1):
            fault = f"has iscrowd {each['iscrowd']!r:.80}; it should be 0 or 1"
        if fault:
            raise InvalidArgumentError(f"{source}: the annotation {each.get('id', place)!r} {fault}", value=each.get("id"))
        each.update(image_id=image_id, category_id=category_id, bbox=list(box), iscrowd=int(bool(each.get("iscrowd"))))
        if isinstance(segmentation, list):  # two points have no inside; Detectron2 leaves them out as well
            each["segmentation"] = [list(polygon) for polygon in segmentation if len(polygon) >= 6]
        if "keypoints" in each and not isinstance(each.get("num_keypoints"), int):
            each["num_keypoints"] = sum(visibility > 0 for visibility in each["keypoints"][2::3])


def _is_number(value: Any) -> bool:
    """Whether it is a number, NumPy's too, that is finite and no coordinate of another planet."""
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return is_number and bool(-1e9 < value < 1e9)


def _are_numbers(given: object) -> bool:
    return isinstance(given, (list, tuple, np.ndarray)) and all(map(_is_number, given))


def _is_mask(given: object, size: tuple[int, int] | None) -> bool:
    if isinstance(given, dict):
        return _is_rle(given, size)
    return isinstance(given, list) and all(_are_numbers(each) and len(each) % 2 == 0 for each in given)


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
    return isinstance(given, list) and len(given) % 3 == 0 and _are_numbers(given)


def _check_panoptic(
    annotations: Sequence[dict[str, Any]], images: Sequence[Picture], categories: Sequence[Category], source: str
) -> None:
    category_ids = {each.id for each in categories}
    of_image = Counter(_id(each.get("image_id")) for each in annotations)
    if absent := [each.file_name for each in images if of_image[each.id] != 1]:
        raise InvalidArgumentError(f"{source} must have one annotation for each image; check {listed(absent)}", value=absent)
    for each in annotations:
        segments = each.get("segments_info")
        if not isinstance(each.get("file_name"), str) or not isinstance(segments, list):
            raise InvalidArgumentError(f"{source}: the image {each.get('image_id')!r} has no PNG or no segments", value=source)
        for segment in segments:
            fault = None
            if not isinstance(segment, dict) or _id(segment.get("category_id")) not in category_ids:
                fault = "whose category does not exist"
            elif not isinstance(segment.get("id"), int) or segment["id"] < 1:
                fault = "whose id is not a whole number of 1 or more; 0 marks unlabeled pixels"
            if fault:
                raise InvalidArgumentError(
                    f"{source}: the image {each['image_id']!r} has the segment {segment!r:.80}, {fault}", value=segment
                )
        _check_once(f"segment of the image {each['image_id']!r},", (segment["id"] for segment in segments), source)
