"""The JSON of `Detections`, described by ``docs/detections.schema.json``: writing it, and reading it from any source.

The text may come from anyone. Types are not converted (a number is no string, true is not 1), and a map is not decoded before
its PNG is known to have the image's size.
"""

from __future__ import annotations

import base64
import io
import json
import reprlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bentoml_detectron import masks as rle_masks
from bentoml_detectron.errors import InvalidArgumentError
from bentoml_detectron.masks import RLE

BOX_COLUMNS = {"xyxy": 4, "xywha": 5}
"""Numbers that a box has, by its format."""

_REQUIRED = ("image_size", "box_format", "boxes", "scores", "class_ids", "class_names")
_OPTIONAL = ("category_ids", "masks", "keypoint_count", "keypoints", "panoptic", "semantic")
_SEGMENT = ("id", "class_id", "class_name", "is_thing", "area"), ("score", "category_id", "detection")

_UNSTABLE = np.uint32(0x15AE43FD)
"""Bits of 7.038531e-26. Of all float32 it alone is another number (the next one) if its shortest text is read as float64 and
then rounded to float32, as parsers of JSON do."""

_PNG_KINDS: dict[str, tuple[int, int, int]] = {"uint8": (8, 0, 1), "int16": (16, 0, 2), "rgb": (8, 2, 3)}
"""A PNG's bits and color type, and its bytes a pixel."""


def write(parts: Mapping[str, Any], segments: Sequence[Any] = ()) -> str:
    """The text for the attributes of a `Detections`, of which masks may be RLEs or polygons.

    Args:
        parts: By name; "panoptic" is the map alone, (H, W) int32.
        segments: Dataclasses, those of the map.
    """
    import orjson

    panoptic, semantic, keypoints = parts["panoptic"], parts["semantic"], parts["keypoints"]
    content = {
        "image_size": parts["image_size"],
        # Without detections the arrays' shapes would be lost.
        "box_format": "xyxy" if parts["boxes"].shape[1] == 4 else "xywha",
        "boxes": _spelled(parts["boxes"]),
        "scores": _spelled(parts["scores"]),
        "class_ids": parts["class_ids"],
        "class_names": parts["class_names"],
        "category_ids": parts["category_ids"],
        "masks": parts["masks"],
        "keypoint_count": None if keypoints is None else keypoints.shape[1],
        "keypoints": None if keypoints is None else _spelled(keypoints),
        "panoptic": None if panoptic is None else {"png": _base64(panoptic_png(panoptic)), "segments": segments},
        "semantic": None if semantic is None else {"dtype": str(semantic.dtype), "png": _base64(png(semantic))},
    }
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY).decode()


