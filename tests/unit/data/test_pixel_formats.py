"""The numbers in a picture file are seen as its header says, or its row fails with the reason by name."""

from __future__ import annotations

import base64
import io
import struct
import time
import zlib
from collections import Counter
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from tests.helpers import picture_writers as write
from tests.helpers.odd_pictures import encoded, png
from tests.helpers.picture_check import KNOWN, MAKERS, ffmpeg_encoded, made, smooth, tiff_shown, verdict
from vqa_embeddings.data import decode as decode_module
from vqa_embeddings.data.decode import decode
from vqa_embeddings.data.decode_options import DecodeOptions
from vqa_embeddings.errors import PictureUnreadable

COUNTS = {"TIFF": 300, "BMP": 100, "JPEG": 100, "JPEG2000": 100}  # pictures of a format, else 40
RNG = np.random.default_rng(1)
PICTURE = smooth(RNG, 4, (24, 36)).astype(np.int64)
GREY = PICTURE[..., :1]
RGB = PICTURE[..., :3]
DEEP = PICTURE << 8 | 0x5A


def seen(data: bytes) -> np.ndarray:
    return np.asarray(decode(Path("picture"), data, DecodeOptions()))


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey, 3, axis=2).astype(np.uint8)


@pytest.mark.parametrize("name", MAKERS)
def test_generated_pictures_are_seen_as_they_are_or_fail_with_a_reason(name):
    found = Counter()
    for seed in range(COUNTS.get(name, 40)):
        odd = made(seed, name)
        said = verdict(odd)
        assert said.startswith(("equal", "failed: ")), f"seed {seed}, {odd.what}: {said}"
        found[said.partition(":")[0]] += 1
    assert found["equal"] > found.total() / 4 or (name == "AVIF" and ".avif" not in KNOWN)


@pytest.mark.parametrize("name", ["TIFF", "BMP", "JPEG2000"])
def test_the_check_finds_what_the_decoder_alone_shows_wrong(name, monkeypatch):
    monkeypatch.setattr(decode_module, "untrusted_format", lambda data: None)
    assert any(verdict(made(seed, name)).startswith(("differs", "seen")) for seed in range(300))


TIFFS = {
    "16 bits a channel in separate planes, not compressed": write.tiff(DEEP[..., :3], (16,) * 3, 2, planar=2),
    "12 bits a channel of grey": write.tiff(GREY << 4, (12,), 1),
    "16 bits a channel of grey with zero as white": write.tiff(GREY << 8, (16,), 0),
    "5/6 bits a channel of RGB": write.tiff(RGB >> 3, (5, 6, 5), 2),
    "24 bits a channel of grey": write.tiff(GREY << 16, (24,), 1),
    "signed numbers": write.tiff(GREY - 128, (8,), 1, tags={339: (3, [2])}),
    "floating numbers": write.tiff((GREY / 255).astype("f4"), (32,), 1, tags={339: (3, [3])}),
    "complex numbers": write.tiff(GREY.astype("c8"), (64,), 1, tags={339: (3, [6])}),
    "5 channels of RGB": write.tiff(PICTURE[..., [0, 1, 2, 3, 3]], (8,) * 5, 2),
    "2 bits a channel in separate planes": write.tiff(GREY >> 6, (2,), 0, planar=2),
    "8 bits a channel in separate planes": write.tiff(PICTURE, (8,) * 4, 2, planar=2),
    "3 channels of CIELab": write.tiff(RGB, (8,) * 3, 8),
    "YCbCr and not compressed": write.tiff(RGB, (8,) * 3, 6),
    "reversed bits in 8 bits a channel of RGB": write.tiff(RGB, (8,) * 3, 2, planar=2, fill=2),
    "predictor 3 for 8 bits a channel and deflate": write.tiff(RGB, (8,) * 3, 2, compression=8, tags={317: (3, [3])}),
    "a colour map of 8 bits": write.tiff(GREY, (8,), 3, tags={320: (3, [*range(256)] * 3)}),
    "a thumbnail or a mask before the picture itself": write.tiff(RGB, (8,) * 3, 2, tags={254: (4, [1])}),
    "inks that are not CMYK": write.tiff(PICTURE, (8,) * 4, 5, tags={332: (3, [2])}),
    "signed numbers#in an odd header": b"MM*\0" + write.tiff(GREY - 128, (8,), 1, order=">", tags={339: (3, [2])})[4:],
}


