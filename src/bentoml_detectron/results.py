"""What a model found on one image, as plain NumPy: `Detections`, its conversions, and `PanopticSegmentation`.

Reading them needs neither PyTorch nor Detectron2.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bentoml_detectron import masks as rle_masks
from bentoml_detectron.errors import NO_DETECTRON2, DependencyMissingError, DetectronMissingError, InvalidArgumentError
from bentoml_detectron.masks import RLE

if TYPE_CHECKING:
    import supervision
    from detectron2.structures import Instances

__all__ = ["RLE", "Detections", "PanopticSegmentation", "Segment"]

MAX_SIDE = 1 << 16  # pixels; JPEG's own limit
VOID = {"uint8": 255, "int16": -1}
"""What a semantic map holds where it says nothing, by its dtype."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment of a panoptic segmentation.

    Attributes:
        id: Its value in the map; above 0.
        class_id: The contiguous training id, of a thing or of stuff.
        class_name: "" only where the model carries no names.
        is_thing: Whether it is one countable object.
        area: In pixels.
        score: In [0, 1], of a thing; None for stuff, and where the model gives none.
        category_id: The dataset's own id, where the model carries it.
        detection: The index of the detection that it is the segment of, if there is one.
    """

    id: int
    class_id: int
    class_name: str
    is_thing: bool
    area: int
    score: float | None = None
    category_id: int | None = None
    detection: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PanopticSegmentation:
    """Each pixel's segment.

    Attributes:
        ids: (H, W) int32, each pixel's segment id; 0 where there is none.
        segments: The segments, whose ids are those of the map.
    """

    ids: NDArray[np.int32]
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        _set(self, "ids", _array("panoptic.ids", self.ids, np.int32, (None, None)))
        _set(self, "segments", tuple(self.segments))
        known = [segment.id for segment in self.segments]
        if len(set(known)) != len(known) or not all(0 < each < 1 << 24 for each in known):
            raise InvalidArgumentError(f"segment ids are distinct and from 1 to 2**24 - 1, not {known}", value=known)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PanopticSegmentation):
            return NotImplemented
        return self.segments == other.segments and np.array_equal(self.ids, other.ids)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        height, width = self.ids.shape
        return f"PanopticSegmentation({len(self.segments)} segments in {width}x{height})"

    def rle(self, segment_id: int) -> RLE:
        """One segment's mask."""
        return rle_masks.encode(self.ids == segment_id)

    def to_png(self) -> bytes:
        """The map as COCO's panoptic PNG: an id is red + 256 green + 65536 blue."""
        rgb = np.ascontiguousarray(self.ids, dtype="<i4").view(np.uint8).reshape(*self.ids.shape, 4)[..., :3]
        return _png(rgb)

    def segments_info(self) -> list[dict[str, Any]]:
        """COCO's ``segments_info``; category ids are the dataset's where the model carries them."""
        return [
            {
                "id": segment.id,
                "category_id": segment.class_id if segment.category_id is None else segment.category_id,
                "isthing": int(segment.is_thing),
                "area": segment.area,
                **({} if segment.score is None else {"score": segment.score}),
            }
            for segment in self.segments
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """What a model found on one image. N detections, best score first as the model gave them; arrays are read-only.

    Attributes:
        image_size: Height and width of the image, in pixels.
        boxes: (N, 4) float32, XYXY in absolute pixels; (N, 5) XYWHA of rotated models: center, size, and degrees
            counter-clockwise.
        scores: (N,) float32, in [0, 1].
        class_ids: (N,) int64, contiguous training ids.
        class_names: One a detection, "" only where the model carries no names.
        category_ids: (N,) int64, the dataset's own ids, where the model carries them.
        masks: One a detection, COCO's compressed RLE at the size of the image.
        keypoints: (N, K, 3) float32: x, y in absolute pixels, and the keypoint's score.
        panoptic: The segmentation of the whole image into things and stuff.
        semantic: (H, W) uint8 or, with 255 classes and more, int16: each pixel's class; 255 or -1 where there is none.

    Raises:
        InvalidArgumentError: (``ValueError``) Dtypes, shapes or lengths do not fit together, or a number is not finite.
    """

    image_size: tuple[int, int]
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    class_ids: NDArray[np.int64]
    class_names: tuple[str, ...]
    masks: list[RLE] | None = None
    keypoints: NDArray[np.float32] | None = None
    panoptic: PanopticSegmentation | None = None
    semantic: NDArray[np.uint8] | NDArray[np.int16] | None = None
    category_ids: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        size = _image_size(self.image_size)
        count = len(self.scores)
        columns = 5 if np.ndim(self.boxes) == 2 and np.shape(self.boxes)[1] == 5 else 4
        _set(self, "image_size", size)
        _set(self, "boxes", _array("boxes", self.boxes, np.float32, (count, columns)))
        _set(self, "scores", _array("scores", self.scores, np.float32, (count,)))
        _set(self, "class_ids", _array("class_ids", self.class_ids, np.int64, (count,)))
        _set(self, "class_names", tuple(self.class_names))
        if len(self.class_names) != count or not all(isinstance(name, str) for name in self.class_names):
            raise InvalidArgumentError(
                f"class_names are {count} strings here, not {self.class_names!r}", value=self.class_names
            )
        if self.category_ids is not None:
            _set(self, "category_ids", _array("category_ids", self.category_ids, np.int64, (count,)))
        if self.keypoints is not None:
            _set(self, "keypoints", _array("keypoints", self.keypoints, np.float32, (count, None, 3)))
        if self.masks is not None:
            _set(self, "masks", list(self.masks))
            if len(self.masks) != count or any(tuple(mask["size"]) != size for mask in self.masks):
                raise InvalidArgumentError(f"masks are {count} RLEs of size {list(size)} here", value=len(self.masks))
        if self.semantic is not None:
            dtype = np.dtype(np.int16 if getattr(self.semantic, "dtype", None) == np.int16 else np.uint8)
            _set(self, "semantic", _array("semantic", self.semantic, dtype.type, size))
        if self.panoptic is not None and self.panoptic.ids.shape != size:
            raise InvalidArgumentError(f"panoptic.ids is {self.panoptic.ids.shape}; the image is {size}", value=self.panoptic)

    def __len__(self) -> int:
        return len(self.scores)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Detections):
            return NotImplemented
        return all(_same(getattr(self, each.name), getattr(other, each.name)) for each in fields(self))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        height, width = self.image_size
        names = [name or str(label) for name, label in zip(self.class_names, self.class_ids.tolist(), strict=True)]
        found = [f"{name} {score:.2f}" for name, score in zip(names[:3], self.scores[:3].tolist(), strict=True)]
        parts = [", ".join(found) + (", ..." if len(self) > 3 else "")] if found else []
        parts += [name for name in ("masks", "keypoints", "panoptic", "semantic") if getattr(self, name) is not None]
        return f"Detections({len(self)} in {width}x{height}{': ' if parts else ''}{'; '.join(parts)})"

    def __getitem__(self, index: slice | Sequence[int] | NDArray[Any]) -> Detections:
        """The detections of a slice, of indices, or where a mask is True; maps of the whole image stay as they are.

        Example::

            sure = found[found.scores > 0.6]
        """
        chosen = np.arange(len(self))[index if isinstance(index, slice) else np.asarray(index)]
        if chosen.ndim != 1:
            raise InvalidArgumentError(f"{index!r} is one detection; give a slice, or a list of indices", value=index)
        return Detections(
            self.image_size,
            self.boxes[chosen],
            self.scores[chosen],
            self.class_ids[chosen],
            tuple(self.class_names[i] for i in chosen),
            None if self.masks is None else [self.masks[i] for i in chosen],
            None if self.keypoints is None else self.keypoints[chosen],
            None if self.panoptic is None else _relinked(self.panoptic, chosen),
            self.semantic,
            None if self.category_ids is None else self.category_ids[chosen],
        )

    def polygons(self) -> list[list[list[float]]]:
        """Each detection's mask as COCO's polygons, flat x, y lists in absolute pixels; see `masks.to_polygons`.

        Raises:
            InvalidArgumentError: There are no masks.
        """
        if self.masks is None:
            raise InvalidArgumentError("these detections have no masks, so no polygons")
        return [rle_masks.to_polygons(mask) for mask in self.masks]

    def to_json(self, *, masks: Literal["rle", "polygon", "none"] = "rle") -> str:
        """As one JSON object whose keys are the attributes; ``docs/detections.schema.json`` is its schema.

        Args:
            masks: As RLE, which `from_json` reads back without loss; as polygons, or not at all, which it cannot.

        Returns:
            The text. Numbers are the shortest that give the same float32; maps are PNG in base64.
        """
        import orjson

        if masks not in ("rle", "polygon", "none"):
            raise InvalidArgumentError(f"masks={masks!r}; give 'rle', 'polygon' or 'none'", value=masks)
        spelled: Any = self.masks if masks == "rle" else None
        if masks == "polygon" and self.masks is not None:
            spelled = self.polygons()
        content = {
            "image_size": self.image_size,
            "boxes": self.boxes,
            "scores": self.scores,
            "class_ids": self.class_ids,
            "class_names": self.class_names,
            "category_ids": self.category_ids,
            "masks": spelled,
            "keypoints": self.keypoints,
            "panoptic": None if self.panoptic is None else {
                "png": _base64(self.panoptic.to_png()), "segments": self.panoptic.segments,
            },
            "semantic": None if self.semantic is None else {
                "dtype": str(self.semantic.dtype), "png": _base64(_png(self.semantic)),
            },
        }  # fmt: skip
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Detections:
        """Reads what `to_json` wrote; the text may come from anywhere.

        Raises:
            InvalidArgumentError: (``ValueError``) It is no such text, or its parts do not fit together.
        """
        import orjson

        try:
            content = orjson.loads(text)
            return _from_content(content)
        except InvalidArgumentError:
            raise
        except (ValueError, TypeError, KeyError, OverflowError, AttributeError) as exc:
            raise InvalidArgumentError(f"this is no Detections as to_json writes them: {exc!r}") from exc

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """As COCO results, which pycocotools' ``loadRes`` takes; one dict a detection.

        Category ids are the dataset's where the model carries them. Boxes are XYWH, XYWHA of rotated models. Keypoints are
        pixel indices, half a pixel less than Detectron2's coordinates, as in its ``COCOEvaluator``.
        """
        boxes = self.boxes
        if boxes.shape[1] == 4:
            boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        categories = self.class_ids if self.category_ids is None else self.category_ids
        columns: dict[str, Sequence[Any]] = {
            "category_id": categories.tolist(), "bbox": boxes.tolist(), "score": self.scores.tolist(),
        }  # fmt: skip
        if self.masks is not None:
            columns["segmentation"] = [dict(mask) for mask in self.masks]
        if self.keypoints is not None:
            shifted = self.keypoints - np.array([0.5, 0.5, 0], np.float32)
            columns["keypoints"] = shifted.reshape(len(self), -1).tolist()
        return [{"image_id": image_id, **dict(zip(columns, row, strict=True))} for row in zip(*columns.values(), strict=True)]

    def to_supervision(self) -> supervision.Detections:
        """As the supervision library's detections, for its annotators, trackers and metrics; masks stay compact.

        Raises:
            DependencyMissingError: supervision is not installed.
            InvalidArgumentError: The boxes are rotated.
        """
        try:
            import supervision as sv
        except ModuleNotFoundError as exc:
            raise DependencyMissingError("this needs supervision: pip install 'bentoml-detectron[draw]'") from exc
        if self.boxes.shape[1] != 4:
            raise InvalidArgumentError("rotated boxes have no place in supervision's Detections; use boxes", value=self.boxes)
        compact = None
        if self.masks is not None:
            # Around each mask rather than its box: a mask may reach a pixel further, and both ends count.
            x, y, width, height = np.array([rle_masks.bounding_box(mask) for mask in self.masks] or np.empty((0, 4))).T
            around = np.stack([x, y, np.maximum(x, x + width - 1), np.maximum(y, y + height - 1)], axis=1)
            compact = sv.CompactMask.from_coco_rle(self.masks, around, self.image_size)
        return sv.Detections(
            xyxy=self.boxes.copy(),
            mask=compact,
            confidence=self.scores.copy(),
            class_id=self.class_ids.copy(),
            data={"class_name": np.array(self.class_names, dtype=str)},
        )

    def to_instances(self) -> Instances:
        """As Detectron2's ``Instances``, on the CPU, with the fields that its models give; masks are (N, H, W) bool.

        Raises:
            DetectronMissingError: Detectron2 is not installed.
        """
        try:
            from detectron2.structures import Boxes, Instances, RotatedBoxes
        except ModuleNotFoundError as exc:
            raise DetectronMissingError(NO_DETECTRON2) from exc
        import torch

        boxes = torch.from_numpy(self.boxes.copy())
        instances = Instances(
            self.image_size,
            pred_boxes=Boxes(boxes) if boxes.shape[1] == 4 else RotatedBoxes(boxes),
            scores=torch.from_numpy(self.scores.copy()),
            pred_classes=torch.from_numpy(self.class_ids.copy()),
        )
        if self.masks is not None:
            bitmaps = torch.zeros((len(self), *self.image_size), dtype=torch.bool)
            for bitmap, mask in zip(bitmaps, self.masks, strict=True):
                bitmap.copy_(torch.from_numpy(rle_masks.decode(mask)))
            instances.pred_masks = bitmaps
        if self.keypoints is not None:
            instances.pred_keypoints = torch.from_numpy(self.keypoints.copy())
        return instances


