"""TIFF pixel formats that are known to be decoded right, by a file's tags. All others are refused.

The names of the tags and their values are those of the TIFF 6.0 specification.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from enum import IntEnum

from PIL.TiffImagePlugin import ImageFileDirectory_v2


class Tag(IntEnum):
    """The tags that are read."""

    NEW_SUBFILE_TYPE = 254
    SUBFILE_TYPE = 255
    IMAGE_WIDTH = 256
    IMAGE_LENGTH = 257
    BITS_PER_SAMPLE = 258
    COMPRESSION = 259
    PHOTOMETRIC_INTERPRETATION = 262
    FILL_ORDER = 266
    STRIP_OFFSETS = 273
    SAMPLES_PER_PIXEL = 277
    ROWS_PER_STRIP = 278
    STRIP_BYTE_COUNTS = 279
    PLANAR_CONFIGURATION = 284
    PREDICTOR = 317
    COLOR_MAP = 320
    TILE_WIDTH = 322
    TILE_LENGTH = 323
    TILE_OFFSETS = 324
    TILE_BYTE_COUNTS = 325
    INK_SET = 332
    DOT_RANGE = 336
    EXTRA_SAMPLES = 338
    SAMPLE_FORMAT = 339
    DNG_VERSION = 50706


WHITE_IS_ZERO, GREY, RGB, PALETTE, INKS, YCBCR = 0, 1, 2, 3, 5, 6  # PhotometricInterpretation
CHANNELS = {WHITE_IS_ZERO: 1, GREY: 1, RGB: 3, PALETTE: 1, INKS: 4, YCBCR: 3}
COLOURS = {
    WHITE_IS_ZERO: "grey with zero as white",
    GREY: "grey",
    RGB: "RGB",
    PALETTE: "palette",
    4: "mask",
    INKS: "CMYK",
    YCBCR: "YCbCr",
    8: "CIELab",
}
UNNAMED, PREMULTIPLIED, ALPHA, NO_TAG = 0, 1, 2, -1  # ExtraSamples; NO_TAG for a fourth channel without that tag
# Bits a channel, by PhotometricInterpretation and ExtraSamples.
TRUSTED_BITS: dict[tuple[int, tuple[int, ...]], tuple[int, ...]] = {
    (WHITE_IS_ZERO, ()): (1, 2, 4, 8),
    (GREY, ()): (1, 2, 4, 8, 16),
    (GREY, (UNNAMED,)): (8,),
    (GREY, (ALPHA,)): (8,),
    (PALETTE, ()): (1, 2, 4, 8),
    (PALETTE, (UNNAMED,)): (8,),
    (PALETTE, (ALPHA,)): (8,),
    (RGB, ()): (8, 16),
    (RGB, (UNNAMED,)): (8, 16),
    (RGB, (ALPHA,)): (8, 16),
    (RGB, (NO_TAG,)): (8, 16),
    (RGB, (PREMULTIPLIED,)): (8,),
    (RGB, (UNNAMED, UNNAMED)): (8,),
    (RGB, (ALPHA, UNNAMED)): (8,),
    (INKS, ()): (8, 16),
    (INKS, (UNNAMED,)): (8,),
    (YCBCR, ()): (8,),
}
PLAIN, JPEG, PACKBITS = 1, 7, 32773  # Compression
FAX = {2, 3, 4}
PREDICTABLE = {5, 8, 32946, 34925, 50000}  # LZW, deflate (two numbers), LZMA, Zstandard: Predictor applies to these
COMPRESSIONS = {
    PLAIN: "not compressed",
    **dict.fromkeys(FAX, "CCITT"),
    5: "LZW",
    6: "old JPEG",
    JPEG: "JPEG",
    **dict.fromkeys((8, 32946), "deflate"),
    PACKBITS: "PackBits",
    34925: "LZMA",
    50000: "Zstandard",
    34712: "JPEG 2000",
    34887: "LERC",
    50001: "WebP",
    50002: "JPEG XL",
}
MAX_CHANNELS = 9  # more than any trusted format has
BIG_TIFF = 43  # where a TIFF has 42
SAMPLE_FORMATS = {1: "whole", 2: "signed", 3: "floating", 5: "complex", 6: "complex"}


@dataclass(frozen=True)
class PixelFormat:
    """The pixel format of a TIFF's first image, as its tags say."""

    photometric: int
    bits: tuple[int, ...]
    extra_samples: tuple[int, ...]
    sample_formats: frozenset[int]
    planar: bool
    compression: int
    predictor: int
    reversed_bits: bool
    secondary: bool  # a thumbnail or a mask of another image in the file
    other_inks: bool
    color_map_maximum: int

    @property
    def depth(self) -> int:
        """Bits of every sample; 0 if they differ."""
        return self.bits[0] if len(set(self.bits)) == 1 else 0

    def find_untrusted(self) -> str | None:
        """The first property that is not known to be decoded right; None if all are."""
        colours = COLOURS.get(self.photometric, f"PhotometricInterpretation {self.photometric}")
        bits = "/".join(map(str, sorted(set(self.bits)))) + " bits a channel"
        numbers = " and ".join(SAMPLE_FORMATS.get(kind, f"undefined ({kind})") for kind in sorted(self.sample_formats))
        named = {*self.extra_samples} - {NO_TAG}
        extra = f" (ExtraSamples {', '.join(map(str, self.extra_samples))})" if named else ""
        packing = COMPRESSIONS.get(self.compression, f"compression {self.compression}")
        untrusted = {
            "a thumbnail or a mask before the picture itself, as raw camera files have it": self.secondary,
            f"{numbers} numbers": self.sample_formats != {1},
            f"{len(self.bits)} channels of {colours}{extra}": not self._channels_trusted(),
            f"{bits} of {colours}{extra}": not self._depth_trusted(),
            "inks that are not CMYK, or less than all at their most": self.photometric == INKS and self.other_inks,
            "a colour map of 8 bits": self.photometric == PALETTE and self.color_map_maximum < 256,
            f"{bits} in separate planes, {packing}": self.planar and not self._planes_trusted(),
            f"{colours} and {packing}": not self._compression_trusted(),
            f"predictor {self.predictor} for {bits} and {packing}": not self._predictor_trusted(),
            f"reversed bits in {bits} of {colours}": self.reversed_bits and not self._reversal_trusted(),
        }
        return next((what for what, applies in untrusted.items() if applies), None)

    def _channels_trusted(self) -> bool:
        known = (self.photometric, self.extra_samples) in TRUSTED_BITS
        return known and len(self.bits) == CHANNELS[self.photometric] + len(self.extra_samples)

    def _depth_trusted(self) -> bool:
        return self.depth in TRUSTED_BITS.get((self.photometric, self.extra_samples), ())

    def _planes_trusted(self) -> bool:
        if len(self.bits) == 1:
            return self.compression != PLAIN or (self.photometric in (GREY, PALETTE) and self.depth == 8)
        known = (self.photometric, self.extra_samples) in [(RGB, ()), (RGB, (ALPHA,)), (INKS, ())]
        return known and (self.compression != PLAIN or self.depth == 8)

    def _compression_trusted(self) -> bool:
        if self.compression in FAX:
            return self.depth == 1 and self.photometric in (WHITE_IS_ZERO, GREY)
        if self.compression == JPEG:
            return self.photometric in (GREY, RGB, INKS, YCBCR) and not (
                self.depth > 8 or self.extra_samples or self.planar
            )
        return self.compression in {PLAIN, PACKBITS, *PREDICTABLE} and self.photometric != YCBCR

    def _predictor_trusted(self) -> bool:
        predicts = self.compression in PREDICTABLE and self.depth in (8, 16)
        return self.predictor == 1 or (self.predictor == 2 and predicts)

    def _reversal_trusted(self) -> bool:
        if self.extra_samples or self.planar or self.depth > 8:
            return False
        listed = self.photometric in (GREY, RGB) or (self.photometric == WHITE_IS_ZERO and self.depth < 8)
        return listed or (self.photometric in (WHITE_IS_ZERO, PALETTE) and self.compression != PLAIN)


