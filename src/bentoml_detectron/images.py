"""From what a caller gives as an image to pixels as Detectron2 takes them.

Encoded images may come from anyone. Four formats are accepted, recognised by their first bytes and never by a file's name.
Their size is known before anything is decoded. Pillow also reads texts, profiles, animations and whole EXIF blocks; here it
does not get them, because it warns of every oddity in them, and fails for what is no part of the picture.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from bentoml_detectron.errors import (
    DamagedImageError,
    ImageError,
    ImageTooLargeError,
    InvalidArgumentError,
    UnsupportedImageError,
)
from bentoml_detectron.image_headers import webp_size

ImageLike: TypeAlias = bytes | bytearray | memoryview | str | os.PathLike[str] | Image.Image | np.ndarray
"""An encoded image, the path of one, a PIL image, or a BGR array."""

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp")
"""What an image's name ends with, in a folder, in whatever case."""

_TAKEN = "only JPEG, PNG, WebP and BMP are supported"

_MODES = frozenset(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
"""Modes that Pillow converts to RGB as they should be; others are refused or come here by another mode."""

_UNMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}

_CURES = {
    "I": "32-bit integers of unknown range; scale them to 0..255 and convert to mode L",
    "F": "floating point numbers of unknown range; scale them to 0..255 and convert to mode L",
    "LAB": "needs a colour profile; convert it with PIL.ImageCms",
}

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture upright, by its EXIF orientation."""

_PNG_CHUNKS = frozenset([b"IHDR", b"PLTE", b"IDAT", b"eXIf", b"IEND"])
"""Chunks of a PNG that make its picture, transparency aside."""

_PIECES = {"PNG": 20_000, "JPEG": 1000}
"""Most chunks of a PNG, and segments of a JPEG before its picture; Pillow takes each in Python. Real ones have far fewer."""

_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff])")

_SCANS = 100
"""Most times that a progressive JPEG of the largest size may go over its pixels; real ones do some ten times."""

_OTHERS = (
    (0, b"GIF8", "a GIF"),
    (0, b"II*\0", "a TIFF"),
    (0, b"MM\0*", "a TIFF"),
    (0, b"II+\0", "a TIFF"),
    (0, b"MM\0+", "a TIFF"),
    (4, b"ftypavi", "an AVIF"),
    (4, b"ftyphe", "a HEIC"),
    (4, b"ftypmif1", "a HEIC"),
    (4, b"ftypmsf1", "a HEIC"),
    (4, b"ftyp", "a video"),
    (4, b"jP  \r\n", "a JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000"),
    (4, b"JXL \r\n", "a JPEG XL"),
    (0, b"\xff\x0a", "a JPEG XL"),
    (0, b"%PDF", "a PDF"),
    (0, b"\0\0\1\0", "an icon"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"PK\3\4", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\x93NUMPY", "a NumPy file; load it and pass the array"),
    (0, b"RIFF", "a RIFF file other than WebP"),
)
_TEXTS = (
    (b"<svg", "an SVG"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"<", "XML, perhaps an SVG"),
    (b"data:", "a data URL; decode it and send the bytes"),
    # How a JPEG, a PNG and a WebP begin in base64, in small letters.
    (b"/9j/", "base64 text; decode it and send the bytes"),
    (b"ivborw0kgg", "base64 text; decode it and send the bytes"),
    (b"uklgr", "base64 text; decode it and send the bytes"),
)

MAX_SIDE = 65_500
"""Most pixels along a side of an image, in any format: libjpeg's limit, so that a picture can be drawn on it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an image may have at most, besides sides of `MAX_SIDE`.

    Attributes:
        max_pixels: Width times height.
        max_bytes: Size of an encoded image.
    """

    max_pixels: int = 25_000_000
    max_bytes: int = 50_000_000

    def __post_init__(self) -> None:
        """Checks them.

        Raises:
            InvalidArgumentError: (``ValueError``) One is not a whole number, or less than 1.
        """
        for name in ("max_pixels", "max_bytes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InvalidArgumentError(f"{name} is {value!r}; give a whole number, 1 or more", value=value)


DEFAULT_LIMITS = Limits()


def load(image: ImageLike, limits: Limits = DEFAULT_LIMITS, *, index: int = 0) -> NDArray[np.uint8]:
    """Pixels of an image, upright and in BGR, as Detectron2's ``DefaultPredictor`` takes them.

    They are those of ``detectron2.data.detection_utils.read_image(path, "BGR")``, with two differences: 16-bit grey is scaled
    to 8 bits and not cut off at 255, and orientations in XMP or text blocks are not looked for. Of 16-bit colour, as there, the
    upper 8 bits are taken. Transparency is dropped: the colours under it stay what they are. Colour profiles are not applied.
    Of an animation, the first picture is taken.

    Args:
        image: An encoded JPEG, PNG, WebP or BMP; the path of one; a PIL image, which stays as it is, but for being loaded; or
            an array of shape (H, W, 3), uint8, BGR. A path is opened as this process may: give what strangers send as bytes.
        limits: What the image may have at most.
        index: The image's place in the call, for messages.

    Returns:
        Shape (H, W, 3), uint8, BGR, 0 to 255. An array is returned as it was given, views too; all else as a new C-contiguous
        array. The orientation in an image's EXIF block (0x0112) is applied; a broken block is ignored.

    Raises:
        ImageError: It is no image, an empty one, or a path where there is no file; or one of:
        UnsupportedImageError: Its format, mode, shape or dtype is none of the above.
        DamagedImageError: It is cut short or damaged.
        ImageTooLargeError: It is larger than the limits.
    """
    if isinstance(image, np.ndarray):
        _check_array(image, index)
        _check_size(image.shape[1], image.shape[0], limits, index)
        return image
    # Copied, because PyTorch warns of arrays that cannot be written.
    return pixels(decoded(image, limits, index=index)[0], swapped=True).copy()


def decoded(image: ImageLike, limits: Limits = DEFAULT_LIMITS, *, index: int = 0) -> tuple[Image.Image, Literal["BGR", "RGB"]]:
    """As `load`, but as a PIL image, which is scaled without being made an array before.

    Returns:
        The image, upright, in mode RGB, and in which order its channels are in fact: an array's stay in BGR.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(load(image, limits, index=index)), "BGR"
    try:
        picture = image if isinstance(image, Image.Image) else _open(_content(image, limits, index), limits, index)
        _check_size(picture.width, picture.height, limits, index)
        return _upright(picture, index), "RGB"
    except ImageError:
        raise
    except Image.DecompressionBombError as exc:  # Pillow's limit for WebP, above the default one
        raise ImageTooLargeError(f"{exc} (PIL.Image.MAX_IMAGE_PIXELS)", index=index) from exc
    except Exception as exc:  # Pillow fails in as many ways as it has lines
        reason = str(exc)[:200] or type(exc).__name__
        raise DamagedImageError(f"it is cut short or damaged ({reason}); send it again", index=index) from exc


