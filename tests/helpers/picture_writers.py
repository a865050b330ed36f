"""Writers of odd picture files that share no code with any decoder: each file is what its arguments say."""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Callable, Sequence

import imagecodecs
import numpy as np

REVERSED = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), axis=1)[:, 0]
TIFF_COMPRESSION: dict[int, Callable[[bytes], bytes]] = {
    1: bytes,
    5: imagecodecs.lzw_encode,
    8: zlib.compress,
    32773: imagecodecs.packbits_encode,
    32946: zlib.compress,
    34925: lzma.compress,
    50000: imagecodecs.zstd_encode,
}


def packed(samples: np.ndarray, bits: Sequence[int]) -> bytes:
    """Rows of samples [height, values] as a string of bits, the highest first, each row padded to whole bytes.

    Args:
        bits: of the first values of a row; they repeat.
    """
    widths = np.resize(np.array(bits), samples.shape[1])
    shown = [((samples[:, [i]] >> np.arange(w - 1, -1, -1)) & 1).astype(np.uint8) for i, w in enumerate(widths)]
    return np.packbits(np.concatenate(shown, axis=1), axis=1).tobytes()


def sample_bytes(samples: np.ndarray, bits: Sequence[int], order: str) -> bytes:
    """Samples [height, values] as a TIFF holds them."""
    if samples.dtype.kind in "fc":
        return samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    if set(bits) <= {8, 16, 32, 64} and len(set(bits)) == 1:
        kind = "i" if samples.min(initial=0) < 0 else "u"
        return samples.astype(f"{order}{kind}{bits[0] // 8}").tobytes()
    return packed(samples, bits)


def differences(samples: np.ndarray) -> np.ndarray:
    """Predictor 2 of samples [height, width, channels]: each but the first of a row less the one before."""
    return np.concatenate([samples[:, :1], np.diff(samples, axis=1)], axis=1)


def tiff(
    samples: np.ndarray,
    bits: Sequence[int],
    photometric: int | None,
    *,
    order: str = "<",
    big: bool = False,
    planar: int = 1,
    compression: int = 1,
    predictor: int = 1,
    fill: int = 1,
    tile: tuple[int, int] | None = None,
    rows: int | None = None,
    tags: dict[int, tuple[int, Sequence[int]]] | None = None,
) -> bytes:
    """A TIFF of samples [height, width, channels].

    Args:
        order: "<" or ">".
        tile: height and width of a tile; strips of `rows` rows without.
        tags: more tags, each a type (3 short, 4 long, 5 rational) and its values.
    """
    height, width, channels = samples.shape
    tall, wide = tile or (rows or height, width)
    planes = [samples[..., [i]] for i in range(channels)] if planar == 2 else [samples]
    blocks = []
    for number, plane in enumerate(planes):
        of_plane = [bits[number]] if planar == 2 else list(bits)
        for y in range(0, height, tall):
            for x in range(0, width, wide):
                block = plane[y : y + tall, x : x + wide]
                if tile:
                    block = np.pad(block, ((0, tall - block.shape[0]), (0, wide - block.shape[1]), (0, 0)))
                if predictor == 2:
                    block = differences(block) & ((1 << of_plane[0]) - 1)
                raw = sample_bytes(block.reshape(len(block), -1), of_plane, order)
                data = TIFF_COMPRESSION[compression](raw)
                blocks.append(REVERSED[np.frombuffer(data, np.uint8)].tobytes() if fill == 2 else data)
    offsets, counts = (324, 325) if tile else (273, 279)
    all_tags: dict[int, tuple[int, Sequence[int]]] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, list(bits)),
        259: (3, [compression]),
        277: (3, [channels]),
        284: (3, [planar]),
        **({262: (3, [photometric])} if photometric is not None else {}),
        **({317: (3, [predictor])} if predictor != 1 else {}),
        **({266: (3, [fill])} if fill != 1 else {}),
        **({322: (4, [wide]), 323: (4, [tall])} if tile else {278: (4, [tall])}),
        **(tags or {}),
    }
    return tiff_of(blocks, all_tags, offsets, counts, order, big)


