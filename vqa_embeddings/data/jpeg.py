"""JPEG files that lack only their end marker: all pixels are there. Found out without a decoder of our own.

The place of what may be missing is filled with random bytes, in many ways. If none of them changes a pixel, nothing
was missing that matters. That misses scans that have not begun at all; the headers tell about those.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
from collections import defaultdict
from collections.abc import Iterator

from PIL import Image

START, END = b"\xff\xd8", b"\xff\xd9"  # SOI and EOI
# Markers, by the standard's names: SOF (three numbers of its range are tables), SOS, DQT, EOI and RST.
FRAMES, SCAN, QUANTIZATION, LAST = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}, 0xDA, 0xDB, END[1]
RESTARTS = range(0xD0, 0xD8)
# A marker with content, or the end. In a scan \xff\x00 is data. Decoders skip what lies before a marker.
MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])")
COEFFICIENTS = 64  # of a block
# A filling for each value of the next four bits. Each half has all values of three of them.
EVEN, ODD = range(0, 16, 2), range(1, 16, 2)
FILLING_BYTES = 3000  # more than ten blocks take, some of which may lie outside the picture
LAST_BYTES = 4  # of a whole picture; without them pixels are missing
COARSE = 16  # a quantization step with which the smallest change of a coefficient changes a pixel


def lacks_end(data: bytes) -> bool:
    """Whether it is a JPEG that ends within a scan. The decoder does not notice if enough other bytes follow."""
    if data.endswith(END) or not data.startswith(START):
        return False
    kinds = [kind for kind, _ in segments(data)]
    return SCAN in kinds and kinds[-1] != LAST


def with_end_marker(data: bytes) -> bytes | None:
    """The file with an end marker if it lacks only that; None if pixels may be missing, or it is not a JPEG."""
    scan = _last_scan(data)
    if scan is None or not _has_all_scans(data):
        return None
    behind = MARKER.search(data, scan.stop)
    scans = _without_half_a_marker(data[: behind.start()] if behind else data)
    complete = _is_complete(scans, EVEN) and _is_complete(_coarsen(scans), ODD)
    return scans + END if complete and not _is_padded(scans) else None


def _without_half_a_marker(data: bytes) -> bytes:
    return data.rstrip(b"\xff")


def _is_complete(data: bytes, fillings: range) -> bool:
    """Whether all pixels stay the same, whatever bytes follow."""
    try:
        digests = (_digest(data + _filling(number) + END) for number in fillings)
        first = next(digests)
        return all(digest == first for digest in digests)
    except OSError:
        return False


def _is_padded(data: bytes) -> bool:
    """Whether other bytes lie where the rest of the picture should be: without the last ones no pixel is missing.

    A last scan of which no byte is needed, because it changes nothing, does not count.
    """
    scan = _last_scan(data)
    last_bytes_can_go = _is_complete(_without_half_a_marker(data[:-LAST_BYTES]), EVEN)
    return last_bytes_can_go and scan is not None and not _is_complete(data[: scan.stop], EVEN)


def _digest(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as picture:
        return hashlib.sha256(picture.tobytes()).digest()


def _filling(number: int) -> bytes:
    """Random bytes that begin with the four bits of `number`, a restart marker, and random bytes again."""
    generator = random.Random(number)
    begin, more = (generator.choices(range(255), k=FILLING_BYTES) for _ in range(2))
    begin[0] = number << 4 | generator.randrange(15)
    return bytes([*begin, 0xFF, RESTARTS[number % len(RESTARTS)], *more])


def _has_all_scans(data: bytes) -> bool:
    """Whether scans have begun for every coefficient of every component, down to the lowest bit."""
    components = b""
    lowest: defaultdict[int, dict[int, int]] = defaultdict(dict)  # bit of each coefficient, by component
    for kind, content in segments(data):
        if kind in FRAMES:
            components = data[content][6::3]
        elif kind == SCAN and content.stop - content.start > 3:
            *selected, first, last, bits = data[content]
            for component in selected[1::2]:
                lowest[component].update(dict.fromkeys(range(first, last + 1), bits & 15))
    whole = dict.fromkeys(range(COEFFICIENTS), 0)
    return bool(components) and all(lowest[component] == whole for component in components)


def _coarsen(data: bytes) -> bytes:
    """The file with larger quantization steps, except that of a block's mean: smaller changes become visible."""
    coarse = bytearray(data)
    for kind, content in segments(data):
        if kind == QUANTIZATION:
            place = content.start
            while place < content.stop:
                size = 1 + (data[place] >> 4)  # bytes of a step, the highest first
                for last in range(place + 2 * size, place + 1 + COEFFICIENTS * size, size):
                    coarse[last] = max(coarse[last], COARSE)
                place += 1 + COEFFICIENTS * size
    return bytes(coarse)


def _last_scan(data: bytes) -> slice | None:
    """The place of the last scan's header; None if no scan has begun, or it is not a JPEG."""
    scans = [content for kind, content in segments(data) if kind == SCAN] if data.startswith(START) else []
    return scans[-1] if scans else None


def segments(data: bytes) -> Iterator[tuple[int, slice]]:
    """The marker of each segment, and the place of its content. The data of the scans is skipped.

    The last segment is the end marker, or the last one that is whole before the file ends.
    """
    place = len(START)
    while match := MARKER.search(data, place):
        kind, place = match[1][0], match.end()
        if kind == LAST:
            yield kind, slice(place, place)
            return
        length = int.from_bytes(data[place : place + 2], "big")
        content, place = slice(place + 2, place + length), place + length
        if length < 2 or place > len(data):
            return
        yield kind, content