def read(text: str | bytes | bytearray | Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The attributes and segments in a text that `write` wrote with RLEs, or anyone else.

    Raises:
        InvalidArgumentError: It is none, or its parts do not fit together; segments are left to their own class.
    """
    content = _object("this", _parsed(text), _REQUIRED, _OPTIONAL)
    size = _size(content["image_size"])
    if type(content["scores"]) is not list:
        raise _unfit("scores", content["scores"], "a list of numbers")
    count = len(content["scores"])
    if content["box_format"] not in tuple(BOX_COLUMNS):
        raise _unfit("box_format", content["box_format"], "'xyxy' or 'xywha'")
    parts: dict[str, Any] = {
        "image_size": size,
        "boxes": _array("boxes", content["boxes"], np.float32, (count, BOX_COLUMNS[content["box_format"]])),
        "scores": _array("scores", content["scores"], np.float32, (count,)),
        "class_ids": _array("class_ids", content["class_ids"], np.int64, (count,)),
        "class_names": _list("class_names", content["class_names"], count),
    }
    if content.get("category_ids") is not None:
        parts["category_ids"] = _array("category_ids", content["category_ids"], np.int64, (count,))
    if content.get("masks") is not None:
        parts["masks"] = [_mask(given, size) for given in _list("masks", content["masks"], count)]
    parts["keypoints"] = _keypoints(content.get("keypoints"), content.get("keypoint_count"), count)
    if content.get("semantic") is not None:
        parts["semantic"] = _semantic(content["semantic"], size)
    segments: list[dict[str, Any]] = []
    if content.get("panoptic") is not None:
        parts["panoptic"], segments = _panoptic(content["panoptic"], size)
    return parts, segments


def panoptic_png(ids: NDArray[np.int32]) -> bytes:
    """A map of segment ids as COCO's panoptic PNG: an id is red + 256 green + 65536 blue."""
    return png(np.ascontiguousarray(ids, dtype="<i4").view(np.uint8).reshape(*ids.shape, 4)[..., :3])


def _spelled(array: NDArray[np.float32]) -> Any:
    """What orjson shall write for float32: the array, in the shortest digits that identify its numbers."""
    bits = array.view(np.uint32) & 0x7FFFFFFF
    return array.tolist() if (bits == _UNSTABLE).any() else array


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def png(pixels: NDArray[Any]) -> bytes:
    """An (H, W) uint8 or int16 or an (H, W, 3) uint8 array as PNG; int16 as if it were uint16."""
    from PIL import Image

    pixels = np.ascontiguousarray(pixels)
    buffer = io.BytesIO()
    Image.fromarray(pixels.view(np.uint16) if pixels.dtype == np.int16 else pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _parsed(text: object) -> Any:
    """The content of a JSON text. Not by orjson, which takes the last of two equal keys."""
    if isinstance(text, Mapping):  # what a client has parsed already; spelled again, it holds nothing but JSON
        try:
            text = json.dumps(text, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as exc:
            raise InvalidArgumentError(f"this cannot be a service's answer ({exc}); give its text", value=text) from exc
    if not isinstance(text, (str, bytes, bytearray)):
        raise InvalidArgumentError(f"the argument must be text written by to_json, not {type(text).__name__}", value=text)
    try:
        spelled = text if isinstance(text, str) else text.decode()
        return json.loads(spelled, object_pairs_hook=_unique, parse_constant=_constant)
    except InvalidArgumentError:
        raise
    except (ValueError, RecursionError) as exc:
        raise InvalidArgumentError(f"not JSON written by to_json: {exc}") from exc


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InvalidArgumentError("an object has a duplicate key, so its value is ambiguous", value=[key for key, _ in pairs])
    return found


def _constant(name: str) -> Any:
    raise InvalidArgumentError(f"{name} is not JSON; numbers must be finite", value=name)


def _unfit(name: str, value: object, due: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name} is {reprlib.repr(value)}; it must be {due}", value=value)


def _object(name: str, given: Any, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    if type(given) is not dict:
        raise InvalidArgumentError(f"{name} must be an object, not {type(given).__name__}", value=given)
    if missing := [key for key in required if key not in given]:
        raise InvalidArgumentError(f"{name} lacks {', '.join(missing)}", value=missing)
    if unknown := sorted(given.keys() - {*required, *optional}):
        raise InvalidArgumentError(f"{name} has unknown keys: {', '.join(unknown):.200}", value=unknown)
    return given


def _list(name: str, given: Any, count: int) -> list[Any]:
    if type(given) is not list or len(given) != count:
        raise _unfit(name, given, f"a list of {count}, the length of scores")
    return given


def _size(given: Any) -> tuple[int, int]:
    if type(given) is not list or [type(each) for each in given] != [int, int]:
        raise _unfit("image_size", given, "height and width")
    return given[0], given[1]


def _array(name: str, given: Any, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
    """Lists in lists of exactly this shape, of numbers; of whole ones for int64."""
    flat: list[Any] = [given]
    for length in shape:
        if any(type(each) is not list or len(each) != length for each in flat):
            raise _unfit(name, given, f"lists of the shape {shape}")
        flat = list(chain.from_iterable(flat))
    wrong = {*map(type, flat)} - ({int} if dtype is np.int64 else {int, float})
    if wrong:
        raise _unfit(name, next(each for each in flat if type(each) in wrong), f"numbers of {np.dtype(dtype)}")
    try:
        with np.errstate(over="ignore"):  # infinite then, which Detections refuses
            return np.array(flat, dtype).reshape(shape)
    except (OverflowError, ValueError) as exc:  # a number, or the shape of nothing, is too large
        raise _unfit(name, given, f"numbers of {np.dtype(dtype)} ({exc})") from None


def _mask(given: Any, size: tuple[int, int]) -> RLE:
    if isinstance(given, list):
        raise InvalidArgumentError("masks are polygons, and from_json reads RLEs; ask the service with masks=rle", value=given)
    mask = _object("a mask", given, ("size", "counts"))
    if _size(mask["size"]) != size:
        raise _unfit("a mask's size", mask["size"], str(list(size)))
    rle = RLE(size=list(size), counts=mask["counts"])
    rle_masks.check(rle, size)
    return rle


def _keypoints(given: Any, each: Any, count: int) -> NDArray[np.float32] | None:
    """(N, `each`, 3), or None where both are None."""
    if given is None and each is None:
        return None
    if given is None or type(each) is not int or each < 0:
        raise _unfit("keypoint_count", each, "the number of keypoints per detection, or null if keypoints is null")
    return _array("keypoints", given, np.float32, (count, each, 3))


def _semantic(given: Any, size: tuple[int, int]) -> NDArray[Any]:
    semantic = _object("semantic", given, ("dtype", "png"))
    dtype = semantic["dtype"]
    if dtype not in ("uint8", "int16"):
        raise _unfit("semantic.dtype", dtype, "'uint8' or 'int16'")
    return np.ascontiguousarray(_pixels("semantic.png", semantic["png"], size, dtype)).view(dtype)


def _panoptic(given: Any, size: tuple[int, int]) -> tuple[NDArray[np.int32], list[dict[str, Any]]]:
    panoptic = _object("panoptic", given, ("png", "segments"))
    if type(panoptic["segments"]) is not list:
        raise _unfit("panoptic.segments", panoptic["segments"], "a list")
    segments = [_object("a segment", segment, *_SEGMENT) for segment in panoptic["segments"]]
    colors = _pixels("panoptic.png", panoptic["png"], size, "rgb")
    ids = np.zeros((*size, 4), np.uint8)
    ids[..., :3] = colors
    return ids.view("<i4")[..., 0].astype(np.int32, copy=False), segments


def _pixels(name: str, given: Any, size: tuple[int, int], kind: str) -> NDArray[Any]:
    """The pixels of a PNG in base64, of which no more is made than its header should say and its content has."""
    from PIL.PngImagePlugin import PngImageFile

    if type(given) is not str:
        raise _unfit(name, given, "a PNG in base64")
    bits, color, bytes_per_pixel = _PNG_KINDS[kind]
    try:
        content = base64.b64decode(given, validate=True)
        start, width, height, *found = struct.unpack_from(">16sIIBB", content)
    except (ValueError, struct.error) as exc:
        raise _unfit(name, given, f"a PNG in base64 ({exc})") from exc
    if start != b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" or (height, width) != size or found != [bits, color]:
        what = f"a PNG of {size[1]}x{size[0]} with {bits} bits and color type {color}"
        raise _unfit(name, f"{width}x{height}, {found}" if start[1:4] == b"PNG" else given, what)
    if height * width > rle_masks.MOST_PIXELS:
        raise _unfit(name, f"{width}x{height}", f"of at most {rle_masks.MOST_PIXELS} pixels")
    try:
        _check_png(content, height * (1 + width * bytes_per_pixel))
        return np.asarray(PngImageFile(io.BytesIO(content)))  # not Image.open, whose limit warns
    except Exception as exc:  # Pillow fails in many ways
        raise InvalidArgumentError(f"{name} is damaged: {exc}", value=name) from exc


def _check_png(content: bytes, length: int) -> None:
    """Checks that a PNG has no chunks but those of its picture, whose rows are this many bytes.

    Pillow leaves rows that are missing black, and unpacks texts and profiles.

    Raises:
        ValueError: It is otherwise.
        struct.error: The end is missing.
        zlib.error: The rows are damaged.
    """
    names, rows, position = [b"IHDR"], [], 33
    if content[28] != 0:
        raise ValueError("it is interlaced")
    while names[-1] != b"IEND":
        size, name = struct.unpack_from(">I4s", content, position)
        body = content[position + 8 : position + 8 + size]
        if struct.unpack_from(">I", content, position + 8 + size)[0] != zlib.crc32(name + body):
            raise ValueError(f"wrong checksum of the chunk {name!r}")
        names.append(name)
        rows.append(body)
        position += 12 + size
    unpacking = zlib.decompressobj()
    if {*names[1:-1]} != {b"IDAT"} or len(unpacking.decompress(b"".join(rows), length + 1)) != length or not unpacking.eof:
        raise ValueError("it has chunks other than its pixels, or the wrong number of rows")
