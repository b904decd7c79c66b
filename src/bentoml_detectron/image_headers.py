"""The size that an encoded image's header claims, found in few steps whatever the file holds; nothing is decoded."""

from __future__ import annotations

import struct

_SEGMENTS = 100
"""Segments of a JPEG that are looked at before its frame; real ones have some ten."""


def claimed_size(image: bytes) -> tuple[int, int]:
    """Width and height in pixels that a JPEG, PNG, WebP or BMP claims; zeros where its header does not say."""
    try:
        if image.startswith(b"\x89PNG"):
            return struct.unpack_from(">II", image, 16)
        if image.startswith(b"BM"):
            width, height = struct.unpack_from("<ii", image, 18)
            return width, abs(height)
        if image.startswith(b"RIFF"):
            return webp_size(image)
        if image.startswith(b"\xff\xd8"):
            return _jpeg_size(image)
    except (struct.error, ValueError):  # it is cut short
        pass
    return 0, 0


def webp_size(image: bytes) -> tuple[int, int]:
    """Width and height that a WebP's header claims; meaningless for a header that is no WebP's.

    Raises:
        ValueError: There is no header.
    """
    kind = image[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(image[24:27], "little"), 1 + int.from_bytes(image[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(image[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind != b"VP8 " or len(image) < 30:
        raise ValueError("not a WebP header")
    return int.from_bytes(image[26:28], "little") & 0x3FFF, int.from_bytes(image[28:30], "little") & 0x3FFF


def _jpeg_size(image: bytes) -> tuple[int, int]:
    place = 2
    for _ in range(_SEGMENTS):
        marker, length = struct.unpack_from(">HH", image, place)
        if 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):
            height, width = struct.unpack_from(">HH", image, place + 5)
            return width, height
        place += 2 + length
    return 0, 0