@pytest.mark.parametrize("what", TIFFS)
def test_a_tiff_that_would_be_seen_wrong_is_refused_by_name(what):
    with pytest.raises(
        PictureUnreadable, match=f"it is a TIFF with {what.partition('#')[0]}.*, which is not read; save it as PNG"
    ):
        seen(TIFFS[what])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [1, 5, 8])
def test_common_tiffs_are_seen(order, compression):
    for samples, bits, photometric, more in [
        (GREY, (8,), 1, {}),
        (GREY, (8,), 0, {"fill": 1, "tile": (16, 16)}),
        (DEEP[..., :1], (16,), 1, {"rows": 5}),
        (RGB, (8,) * 3, 2, {"planar": 2}),
        (DEEP[..., :3], (16,) * 3, 2, {"tile": (16, 16)}),
        (PICTURE, (8,) * 4, 2, {"tags": {338: (3, [2])}}),
        (PICTURE, (8,) * 4, 5, {}),
    ]:
        data = write.tiff(samples, bits, photometric, order=order, compression=compression, **more)
        extra = (2,) if "tags" in more else ()
        assert np.array_equal(seen(data), tiff_shown(samples, bits, photometric, extra)), (bits, photometric, more)


@pytest.mark.parametrize("maxval", [1, 100, 255, 256, 1000, 4095, 65535])
@pytest.mark.parametrize("kind", [2, 5])
def test_the_white_of_a_pgm_is_its_maxval(maxval, kind):
    ramp = np.linspace(0, maxval, 40).round().astype(int).reshape(5, 8, 1)
    assert np.abs(seen(write.netpbm(ramp, maxval, kind)) - three(ramp / maxval * 255).astype(int)).max() <= 1
    assert seen(write.netpbm(ramp, maxval, kind)).max() == 255


def jpeg2000(samples: np.ndarray, bits: int) -> bytes:
    stored = samples[..., 0] if samples.shape[2] == 1 else samples
    stored = stored.astype(np.uint16 if bits > 8 else np.uint8)
    return imagecodecs.jpeg2k_encode(stored, 0, codecformat="JP2", bitspersample=bits, reversible=True)


@pytest.mark.parametrize("bits", [2, 7, 9, 12, 16])
def test_a_jpeg_2000_whose_white_would_be_black_is_refused(bits):
    with pytest.raises(PictureUnreadable, match=f"it is a JPEG 2000 picture with 3 channels of {bits} bits"):
        seen(jpeg2000(RGB << 8 >> 16 - bits, bits))


def test_a_jpeg_2000_of_coarser_chroma_is_refused():
    with pytest.raises(PictureUnreadable, match="it is a JPEG 2000 picture whose channels differ in size"):
        seen(ffmpeg_encoded(RGB.astype(np.uint8), "jpeg2000", "yuv420p", format="jp2"))


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_a_grey_jpeg_2000_is_seen_by_its_upper_bits(bits):
    assert np.array_equal(seen(jpeg2000(GREY << bits - 8, bits)), three(GREY))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_bitmap_of_black_and_white_in_more_than_a_bit_is_refused(bits):
    rows = [write.packed(row[None, :, 0] >> 7, [bits]) for row in GREY]
    two = np.array([[0] * 3, [255] * 3], np.uint8)
    with pytest.raises(PictureUnreadable, match=f"it is a bitmap with {bits} bits a pixel for 2 greys"):
        seen(write.bmp(rows, GREY.shape[1], bits, palette=two))
    icon = write.bmp(rows[:8], 8, bits, palette=two)[14:]
    with pytest.raises(PictureUnreadable, match=f"it is a bitmap with {bits} bits a pixel for 2 greys"):
        seen(write.icon([(8, 8, bits, icon)]))


