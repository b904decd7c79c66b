"""From bytes, paths, PIL images and arrays to BGR pixels; and what hostile files can do, which is to be refused."""

from __future__ import annotations

import io
import os
import resource
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bentoml_detectron import errors, images
from bentoml_detectron.images import Limits, load

RNG = np.random.default_rng(7)
RGB = np.asarray(Image.fromarray(RNG.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((23, 17), Image.Resampling.BICUBIC))
BGR = RGB[:, :, ::-1]


def encoded(image: Image.Image | np.ndarray, format_: str, **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format_, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, depth, colour, rows: bytes, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def exif(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    value = struct.pack(order + {3: "HH", 4: "I"}[kind], *{3: (orientation, 0), 4: (orientation,)}[kind])
    other = struct.pack(order + "HHIHH", 0x0100, 3, 1, 6, 0)
    return (
        b"Exif\0\0"
        + start
        + struct.pack(order + "H", 2)
        + other
        + struct.pack(order + "HHI", 0x0112, kind, 1)
        + value
        + b"\0" * 4
    )


def progressive() -> bytes:
    return encoded(RGB, "JPEG", progressive=True, quality=95)


FILES = {
    "jpeg": encoded(RGB, "JPEG", quality=95),
    "jpeg, progressive": progressive(),
    "jpeg, exif": encoded(RGB, "JPEG", exif=exif(6)),
    "jpeg, cmyk": encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
    "png": encoded(RGB, "PNG"),
    "png, palette": encoded(Image.fromarray(RGB).quantize(17), "PNG", transparency=3, exif=exif(3)[6:]),
    "png, 16-bit": encoded(Image.fromarray(np.arange(90, dtype=np.uint16).reshape(9, 10) * 700), "PNG"),
    "png, animated": encoded(RGB, "PNG", save_all=True, append_images=[Image.fromarray(BGR)]),
    "webp": encoded(RGB, "WEBP", quality=95),
    "webp, lossless": encoded(RGB, "WEBP", lossless=True),
    "webp, extended": encoded(Image.fromarray(RGB).convert("RGBA"), "WEBP", exif=exif(8)),
    "bmp": encoded(RGB, "BMP"),
    "bmp, palette": encoded(Image.fromarray(RGB).quantize(17), "BMP"),
}
HUGE = {
    "png": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)),
    "png, no pixels": png(30_000, 30_000, 8, 2, b""),
    "jpeg": b"\xff\xd8\xff\xc0\0\x11\x08" + struct.pack(">HH", 30_000, 30_000) + b"\x03\x01\x22\0\x02\x11\1\x03\x11\1",
    "webp": b"RIFF\0\0\0\1WEBPVP8X\x0a\0\0\0\0\0\0\0" + struct.pack("<I", 29_999)[:3] * 2,
    "webp, lossless": b"RIFF\0\0\0\1WEBPVP8L\x0a\0\0\0\x2f" + struct.pack("<I", 16_382 | 16_382 << 14) + b"\0" * 9,
    "webp, lossy": b"RIFF\0\0\0\1WEBPVP8 \x0a\0\0\0\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 16_383, 16_383) + b"\0" * 9,
    "bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0),
}


def outcome(content) -> np.ndarray | errors.ImageError:
    """What loading gives or raises, which may be nothing but pixels or an `ImageError`, and no warning."""
    result: np.ndarray | errors.ImageError
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            result = load(content, index=3)
        except errors.ImageError as error:
            result = error
    assert [str(warning.message) for warning in seen] == []
    if isinstance(result, errors.ImageError):
        assert (result.index, str(result)[:9]) == (3, "image 3: ")
    else:
        assert (result.dtype, result.ndim, result.shape[2]) == (np.uint8, 3, 3)
        assert result.flags.c_contiguous
        assert result.flags.writeable
    return result


def near(found: np.ndarray, due, tolerance: int) -> None:
    assert found.dtype == np.uint8
    due = np.broadcast_to(due, found.shape)
    assert np.abs(found.astype(int) - due.astype(int)).max() <= tolerance


# Formats


@pytest.mark.parametrize("format_", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_give_the_exact_pixels_in_bgr(format_):
    np.testing.assert_array_equal(outcome(encoded(RGB, format_, **({"lossless": True} if format_ == "WEBP" else {}))), BGR)


def test_jpeg_gives_what_pillow_decodes_in_bgr():
    for name in ("jpeg", "jpeg, progressive", "webp"):
        due = np.asarray(Image.open(io.BytesIO(FILES[name])))[:, :, ::-1]
        np.testing.assert_array_equal(outcome(FILES[name]), due)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_every_kind_of_bytes(kind):
    np.testing.assert_array_equal(load(kind(FILES["png"])), BGR)


@pytest.mark.parametrize("kind", [str, Path])
def test_every_kind_of_path(kind, tmp_path):
    (tmp_path / "a.png").write_bytes(FILES["png"])
    np.testing.assert_array_equal(load(kind(tmp_path / "a.png")), BGR)


def test_the_content_wins_over_the_file_name(tmp_path):
    (tmp_path / "a.jpg").write_bytes(FILES["png"])
    np.testing.assert_array_equal(load(tmp_path / "a.jpg"), BGR)
    (tmp_path / "b.png").write_bytes(b"GIF89a")
    with pytest.raises(errors.UnsupportedImageError, match="GIF"):
        load(tmp_path / "b.png")


def test_only_the_first_picture_of_an_animation_is_taken():
    np.testing.assert_array_equal(outcome(FILES["png, animated"]), BGR)
    frames = {"save_all": True, "append_images": [Image.fromarray(BGR)], "lossless": True}
    np.testing.assert_array_equal(outcome(encoded(RGB, "WEBP", **frames)), BGR)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (encoded(RGB, "GIF"), "a GIF"),
        (encoded(RGB, "TIFF"), "a TIFF"),
        (encoded(RGB, "JPEG2000"), "a JPEG 2000"),
        (encoded(RGB, "AVIF"), "an AVIF"),
        (encoded(RGB, "ICO"), "an icon"),
        (b"\0\0\0\x18ftypheic", "a HEIC"),
        (b"\0\0\0\x18ftypisom", "a video"),
        (b"%PDF-1.7", "a PDF"),
        (b"PK\3\4", "a zip archive"),
        (b"\x1f\x8b\x08", "a gzip archive"),
        (b"RIFF\0\0\0\0WAVE", "other than WebP"),
        (b"\n <SVG xmlns=''>", "an SVG"),
        (b"<?xml version='1.0'?><svg>", "perhaps an SVG"),
        (b"\xef\xbb\xbf<!DOCTYPE html>", "a web page"),
        (b"data:image/png;base64,iVBORw0KGgo", "a data URL"),
        (b"iVBORw0KGgoAAAANSUhEUg", "base64"),
        (b"/9j/4AAQSkZJRg", "base64"),
        (b'{"instances": []}', "text"),
        (b"", "empty"),
        (b"\x01\x02\x03", "01 02 03"),
        (encoded(RGB, "PPM"), "in an unknown format"),
    ],
)
def test_other_formats_are_refused_by_name(content, name):
    error = outcome(content)
    assert type(error) is errors.UnsupportedImageError
    assert name in str(error)
    assert "JPEG, PNG, WebP and BMP" in str(error)