def pixels(picture: Image.Image, *, swapped: bool) -> NDArray[np.uint8]:
    """An image of mode RGB as (H, W, 3) uint8, which cannot be written; `swapped`: its first and last channel change places."""
    # Five times as fast as reversing the array's last axis.
    content = picture.tobytes("raw", "BGR" if swapped else "RGB")
    return np.frombuffer(content, np.uint8).reshape(picture.height, picture.width, 3)


def _check_array(array: NDArray[Any], index: int) -> None:
    shape = array.shape
    if array.ndim == 2 or shape[2:] == (1,):
        fault = f"the shape {shape} is grayscale; stack it to three channels"
    elif array.ndim == 3 and shape[2] == 4:
        fault = f"the shape {shape} has 4 channels; drop the last: image[:, :, :3]"
    elif array.ndim == 3 and shape[0] == 3 != shape[2]:
        fault = f"the shape {shape} has the channels first; pass image.transpose(1, 2, 0)"
    elif array.ndim == 4:
        fault = f"the shape {shape} is a batch; pass its images one by one"
    elif array.ndim != 3 or shape[2] != 3:
        fault = f"its shape is {shape}; it must be (H, W, 3)"
    elif array.dtype != np.uint8:
        raise UnsupportedImageError(f"it is {array.dtype}; convert to uint8, 0 to 255", index=index, value=array.dtype)
    else:
        return
    raise UnsupportedImageError(fault, index=index, value=shape)