def test_a_bitmap_of_runs_of_4_bits_is_refused():
    """Some versions of the decoder lose pixels."""
    runs = write.run_lengths(GREY[..., 0] >> 4, 4, RNG)
    table = np.arange(48, dtype=np.uint8).reshape(16, 3)
    data = write.bmp([b""] * len(GREY), GREY.shape[1], 4, palette=table, compression=2, whole=runs)
    with pytest.raises(PictureUnreadable, match="it is a bitmap of runs of 4 bits"):
        seen(data)


def test_a_header_that_is_not_understood_is_not_trusted():
    with pytest.raises(PictureUnreadable, match="its header is broken; mend or replace it"):
        seen(b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(400))


# 24x16 pixels, written with arithmetic coding by the IJG's libjpeg 9e, and what its twin in Huffman's code shows.
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERX"
    "RTc4UG1RV19iZ2hnPk1xeXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2Nj"
    "Y2NjY2NjY2P/yQARCAAQABgDACIAAREBAhEB/8wACgAQEAUBEBEF/9oADAMAAAERAhEAPwDRWSxns3OjR08numI+ZfAVYP1GnO6zMpguFtAkJ6TI"
    "R95ensPxLLb/2Q=="
)


def test_arithmetic_coding_is_seen_as_its_twin():
    assert seen(ARITHMETIC)[::5, ::8].tolist() == [
        [[165, 228, 17], [226, 190, 14], [253, 152, 22]],
        [[148, 177, 9], [207, 141, 1], [239, 99, 14]],
        [[144, 113, 22], [202, 78, 4], [239, 45, 17]],
        [[127, 63, 15], [192, 34, 0], [228, 17, 8]],
    ]


def test_a_jpeg_whose_restart_markers_are_out_of_order_is_refused():
    """Decoders put what follows them into different places."""
    stream = io.BytesIO()
    Image.fromarray(RGB.astype(np.uint8)).save(stream, "JPEG", restart_marker_rows=1)
    whole = stream.getvalue()
    assert seen(whole).shape == RGB.shape
    start = whole.rindex(b"\xff\xd0")
    with pytest.raises(PictureUnreadable, match="it is a JPEG whose restart markers are not in order"):
        seen(whole[:start] + b"\xff\xd7" + whole[start + 2 :])


def frame(mark: int, bits: int = 8, channels: int = 3) -> bytes:
    said = struct.pack("!BHHB", bits, 8, 8, channels) + bytes(3 * channels)
    return b"\xff\xd8\xff" + bytes([mark]) + struct.pack("!H", 2 + len(said)) + said + b"\xff\xda\0\2" + bytes(40)


def container(*brands: bytes) -> bytes:
    return write.box(b"ftyp", brands[0] + b"\0\0\0\0" + b"".join(brands[1:])) + bytes(40)