# Orientation

TURNED = {  # what an upright picture is stored as
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: np.rot90,
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("format_", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100, "subsampling": 0})]
)
def test_all_orientations_give_the_same_upright_picture(orientation, format_, options):
    stored = np.ascontiguousarray(TURNED[orientation](RGB))
    content = encoded(stored, format_, exif=exif(orientation), **options)
    tolerance = 8 if format_ == "JPEG" else 0
    near(outcome(content), BGR, tolerance)
    near(load(Image.open(io.BytesIO(content))), BGR, tolerance)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [3, 4])
def test_orientation_in_every_notation(order, kind):
    np.testing.assert_array_equal(outcome(encoded(RGB, "PNG", exif=exif(3, order, kind))), BGR[::-1, ::-1])


def test_orientation_of_a_16_bit_picture():
    grey = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257
    assert outcome(encoded(Image.fromarray(grey), "PNG", exif=exif(6)))[:, :, 0].tolist() == [[3, 0], [4, 1], [5, 2]]


@pytest.mark.parametrize(
    "block",
    [
        exif(0),
        exif(9),
        exif(65_535),
        exif(6)[:-8],
        exif(6)[:12],
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        b"Exif\0\0XX*\0\x08\0\0\0",
        b"Exif\0\0" + b"\xff" * 60,
        exif(6).replace(struct.pack("<HHI", 0x0112, 3, 1), struct.pack("<HHI", 0x0112, 3, 2**32 - 1)),
        exif(6).replace(struct.pack("<HHI", 0x0112, 3, 1), struct.pack("<HHI", 0x0112, 5, 1)),
    ],
)
def test_a_broken_exif_block_is_ignored(block):
    for format_, options in (("JPEG", {"quality": 100, "subsampling": 0}), ("PNG", {}), ("WEBP", {"lossless": True})):
        content = encoded(RGB, format_, exif=block, **options)
        near(outcome(content), BGR, 8 if format_ == "JPEG" else 0)