def _check_size(width: int, height: int, limits: Limits, index: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{width} x {height} pixels is not a valid image size", index=index, value=(width, height))
    if max(width, height) > MAX_SIDE:
        raise ImageTooLargeError(
            f"{width} x {height} pixels: a side may have at most {MAX_SIDE:,}; split the image",
            index=index,
            value=(width, height),
        )
    if width * height > limits.max_pixels:
        raise ImageTooLargeError(
            f"{width} x {height} pixels exceed the limit of {limits.max_pixels:,} (--max-image-pixels, "
            "max_pixels); scale it down",
            index=index,
            value=(width, height),
        )


def _content(image: object, limits: Limits, index: int) -> bytes:
    """An encoded image, read from its path if it is one, of at most `max_bytes`."""
    if isinstance(image, str) and ("://" in image or image[:5].lower() == "data:"):
        raise ImageError(f"URLs are not supported; pass the image itself, not {image[:80]!r}", index=index, value=image)
    if isinstance(image, (str, os.PathLike)):
        content = _read(image, limits, index)
        size = len(content)
    elif isinstance(image, (bytes, bytearray, memoryview)):
        size = memoryview(image).nbytes
        content = b"" if size > limits.max_bytes else bytes(image)
    else:
        raise ImageError(
            f"it must be bytes, a path, a PIL image or an array, not {type(image).__name__}", index=index, value=image
        )
    if size > limits.max_bytes:
        raise ImageTooLargeError(
            f"it is larger than the limit of {limits.max_bytes:,} bytes (max_bytes)", index=index, value=size
        )
    return content


def _read(path: str | os.PathLike[str], limits: Limits, index: int) -> bytes:
    """Reads a regular file, but no more than one byte above the limit; pipes and devices are refused without waiting."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError) as exc:  # ValueError: a null byte
        reason = getattr(exc, "strerror", None) or exc
        raise ImageError(f"cannot open {str(path)!r} ({reason})", index=index, value=path) from exc
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ImageError(f"{str(path)!r} is not a regular file", index=index, value=path)
    with os.fdopen(descriptor, "rb") as file:
        try:
            return file.read(limits.max_bytes + 1)
        except OSError as exc:  # a disk's bad sector, or a network's file that is no more
            raise ImageError(f"cannot read {str(path)!r} ({exc.strerror})", index=index, value=path) from exc


class _Jpeg(JpegImageFile):
    """Pillow's JPEG; but its EXIF block, which Pillow reads at opening to learn the resolution, is left alone."""

    def getexif(self) -> Image.Exif:
        return Image.Exif()


def _open(content: bytes, limits: Limits, index: int) -> ImageFile:
    """Opens an encoded image without decoding it.

    The classes are Pillow's own. ``Image.open`` has limits and warnings of its own, and takes some JPEGs for other formats.

    Raises:
        Exception: It is damaged; nobody knows how Pillow says so.
    """
    if content.startswith(b"\xff\xd8\xff"):
        picture = _Jpeg(io.BytesIO(_jpeg_picture(content)))
        if picture.info.get("progressive"):
            _check_scans(picture, content, limits, index)
        return picture
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        width, height = struct.unpack_from(">II", content, 16)
        _check_size(width, height, limits, index)
        return PngImageFile(io.BytesIO(_png_picture(content)))
    if content.startswith(b"RIFF") and content.startswith(b"WEBP", 8):
        # Opening makes room for the picture.
        _check_size(*webp_size(content), limits, index)
        return WebPImageFile(io.BytesIO(content))
    if content.startswith(b"BM"):
        bitmap = BmpImageFile(io.BytesIO(content))
        if bitmap.info["compression"] in (BmpImageFile.COMPRESSIONS["RLE8"], BmpImageFile.COMPRESSIONS["RLE4"]):
            # Pillow decodes these in Python, a pixel at a time: seconds for a file of a kilobyte.
            raise UnsupportedImageError("it is a run-length encoded BMP; save it as PNG", index=index)
        return bitmap
    seems = _seems(content)
    raise UnsupportedImageError(f"it is {seems}; {_TAKEN}", index=index, value=seems)


def _check_scans(picture: ImageFile, content: bytes, limits: Limits, index: int) -> None:
    """Refuses a progressive JPEG that goes over its pixels again and again: each time takes 40 bytes and milliseconds."""
    scans = content.count(b"\xff\xda")
    if scans * picture.width * picture.height > _SCANS * limits.max_pixels:
        raise DamagedImageError(
            f"it has {scans:,} progressive scans, which is too many; save it again", index=index, value=scans
        )


def _jpeg_picture(content: bytes) -> bytes:
    """A JPEG without the segments before its picture that do not make it, but for its first EXIF block.

    Raises:
        ValueError: There are too many segments.
        struct.error: One is cut short.
    """
    kept = [content[:2]]
    position = 2
    has_exif = False
    for _ in range(_PIECES["JPEG"]):
        # As Pillow does, what is between segments is passed over.
        found = _JPEG_MARKER.search(content, position)
        if found is None:
            break
        position, marker = found.end(), found[1][0]
        if marker == 0xDA:
            return b"".join([*kept, content[position - 2 :]])
        if marker == 0x01 or 0xD0 <= marker <= 0xD9:  # a marker alone
            continue
        (length,) = struct.unpack_from(">H", content, position)
        segment = content[position - 2 : position + length]
        position += length
        is_exif = marker == 0xE1 and segment.startswith(b"Exif\0", 4)
        if not 0xE0 <= marker <= 0xFE or marker in (0xE0, 0xEE) or (is_exif and not has_exif):
            kept.append(segment)
        has_exif = has_exif or is_exif
    else:
        raise ValueError("too many segments")
    return b"".join(kept)  # without a picture; it may claim a size all the same


def _png_picture(content: bytes) -> bytes:
    """A PNG with only the chunks that make its picture; the checksums of all are checked.

    Pillow unpacks texts and profiles that nobody asked for, warns of animations, and checks no pixel's checksum.

    Raises:
        ValueError: A chunk is damaged.
        struct.error: The end is missing.
    """
    kept = [content[:8]]
    position = 8
    name = b""
    for _ in range(_PIECES["PNG"]):
        length, name = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        (checksum,) = struct.unpack_from(">I", content, end - 4)
        if zlib.crc32(memoryview(content)[position + 4 : end - 4]) != checksum:
            raise ValueError(f"wrong checksum of the chunk {name!r}")
        if name in _PNG_CHUNKS:
            kept.append(content[position:end])
        if name == b"IEND":
            return b"".join(kept)
        position = end
    raise ValueError("too many chunks")


def _seems(content: bytes) -> str:
    """What content of no format that is taken may be, for a message."""
    if not content:
        return "empty"
    for offset, mark, name in _OTHERS:
        if content.startswith(mark, offset):
            return name
    start = content[:256].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for mark, name in _TEXTS:
        if start.startswith(mark):
            return name
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in content[:64]):
        return "text"
    return f"in an unknown format (it begins with {content[:8].hex(' ')})"