def untrusted_format(data: bytes) -> str | None:
    """What the file is if its first image may be decoded wrong; None if it is trusted.

    Raises:
        Exception: of nearly any kind, for a broken header.
    """
    tags = _read_tags(data)
    if Tag.DNG_VERSION in tags:
        return "a raw camera file (DNG)"
    if Tag.PHOTOMETRIC_INTERPRETATION not in tags:
        return "a TIFF without PhotometricInterpretation"
    if _lacks_parts(tags):
        return "a TIFF of which parts are missing"
    bits, samples = tuple(tags.get(Tag.BITS_PER_SAMPLE, (1,))), int(tags.get(Tag.SAMPLES_PER_PIXEL, 1))
    if len(bits) not in (1, samples) or samples > MAX_CHANNELS:
        return f"a TIFF with {samples} channels, and bits of {len(bits)}"
    untrusted = _pixel_format(tags, bits * samples if len(bits) == 1 else bits).find_untrusted()
    return f"a TIFF with {untrusted}" if untrusted else None


def _read_tags(data: bytes) -> ImageFileDirectory_v2:
    tags = ImageFileDirectory_v2(data[: 16 if data[2] == BIG_TIFF else 8])
    stream = io.BytesIO(data)
    stream.seek(tags.next)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", r"(Possibly c|C)orrupt EXIF|Truncated File")  # tags behind the file's end
        tags.load(stream)
    return tags