def test_an_exif_block_of_another_type_is_ignored():
    image = Image.fromarray(RGB)
    image.info["exif"] = "Exif"
    np.testing.assert_array_equal(load(image), BGR)


# Colour modes

GREY = np.array([[0, 1, 127], [128, 254, 255]], np.uint8)


@pytest.mark.parametrize("alpha", [0, 100, 255])
def test_grey_pictures_get_three_equal_channels(alpha):
    due = np.repeat(GREY[:, :, None], 3, 2)
    grey = Image.fromarray(GREY)
    with_alpha = grey.convert("LA")
    with_alpha.putalpha(alpha)
    for image in (grey, with_alpha):
        np.testing.assert_array_equal(outcome(image), due)
        np.testing.assert_array_equal(outcome(encoded(image, "PNG")), due)
    bits = Image.fromarray(GREY > 127)
    assert bits.mode == "1"
    for content in (bits, encoded(bits, "PNG"), encoded(bits, "BMP")):
        np.testing.assert_array_equal(outcome(content)[:, :, 1], [[0, 0, 0], [255, 255, 255]])


def test_premultiplied_grey_is_divided_again():
    image = Image.fromarray(np.array([[[100, 128], [255, 255]]], np.uint8)).convert("La")
    near(outcome(image)[0, :, 0], [100, 255], 1)


@pytest.mark.parametrize("transparency", [None, 1, b"\0\x80\xff"])
@pytest.mark.parametrize("mode", ["P", "PA"])
def test_palette_pictures_get_their_colours_whatever_is_transparent(mode, transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    options = {} if transparency is None else {"transparency": transparency}
    if mode == "P":
        reopened = Image.open(io.BytesIO(encoded(image, "PNG", **options)))
        assert reopened.mode == "P"
        sources = [encoded(image, "PNG", **options), reopened]
    else:
        image.info.update(options)
        sources = [image.convert("PA")]
    for source in sources:
        assert outcome(source).tolist() == [[[30, 20, 10], [60, 50, 40], [90, 80, 70]]]


@pytest.mark.parametrize("transparency", [1, 65_535, b"abc", (1, 2, 3)])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA"])
def test_a_strange_note_on_transparency_is_ignored(mode, transparency):
    image = Image.fromarray(RGB).convert(mode)
    due = outcome(image.copy())
    image.info["transparency"] = transparency
    np.testing.assert_array_equal(outcome(image), due)
    assert image.info["transparency"] == transparency


@pytest.mark.parametrize("mode", ["RGBA", "RGBX"])
def test_alpha_is_dropped_and_the_colours_stay(mode):
    alpha = RNG.integers(0, 256, RGB.shape[:2], dtype=np.uint8)
    image = Image.merge(mode, [*Image.fromarray(RGB).split(), Image.fromarray(alpha)])
    np.testing.assert_array_equal(outcome(image), BGR)
    if mode == "RGBA":
        np.testing.assert_array_equal(outcome(encoded(image, "PNG")), BGR)
        np.testing.assert_array_equal(outcome(encoded(image, "WEBP", lossless=True, exact=True)), BGR)


def test_premultiplied_colours_are_divided_again():
    image = Image.new("RGBA", (1, 1), (200, 100, 50, 128)).convert("RGBa")
    assert image.getpixel((0, 0))[0] == 100
    near(outcome(image), [50, 100, 200], 1)


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 200, 90), (255, 255, 255), (0, 0, 0)])
@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV"])
def test_other_colour_spaces_come_back(mode, colour):
    image = Image.new("RGB", (8, 8), colour).convert(mode)
    near(outcome(image), colour[::-1], 5 if mode == "HSV" else 3)
    if mode != "HSV":
        near(outcome(encoded(image, "JPEG", quality=95)), colour[::-1], 3)