def tiff_of(
    blocks: Sequence[bytes],
    tags: dict[int, tuple[int, Sequence[int]]],
    offsets: int = 273,
    counts: int = 279,
    order: str = "<",
    big: bool = False,
) -> bytes:
    """A TIFF of these blocks and tags; the places and sizes of the blocks are added."""
    start = 16 if big else 8
    places = [start + sum(map(len, blocks[:i])) for i in range(len(blocks))]
    tags = {**tags, offsets: (4, places), counts: (4, [len(block) for block in blocks])}
    body = b"".join(blocks)
    body += bytes(len(body) % 2)
    word, entry, room = ("Q", "HHQ", 8) if big else ("I", "HHI", 4)
    directory = start + len(body)
    after = directory + (8 if big else 2) + len(tags) * (20 if big else 12) + room
    entries, more = b"", b""
    for tag, (kind, values) in sorted(tags.items()):
        letter = {1: "B", 3: "H", 4: "I", 5: "I", 7: "B"}[kind]
        raw = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(raw) > room:
            at = struct.pack(order + word, after + len(more))
            more += raw + bytes(len(raw) % 2)
        else:
            at = raw.ljust(room, b"\0")
        entries += struct.pack(order + entry, tag, kind, len(values) // (2 if kind == 5 else 1)) + at
    mark = b"II" if order == "<" else b"MM"
    head = struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0) if big else (42,)), directory)
    count = struct.pack(order + ("Q" if big else "H"), len(tags))
    return mark + head + body + count + entries + bytes(room) + more