def _pixel_format(tags: ImageFileDirectory_v2, bits: tuple[int, ...]) -> PixelFormat:
    photometric = tags[Tag.PHOTOMETRIC_INTERPRETATION]
    no_tag = (NO_TAG,) * (photometric == RGB and len(bits) == 4)
    return PixelFormat(
        photometric=int(photometric),
        bits=bits,
        extra_samples=tuple(tags.get(Tag.EXTRA_SAMPLES, no_tag)),
        sample_formats=frozenset(tags.get(Tag.SAMPLE_FORMAT, (1,))),
        planar=tags.get(Tag.PLANAR_CONFIGURATION, 1) != 1,
        compression=int(tags.get(Tag.COMPRESSION, PLAIN)),
        predictor=int(tags.get(Tag.PREDICTOR, 1)),
        reversed_bits=tags.get(Tag.FILL_ORDER, 1) != 1,
        secondary=int(tags.get(Tag.NEW_SUBFILE_TYPE, 0)) not in (0, 2) or tags.get(Tag.SUBFILE_TYPE, 1) == 2,
        other_inks=tags.get(Tag.INK_SET, 1) != 1 or tuple(tags.get(Tag.DOT_RANGE, (0,)))[:1] != (0,),
        color_map_maximum=max(tags.get(Tag.COLOR_MAP, (0,))),
    )


def _lacks_parts(tags: ImageFileDirectory_v2) -> bool:
    """Whether strips or tiles are missing: decoders show black in their place, or the bytes of the file's header."""
    width, height = int(tags[Tag.IMAGE_WIDTH]), int(tags[Tag.IMAGE_LENGTH])
    if Tag.TILE_OFFSETS in tags:
        offsets, sizes = tags[Tag.TILE_OFFSETS], tags.get(Tag.TILE_BYTE_COUNTS, ())
        rows, across = int(tags[Tag.TILE_LENGTH]), -(-width // int(tags[Tag.TILE_WIDTH]))
    else:
        offsets, sizes = tags[Tag.STRIP_OFFSETS], tags.get(Tag.STRIP_BYTE_COUNTS, ())
        rows, across = int(tags.get(Tag.ROWS_PER_STRIP, height)), 1
    planes = int(tags.get(Tag.SAMPLES_PER_PIXEL, 1)) if tags.get(Tag.PLANAR_CONFIGURATION, 1) == 2 else 1
    too_few = len(offsets) < -(-height // rows) * across * planes
    both = Tag.TILE_OFFSETS in tags and Tag.STRIP_OFFSETS in tags
    return too_few or not all(offsets) or not all(sizes) or both