def test_a_ycck_jpeg_comes_back():
    inks = (200, 40, 90, 30)
    luma = Image.new("RGB", (8, 8), inks[:3]).convert("YCbCr").getpixel((0, 0))
    # Pillow writes CMYK, inverted; with the Adobe block's last byte set, readers take the first three for YCbCr.
    content = encoded(Image.new("CMYK", (8, 8), (*(255 - part for part in luma), inks[3])), "JPEG", quality=100, subsampling=0)
    place = content.index(b"Adobe") + 11
    assert content[place] == 0
    due = Image.new("CMYK", (1, 1), inks).convert("RGB").getpixel((0, 0))
    near(outcome(content[:place] + b"\2" + content[place + 1 :]), due[::-1], 4)


DEEP = np.array([[0, 1, 127, 128, 129, 255, 256, 257, 32_768, 65_279, 65_407, 65_408, 65_535]], np.uint16)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_16_bit_grey_is_scaled_and_rounded(mode):
    due = np.round(DEEP * (255 / 65_535))[:, :, None]
    image = Image.frombytes(mode, (DEEP.shape[1], 1), DEEP.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    assert image.mode == mode
    near(outcome(image), due, 0)
    if mode == "I;16":
        near(outcome(encoded(image, "PNG")), due, 0)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_pngs_are_right_to_one_level(colour, channels):
    samples = np.repeat(DEEP[:, :, None], channels, 2)
    content = png(DEEP.shape[1], 1, 16, colour, b"\0" + samples.astype(">u2").tobytes())
    near(outcome(content), np.round(DEEP * (255 / 65_535))[:, :, None], 0 if colour == 0 else 1)


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_modes_without_a_known_range_are_refused_by_name(mode):
    error = outcome(Image.new(mode, (2, 2)))
    assert type(error) is errors.UnsupportedImageError
    assert f"mode is {mode}:" in str(error)
    assert error.value == mode


def test_pixels_are_those_of_detectron2s_own_reader(tmp_path):
    read_image = pytest.importorskip("detectron2.data.detection_utils").read_image
    for name, content in FILES.items():
        if name != "png, 16-bit":
            (tmp_path / "image").write_bytes(content)
            np.testing.assert_array_equal(outcome(content), read_image(str(tmp_path / "image"), "BGR"), err_msg=name)


# PIL images


@pytest.mark.parametrize("name", FILES)
def test_a_lazily_opened_image_is_as_good_as_its_bytes(name):
    np.testing.assert_array_equal(outcome(Image.open(io.BytesIO(FILES[name]))), outcome(FILES[name]))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "I;16"])
def test_nothing_changes_the_callers_image(mode):
    image = (
        Image.fromarray(RGB).convert("L" if mode == "I;16" else mode)
        if mode != "RGBa"
        else Image.new("RGBa", (3, 2), (9, 9, 9, 99))
    )
    image = image.convert(mode)
    image.info.update(exif=exif(6), transparency=1)
    before = (image.mode, image.size, image.tobytes(), dict(image.info), image.getpalette())
    pixels = load(image)
    pixels[:] = 77
    assert (image.mode, image.size, image.tobytes(), dict(image.info), image.getpalette()) == before


def test_the_callers_open_file_stays_open():
    file = io.BytesIO(FILES["png"])
    load(Image.open(file))
    assert not file.closed


def test_formats_that_only_pillow_was_asked_to_open_are_fine():
    np.testing.assert_array_equal(outcome(Image.open(io.BytesIO(encoded(RGB, "TIFF")))), BGR)


def test_a_damaged_image_that_was_opened_lazily():
    assert type(outcome(Image.open(io.BytesIO(FILES["jpeg"][:-100])))) is errors.DamagedImageError


# Arrays


def test_arrays_are_returned_as_given():
    for array in (BGR, np.ascontiguousarray(BGR), BGR[::2, 1:]):
        assert load(array) is array