def png(
    samples: np.ndarray,
    bits: int,
    colour: int,
    *,
    interlaced: bool = False,
    filters: Sequence[int] = (0,),
    before: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """A PNG of samples [height, width, channels].

    Args:
        colour: the standard's colour type.
        filters: of the rows, in turn.
        before: chunks before the pixels.
    """
    height, width, channels = samples.shape
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    step = max(1, bits * channels // 8)
    raw = b""
    for x, y, across, down in passes if interlaced else [(0, 0, 1, 1)]:
        part = samples[y::down, x::across]
        if not part.size:
            continue
        lines = np.frombuffer(packed(part.reshape(len(part), -1), [bits]), np.uint8).reshape(len(part), -1)
        above = np.zeros_like(lines[0])
        for number, line in enumerate(lines):
            kind = filters[number % len(filters)]
            raw += bytes([kind]) + filtered(line, above, step, kind).tobytes()
            above = line
    header = struct.pack("!IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced))
    chunks = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    made = [
        struct.pack("!I", len(data)) + name + data + struct.pack("!I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def filtered(line: np.ndarray, above: np.ndarray, step: int, kind: int) -> np.ndarray:
    """A row's bytes minus what the PNG filter predicts."""
    left, corner = (np.concatenate([np.zeros(step, np.uint8), row])[: len(row)].astype(int) for row in (line, above))
    up = above.astype(int)
    nearest = np.abs(np.stack([up - corner, left - corner, left + up - 2 * corner])).argmin(axis=0)
    predicted = [0 * left, left, up, (left + up) // 2, np.choose(nearest, [left, up, corner])][kind]
    return ((line - predicted) & 255).astype(np.uint8)


def netpbm(samples: np.ndarray, maxval: int, kind: int, comment: bytes = b"") -> bytes:
    """P1 to P6 of samples [height, width, channels]; of 1 and 4 one is black."""
    height, width, _ = samples.shape
    head = b"P%d\n%s%d %d\n" % (kind, comment, width, height) + (b"" if kind in (1, 4) else b"%d\n" % maxval)
    rows = samples.reshape(height, -1)
    if kind <= 3:
        return head + b"\n".join(b" ".join(b"%d" % value for value in row) for row in rows) + b"\n"
    return head + (packed(rows, [1]) if kind == 4 else rows.astype(">u2" if maxval > 255 else "u1").tobytes())


def bmp(
    rows: Sequence[bytes],
    width: int,
    bits: int,
    *,
    head: int = 40,
    palette: np.ndarray | None = None,
    masks: Sequence[int] = (),
    compression: int = 0,
    down: bool = False,
    whole: bytes | None = None,
) -> bytes:
    """A BMP of these rows, the upper one first, padded to four bytes.

    Args:
        head: size of the header: 12, 40, 52, 56, 108 or 124.
        palette: uint8 [colours, 3], red first.
        masks: of the channels, for compression 3.
        down: the upper row comes first.
        whole: the encoded pixels, in place of the rows.
    """
    data = whole or b"".join(row + bytes(-len(row) % 4) for row in (rows if down else rows[::-1]))
    colours = b"" if palette is None else b"".join(bytes(c[::-1]) + b"\0" * (head != 12) for c in palette)
    if head == 12:
        header = struct.pack("<IHHHH", head, width, len(rows), 1, bits)
    else:
        used = 0 if palette is None else len(palette)
        tall = -len(rows) if down else len(rows)
        header = struct.pack("<IiiHHIIiiII", head, width, tall, 1, bits, compression, len(data), 2835, 2835, used, 0)
        header += struct.pack(f"<{len(masks)}I", *masks)
        if head > 40:
            header = header.ljust(head, b"\0")
    start = 14 + len(header) + len(colours)
    return struct.pack("<2sIHHI", b"BM", start + len(data), 0, 0, start) + header + colours + data


def run_lengths(indices: np.ndarray, bits: int, rng: np.random.Generator) -> bytes:
    """Indices [height, width] as RLE8 or RLE4, in runs and in absolute mode."""
    data = b""
    for row in indices[::-1].tolist():
        x = 0
        while x < len(row):
            count = min(len(row) - x, int(rng.integers(1, 12)))
            run = row[x : x + count]
            if count >= 3 and rng.integers(2):
                raw = bytes(run) if bits == 8 else packed(np.array([run]), [4])
                data += bytes([0, count]) + raw + bytes(len(raw) % 2)
            elif bits == 8:
                data += b"".join(bytes([1, value]) for value in run)
            else:
                pairs = [run[i : i + 2] for i in range(0, count, 2)]
                data += b"".join(bytes([len(pair), pair[0] << 4 | pair[-1]]) for pair in pairs)
            x += count
        data += b"\0\0"
    return data + b"\0\1"


def gif(
    indices: np.ndarray,
    bits: int,
    *,
    shared: np.ndarray | None,
    own: np.ndarray | None = None,
    interlaced: bool = False,
    transparent: int | None = None,
    more: Sequence[np.ndarray] = (),
    room: tuple[int, int, int, int] = (0, 0, 0, 0),
    background: int = 0,
) -> bytes:
    """A GIF of indices [height, width] and `more` frames.

    Args:
        room: around the frames: left, above, right, below.
        shared: the global colour table, uint8 [1 << bits, 3].
        own: the first frame's.
    """
    height, width = indices.shape

    def table(colours: np.ndarray | None) -> tuple[int, bytes]:
        return (0, b"") if colours is None else (128 | (bits - 1), colours.astype(np.uint8).tobytes())

    flags, colours = table(shared)
    data = b"GIF89a" + struct.pack(
        "<HHBBB", width + room[0] + room[2], height + room[1] + room[3], flags | 112, background, 0
    )
    data += colours
    for number, frame in enumerate([indices, *more]):
        if transparent is not None or more:
            data += b"!\xf9\4" + struct.pack("<BHBB", transparent is not None, 10, transparent or 0, 0)
        flags, colours = table(own if number == 0 else None)
        order = [y for first, step in [(0, 8), (4, 8), (2, 4), (1, 2)] for y in range(first, height, step)]
        shown = frame[order] if interlaced else frame
        data += b"," + struct.pack("<HHHHB", room[0], room[1], width, height, flags | 64 * interlaced) + colours
        data += codes(shown.ravel(), max(2, bits))
    return data + b";"


def codes(indices: np.ndarray, bits: int) -> bytes:
    """Indices as LZW whose table is cleared before its codes grow, in blocks."""
    clear, room = 1 << bits, (1 << bits) - 2
    lzw = [clear]
    for start in range(0, len(indices), room):
        lzw += [*indices[start : start + room].tolist(), clear]
    lzw[-1] = clear + 1
    shown = ((np.array(lzw)[:, None] >> np.arange(bits + 1)) & 1).astype(np.uint8)
    raw = np.packbits(shown.ravel(), bitorder="little").tobytes()
    return (
        bytes([bits])
        + b"".join(bytes([len(raw[i : i + 255])]) + raw[i : i + 255] for i in range(0, len(raw), 255))
        + b"\0"
    )


def icon(pictures: Sequence[tuple[int, int, int, bytes]]) -> bytes:
    """An ICO of pictures: width, height, bits, and a PNG or a BMP without its first 14 bytes."""
    start = 6 + 16 * len(pictures)
    head = struct.pack("<HHH", 0, 1, len(pictures))
    for number, (width, height, bits, data) in enumerate(pictures):
        at = start + sum(len(picture[3]) for picture in pictures[:number])
        head += struct.pack("<BBBBHHII", width, height, 0, 0, 1, bits, len(data), at)
    return head + b"".join(data for *_, data in pictures)


def box(name: bytes, data: bytes) -> bytes:
    """A box of JPEG 2000's and MPEG's files."""
    return struct.pack("!I", 8 + len(data)) + name + data


def jp2(codestream: bytes, size: tuple[int, int], channels: int, bits: int, space: int, more: bytes = b"") -> bytes:
    """A JPEG 2000 file around a codestream; `more` boxes in its header.

    Args:
        size: height and width.
        space: 12 CMYK, 16 sRGB, 17 grey, 18 sYCC.
    """
    header = box(b"ihdr", struct.pack("!IIHBBBB", *size, channels, bits - 1, 7, 0, 0))
    header += box(b"colr", struct.pack("!BBBI", 1, 0, 0, space)) + more
    start = box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 \0\0\0\0jp2 ")
    return start + box(b"jp2h", header) + box(b"jp2c", codestream)


def avif_grid(tiles: Sequence[bytes], rows: int, columns: int, side: int, size: tuple[int, int]) -> bytes:
    """An AVIF that is a grid of square images, each taken from an AVIF of its own.

    Args:
        side: of each tile.
        size: height and width of the whole image; the grid may be larger.
    """

    def full(name: bytes, data: bytes, version: int = 0, flags: int = 0) -> bytes:
        return box(name, struct.pack("!I", version << 24 | flags) + data)

    def inner(data: bytes, name: bytes) -> bytes:
        at = data.index(name)
        return data[at - 4 : at - 4 + int.from_bytes(data[at - 4 : at], "big")]

    count = len(tiles)
    pixels = [inner(tile, b"mdat")[8:] for tile in tiles]
    grid = struct.pack("!BBBBHH", 0, 0, rows - 1, columns - 1, size[1], size[0])
    names = [full(b"infe", struct.pack("!HH", 1, 0) + b"grid\0", 2)]
    names += [full(b"infe", struct.pack("!HH", 2 + i, 0) + b"av01\0", 2, 1) for i in range(count)]
    parts = struct.pack(f"!HH{count}H", 1, count, *range(2, 2 + count))
    holders = [full(b"ispe", struct.pack("!II", size[1], size[0])), full(b"ispe", struct.pack("!II", side, side))]
    holders += [inner(tiles[0], name) for name in (b"pixi", b"av1C", b"colr")]
    uses = struct.pack("!I", 1 + count) + struct.pack("!HBBBB", 1, 3, 1, 3, 5)
    uses += b"".join(struct.pack("!HBBBBB", 2 + i, 4, 2, 3, 0x84, 5) for i in range(count))

    def meta(start: int) -> bytes:
        places = [start + sum(map(len, pixels[:i])) for i in range(count)]
        ends = start + sum(map(len, pixels))
        located = struct.pack("!BBH", 0x44, 0, 1 + count) + struct.pack("!HHHII", 1, 0, 1, ends, len(grid))
        located += b"".join(struct.pack("!HHHII", 2 + i, 0, 1, places[i], len(pixels[i])) for i in range(count))
        return full(
            b"meta",
            full(b"hdlr", bytes(4) + b"pict" + bytes(13))
            + full(b"pitm", struct.pack("!H", 1))
            + full(b"iloc", located)
            + full(b"iinf", struct.pack("!H", 1 + count) + b"".join(names))
            + full(b"iref", box(b"dimg", parts))
            + box(b"iprp", box(b"ipco", b"".join(holders)) + full(b"ipma", uses)),
        )

    start = box(b"ftyp", b"avif\0\0\0\0avifmif1miaf")
    return start + meta(len(start) + len(meta(0)) + 8) + box(b"mdat", b"".join(pixels) + grid)


def without(data: bytes, mark: int) -> bytes:
    """A JPEG without its first segment of this marker."""
    at = data.index(bytes([0xFF, mark]))
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
