"""Odd pictures of every format, made by seed, compared with independent writers and decoders.

    python -m tests.helpers.picture_check --count 10000 [--seed 0] [--only TIFF]

Every picture must be decoded right, or be a failed row with a reason: exit 1 if one is decoded wrong.
The pixels of a lossless file are known from its writer. A lossy file is decoded by FFmpeg, or by a plain decoder with
the arithmetic written out here.
"""

from __future__ import annotations

import argparse
import io
import re
import struct
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from tests.helpers import picture_writers as write
from vqa_embeddings.data.decode import decode
from vqa_embeddings.data.decode_options import DecodeOptions
from vqa_embeddings.errors import PictureUnreadable

KNOWN = Image.registered_extensions()
LOSSY = 4.0  # grey levels, on average, by which two decoders of a lossy file may differ


@dataclass(frozen=True)
class Odd:
    """A picture file, what it is, and its right pixels: uint8 [height, width, 3], or None if they are not defined."""

    data: bytes
    what: str
    shown: np.ndarray | None
    near: float = 0.0


def smooth(rng: np.random.Generator, channels: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """A picture without edges, uint8 [height, width, channels]."""
    height, width = size or (int(rng.integers(16, 60)), int(rng.integers(16, 60)))
    y, x = np.mgrid[:height, :width]
    slopes = rng.uniform(-1, 1, (2, channels))
    sloped = x[..., None] / width * slopes[0] + y[..., None] / height * slopes[1]
    return (128 + 120 * np.sin(2 * sloped + rng.uniform(0, 6, channels))).astype(np.uint8)


def rough(rng: np.random.Generator, bits: tuple[int, ...]) -> np.ndarray:
    """Samples that use all their bits, int64 [height, width, channels]."""
    height, width = int(rng.integers(1, 40)), int(rng.integers(1, 40))
    return np.stack([rng.integers(0, 1 << b, (height, width), dtype=np.int64) for b in bits], axis=2)


def eight(samples: np.ndarray, bits: int) -> np.ndarray:
    """Samples of so many bits as 8 bits: scaled up, or the upper ones."""
    return (samples >> bits - 8 if bits >= 8 else samples * 255 // ((1 << bits) - 1)).astype(np.uint8)


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., :1], 3, axis=2)


def of_inks(inks: np.ndarray) -> np.ndarray:
    """RGB of four inks, of which 255 is the most."""
    paper = 255.0 - inks
    return np.round(paper[..., :3] * paper[..., 3:4] / 255).astype(np.uint8)


def of_ycc(planes: np.ndarray) -> np.ndarray:
    """RGB of JPEG's luma and chroma [height, width, 3]."""
    y, b, r = (planes[..., i].astype(float) - 128 * (i > 0) for i in range(3))
    rgb = np.stack([y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b], axis=2)
    return np.clip(np.round(rgb), 0, 255).astype(np.uint8)


def by_ffmpeg(data: bytes, full: bool = False) -> np.ndarray:
    """A lossy file as FFmpeg's own decoders decode it, with interpolated chroma and the matrix of BT.601."""
    with av.open(io.BytesIO(data)) as container:
        frame = next(container.decode(video=0))
    form = frame.format
    if form.is_rgb:
        return frame.to_ndarray(format="rgb24")
    depth = form.components[0].bits
    planes = [
        np.frombuffer(bytes(plane), np.uint8 if depth == 8 else np.uint16)
        .reshape(plane.height, -1)[:, : plane.width]
        .astype(float)
        / (1 << depth - 8)
        for plane in list(frame.planes)[: 1 if form.name.startswith("gray") else 3]
    ]
    if not full and not form.name.startswith("yuvj") and frame.color_range != 2 and not form.name.startswith("gray"):
        planes = [
            (plane - (16 if i == 0 else 128)) * 255 / (219, 224, 224)[i] + 128 * (i > 0)
            for i, plane in enumerate(planes)
        ]
    if len(planes) == 1:
        return three(np.round(planes[0])[..., None]).astype(np.uint8)
    return of_ycc(np.stack([stretched(plane, planes[0].shape) for plane in planes], axis=2))