def _set(target: object, name: str, value: object) -> None:
    object.__setattr__(target, name, value)


def _array(name: str, value: Any, dtype: type[np.generic], shape: tuple[int | None, ...]) -> NDArray[Any]:
    """The value as a read-only array, or an error that names it; a caller's array stays writable."""
    try:
        array = np.asarray(value)
        if not np.can_cast(array.dtype, dtype, "same_kind") and array.size:
            raise TypeError(f"cannot be {np.dtype(dtype)} without loss")
        array = np.ascontiguousarray(array, dtype=dtype).view()
    except (TypeError, ValueError) as exc:
        raise InvalidArgumentError(f"{name}: {exc}", value=value) from exc
    if array.size == 0 and None not in shape and 0 in shape:
        array = array.reshape([each or 0 for each in shape])
    if array.ndim != len(shape) or any(due is not None and due != got for due, got in zip(shape, array.shape, strict=True)):
        due = tuple("any" if each is None else each for each in shape)
        raise InvalidArgumentError(f"{name} has the shape {array.shape}; it should be {due}", value=array.shape)
    if dtype is np.float32 and not np.isfinite(array).all():
        raise InvalidArgumentError(f"{name} holds a number that is not finite", value=name)
    array.flags.writeable = False
    return array


def _image_size(value: Any) -> tuple[int, int]:
    try:
        height, width = (int(each) for each in value)
    except (TypeError, ValueError) as exc:
        raise InvalidArgumentError(f"image_size is {value!r}; give height and width", value=value) from exc
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise InvalidArgumentError(f"image_size is {value!r}; each side is from 1 to {MAX_SIDE} pixels", value=value)
    return height, width


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(type(one) is type(other) and one == other)