FOREIGN = {
    "a HEIC picture": container(b"heic", b"mif1", b"heic"),
    "a HEIC picture#general": container(b"mif1", b"mif1", b"heix"),
    "a video": container(b"isom", b"isom", b"avc1"),
    "a video#web": b"\x1a\x45\xdf\xa3" + bytes(40),
    "a raw camera file": container(b"crx ", b"isom"),
    "a raw camera file#CR2": b"II*\0\x10\0\0\0CR\2\0" + bytes(40),
    "a raw camera file \\(DNG\\)": write.tiff(RGB, (8,) * 3, 2, tags={50706: (1, [1, 4, 0, 0])}),
    "a JPEG XL picture": b"\xff\x0a" + bytes(40),
    "a JPEG XL picture#boxed": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40),
    "a JPEG of 12 bits": frame(0xC1, bits=12),
    "a JPEG of 2 channels": frame(0xC0, channels=2),
    "a lossless JPEG": frame(0xC3),
    "a JPEG-LS JPEG": frame(0xF7),
    "a hierarchical JPEG": frame(0xC5),
    "a BigTIFF whose numbers begin with the higher byte": write.tiff(GREY, (8,), 1, order=">", big=True),
    "a PAM picture": b"P7\nWIDTH 1\n",
    "a PFM picture, whose pixels are floats": b"Pf\n1 1\n-1.0\n\0\0\0\0",
    "an SVG drawing": b"<?xml version='1.0'?>\n<svg/>",
    "a ZIP archive": b"PK\3\4" + bytes(40),
    "a NumPy array": b"\x93NUMPY" + bytes(40),
}
NO_PICTURE = {
    "it is an HTML page and not a picture; fetch the picture again": b"\n<!DOCTYPE html><title>404</title>",
    "it is an XML document and not a picture; fetch the picture again": b"<?xml version='1.0'?><Error/>",
    "it is a Git LFS pointer .*`git lfs pull`": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "it is empty; fetch the picture again": b"",
    "it holds nothing but zeros; fetch the picture again": bytes(5000),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_format_that_is_read_is_named(kind):
    with pytest.raises(
        PictureUnreadable, match=f"^picture cannot be .*: it is {kind.partition('#')[0]}, which is not read; "
    ):
        seen(FOREIGN[kind])


def tags_of(data: bytes) -> dict[int, int]:
    """Where each entry of a TIFF's tags lies, of those that begin at its head."""
    at = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack("<H", data[at : at + 2])[0]
    return {struct.unpack("<H", data[i : i + 2])[0]: i for i in range(at + 2, at + 2 + 12 * count, 12)}


@pytest.mark.parametrize("tag", [273, 279, 257], ids=["a strip at 0", "a strip of 0 bytes", "a strip too few"])
def test_a_tiff_of_which_parts_are_missing_is_no_whole_picture(tag):
    """Pillow shows the file's own header in their place, or black."""
    whole = encoded(RGB.astype(np.uint8), "TIFF")
    assert np.array_equal(seen(whole), RGB)
    entry = tags_of(whole)[tag]
    (value,) = struct.unpack("<I", whole[entry + 8 : entry + 12])
    broken = whole[: entry + 8] + struct.pack("<I", 2 * value if tag == 257 else 0) + whole[entry + 12 :]
    with pytest.raises(PictureUnreadable, match="it is a TIFF of which parts are missing"):
        seen(broken)


def test_a_tiff_that_ends_within_its_tags_has_a_broken_header():
    whole = encoded(RGB.astype(np.uint8), "TIFF", compression="tiff_lzw")
    for lost in (1, 8, 40, 90):
        with pytest.raises(PictureUnreadable, match="its header is broken; mend or replace it"):
            seen(whole[:-lost])


def test_what_is_damaged_is_not_called_another_format():
    whole = png_with(b"tEXt", b"k\0text")
    assert seen(whole).shape == (1, 1, 3)
    with pytest.raises(PictureUnreadable, match="it is damaged; expected a whole one"):
        seen(whole.replace(b"text", b"tent"))


def test_a_long_text_in_a_png_is_no_fault_of_the_picture():
    assert seen(png_with(b"zTXt", b"k\0\0" + zlib.compress(bytes(2_000_000)))).shape == (1, 1, 3)


def png_with(name: bytes, text: bytes) -> bytes:
    head = struct.pack("!IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    return png((b"IHDR", head), (name, text), (b"IDAT", zlib.compress(bytes(4))), (b"IEND", b""))


def test_headers_of_nothing_but_fill_bytes_are_read_in_no_time():
    """A card that was erased has them; each of half a million could be the beginning of all that follow."""
    begun = time.process_time()
    plain, marked = (encoded(RGB.astype(np.uint8), "JPEG", **more) for more in ({}, {"restart_marker_rows": 1}))
    for beginning in (b"\xff\xd8\xff\xe0\0\4ab", plain[:-20], marked[:-20]):
        with pytest.raises(PictureUnreadable):
            seen(beginning + b"\xff" * 500_000)
    assert time.process_time() - begun < 10


@pytest.mark.parametrize("reason", NO_PICTURE)
def test_what_was_fetched_in_place_of_a_picture_is_named(reason):
    with pytest.raises(PictureUnreadable, match=reason):
        seen(NO_PICTURE[reason])