@pytest.mark.parametrize(
    ("array", "fault"),
    [
        (np.zeros((4, 5, 3), np.float32), "float32; convert to uint8"),
        (np.zeros((4, 5, 3), np.int64), "int64; convert to uint8"),
        (np.zeros((4, 5, 3), bool), "bool; convert to uint8"),
        (np.full((4, 5, 3), None), "object; convert to uint8"),
        (np.zeros((4, 5), np.uint8), r"\(4, 5\) is grayscale; stack it to three channels"),
        (np.zeros((4, 5, 1), np.uint8), "grayscale; stack"),
        (np.zeros((4, 5, 4), np.uint8), "4 channels; drop"),
        (np.zeros((3, 4, 5), np.uint8), "channels first"),
        (np.zeros((2, 4, 5, 3), np.uint8), "one by one"),
        (np.zeros((4, 5, 2), np.uint8), r"\(4, 5, 2\); it must be \(H, W, 3\)"),
        (np.zeros(5, np.uint8), r"\(5,\)"),
        (np.zeros((), np.uint8), r"\(\)"),
    ],
)
def test_other_arrays_are_refused_with_the_cure(array, fault):
    with pytest.raises(errors.UnsupportedImageError, match="image 2: .*" + fault) as caught:
        load(array, index=2)
    assert caught.value.value in (array.shape, array.dtype)


@pytest.mark.parametrize("empty", [np.zeros((0, 5, 3), np.uint8), np.zeros((5, 0, 3), np.uint8), Image.new("RGB", (0, 5))])
def test_images_without_pixels_are_refused(empty):
    assert "not a valid image size" in str(outcome(empty))


@pytest.mark.parametrize("thing", [None, 7, [1, 2], object(), io.BytesIO(b"")])
def test_what_is_no_image_at_all_is_refused_by_type(thing):
    error = outcome(thing)
    assert type(error) is errors.ImageError
    assert type(thing).__name__ in str(error)
    assert error.value is thing


# Paths


@pytest.mark.parametrize(
    "url", ["http://a/b.png", "https://a", "file:///etc/passwd", "s3://a/b", "data:image/png;base64,AA", "DATA:,"]
)
def test_urls_are_not_fetched(url):
    error = outcome(url)
    assert "URLs are not supported; pass the image itself" in str(error)
    assert error.value == url


@pytest.mark.parametrize(
    "path", ["missing.png", "", "a\0b", "x" * 5000, "/dev/null", "/dev/zero", "/dev/tty", "/", "/proc/self/mem"]
)
def test_paths_without_a_regular_file_are_refused(path):
    error = outcome(path)
    assert isinstance(error, errors.ImageError)


@pytest.mark.parametrize("path", ["missing.png", "/dev/zero", "/"])
def test_a_refused_path_is_named(path):
    assert outcome(path).value == path
    assert repr(path) in str(outcome(Path(path)))


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in str(outcome(tmp_path / "pipe.png"))


def test_a_file_that_the_system_cannot_read_is_an_image_error():
    assert str(outcome("/proc/self/mem")) == "image 3: cannot read '/proc/self/mem' (Input/output error)"


def descriptors() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def test_no_descriptor_stays_open(tmp_path):
    (tmp_path / "a.png").write_bytes(FILES["png"][:60])
    os.mkfifo(tmp_path / "pipe")
    before = descriptors()
    for path in (tmp_path / "a.png", tmp_path / "pipe", tmp_path):
        assert isinstance(outcome(path), errors.ImageError)
    assert descriptors() == before


# Limits


@pytest.mark.parametrize("name", HUGE)
def test_a_header_that_claims_too_much_is_refused_before_anything_is_decoded(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = outcome(HUGE[name])
    assert type(error) is errors.ImageTooLargeError, error
    assert error.value[0] >= 16_383
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


@pytest.mark.parametrize("name", ["jpeg", "png", "webp", "bmp"])
def test_the_limits_are_inclusive(name, tmp_path):
    content, pixels = FILES[name], 23 * 17
    (tmp_path / "image").write_bytes(content)
    for source in (content, tmp_path / "image"):
        load(source, Limits(max_pixels=pixels, max_bytes=len(content)))
        with pytest.raises(errors.ImageTooLargeError, match="max_bytes"):
            load(source, Limits(max_bytes=len(content) - 1))
    for source in (content, tmp_path / "image", Image.open(tmp_path / "image"), BGR):
        with pytest.raises(errors.ImageTooLargeError, match=r"23 x 17 pixels exceed the limit of 390") as caught:
            load(source, Limits(max_pixels=pixels - 1))
        assert caught.value.value == (23, 17)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "array", "picture"])
