"""What the tags of a TIFF say about its samples: trusted to be shown right, or refused by name."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL.TiffImagePlugin import ImageFileDirectory_v2

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
UNNAMED, PREMULTIPLIED, ALPHA, UNSAID = 0, 1, 2, -1  # ExtraSamples; the last where there are some and no such tag
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
    (RGB, (UNSAID,)): (8, 16),
    (RGB, (PREMULTIPLIED,)): (8,),
    (RGB, (UNNAMED, UNNAMED)): (8,),
    (RGB, (ALPHA, UNNAMED)): (8,),
    (INKS, ()): (8, 16),
    (INKS, (UNNAMED,)): (8,),
    (YCBCR, ()): (8,),
}
PLAIN, JPEG, PACKBITS = 1, 7, 32773  # Compression
FAX = {2, 3, 4}
PREDICTED = {5, 8, 32946, 34925, 50000}  # LZW, deflate twice, LZMA, Zstandard: those to which Predictor applies
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
MOST = 9  # channels, more than any has that is trusted
BIG = 43  # in the place of TIFF's 42
NUMBERS = {1: "whole", 2: "signed", 3: "floating", 5: "complex", 6: "complex"}  # SampleFormat


@dataclass(frozen=True)
class Tiff:
    """What the tags of a TIFF's first picture say about its samples."""

    photometric: int
    bits: tuple[int, ...]
    extra: tuple[int, ...]
    numbers: frozenset[int]
    planes: bool
    compression: int
    predictor: int
    reversed: bool
    part: bool  # of another picture in the file, as a thumbnail or a mask is
    other_inks: bool
    brightest: int  # of the colour map

    @property
    def depth(self) -> int:
        """Bits of every sample; 0 where they differ."""
        return self.bits[0] if len(set(self.bits)) == 1 else 0

    def untrusted(self) -> str | None:
        """What it has that was not seen to be shown right; None for all that was."""
        colours = COLOURS.get(self.photometric, f"PhotometricInterpretation {self.photometric}")
        bits = "/".join(map(str, sorted(set(self.bits)))) + " bits a channel"
        numbers = " and ".join(NUMBERS.get(kind, f"undefined ({kind})") for kind in sorted(self.numbers))
        extra = f" (ExtraSamples {', '.join(map(str, self.extra))})" if {*self.extra} - {UNSAID} else ""
        packing = COMPRESSIONS.get(self.compression, f"compression {self.compression}")
        doubts = {
            "a thumbnail or a mask before the picture itself, as raw camera files have it": self.part,
            f"{numbers} numbers": self.numbers != {1},
            f"{len(self.bits)} channels of {colours}{extra}": not self._channels_trusted(),
            f"{bits} of {colours}{extra}": not self._depth_trusted(),
            "inks that are not CMYK, or less than all at their most": self.photometric == INKS and self.other_inks,
            "a colour map of 8 bits": self.photometric == PALETTE and self.brightest < 256,
            f"{bits} in separate planes, {packing}": self.planes and not self._planes_trusted(),
            f"{colours} and {packing}": not self._compression_trusted(),
            f"predictor {self.predictor} for {bits} and {packing}": not self._predictor_trusted(),
            f"reversed bits in {bits} of {colours}": self.reversed and not self._reversal_trusted(),
        }
        return next((what for what, doubted in doubts.items() if doubted), None)

    def _channels_trusted(self) -> bool:
        known = (self.photometric, self.extra) in TRUSTED_BITS
        return known and len(self.bits) == CHANNELS[self.photometric] + len(self.extra)

    def _depth_trusted(self) -> bool:
        return self.depth in TRUSTED_BITS.get((self.photometric, self.extra), ())

    def _planes_trusted(self) -> bool:
        if len(self.bits) == 1:
            return self.compression != PLAIN or (self.photometric in (GREY, PALETTE) and self.depth == 8)
        known = (self.photometric, self.extra) in [(RGB, ()), (RGB, (ALPHA,)), (INKS, ())]
        return known and (self.compression != PLAIN or self.depth == 8)

    def _compression_trusted(self) -> bool:
        if self.compression in FAX:
            return self.depth == 1 and self.photometric in (WHITE_IS_ZERO, GREY)
        if self.compression == JPEG:
            return self.photometric in (GREY, RGB, INKS, YCBCR) and not (self.depth > 8 or self.extra or self.planes)
        return self.compression in {PLAIN, PACKBITS, *PREDICTED} and self.photometric != YCBCR

    def _predictor_trusted(self) -> bool:
        predicts = self.compression in PREDICTED and self.depth in (8, 16)
        return self.predictor == 1 or (self.predictor == 2 and predicts)

    def _reversal_trusted(self) -> bool:
        if self.extra or self.planes or self.depth > 8:
            return False
        listed = self.photometric in (GREY, RGB) or (self.photometric == WHITE_IS_ZERO and self.depth < 8)
        return listed or (self.photometric in (WHITE_IS_ZERO, PALETTE) and self.compression != PLAIN)


def untrusted_format(data: bytes) -> str | None:
    """What the file is, where its first picture is not trusted to be shown right."""
    tags = ImageFileDirectory_v2(data[: 16 if data[2] == BIG else 8])
    stream = io.BytesIO(data)
    stream.seek(tags.next)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", r"(Possibly c|C)orrupt EXIF|Truncated File")  # tags that the file ends before
        tags.load(stream)
    if 50706 in tags:
        return "a raw camera file (DNG)"
    if 262 not in tags:
        return "a TIFF without PhotometricInterpretation"
    if _lacks_parts(tags):
        return "a TIFF of which parts are missing"
    bits, samples = tuple(tags.get(258, (1,))), int(tags.get(277, 1))
    if len(bits) not in (1, samples) or samples > MOST:
        return f"a TIFF with {samples} channels, and bits of {len(bits)}"
    found = Tiff(
        photometric=int(tags[262]),
        bits=bits * samples if len(bits) == 1 else bits,
        extra=tuple(tags.get(338, (UNSAID,) * (tags[262] == RGB and samples == 4))),
        numbers=frozenset(tags.get(339, (1,))),
        planes=tags.get(284, 1) != 1,
        compression=int(tags.get(259, PLAIN)),
        predictor=int(tags.get(317, 1)),
        reversed=tags.get(266, 1) != 1,
        part=int(tags.get(254, 0)) not in (0, 2) or tags.get(255, 1) == 2,
        other_inks=tags.get(332, 1) != 1 or tuple(tags.get(336, (0,)))[:1] != (0,),
        brightest=max(tags.get(320, (0,))),
    )
    what = found.untrusted()
    return f"a TIFF with {what}" if what else None


def _lacks_parts(tags: ImageFileDirectory_v2) -> bool:
    """Whether strips or tiles are left out: what is shown in their place is black, or the file's own header."""
    width, height = int(tags[256]), int(tags[257])
    if 324 in tags:
        places, sizes, tall, across = tags[324], tags.get(325, ()), int(tags[323]), -(-width // int(tags[322]))
    else:
        places, sizes, tall, across = tags[273], tags.get(279, ()), int(tags.get(278, height)), 1
    planes = int(tags.get(277, 1)) if tags.get(284, 1) == 2 else 1
    few = len(places) < -(-height // tall) * across * planes
    return few or not all(places) or not all(sizes) or (324 in tags and 273 in tags)