def _relinked(panoptic: PanopticSegmentation, chosen: NDArray[np.int64]) -> PanopticSegmentation:
    """The same segmentation, its segments pointing at detections as they are counted now."""
    from dataclasses import replace

    place = {int(old): new for new, old in enumerate(chosen)}
    segments = [
        segment if segment.detection is None else replace(segment, detection=place.get(segment.detection))
        for segment in panoptic.segments
    ]
    return PanopticSegmentation(panoptic.ids, tuple(segments))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _png(pixels: NDArray[Any]) -> bytes:
    """An (H, W) uint8 or int16 or an (H, W, 3) uint8 array as PNG; int16 as if it were uint16."""
    from PIL import Image

    pixels = np.ascontiguousarray(pixels)
    if pixels.dtype == np.int16:
        pixels = pixels.view(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _pixels(png: str, size: tuple[int, int], mode: str) -> NDArray[Any]:
    """The pixels of a PNG in base64, which must be of that size and mode; nothing is decoded before that is known."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(base64.b64decode(png, validate=True)), formats=("PNG",)) as image:
            if image.size == size[::-1] and image.mode == mode:
                return np.asarray(image)
            found = f"{image.mode} of {image.size}"
    except Exception as exc:  # Pillow fails in many ways
        raise InvalidArgumentError(f"a map is no PNG: {exc}") from exc
    raise InvalidArgumentError(f"a map is a PNG with {found}, not {mode} of {size[::-1]}", value=found)


def _from_content(content: Mapping[str, Any]) -> Detections:
    """`Detections` from parsed JSON of unknown origin."""
    if not isinstance(content, dict):
        raise InvalidArgumentError(f"this is a {type(content).__name__}, not an object with the attributes of Detections")
    if unknown := content.keys() - {each.name for each in fields(Detections)}:
        raise InvalidArgumentError(f"unknown attributes: {', '.join(sorted(unknown))}", value=sorted(unknown))
    size = _image_size(content["image_size"])

    def optional(name: str, read: Callable[[Any], Any]) -> Any:
        return None if content.get(name) is None else read(content[name])

    def checked_masks(given: Any) -> list[RLE]:
        for mask in given:
            rle_masks.check(mask, size)
        return [RLE(size=list(size), counts=mask["counts"]) for mask in given]

    def semantic(given: Any) -> NDArray[Any]:
        if given["dtype"] not in VOID:
            raise InvalidArgumentError(f"semantic.dtype is {given['dtype']!r}; it is one of {', '.join(VOID)}")
        pixels = _pixels(given["png"], size, "L" if given["dtype"] == "uint8" else "I;16")
        return np.ascontiguousarray(pixels).view(given["dtype"])

    def panoptic(given: Any) -> PanopticSegmentation:
        red, green, blue = np.moveaxis(_pixels(given["png"], size, "RGB").astype(np.int32), 2, 0)
        return PanopticSegmentation(red + (green << 8) + (blue << 16), tuple(Segment(**each) for each in given["segments"]))

    return Detections(
        image_size=size,
        boxes=_numbers(content["boxes"], np.float32),
        scores=_numbers(content["scores"], np.float32),
        class_ids=_numbers(content["class_ids"], np.int64),
        class_names=tuple(content["class_names"]),
        masks=optional("masks", checked_masks),
        keypoints=optional("keypoints", lambda given: _numbers(given, np.float32)),
        panoptic=optional("panoptic", panoptic),
        semantic=optional("semantic", semantic),
        category_ids=optional("category_ids", lambda given: _numbers(given, np.int64)),
    )


def _numbers(given: Any, dtype: type[np.generic]) -> NDArray[Any]:
    """Nested lists of JSON numbers as an array; integers must be integers."""
    array = np.array(given)
    if not (array.size == 0 or array.dtype.kind == "i" or (array.dtype.kind == "f" and dtype is np.float32)):
        raise InvalidArgumentError(f"{given!r:.60} should be numbers of {np.dtype(dtype)}")
    return array.astype(dtype)