@pytest.mark.parametrize("size", [(65_501, 1), (1, 65_501)])
def test_no_side_is_longer_than_results_and_jpegs_can_be(kind, size):
    picture, buffer = Image.new("RGB", size), io.BytesIO()
    given = {"array": np.asarray(picture), "picture": picture}.get(kind)
    if given is None:
        picture.save(buffer, kind)
        given = buffer.getvalue()
    with pytest.raises(errors.ImageTooLargeError, match=f"{size[0]} x {size[1]} pixels: a side may have at most 65,500"):
        load(given)
    assert load(Image.new("RGB", (65_500, 1))).shape == (1, 65_500, 3)


def test_the_size_of_a_memoryview_is_its_bytes():
    with pytest.raises(errors.ImageTooLargeError):
        load(memoryview(np.zeros(100, np.int64)), Limits(max_bytes=799))


@pytest.mark.parametrize("name", FILES)
def test_pillows_own_limit_warns_of_nothing(name, monkeypatch):
    due = outcome(FILES[name])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    np.testing.assert_array_equal(outcome(FILES[name]), due)


def test_pillows_own_limit_for_webp_is_named(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    assert type(outcome(FILES["webp"])) is errors.ImageTooLargeError


# Damage


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_is_damaged_or_lacks_no_pixel(name):
    """Only what follows the last pixel may be missing: the padding of a bitmap's last row."""
    content = FILES[name]
    whole = outcome(content)
    start = {"w": 16, "p": 8, "j": 3, "b": 2}[name[0]]
    for length in sorted({*range(start, 80), *range(80, len(content) - 40, 7), *range(len(content) - 40, len(content))}):
        found = outcome(content[:length])
        if isinstance(found, np.ndarray):
            assert name.startswith("bmp")
            assert len(content) - length < 4
            np.testing.assert_array_equal(found, whole)
        else:
            assert type(found) is errors.DamagedImageError


@pytest.mark.parametrize("name", ["png", "png, palette", "png, 16-bit"])
def test_a_wrong_bit_in_a_png_is_always_found(name):
    content = FILES[name]
    for place in range(8, len(content)):
        found = outcome(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert isinstance(found, errors.ImageError), place


@pytest.mark.parametrize(
    "more",
    [
        chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * (20 << 20))),
        chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"\0" * (20 << 20))),
        chunk(b"iCCP", b"a\0\0" + zlib.compress(b"\0" * (20 << 20))),
        chunk(b"acTL", struct.pack(">II", 0, 0)) * 2,
        chunk(b"fcTL", b"\xff" * 26),
        chunk(b"tRNS", b"\0"),
        chunk(b"gAMA", b""),
    ],
)
def test_what_is_not_the_picture_of_a_png_does_no_harm(more):
    start = time.perf_counter()
    content = FILES["png"]
    np.testing.assert_array_equal(outcome(content[:33] + more + content[33:]), BGR)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "content",
    [
        png(0, 5, 8, 2, b""),
        png(5, 0, 8, 2, b""),
        png(2, 2, 8, 7, b"\0" * 20),
        png(2, 2, 3, 2, b"\0" * 20),
        png(2, 2, 8, 2, b"\0" * 3),
        b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""),
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"") + chunk(b"IEND", b""),
        b"\x89PNG\r\n\x1a\n" + b"\xff\xff\xff\xffIDAT",
        b"\xff\xd8\xff" + b"\0" * 1000,
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8\xff\xc0\0\x02",
        HUGE["jpeg"].replace(struct.pack(">HH", 30_000, 30_000), b"\0\0\0\x05"),
        b"RIFF\0\0\0\0WEBPVP8Q" + b"\0" * 30,
        b"RIFF\0\0\0\0WEBP",
        b"RIFF\0\0\0\1WEBPVP8 \x0a\0\0\0" + b"\0" * 30,
        b"BM",
        b"BM" + b"\xff" * 100,
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, -5, 5, 1, 24, 0, 0, 0, 0, 0, 0),
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 5, 5, 1, 8, 0, 0, 0, 0, 2**31, 0),
    ],
)
def test_impossible_files_are_refused(content):
    assert isinstance(outcome(content), errors.ImageError)


