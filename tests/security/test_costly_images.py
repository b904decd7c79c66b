"""Files made to cost: none within the limits takes much more of the processor, or of memory, than the largest honest image."""

from __future__ import annotations

import io
import os
import resource
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bentoml_detectron.errors import ImageError
from bentoml_detectron.images import Limits, load
from support import picture

pytestmark = pytest.mark.slow
LIMITS = Limits(max_pixels=25_000_000, max_bytes=20 << 20)
SIZE = LIMITS.max_bytes - 10_000


def chunk(name: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(*chunks: bytes) -> bytes:
    """One of 8 x 8 pixels, with these chunks after its header."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND")


def encoded(kind: str, height: int = 64, width: int = 64, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(height, width)).save(buffer, kind, **options)
    return buffer.getvalue()


def zeros(megabytes: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


def jpeg(segment: bytes) -> bytes:
    """One with as many of a segment as there is room for."""
    plain = encoded("JPEG")
    return plain[:2] + segment * (SIZE // len(segment)) + plain[2:]


def progressive(size: int) -> bytes:
    """One whose last scan comes again and again."""
    plain = encoded("JPEG", size, size, progressive=True)
    last = plain[plain.rindex(b"\xff\xda") : -2]
    return plain[:-2] + last * ((SIZE - len(plain)) // len(last)) + b"\xff\xd9"


def animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), (number % 256, number // 256, 0)) for number in range(2000)]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


PIXELS = chunk(b"IDAT", zlib.compress(bytes(8 * 25)))
COSTLY: dict[str, Callable[[], bytes]] = {
    "PNG, pixels in empty chunks": lambda: png(PIXELS, chunk(b"IDAT") * (SIZE // 12)),
    "PNG, empty texts": lambda: png(chunk(b"tEXt") * (SIZE // 12), PIXELS),
    "PNG, many EXIF blocks": lambda: png(chunk(b"eXIf", b"II*\0") * (SIZE // 16), PIXELS),
    "PNG, more pixels than its header has": lambda: png(chunk(b"IDAT", zeros(1000))),
    "PNG, a profile that unpacks to a gigabyte": lambda: png(chunk(b"iCCP", b"a\0\0" + zeros(1000)), PIXELS),
    "PNG, a text that unpacks to a gigabyte": lambda: png(chunk(b"zTXt", b"a\0\0" + zeros(1000)), PIXELS),
    "JPEG, empty segments": lambda: jpeg(b"\xff\xe1\0\2"),
    "JPEG, EXIF in small pieces": lambda: jpeg(b"\xff\xe1\0\x0aExif\0\0ab"),
    "JPEG, EXIF in large pieces": lambda: jpeg(b"\xff\xe1\xff\xffExif\0\0" + bytes(65527)),
    "JPEG, empty comments": lambda: jpeg(b"\xff\xfe\0\2"),
    "JPEG, empty tables": lambda: jpeg(b"\xff\xdb\0\2"),
    "JPEG, Photoshop's blocks": lambda: jpeg(b"\xff\xed\xff\xffPhotoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5459 + bytes(11)),
    "JPEG, fill bytes": lambda: jpeg(b"\xff"),
    "JPEG, fill bytes and nothing else": lambda: b"\xff" + b"\xd8" + b"\xff" * SIZE,
    "JPEG, fill bytes before no marker": lambda: b"\xff\xd8" + b"\xff" * SIZE + bytes(2),
    "JPEG, bytes between segments": lambda: encoded("JPEG")[:20] + bytes(SIZE) + encoded("JPEG")[20:],
    "JPEG, markers alone": lambda: jpeg(b"\xff\xd0"),
    "JPEG, comments in the picture": lambda: encoded("JPEG")[:-2] + b"\xff\xfe\0\2" * (SIZE // 4) + b"\xff\xd9",
    "JPEG, scans": lambda: progressive(64),
    "JPEG, scans of a larger picture": lambda: progressive(500),
    "WebP, 2000 pictures": animated,
    "BMP, palette": lambda: encoded("BMP")[:46] + struct.pack("<I", 0x7FFFFFFF) + encoded("BMP")[50:],
}


def spent(content: bytes) -> tuple[float, int, str]:
    """Seconds of the processor, most memory above what there was, in KB, and what came of it; in a process of its own."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
        start, before = time.process_time(), resident()
        try:
            outcome = str(load(content, LIMITS).shape)
        except ImageError as exc:
            outcome = str(exc)
        except BaseException as exc:
            outcome = f"NOT SAID: {exc!r}"
        most = int(status("VmHWM"))
        os.write(send, f"{time.process_time() - start} {most - before} {outcome}".encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(child, 0)
    assert text, "it took more than 120 seconds"
    seconds, memory, outcome = text.split(" ", 2)
    return float(seconds), int(memory), outcome


def status(name: str) -> str:
    with Path("/proc/self/status").open() as file:
        return next(line for line in file if line.startswith(name)).split()[1]


def resident() -> int:
    return int(status("VmRSS"))


@pytest.fixture(scope="module")
def honest() -> tuple[float, int]:
    """What the largest image takes: 25 megapixels, a progressive JPEG."""
    pixels = np.random.default_rng(0).integers(0, 256, (625, 625, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((5000, 5000)).save(buffer, "JPEG", quality=90, progressive=True)
    seconds, memory, outcome = spent(buffer.getvalue())
    assert outcome == "(5000, 5000, 3)"
    return seconds, memory


@pytest.mark.parametrize("name", COSTLY)
def test_no_file_costs_much_more_than_the_largest_image(name, honest):
    content = COSTLY[name]()
    assert len(content) < LIMITS.max_bytes
    seconds, memory, outcome = spent(content)
    assert not outcome.startswith("NOT SAID")
    assert seconds < 3 * honest[0], outcome
    assert memory < 2 * honest[1], outcome


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_file_that_is_cut_anywhere_is_refused_unless_all_pixels_are_there(kind):
    content = encoded(kind, 12, 10)
    loaded = 0
    for end in range(len(content)):
        with suppress(ImageError):
            load(content[:end], LIMITS)
            loaded += 1
    assert loaded <= 12  # what follows the last pixel, or a PNG's or JPEG's end, may be missing


def test_segments_that_make_no_picture_change_none():
    plain = encoded("JPEG")
    more = plain[:2] + b"\xff\xff\xfe\0\5abc\xff\xe2\0\6ICC_\0\xff\xed\0\4ab" + plain[2:]
    np.testing.assert_array_equal(load(plain), load(more))
