"""Pixel formats that are known to be decoded right, by the header of a picture file. All others are refused.

Decoders open more files than they decode right. The formats that are trusted here were compared with independent
encoders and decoders (`python -m tests.helpers.picture_check`).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator

from vqa_embeddings.data import tiff
from vqa_embeddings.data.jpeg import RESTARTS, SCAN, segments

CONVERT = "save it as PNG or JPEG with 8 bits"


def untrusted_format(data: bytes) -> str | None:
    """What the file is if it may be decoded wrong, and what to do; None if it is trusted."""
    check = next((check for magic, check in CHECKS if data.startswith(magic)), None)
    try:
        found = check(data) if check else None
    except Exception:  # a broken header can raise nearly anything
        return "its header is broken; mend or replace it"
    return f"it is {found}, which is not read; {CONVERT}" if found else None


# JPEG

FRAMES = {
    **dict.fromkeys((0xC0, 0xC1, 0xC2, 0xC9), ""),
    0xCA: "progressive arithmetic",
    **dict.fromkeys((0xC3, 0xCB), "lossless"),
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical"),
    0xF7: "JPEG-LS",
}  # by marker (SOF); those with an empty name are read
RESTART_INTERVAL = 0xDD  # marker (DRI)
ANY_MARKER = re.compile(rb"\xff([\x01-\xfe])")  # restart markers too


def _jpeg(data: bytes) -> str | None:
    restarts = False
    for marker, place in segments(data):
        content = data[place]
        if marker in FRAMES:
            bits, channels = content[0], content[5]
            if FRAMES[marker]:
                return f"a {FRAMES[marker]} JPEG"
            if bits != 8:
                return f"a JPEG of {bits} bits"
            if channels not in (1, 3, 4):
                return f"a JPEG of {channels} channels"
        elif marker == RESTART_INTERVAL:
            restarts = content != b"\0\0"
        elif marker == SCAN:
            in_order = not restarts or _restarts_in_order(data, place.stop)
            return None if in_order else "a JPEG whose restart markers are not in order"
    raise ValueError("no scan")


def _restarts_in_order(data: bytes, start: int) -> bool:
    """Whether the restart markers of the scan at `start` count up; if not, decoders put its blocks at other places."""
    for count, found in enumerate(ANY_MARKER.finditer(data, start)):
        marker = found[1][0]
        if marker not in RESTARTS:
            return True
        if marker != RESTARTS[count % len(RESTARTS)]:
            return False
    return True


# GIF

EXTENSION, FRAME, GRAPHIC_CONTROL = ord("!"), ord(","), 0xF9


def _gif(data: bytes) -> str | None:
    """A first frame smaller than the picture: the decoder fills the rest with colour 0, not the background colour."""
    width, height, flags, background = struct.unpack("<HHBB", data[6:12])
    at, transparent = 13 + _colour_table_bytes(flags), False
    while data[at] in (0, EXTENSION):
        if not data[at]:  # which decoders skip
            at += 1
            continue
        transparent |= data[at + 1] == GRAPHIC_CONTROL and bool(data[at + 3] & 1)
        at += 2
        while data[at]:
            at += 1 + data[at]
        at += 1
    if data[at] != FRAME:
        raise ValueError("no frame")
    left, top, wide, tall = struct.unpack("<HHHH", data[at + 1 : at + 9])
    if left + wide > width or top + tall > height:
        return "a GIF whose first frame is larger than the picture"
    smaller = (left, top, wide, tall) != (0, 0, width, height) and not transparent
    filled_right = flags & 128 and background == 0 and not data[at + 9] & 128
    return "a GIF whose first frame does not fill it" if smaller and not filled_right else None


def _colour_table_bytes(flags: int) -> int:
    return 3 << 1 + (flags & 7) if flags & 128 else 0


# JPEG 2000

SRGB, GREY, SYCC, CMYK = b"\0\0\0\x10", b"\0\0\0\x11", b"\0\0\0\x12", b"\0\0\0\x0c"  # enumerated colour spaces
TRUSTED_GREY_BITS = {8, *range(10, 17)}  # 9 depend on the container


def _jpeg2000(data: bytes) -> str | None:
    boxes = dict(_boxes(data, 0, len(data))) if data[0] == 0 else {}
    at = boxes.get(b"jp2c", slice(0, None)).start
    channels = int.from_bytes(data[at + 40 : at + 42], "big")
    components = [data[i : i + 3] for i in range(at + 42, at + 42 + 3 * channels, 3)]
    bits = {(component[0] & 127) + 1 for component in components}
    if not bits <= (TRUSTED_GREY_BITS if channels == 1 and b"pclr" not in boxes else {8}):
        described = f"{channels} channel{'s' * (channels > 1)} of {'/'.join(map(str, sorted(bits)))} bits"
        return f"a JPEG 2000 picture with {described}"
    if any(component[1:] != b"\1\1" for component in components):
        return "a JPEG 2000 picture whose channels differ in size"
    colour = data[boxes.get(b"colr", slice(0, 0))]
    if colour[:1] == b"\1" and colour[3:7] not in (SRGB, GREY, SYCC, CMYK):
        return f"a JPEG 2000 picture in colour space {int.from_bytes(colour[3:7], 'big')}"
    roles, columns = data[boxes.get(b"cdef", slice(0, 0))][2:], data[boxes.get(b"cmap", slice(0, 0))]
    colours = [struct.unpack("!HHH", roles[i : i + 6]) for i in range(0, len(roles), 6)]
    moved = any(role == 0 and place != channel + 1 for channel, role, place in colours)
    if moved or columns[3::4] != bytes(range(len(columns) // 4)):
        return "a JPEG 2000 picture whose channels lie in another order"
    return None


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, slice]]:
    """The name and the place of each box, also of those inside the header box."""
    while at + 8 <= end:
        length, name, start = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], at + 8
        if length == 1:
            length, start = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
        after = at + length if length >= start - at else end
        yield name, slice(start, after)
        if name == b"jp2h":
            yield from _boxes(data, start, after)
        at = after


# BMP, and ICO, which contains bitmaps

OLD_HEADER = 12  # bytes of a header without the number of colours
RLE4 = 2  # compression that several versions of the decoder decode wrong


def _bmp(data: bytes) -> str | None:
    return _bitmap(data, 14)


def _icon(data: bytes) -> str | None:
    places = [int.from_bytes(data[i + 12 : i + 16], "little") for i in range(6, 6 + 16 * data[4], 16)]
    return next(filter(None, (_bitmap(data, at) for at in places if data[at : at + 4] != b"\x89PNG")), None)


def _bitmap(data: bytes, at: int) -> str | None:
    """A palette of greys alone: the decoder takes each byte for a pixel, or each bit if there are two greys."""

    def number(place: int, size: int) -> int:
        return int.from_bytes(data[at + place : at + place + size], "little")

    header = number(0, 4)
    old = header == OLD_HEADER
    bits, compression, named = (number(10, 2), 0, 0) if old else (number(14, 2), number(16, 4), number(32, 4))
    if compression == RLE4:
        return "a bitmap of runs of 4 bits (RLE4)"
    colours, size = named or 1 << min(bits, 8), 3 if old else 4
    levels = (0, 255) if colours == 2 else range(min(colours, 256))
    grey = all(data[(i := at + header + n * size) : i + 3] == bytes([level] * 3) for n, level in enumerate(levels))
    decoded_right = bits == 1 if colours <= 2 else bits == 8
    wrong = bits <= 8 and grey and not decoded_right
    return f"a bitmap with {bits} bits a pixel for {colours} greys" if wrong else None


CHECKS: tuple[tuple[tuple[bytes, ...], Callable[[bytes], str | None]], ...] = (
    ((b"II*\0", b"II\0*", b"MM\0*", b"MM*\0", b"II+\0"), tiff.untrusted_format),
    ((b"\xff\xd8\xff",), _jpeg),
    ((b"GIF87a", b"GIF89a"), _gif),
    ((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  "), _jpeg2000),
    ((b"BM",), _bmp),
    ((b"\0\0\1\0",), _icon),
)
MAGIC_NUMBERS = tuple(number for magic, _ in CHECKS for number in magic)  # what files of these formats begin with
