"""JPEG files that lack nothing but their end marker: every pixel is there. How that is known without a decoder of ours.

What may be missing is put in its place, in many ways. Where none of them changes a pixel, nothing was missing that
matters. Scans that have not begun, which no filling shows, are missed in the headers.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
from collections import defaultdict
from collections.abc import Iterator

from PIL import Image

START, END = b"\xff\xd8", b"\xff\xd9"
# Markers: of frames (three of those numbers are tables'), of a scan, of a table of divisors, of the end; of restarts.
FRAMES, SCAN, DIVISORS, LAST = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}, 0xDA, 0xDB, END[1]
RESTARTS = range(0xD0, 0xD8)
# One that something follows, or the end; in a scan \xff\x00 is a number. What is before it, decoders skip.
MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])")
FREQUENCIES = 64  # of a block
# One filling for each way in which the next four bits may go on. Either half has all ways for three of them.
EVEN, ODD = range(0, 16, 2), range(1, 16, 2)
FILLING_BYTES = 3000  # more than ten blocks take, some of which may lie beside the picture
LAST_BYTES = 4  # of a picture, without which pixels are missing
COARSE = 16  # a divisor with which the smallest change of a number changes a pixel


def lacks_end(data: bytes) -> bool:
    """Whether it is a JPEG that ends within a scan. The decoder does not say so where enough other bytes follow."""
    if data.endswith(END) or not data.startswith(START):
        return False
    kinds = [kind for kind, _ in segments(data)]
    return SCAN in kinds and kinds[-1] != LAST


def with_end_marker(data: bytes) -> bytes | None:
    """The file with its end marker, where it lacks that alone; None where pixels may be missing, or it is no JPEG."""
    scan = _last_scan(data)
    if scan is None or not _has_all_scans(data):
        return None
    behind = MARKER.search(data, scan.stop)
    rest = _without_half_a_marker(data[: behind.start()] if behind else data)
    complete = _is_complete(rest, EVEN) and _is_complete(_coarsen(rest), ODD)
    return rest + END if complete and not _is_filled_up(rest) else None


def _without_half_a_marker(data: bytes) -> bytes:
    return data.rstrip(b"\xff")


def _is_complete(data: bytes, fillings: range) -> bool:
    """Whether all pixels are the same, whatever follows."""
    try:
        digests = (_digest(data + _filling(number) + END) for number in fillings)
        first = next(digests)
        return all(digest == first for digest in digests)
    except OSError:
        return False


def _is_filled_up(data: bytes) -> bool:
    """Whether what is no part of the picture stands where the rest of it should be: the last bytes can go, and no
    pixel is missing. Where all of the last scan can go, it had nothing to say.
    """
    scan = _last_scan(data)
    last_bytes_can_go = _is_complete(_without_half_a_marker(data[:-LAST_BYTES]), EVEN)
    return last_bytes_can_go and scan is not None and not _is_complete(data[: scan.stop], EVEN)


def _digest(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as picture:
        return hashlib.sha256(picture.tobytes()).digest()


def _filling(number: int) -> bytes:
    """Bytes that begin with these four bits and go on at random; and an interval, as the next one may be marked."""
    chance = random.Random(number)
    begin, more = (chance.choices(range(255), k=FILLING_BYTES) for _ in range(2))
    begin[0] = number << 4 | chance.randrange(15)
    return bytes([*begin, 0xFF, RESTARTS[number % len(RESTARTS)], *more])


def _has_all_scans(data: bytes) -> bool:
    """Whether scans have begun for every frequency of every component, down to the last bit."""
    components = b""
    lowest: defaultdict[int, dict[int, int]] = defaultdict(dict)  # bit of a component's frequency
    for kind, content in segments(data):
        if kind in FRAMES:
            components = data[content][6::3]
        elif kind == SCAN and content.stop - content.start > 3:
            *selected, first, last, bits = data[content]
            for component in selected[1::2]:
                lowest[component].update(dict.fromkeys(range(first, last + 1), bits & 15))
    whole = dict.fromkeys(range(FREQUENCIES), 0)
    return bool(components) and all(lowest[component] == whole for component in components)


def _coarsen(data: bytes) -> bytes:
    """The file with larger divisors, but for those of a block's mean: smaller changes of its numbers are seen."""
    coarse = bytearray(data)
    for kind, content in segments(data):
        if kind == DIVISORS:
            place = content.start
            while place < content.stop:
                size = 1 + (data[place] >> 4)  # bytes of a divisor, of which the last is the lower one
                for last in range(place + 2 * size, place + 1 + FREQUENCIES * size, size):
                    coarse[last] = max(coarse[last], COARSE)
                place += 1 + FREQUENCIES * size
    return bytes(coarse)


def _last_scan(data: bytes) -> slice | None:
    """Where the header of the last scan that has begun lies; None where there is none, or it is no JPEG."""
    scans = [content for kind, content in segments(data) if kind == SCAN] if data.startswith(START) else []
    return scans[-1] if scans else None


def segments(data: bytes) -> Iterator[tuple[int, slice]]:
    """What is before, between and after the numbers of the scans: which marker, and where its content lies.

    The last one is that of the end, or the last one before the file ends.
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