def stretched(plane: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """A plane of chroma, interpolated to the size of the luma."""
    for axis in (0, 1):
        few, many = plane.shape[axis], size[axis]
        if few != many:
            ratio = round(many / few)
            places = (np.arange(many) + 0.5) / ratio - 0.5
            plane = np.apply_along_axis(lambda line, x=places, n=few: np.interp(x, np.arange(n), line), axis, plane)
    return plane


def one_of(rng: np.random.Generator, *choices):
    return choices[int(rng.integers(len(choices)))]


TIFF_LAYOUTS = [
    *[((b,), p, ()) for b in (1, 2, 4, 6, 8, 10, 12, 14, 16, 24, 32) for p in (0, 1)],
    *[((b,), 3, ()) for b in (1, 2, 4, 8, 8, 8, 16)],
    *[((b,) * 3, 2, ()) for b in (4, 8, 8, 8, 10, 12, 16, 16, 16, 32)],
    *[((b,) * 4, 2, extra) for b in (8, 12, 16) for extra in ((), (0,), (1,), (2,))],
    *[((b,) * 2, p, extra) for b in (8, 16) for p in (0, 1, 3) for extra in ((), (0,), (1,), (2,))],
    *[((b,) * 4, 5, ()) for b in (8, 8, 16)],
    *[((b,) * 5, 5, extra) for b in (8, 16) for extra in ((0,), (1,), (2,))],
    *[((b,) * 5, 2, extra) for b in (8, 16) for extra in ((0, 0), (1, 0), (2, 0))],
    *[(bits, 2, ()) for bits in ((5, 6, 5), (8, 8, 16), (8, 4, 8), (8,), (8, 8))],
    *[(bits, p, ()) for bits in ((8,), (8, 8, 8)) for p in (4, 6, 8, 9, 32803)],
    ((8, 8, 8), 5, ()),
]


TIFF_COMMON = [
    *[((b,), p, ()) for b in (1, 2, 4, 8) for p in (0, 1, 3)],
    *[((b,) * 3, 2, ()) for b in (8, 16)],
    *[((b,) * 4, 2, (2,)) for b in (8, 16)],
    *[((8,) * 2, p, (2,)) for p in (1, 3)],
    ((16,), 1, ()),
    ((8,) * 4, 2, (1,)),
    ((8,) * 4, 5, ()),
    ((16,) * 4, 5, ()),
]


def tiff(rng: np.random.Generator) -> Odd:
    special = int(rng.integers(10))
    if special < 2:
        return (tiff_jpeg, tiff_numbers)[special](rng)
    bits, photometric, extra = one_of(rng, *(TIFF_COMMON if rng.integers(3) else TIFF_LAYOUTS))
    compression = one_of(rng, *write.TIFF_COMPRESSION)
    planar = one_of(rng, 1, 1, 2)
    settings = {
        "order": one_of(rng, "<", ">"),
        "big": rng.integers(8) == 0,
        "planar": planar,
        "compression": compression,
        "predictor": 1 if compression in (1, 32773) or set(bits) - {8, 16} else one_of(rng, 1, 2),
        "fill": one_of(rng, 1, 1, 1, 2),
        "tile": one_of(rng, None, None, (16, 32)),
        "rows": one_of(rng, None, 5),
    }
    samples = rough(rng, bits)
    if extra[:1] == (1,):  # no colour is brighter than its alpha
        samples[..., :3] = np.minimum(samples[..., :3], samples[..., [-len(extra)]])
    tags: dict[int, tuple[int, list[int]]] = {338: (3, list(extra))} if extra else {}
    shown = tiff_shown(samples, bits, photometric, extra)
    if photometric == 3:
        top = one_of(rng, 65536, 65536, 256)
        colours = rng.integers(0, top, (3, 1 << bits[0]))
        tags[320] = (3, colours.ravel().tolist())
        picked = colours[:, samples[..., 0]].transpose(1, 2, 0)
        shown = (picked >> 8 if colours.max() > 255 else picked).astype(np.uint8)
    turned = int(one_of(rng, 1, 1, 1, *range(2, 9)))
    if turned != 1:
        tags[274] = (3, [turned])
        shown = None if shown is None else upright(shown, turned)
    data = write.tiff(samples, bits, photometric, tags=tags, **settings)
    where = ", ".join(f"{name} {value}" for name, value in settings.items() if value)
    return Odd(data, f"bits {bits}, photometric {photometric}, extra {extra}, {where}, turned {turned}", shown)


def tiff_shown(
    samples: np.ndarray, bits: tuple[int, ...], photometric: int, extra: tuple[int, ...]
) -> np.ndarray | None:
    channels = {0: 1, 1: 1, 2: 3, 5: 4}.get(photometric, 99)
    if len(bits) - len(extra) != channels and (bits, photometric) not in [((b,) * 4, 2) for b in (8, 12, 16)]:
        return None
    levels = np.stack([eight(samples[..., i], b) for i, b in enumerate(bits)], axis=2)
    if photometric == 5:
        return of_inks(levels[..., :4])
    rgb = levels[..., :3] if photometric == 2 else three(levels)
    if extra[:1] == (1,):
        alpha = levels[..., [channels]].astype(int)
        rgb = np.where(alpha > 0, np.clip(rgb.astype(int) * 255 // np.maximum(alpha, 1), 0, 255), rgb).astype(np.uint8)
    return 255 - rgb if photometric == 0 else rgb


def upright(shown: np.ndarray, turned: int) -> np.ndarray:
    """As the orientation says."""
    return {
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.transpose(1, 0, 2),
        6: np.rot90(shown, -1),
        7: shown[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(shown),
    }[turned]


def tiff_jpeg(rng: np.random.Generator) -> Odd:
    """Compressed as whole formats or as fax, by tifffile and libtiff, or with chroma of its own size, by hand."""
    kind = one_of(
        rng, "ycbcr", "rgb", "grey", "raw ycbcr", "cmyk", "webp", "jpeg2000", "tiff_ccitt", "group3", "group4"
    )
    channels = {"grey": 1, "cmyk": 4}.get(kind, 3)
    picture = smooth(rng, channels, (int(rng.integers(16, 60)), int(rng.integers(16, 60))))
    tile = one_of(rng, {}, {"tile": (16, 32)})
    stream = io.BytesIO()
    if kind in ("tiff_ccitt", "group3", "group4"):
        bits = rng.integers(0, 2, picture.shape[:2]).astype(bool)
        Image.fromarray(bits).save(stream, "TIFF", compression=kind)
        return Odd(stream.getvalue(), kind, three(bits[..., None] * np.uint8(255)))
    if kind == "raw ycbcr":
        across, down = one_of(rng, (1, 1), (2, 1), (2, 2))
        limits = one_of(rng, (0, 255, 128, 255, 128, 255), (16, 235, 128, 240, 128, 240))
        picture = picture[: len(picture) // 2 * 2, : picture.shape[1] // 2 * 2]
        chroma = picture[::down, ::across, 1:]
        luma = picture[..., 0].reshape(len(picture) // down, down, -1, across).transpose(0, 2, 1, 3)
        units = np.concatenate([luma.reshape(*chroma.shape[:2], -1), chroma], axis=2)
        tags = {256: (4, [picture.shape[1]]), 257: (4, [len(picture)]), 258: (3, [8] * 3), 259: (3, [1])}
        tags |= {262: (3, [6]), 277: (3, [3]), 278: (4, [len(picture)]), 530: (3, [across, down])}
        tags[532] = (5, [n for limit in limits for n in (limit, 1)])
        whole = np.concatenate([picture[..., :1], chroma.repeat(down, 0).repeat(across, 1)], axis=2).astype(float)
        if limits[0]:
            whole = np.stack(
                [(whole[..., 0] - 16) * 255 / 219, *((whole[..., i] - 128) * 127 / 112 + 128 for i in (1, 2))], 2
            )
        return Odd(write.tiff_of([units.tobytes()], tags), f"raw YCbCr {across}x{down} {limits}", of_ycc(whole), 1.0)
    settings: dict[str, object] = {"compression": "jpeg", "photometric": "rgb", "compressionargs": {"level": 90}}
    if kind == "ycbcr":
        sampling = one_of(rng, (1, 1), (2, 1), (2, 2))
        settings |= {"photometric": "ycbcr", "subsampling": sampling, "compressionargs": {"level": 95}}
    elif kind == "grey":
        settings |= {"photometric": "minisblack"}
    elif kind == "cmyk":
        settings |= {"photometric": "separated"}
    elif kind == "webp":
        settings |= {"compression": "webp"}
    elif kind == "jpeg2000":
        settings |= {"compression": "jpeg2000"}
    tifffile.imwrite(stream, picture if channels > 1 else picture[..., 0], metadata=None, **settings, **tile)
    seen = np.atleast_3d(tifffile.imread(io.BytesIO(stream.getvalue())))
    shown = of_inks(seen) if channels == 4 else three(seen) if channels == 1 else seen
    return Odd(stream.getvalue(), f"compressed as {kind} {settings} {tile}", shown, LOSSY)


def tiff_numbers(rng: np.random.Generator) -> Odd:
    """Samples that are signed, floats or complex, and tags that are missing or odd."""
    kind = one_of(
        rng, "i1", "i2", "i4", "f2", "f4", "f8", "c8", "u8", "no photometric", "few bits", "predictor", "format 4"
    )
    picture = smooth(rng, one_of(rng, 1, 3))
    photometric = 1 if picture.shape[2] == 1 else 2
    settings: dict[str, object] = {"order": one_of(rng, "<", ">"), "compression": one_of(rng, 1, 8)}
    bits, shown, tags = [8] * picture.shape[2], None, {}
    if kind[1:].isdigit():
        picture = picture.astype(kind)
        bits = [8 * picture.dtype.itemsize] * picture.shape[2]
        tags[339] = (3, [{"u": 1, "i": 2, "f": 3, "c": 6}[kind[0]]] * picture.shape[2])
        if kind[0] != "u":
            picture = -picture if rng.integers(2) else picture
    elif kind == "no photometric":
        photometric = None
    elif kind == "predictor":
        tags[317] = (3, [3])
        settings["compression"] = 8
    elif kind == "format 4":
        tags[339] = (3, [4] * picture.shape[2])
    else:  # one value stands for all
        tags[258] = (3, [8])
        shown = np.ascontiguousarray(three(picture) if picture.shape[2] == 1 else picture)
    if picture.dtype == np.uint8:
        picture = picture.astype(np.int64)
    return Odd(write.tiff(picture, bits, photometric, tags=tags, **settings), f"{kind} {settings} {bits}", shown)


def png(rng: np.random.Generator) -> Odd:
    colour, bits = one_of(
        rng, *[(c, b) for c in (0, 3) for b in (1, 2, 4, 8)], (0, 16), *[(c, b) for c in (2, 4, 6) for b in (8, 16)]
    )
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    samples = rough(rng, (bits,) * channels)
    before = [
        one_of(rng, (b"gAMA", struct.pack("!I", int(one_of(rng, 45455, 100000)))), (b"sRGB", b"\0"), (b"tEXt", b"a\0b"))
    ]
    levels = eight(samples, bits)
    shown = levels[..., :3] if colour in (2, 6) else three(levels)
    if colour == 3:
        table = rng.integers(0, 256, (1 << bits, 3), dtype=np.uint8)
        before.append((b"PLTE", table.tobytes()))
        shown = table[samples[..., 0]]
    if rng.integers(3) == 0 and colour in (0, 2, 3):
        transparent = (
            samples[0, 0].astype(">u2").tobytes() if colour != 3 else bytes(rng.integers(0, 256, 2, dtype=np.uint8))
        )
        before.append((b"tRNS", transparent))
    filters = tuple(rng.integers(0, 5, 3).tolist())
    interlaced = bool(rng.integers(2))
    data = write.png(samples, bits, colour, interlaced=interlaced, filters=filters, before=before)
    return Odd(data, f"colour {colour}, {bits} bits, interlaced {interlaced}, {[name for name, _ in before]}", shown)


def netpbm(rng: np.random.Generator) -> Odd:
    kind = int(rng.integers(1, 9))
    comment = one_of(rng, b"", b"# made by hand\n")
    if kind >= 7:  # PFM and PAM
        picture = smooth(rng, 3)
        size = picture.shape[1], picture.shape[0]
        if kind == 7:
            head = b"P7\nWIDTH %d\nHEIGHT %d\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n" % size
            return Odd(head + picture.tobytes(), "PAM", picture)
        name, part = one_of(rng, (b"Pf", picture[..., :1]), (b"PF", picture))
        return Odd(
            b"%s\n%d %d\n-1.0\n" % (name, *size) + (part[::-1] / 255).astype("<f4").tobytes(), name.decode(), None
        )
    maxval = (
        1 if kind in (1, 4) else int(one_of(rng, 1, 3, 15, 100, 254, 255, 255, 256, 1000, 1023, 4095, 65534, 65535))
    )
    samples = rng.integers(
        0, maxval + 1, (int(rng.integers(1, 30)), int(rng.integers(1, 30)), 3 if kind in (3, 6) else 1)
    )
    data = write.netpbm(samples, maxval, kind, comment)
    what = f"P{kind} of {maxval}, {samples.shape}"
    if kind in (1, 4):
        return Odd(data, what, three(255 - 255 * samples).astype(np.uint8))
    if maxval > 255 and kind in (2, 5):
        levels = np.round(samples / maxval * 65535).astype(int) >> 8
    else:
        levels = np.round(samples / maxval * 255)
    return Odd(data, what, (three(levels) if samples.shape[2] == 1 else levels).astype(np.uint8))


BMP_MASKS = [
    (16, (0xF800, 0x7E0, 0x1F)),
    (16, (0x7C00, 0x3E0, 0x1F)),
    (16, (0xF00, 0xF0, 0xF)),
    (32, (0xFF0000, 0xFF00, 0xFF)),
    (32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)),
    (32, (0xFF, 0xFF00, 0xFF0000, 0xFF000000)),
    (32, (0xFF000000, 0xFF0000, 0xFF00, 0xFF)),
    (32, (0xFF, 0xFF00, 0xFF0000)),
    (32, (0x3FF00000, 0xFFC00, 0x3FF)),
]


def bmp(rng: np.random.Generator) -> Odd:
    height, width = int(rng.integers(1, 30)), int(rng.integers(1, 30))
    head, down = int(one_of(rng, 12, 40, 40, 52, 56, 108, 124)), bool(rng.integers(3) == 0)
    kind = one_of(rng, "palette", "palette", "runs", "masks", "masks", "24", "32", "16")
    if kind in ("palette", "runs"):
        bits = one_of(rng, 1, 2, 4, 8) if kind == "palette" else one_of(rng, 4, 8)
        count = one_of(rng, 2, 1 << bits, 1 << bits) if head != 12 else 1 << bits
        grey = np.arange(count)[:, None].repeat(3, 1) * one_of(rng, 1, 255 // (count - 1))
        table = one_of(rng, rng.integers(0, 256, (count, 3)), grey).astype(np.uint8)
        indices = rng.integers(0, count, (height, width))
        rows = [write.packed(row[None], [bits]) for row in indices]
        what = f"{kind} of {count}, {bits} bits, head {head}, down {down}"
        if kind == "palette":
            data = write.bmp(rows, width, bits, head=head, palette=table, down=down and head != 12)
        else:
            runs = write.run_lengths(indices, bits, rng)
            data = write.bmp(rows, width, bits, head=40, palette=table, compression=1 if bits == 8 else 2, whole=runs)
        return Odd(data, what, table[indices])
    if kind == "masks":
        bits, masks = one_of(rng, *BMP_MASKS)
        head = max(head, 40 if len(masks) == 3 else 56)
    else:
        bits = int(kind)
        masks = (0x7C00, 0x3E0, 0x1F) if bits == 16 else (0xFF0000, 0xFF00, 0xFF)
    widths = [mask.bit_count() for mask in masks]
    samples = np.stack([rng.integers(0, 1 << w, (height, width)) for w in widths], axis=2)
    words = sum(samples[..., i] << (m & -m).bit_length() - 1 for i, m in enumerate(masks))
    if kind == "32":
        words = words | rng.integers(0, 256, (height, width)) << 24
    rows = [row.astype("<u4").view(np.uint8).reshape(width, 4)[:, : bits // 8].tobytes() for row in words]
    settings = {"masks": masks, "compression": 3} if kind == "masks" else {}
    data = write.bmp(rows, width, bits, head=head, down=down and head != 12, **settings)
    shown = np.stack([eight(samples[..., i], widths[i]) for i in range(3)], axis=2)
    return Odd(data, f"{bits} bits, masks {masks}, head {head}, down {down}", shown)


def gif(rng: np.random.Generator) -> Odd:
    bits = int(rng.integers(1, 9))
    samples = rng.integers(0, 1 << bits, (int(rng.integers(2, 40)), int(rng.integers(2, 40))))
    shared, own = (rng.integers(0, 256, (1 << bits, 3), dtype=np.uint8) for _ in range(2))
    if rng.integers(4) == 0:
        shared = np.arange(1 << bits, dtype=np.uint8)[:, None].repeat(3, 1)
    which = int(rng.integers(3))
    settings = {
        "shared": None if which == 1 else shared,
        "own": own if which else None,
        "interlaced": bool(rng.integers(2)),
        "transparent": one_of(rng, None, int(samples[0, 0])),
        "more": one_of(rng, (), (samples[::-1],)),
        "room": one_of(rng, *[(0, 0, 0, 0)] * 5, (1, 2, 3, 0), (0, 1, -1, 0)),
        "background": int(one_of(rng, 0, (1 << bits) - 1)),
    }
    table = own if which else shared
    shown = table[samples]
    if max(settings["room"]) and min(settings["room"]) == 0:
        left, above, right, below = settings["room"]
        around = settings["background"] if settings["transparent"] is None else settings["transparent"]
        framed = np.full((len(shown) + above + below, shown.shape[1] + left + right, 3), table[around])
        framed[above : above + len(shown), left : left + shown.shape[1]] = shown
        shown = framed if which == 0 or settings["transparent"] is not None else None
    data = write.gif(samples, bits, **settings)
    what = f"{bits} bits, tables {which}, room {settings['room']}, background {settings['background']}"
    return Odd(data, what, None if min(settings["room"]) < 0 else shown)


def jpeg(rng: np.random.Generator) -> Odd:
    kind = one_of(rng, "ycc", "ycc", "ycc", "grey", "rgb", "cmyk", "ycck", "pillow", "ffmpeg", "12 bits", "lossless")
    size = (
        (int(rng.integers(80, 110)), int(rng.integers(80, 110))) if kind == "ycc" else None
    )  # however chroma is spread
    picture = smooth(rng, {"grey": 1, "cmyk": 4, "ycck": 4}.get(kind, 3), size)
    level = int(rng.integers(60, 98))
    encode = imagecodecs.jpeg8_encode
    if kind == "ycc":
        sampling = one_of(rng, "444", "422", "420", "440", "411", "410")
        try:
            data = encode(picture, level, subsampling=sampling, optimize=bool(rng.integers(2)))
        except (ValueError, imagecodecs.Jpeg8Error):
            data = encode(picture, level)
        return Odd(data, f"4:{sampling[1]}:{sampling[2]}", by_ffmpeg(data), LOSSY)
    if kind == "pillow":
        stream = io.BytesIO()
        settings = {
            "progressive": bool(rng.integers(2)),
            "subsampling": int(rng.integers(3)),
            "restart_marker_rows": int(rng.integers(3)),
        }
        Image.fromarray(picture).save(stream, "JPEG", quality=level, **settings)
        return Odd(stream.getvalue(), f"{settings}", by_ffmpeg(stream.getvalue()), LOSSY)
    if kind == "ffmpeg":
        data = ffmpeg_encoded(picture, "mjpeg", one_of(rng, "yuvj420p", "yuvj422p", "yuvj444p"))
        return Odd(data, "by FFmpeg", by_ffmpeg(data), LOSSY)
    if kind in ("cmyk", "ycck"):
        data = encode(picture, level, colorspace="CMYK", outcolorspace=kind.upper())
        inks = imagecodecs.jpeg8_decode(data, outcolorspace="CMYK")
        if kind == "cmyk" and rng.integers(2):  # browsers take it as Adobe's also without the marker
            data = write.without(data, 0xEE)
        return Odd(data, kind, of_inks(255 - inks), 1.0)
    if kind == "grey":
        data = encode(picture[..., 0], level)
    elif kind == "rgb":
        data = encode(picture, level, colorspace="RGB", outcolorspace="RGB")
        shown = imagecodecs.jpeg8_decode(data, colorspace="RGB", outcolorspace="RGB")
        if rng.integers(2):  # the components' names say it too
            data = write.without(data, 0xEE)
        return Odd(data, kind, shown, LOSSY)
    elif kind == "12 bits":
        return Odd(encode(picture.astype(np.uint16) << 4, level, bitspersample=12), kind, None)
    else:
        return Odd(
            imagecodecs.ljpeg_encode(picture[..., 0].astype(one_of(rng, np.uint8, np.uint16))), kind, three(picture)
        )
    return Odd(data, kind, by_ffmpeg(data), LOSSY)


def ffmpeg_encoded(picture: np.ndarray, codec: str, form: str, **options: str) -> bytes:
    made = av.CodecContext.create(codec, "w")
    made.width, made.height, made.pix_fmt = picture.shape[1], picture.shape[0], form
    made.time_base = Fraction(1)
    made.options, made.thread_count = options, 1  # slices of several threads begin with the wrong restart marker
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(format=form)
    return b"".join(bytes(packet) for packet in [*made.encode(frame), *made.encode(None)])


def mpo(rng: np.random.Generator) -> Odd:
    pictures = [Image.fromarray(smooth(rng, 3, (40, 30))) for _ in range(2)]
    stream = io.BytesIO()
    pictures[0].save(stream, "MPO", save_all=True, append_images=pictures[1:])
    data = stream.getvalue()
    return Odd(data, "two pictures", by_ffmpeg(data[: data.index(b"\xff\xd9\xff\xd8") + 2]), LOSSY)


def jpeg2000(rng: np.random.Generator) -> Odd:
    kinds = ["plain"] * 4 + ["deep"] * 2 + ["few", "signed", "palette", "sub-sampled", "cmyk", "ycc", "order"]
    kind = one_of(rng, *kinds)
    form = one_of(rng, "J2K", "JP2")
    encode = imagecodecs.jpeg2k_encode
    channels = one_of(rng, 1, 2, 3, 4)
    if kind == "sub-sampled":
        picture = smooth(rng, 3)
        data = ffmpeg_encoded(picture, "jpeg2000", one_of(rng, "yuv420p", "yuv422p", "yuv444p"), format=form.lower())
        return Odd(data, f"{kind} {form}", by_ffmpeg(data, full=True), LOSSY)
    if kind == "palette":
        bits, columns = one_of(rng, 4, 8), one_of(rng, (0, 1, 2), (0, 1, 2), (2, 1, 0))
        indices, table = rough(rng, (8,))[..., 0] % (1 << bits), rng.integers(0, 256, (1 << bits, 3), dtype=np.uint8)
        more = write.box(b"pclr", struct.pack("!HB3B", len(table), 3, 7, 7, 7) + table.tobytes())
        more += write.box(b"cmap", b"".join(struct.pack("!HBB", 0, 1, column) for column in columns))
        stream = encode(indices.astype(np.uint8), 0, codecformat="J2K", bitspersample=bits)
        shown = table[indices][..., list(columns)]
        return Odd(write.jp2(stream, indices.shape, 1, bits, 16, more), f"{kind} {bits} {columns}", shown)
    if kind == "order":
        samples, order = rough(rng, (8,) * 3).astype(np.uint8), one_of(rng, (0, 1, 2), (2, 1, 0))
        more = write.box(b"cdef", struct.pack("!H9H", 3, *(n for i, c in enumerate(order) for n in (i, 0, c + 1))))
        stream = encode(samples, 0, codecformat="J2K", mct=False)
        return Odd(write.jp2(stream, samples.shape[:2], 3, 8, 16, more), f"{kind} {order}", samples[..., list(order)])
    if kind in ("cmyk", "ycc"):
        samples = rough(rng, (8,) * (4 if kind == "cmyk" else 3)).astype(np.uint8)
        stream = encode(samples, 0, codecformat="J2K", mct=False)
        data = write.jp2(stream, samples.shape[:2], samples.shape[2], 8, 12 if kind == "cmyk" else 18)
        return Odd(data, kind, of_inks(samples) if kind == "cmyk" else of_ycc(samples), 1.0)
    bits = {"plain": 8, "signed": 8}.get(kind) or (
        one_of(rng, 9, 10, 12, 14, 16) if kind == "deep" else one_of(rng, 1, 2, 4, 5, 7)
    )
    samples = rough(rng, (bits,) * channels)
    levels = eight(samples, bits)
    shown = three(levels) if channels < 3 else levels[..., :3]
    stored = samples.astype(np.uint8 if bits <= 8 else np.uint16)
    if kind == "signed":
        stored = (samples - 128).astype(np.int8)
    stored = stored[..., 0] if channels == 1 else stored
    data = encode(stored, 0, codecformat=form, bitspersample=bits, reversible=True)
    return Odd(data, f"{kind} {form} {channels} of {bits} bits", shown)


def webp(rng: np.random.Generator) -> Odd:
    picture = smooth(rng, one_of(rng, 3, 4))
    if rng.integers(2):
        picture = rough(rng, (8,) * picture.shape[2]).astype(np.uint8)
        picture[0, 0] = 9
        data = imagecodecs.webp_encode(picture, lossless=True)
        seen = picture[..., :3] if picture.shape[2] == 3 else by_ffmpeg(data)
        return Odd(data, f"lossless of {picture.shape[2]}", seen)
    picture = picture[..., :3]
    stream = io.BytesIO()
    more = {"save_all": True, "append_images": [Image.fromarray(picture[::-1].copy())]} if rng.integers(4) == 0 else {}
    Image.fromarray(picture).save(stream, "WEBP", quality=95 if more else int(rng.integers(60, 99)), **more)
    if more:
        return Odd(stream.getvalue(), "animated", picture, LOSSY)
    return Odd(stream.getvalue(), "lossy", by_ffmpeg(stream.getvalue()), LOSSY)


def avif(rng: np.random.Generator) -> Odd:
    bits = int(one_of(rng, 8, 8, 10, 12))
    kind = one_of(rng, "444", "422", "420", "400", "alpha", "grid", "grid", *["turned"] * (".avif" in KNOWN))
    picture = smooth(rng, {"400": 1, "alpha": 4}.get(kind, 3), (64, 64) if kind == "grid" else None)
    if kind == "turned":
        exif, stream, turned = Image.Exif(), io.BytesIO(), int(rng.integers(2, 9))
        exif[0x0112] = turned
        Image.fromarray(picture).save(stream, "AVIF", quality=90, speed=10, exif=exif.tobytes())
        return Odd(stream.getvalue(), f"turned {turned}", upright(by_ffmpeg(stream.getvalue()), turned), LOSSY)

    def encoded(part: np.ndarray) -> bytes:
        deep = part.astype(np.uint16) << bits - 8 if bits > 8 else part
        settings = {"speed": 10, "bitspersample": bits, "pixelformat": kind if kind.isdigit() else "420"}
        return imagecodecs.avif_encode(deep[..., 0] if part.shape[2] == 1 else deep, level, **settings)

    level = int(rng.integers(80, 101))
    if kind == "grid":
        tiles = [encoded(np.roll(picture, 20 * number, axis=1)) for number in range(2 * one_of(rng, 1, 2))]
        rows, columns = one_of(rng, (1, 2), (2, 1)) if len(tiles) == 2 else (2, 2)
        size = 64 * rows - 10, 64 * columns - 6
        seen = [by_ffmpeg(tile) for tile in tiles]
        lines = [np.concatenate(seen[row * columns : (row + 1) * columns], axis=1) for row in range(rows)]
        shown = np.concatenate(lines)[: size[0], : size[1]]
        return Odd(
            write.avif_grid(tiles, rows, columns, 64, size), f"grid {rows}x{columns} of {bits} bits", shown, LOSSY
        )
    data = encoded(picture)
    return Odd(data, f"{kind} of {bits} bits", by_ffmpeg(data), LOSSY)


def ico(rng: np.random.Generator) -> Odd:
    side = int(one_of(rng, 8, 16, 32))
    pictures = []
    for size in [side, side // 2] if rng.integers(2) else [side]:
        bits = int(one_of(rng, 1, 4, 8, 24, 32))
        table = rng.integers(0, 256, (1 << bits, 3), dtype=np.uint8) if bits <= 8 else None
        pixels = rng.integers(0, 256, (size, size, bits // 8 if bits > 8 else 1), dtype=np.uint8)
        if table is not None:
            pixels &= (1 << bits) - 1
            rows = [write.packed(row.reshape(1, -1), [bits]) for row in pixels]
            seen = table[pixels[..., 0]]
        else:
            rows = [row.tobytes() for row in pixels]
            seen = pixels[..., 2::-1]
        if rng.integers(3) == 0:
            seen = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            pictures.append((size, size, 24, write.png(seen.astype(int), 8, 2), seen))
            continue
        plain = write.bmp(rows, size, bits, palette=table)[14:]
        mask = (size + 31) // 32 * 4 * size
        plain = (
            plain[:8] + struct.pack("<i", 2 * size) + plain[12:] + rng.integers(0, 256, mask, dtype=np.uint8).tobytes()
        )
        pictures.append((size, size, bits, plain, seen))
    return Odd(
        write.icon([picture[:4] for picture in pictures]), f"{[picture[:3] for picture in pictures]}", pictures[0][4]
    )


MAKERS: dict[str, Callable[[np.random.Generator], Odd]] = {
    "TIFF": tiff,
    "PNG": png,
    "PPM": netpbm,
    "BMP": bmp,
    "GIF": gif,
    "JPEG": jpeg,
    "JPEG2000": jpeg2000,
    "WEBP": webp,
    "AVIF": avif,
    "ICO": ico,
    "MPO": mpo,
}
SHARES = {
    "TIFF": 8,
    "PNG": 2,
    "PPM": 2,
    "BMP": 3,
    "GIF": 1,
    "JPEG": 3,
    "JPEG2000": 3,
    "WEBP": 1,
    "AVIF": 1,
    "ICO": 1,
    "MPO": 1,
}
TURNS = [name for name, share in SHARES.items() for _ in range(share)]


def made(seed: int, name: str) -> Odd:
    """The picture of this seed and format."""
    return MAKERS[name](np.random.default_rng([seed, *name.encode()]))


def verdict(odd: Odd) -> str:
    """`equal`, `failed: ` and its reason, or how it differs."""
    try:
        seen = np.asarray(decode(Path("odd"), odd.data, DecodeOptions())).astype(int)
    except PictureUnreadable as failure:
        return "failed: " + str(failure).partition("picture: ")[2]
    if odd.shown is None:
        return "seen, and nobody says how it is to be seen"
    if seen.shape != odd.shown.shape:
        return f"differs: its shape is {seen.shape}, not {odd.shown.shape}"
    away = np.abs(seen - odd.shown)
    wrong = away.mean() > odd.near if odd.near else away.max() > 0
    return f"differs: by {away.mean():.2f} on average, {away.max()} at most" if wrong else "equal"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=MAKERS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: Counter[tuple[str, str]] = Counter()
    wrong = 0
    for number in range(options.count):
        name = options.only or TURNS[number % len(TURNS)]
        odd = made(options.seed + number, name)
        found = verdict(odd)
        counts[name, re.sub(r"[\d.]+", "N", found)] += 1
        if not found.startswith(("equal", "failed: ")):
            wrong += 1
            print(f"{name} of seed {options.seed + number}, {odd.what}: {found}")
    for (name, found), count in sorted(counts.items()):
        print(f"{name:9} {count:6} {found}")
    print(f"{options.count} pictures, {wrong} seen as they are not")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
