"""What the numbers in a picture file mean, where its header leaves a choice: trusted, or refused by name.

Decoders open more than they show right. What a header says about its samples is looked up among what was seen to be
right against independent writers and decoders (`python -m tests.picture_check`), and all else is refused.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator

from vqa_embeddings.data import tiff
from vqa_embeddings.data.jpeg import SCAN, segments

CONVERT = "save it as PNG or JPEG with 8 bits"


def untrusted_format(data: bytes) -> str | None:
    """Why this file is not trusted to be shown right: what it is, and what to do. None where it is."""
    check = next((check for magic, check in CHECKS if data.startswith(magic)), None)
    try:
        found = check(data) if check else None
    except Exception:  # whatever may come of a broken header: what is not understood is not trusted
        return "its header is broken; mend or replace it"
    return f"it is {found}, which is not read; {CONVERT}" if found else None


# JPEG

FRAMES = {
    **dict.fromkeys((0xC0, 0xC1, 0xC2, 0xC9), ""),
    0xCA: "progressive arithmetic",
    **dict.fromkeys((0xC3, 0xCB), "lossless"),
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical"),
    0xF7: "JPEG-LS",
}  # by marker; those without a name are read
RESTARTS = 0xDD  # the marker of how often they come
MARK = re.compile(rb"\xff([\x01-\xfe])")  # in a scan, restarts too


def _jpeg(data: bytes) -> str | None:
    restarts = False
    for mark, place in segments(data):
        said = data[place]
        if mark in FRAMES:
            bits, channels = said[0], said[5]
            if FRAMES[mark]:
                return f"a {FRAMES[mark]} JPEG"
            if bits != 8:
                return f"a JPEG of {bits} bits"
            if channels not in (1, 3, 4):
                return f"a JPEG of {channels} channels"
        elif mark == RESTARTS:
            restarts = said != b"\0\0"
        elif mark == SCAN:
            in_order = not restarts or _in_order(data, place.stop)
            return None if in_order else "a JPEG whose restart markers are not in order"
    raise ValueError("no scan")


def _in_order(data: bytes, start: int) -> bool:
    """Whether the restart markers of the scan that begins there count as they should, or its rows lie elsewhere."""
    for count, found in enumerate(MARK.finditer(data, start)):
        mark = found[1][0]
        if not 0xD0 <= mark <= 0xD7:
            return True
        if mark != 0xD0 + count % 8:
            return False
    return True


# GIF

EXTENSION, FRAME, SEE_THROUGH = ord("!"), ord(","), 0xF9


def _gif(data: bytes) -> str | None:
    """A first frame that leaves room around it: the decoder fills that with colour 0, and not with the background."""
    width, height, flags, background = struct.unpack("<HHBB", data[6:12])
    at, transparent = 13 + _table(flags), False
    while data[at] in (0, EXTENSION):
        if not data[at]:  # which decoders skip
            at += 1
            continue
        transparent |= data[at + 1] == SEE_THROUGH and bool(data[at + 3] & 1)
        at += 2
        while data[at]:
            at += 1 + data[at]
        at += 1
    if data[at] != FRAME:
        raise ValueError("no frame")
    left, top, wide, tall = struct.unpack("<HHHH", data[at + 1 : at + 9])
    if left + wide > width or top + tall > height:
        return "a GIF whose first frame is larger than the picture"
    around = (left, top, wide, tall) != (0, 0, width, height) and not transparent
    right = flags & 128 and background == 0 and not data[at + 9] & 128
    return "a GIF whose first frame does not fill it" if around and not right else None


def _table(flags: int) -> int:
    """Bytes of the table of colours."""
    return 3 << 1 + (flags & 7) if flags & 128 else 0


# JPEG 2000

SRGB, GREY, SYCC, CMYK = b"\0\0\0\x10", b"\0\0\0\x11", b"\0\0\0\x12", b"\0\0\0\x0c"  # numbers of colour spaces
TRUSTED_GREYS = {8, *range(10, 17)}  # bits; of 9 it depends on the container


def _jpeg2000(data: bytes) -> str | None:
    boxes = dict(_boxes(data, 0, len(data))) if data[0] == 0 else {}
    at = boxes.get(b"jp2c", slice(0, None)).start
    channels = int.from_bytes(data[at + 40 : at + 42], "big")
    parts = [data[i : i + 3] for i in range(at + 42, at + 42 + 3 * channels, 3)]
    bits = {(part[0] & 127) + 1 for part in parts}
    if not bits <= (TRUSTED_GREYS if channels == 1 and b"pclr" not in boxes else {8}):
        said = f"{channels} channel{'s' * (channels > 1)} of {'/'.join(map(str, sorted(bits)))} bits"
        return f"a JPEG 2000 picture with {said}"
    if any(part[1:] != b"\1\1" for part in parts):
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
    """The name and the place of each box, those in the header too."""
    while at + 8 <= end:
        length, name, start = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], at + 8
        if length == 1:
            length, start = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
        after = at + length if length >= start - at else end
        yield name, slice(start, after)
        if name == b"jp2h":
            yield from _boxes(data, start, after)
        at = after


# BMP, and ICO, which holds such

OLD_HEAD = 12  # bytes of the header that names no number of colours
RUNS_OF_4 = 2  # which decoders of several versions show wrong


def _bmp(data: bytes) -> str | None:
    return _bitmap(data, 14)


def _icon(data: bytes) -> str | None:
    places = [int.from_bytes(data[i + 12 : i + 16], "little") for i in range(6, 6 + 16 * data[4], 16)]
    return next(filter(None, (_bitmap(data, at) for at in places if data[at : at + 4] != b"\x89PNG")), None)


def _bitmap(data: bytes, at: int) -> str | None:
    """Of a palette of nothing but greys the decoder believes that a byte is a pixel, or a bit where they are two."""

    def number(place: int, size: int) -> int:
        return int.from_bytes(data[at + place : at + place + size], "little")

    head = number(0, 4)
    old = head == OLD_HEAD
    bits, packing, named = (number(10, 2), 0, 0) if old else (number(14, 2), number(16, 4), number(32, 4))
    if packing == RUNS_OF_4:
        return "a bitmap of runs of 4 bits (RLE4)"
    colours, size = named or 1 << min(bits, 8), 3 if old else 4
    levels = (0, 255) if colours == 2 else range(min(colours, 256))
    grey = all(data[(i := at + head + n * size) : i + 3] == bytes([level] * 3) for n, level in enumerate(levels))
    right = bits == 1 if colours <= 2 else bits == 8
    return f"a bitmap with {bits} bits a pixel for {colours} greys" if bits <= 8 and grey and not right else None


CHECKS: tuple[tuple[tuple[bytes, ...], Callable[[bytes], str | None]], ...] = (
    ((b"II*\0", b"II\0*", b"MM\0*", b"MM*\0", b"II+\0"), tiff.untrusted_format),
    ((b"\xff\xd8\xff",), _jpeg),
    ((b"GIF87a", b"GIF89a"), _gif),
    ((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  "), _jpeg2000),
    ((b"BM",), _bmp),
    ((b"\0\0\1\0",), _icon),
)
MAGIC_NUMBERS = tuple(number for magic, _ in CHECKS for number in magic)  # what files of these formats begin with