def _upright(picture: Image.Image, index: int) -> Image.Image:
    """A picture in mode RGB, upright; the picture itself if it is that.

    Raises:
        UnsupportedImageError: The picture's mode is none that is taken.
        Exception: It is damaged; nobody knows how Pillow says so.
    """
    picture.load()
    rgb = _rgb(picture, index)
    turn = _UPRIGHT.get(_orientation(picture.info.get("exif")))
    return rgb if turn is None else rgb.transpose(turn)


def _rgb(picture: Image.Image, index: int) -> Image.Image:
    """A loaded picture in mode RGB; the picture itself if it has it."""
    if picture.mode.startswith("I;16"):
        # Pillow would cut off at 255. Dividing by 257 takes 65,535 to 255; half of it more rounds.
        return Image.fromarray(((np.asarray(picture, np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode in _UNMULTIPLIED:
        picture = picture.convert(_UNMULTIPLIED[picture.mode])
    if picture.mode not in _MODES:
        cure = _CURES.get(picture.mode, "convert it to RGB")
        raise UnsupportedImageError(f"its mode is {picture.mode}: {cure}", index=index, value=picture.mode)
    if picture.mode == "RGB":
        return picture
    if "transparency" in picture.info:
        # Pillow would convert it too, and warns or fails where it cannot.
        picture = picture.copy()
        del picture.info["transparency"]
    return picture.convert("RGB")


def _orientation(exif: object) -> int:
    """Orientation in an EXIF block, 1 to 8; 1 where there is none, or the block is broken.

    Pillow reads whole blocks, and warns of broken ones.
    """
    if not isinstance(exif, bytes):
        return 1
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(f"{order}HHI", tiff, place)
            if tag == 0x0112 and number == 1 and kind in (3, 4):
                (value,) = struct.unpack_from(order + " HI"[kind - 2], tiff, place + 8)
                return int(value) if value in _UPRIGHT else 1
    except struct.error:
        pass  # it ends before it says how
    return 1