def test_a_jpeg_that_goes_over_its_pixels_again_and_again_is_refused():
    """Each such scan takes tens of bytes, and of 25 million pixels some 16 ms: hours for a file within the limits."""
    content = progressive()
    scan = content[content.rindex(b"\xff\xda") : -2]
    bomb = content[:-2] + scan * 100 + b"\xff\xd9"
    limits = Limits(max_pixels=23 * 17)
    load(content, limits)
    with pytest.raises(errors.DamagedImageError, match=r"it has 1[0-9]+ progressive scans"):
        load(bomb, limits)


def test_a_run_length_encoded_bmp_is_refused():
    """Pillow decodes it in Python: this one, of 1 KB, holds the interpreter for seconds."""
    header = struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 1078, 40, 25_000_000, 1, 1, 8, 1, 6, 0, 0, 256, 0)
    error = outcome(b"BM" + header + bytes(1024) + b"\1\1\0\0\0\1")
    assert type(error) is errors.UnsupportedImageError
    assert "run-length" in str(error)


# Anything at all

EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6)
NAMES = st.sampled_from(sorted(FILES))


def mutated(name: str, edits: list[tuple[float, int]], near_start: bool, cut: float, insertion: bytes) -> bytes:
    content = bytearray(FILES[name])
    reach = min(len(content), 120) if near_start else len(content)
    for place, value in edits:
        content[min(int(place * reach), len(content) - 1)] = value
    middle = int(cut * len(content))
    return bytes(content[:middle]) + insertion + bytes(content[middle:])


def repaired(content: bytes) -> bytes:
    """A PNG whose checksums are right, so that damage gets past them to Pillow; other files as they are."""
    if not content.startswith(b"\x89PNG"):
        return content
    parts, position = [content[:8]], 8
    while position + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, position)
        if position + 12 + length > len(content):
            break
        parts.append(chunk(content[position + 4 : position + 8], content[position + 8 : position + 8 + length]))
        position += 12 + length
    return b"".join(parts) + content[position:]


MUTATIONS = st.builds(mutated, NAMES, EDITS, st.booleans(), st.floats(0, 1), st.binary(max_size=8))
RELAXED = [HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.mark.slow
@given(MUTATIONS)
@settings(max_examples=400, deadline=None, suppress_health_check=RELAXED)
def test_mutated_files_give_pixels_or_an_image_error(content):
    outcome(content)
    outcome(repaired(content))


@pytest.mark.slow
@given(MUTATIONS)
@settings(max_examples=4000, deadline=None, suppress_health_check=RELAXED)
def test_many_mutated_files_give_pixels_or_an_image_error(content):
    outcome(content)
    outcome(repaired(content))


@given(st.sampled_from([b"", *(content[:40] for content in FILES.values()), *HUGE.values()]), st.binary(max_size=300))
@settings(max_examples=300, deadline=None, suppress_health_check=RELAXED)
def test_random_bytes_after_any_header_give_pixels_or_an_image_error(header, rest):
    outcome(header + rest)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_a_random_exif_block_gives_an_orientation(block):
    for start in (b"", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\0\0\0\x08", exif(6)[:18]):
        assert 1 <= images._orientation(start + block) <= 8


def test_memory_that_is_not_there_is_a_typed_error(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(images.PngImageFile, "load", fail)
    assert "MemoryError" in str(outcome(FILES["png"]))


@pytest.mark.parametrize("given", [{"max_pixels": None}, {"max_pixels": 0}, {"max_bytes": 1e6}, {"max_bytes": True}], ids=str)
def test_limits_that_cannot_be_are_refused_and_no_image_is_blamed(given):
    with pytest.raises(errors.InvalidArgumentError, match=rf"^{next(iter(given))} is .*; give a whole number, 1 or more"):
        Limits(**given)
