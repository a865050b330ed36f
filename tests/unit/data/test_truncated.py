"""Pictures that are cut off fail their rows, or are shown with a mark; one that lacks only its end marker is whole."""

from __future__ import annotations

import io
import re
import struct
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.helpers.odd_pictures import CAT, bad, encoded, png, seen
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.cli.options import parse_extract
from vqa_embeddings.data import decode_pool as decode_pool_module
from vqa_embeddings.data.decode import decode, open_picture
from vqa_embeddings.data.decode_options import DecodeOptions
from vqa_embeddings.data.decode_pool import DecodePool
from vqa_embeddings.data.picture_limits import is_truncated
from vqa_embeddings.errors import PictureUnreadable

FAIL, SHOW = DecodeOptions(), DecodeOptions(show_truncated=True)
SMALL = CAT[:61, :83]
JPEGS = {
    "baseline": encoded(SMALL, "JPEG", quality=90),
    "grey": encoded(SMALL[..., 0], "JPEG", quality=50),
    "optimised": encoded(SMALL, "JPEG", quality=75, optimize=True),
    "restarts": encoded(SMALL, "JPEG", quality=90, restart_marker_blocks=3),
    "progressive": encoded(SMALL, "JPEG", quality=90, progressive=True),
    "nothing_to_refine": encoded(np.full((64, 64), 99, np.uint8), "JPEG", progressive=True, restart_marker_blocks=5),
    "white": encoded(np.full((40, 40, 3), 255, np.uint8), "JPEG", optimize=True),
}
CUT = "cannot be read as a picture: it is cut off; expected a whole one, .*--truncated-pictures show"


def opened(data: bytes, decode_options: DecodeOptions = FAIL) -> Image.Image:
    return decode(Path("cat.jpg"), data, decode_options)


def pixels(data: bytes, decode_options: DecodeOptions = FAIL) -> np.ndarray:
    return np.asarray(opened(data, decode_options))


@pytest.fixture(scope="module")
def pools() -> dict[DecodeOptions, DecodePool]:
    return {FAIL: DecodePool(FAIL), SHOW: DecodePool(SHOW)}


@pytest.mark.parametrize("decode_options", [FAIL, SHOW])
@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_lacks_only_its_end_marker_is_whole(tmp_path, pools, name, decode_options):
    for lost in (1, 2):
        (tmp_path / "cat.jpg").write_bytes(JPEGS[name][:-lost])
        for open_ in (partial(open_picture, decode_options=decode_options), pools[decode_options]):
            picture = open_(tmp_path / "cat.jpg")
            assert np.array_equal(np.asarray(picture), seen(JPEGS[name])) and not is_truncated(picture)


@pytest.mark.parametrize("name", ["baseline", "grey", "optimised", "restarts", "progressive"])
def test_a_jpeg_that_lacks_any_byte_more_is_cut_off(name):
    data = JPEGS[name]
    begin_of_scan = data.index(b"\xff\xda") + 20
    scans = [found.start() for found in re.finditer(rb"\xff[\xc4\xda\xd0-\xd7]", data) if found.start() > begin_of_scan]
    cuts = {*range(len(data) - 150, len(data) - 2), *(at + more for at in scans for more in (0, 1, 2, 4))}
    for cut in sorted(cuts - {len(data) - 2, len(data) - 1}):
        with pytest.raises(PictureUnreadable, match=CUT):
            opened(data[:cut])


def test_a_cut_that_only_rounding_hides_is_one():
    """Of this picture a byte can go, and no pixel changes whatever follows, but for what has really stood there."""
    with Image.open(DATA / "rocket.jpg") as rocket:
        corner = rocket.convert("RGB").crop((282, 180, 282 + 52, 180 + 97))
    data = encoded(corner, "JPEG", quality=100, progressive=True, subsampling=1)
    for cut in range(len(data) - 60, len(data) - 2):
        try:
            assert np.array_equal(pixels(data[:cut]), seen(data)), cut
        except PictureUnreadable:
            continue


@pytest.mark.parametrize("name", ["baseline", "restarts", "progressive"])
@pytest.mark.parametrize("junk", [bytes(20_000), b"\xff" * 5000, b"<html>504 Gateway Time-out</html>" * 200, b"\0" * 9])
def test_what_lies_behind_a_cut_does_not_make_a_picture_whole(name, junk):
    data = JPEGS[name]
    for cut in (len(data) - 12, len(data) * 2 // 3):
        with pytest.raises(PictureUnreadable, match="it is cut off"):
            opened(data[:cut] + junk)


@pytest.mark.parametrize("name", ["baseline", "progressive"])
@pytest.mark.parametrize("behind", [b"\xff\xfe\0\4ab", b"\xff\xe1\0\4ab" + bytes(500), b"\xff\xfe\0\4ab" + bytes(9000)])
def test_a_segment_behind_a_cut_does_not_make_a_picture_whole(name, behind):
    data = JPEGS[name]
    with pytest.raises(PictureUnreadable, match="it is cut off"):
        opened(data[: len(data) // 2] + behind)
    assert is_truncated(opened(data[: len(data) // 2] + behind, SHOW))
    assert np.array_equal(pixels(data[:-2] + behind), seen(data)), "behind a whole one it is no harm"


@pytest.mark.parametrize("junk", [b"\0", b"abc", b"\xff\xff"])
def test_bytes_between_the_segments_hide_no_cut(junk):
    data = JPEGS["baseline"]
    place = 4 + int.from_bytes(data[4:6], "big")
    loose = data[:place] + junk + data[place:]
    assert np.array_equal(pixels(loose), seen(data)) and np.array_equal(pixels(loose[:-2]), seen(data))
    with pytest.raises(PictureUnreadable, match="it is cut off"):
        opened(loose[: len(loose) // 2] + bytes(70_000))


def test_a_webp_that_is_cut_off_says_so_and_has_nothing_to_show():
    whole = encoded(CAT, "WEBP")
    assert pixels(whole).shape == CAT.shape
    for decode_options in (FAIL, SHOW):
        with pytest.raises(PictureUnreadable, match=r"it is cut off; expected a whole one, mend or replace it$"):
            opened(whole[: len(whole) // 2], decode_options)


def cut_off() -> dict[str, tuple[bytes, bytes]]:
    """Files that lack their last quarter, with the whole ones, by format."""
    palette = Image.fromarray(CAT).quantize(64)
    whole = {
        "jpg": encoded(CAT, "JPEG"),
        "png": encoded(CAT, "PNG"),
        "gif": encoded(palette, "GIF"),
        "bmp": encoded(CAT[::-1], "BMP"),
        "tif": encoded(CAT, "TIFF"),
        "ppm": encoded(CAT, "PPM"),
        "ico": encoded(Image.fromarray(CAT[:64, :64]), "ICO", sizes=[(64, 64)]),
    }
    return {name: (data[: len(data) * 3 // 4], data) for name, data in whole.items()}


CUT_OFF = cut_off()


@pytest.mark.parametrize("name", CUT_OFF)
def test_a_picture_that_is_cut_off_is_shown_with_a_mark_where_that_is_asked_for(tmp_path, pools, name):
    part, whole = CUT_OFF[name]
    for data, truncated in ((part, True), (whole, False)):
        (tmp_path / name).write_bytes(data)
        for open_ in (partial(open_picture, decode_options=SHOW), pools[SHOW]):
            picture = open_(tmp_path / name)
            assert is_truncated(picture) == truncated
            same = np.all(np.asarray(picture) == seen(whole), axis=(1, 2))
            assert same.all() != truncated
            rows = same[::-1] if name == "bmp" else same  # which begins with its last line
            assert rows[: len(rows) // 3].all()
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    (tmp_path / name).write_bytes(part)
    for open_ in (open_picture, pools[FAIL]):
        with pytest.raises(PictureUnreadable, match=CUT):
            open_(tmp_path / name)


UNREADABLE = {name: data for name, (data, error) in bad().items() if error == "PictureUnreadable"}
SHOWN = {"half.jpg", "half.png", "half.gif"}
OTHER = {"strip.png", "column.png", "crash.jpg", "hang.jpg"}  # pictures


@pytest.mark.parametrize("name", sorted(UNREADABLE.keys() - SHOWN - OTHER))
def test_what_is_no_picture_is_not_shown_either(name):
    with pytest.raises(PictureUnreadable):
        opened(UNREADABLE[name], SHOW)


def test_no_file_says_of_itself_that_it_is_cut_off():
    chunks = [(b"IHDR", struct.pack("!IIBBBBB", 1, 1, 8, 2, 0, 0, 0)), (b"tEXt", b"truncated\0True")]
    whole = png(*chunks, (b"IDAT", bytes.fromhex("789c63606060000000040001")), (b"IEND", b""))
    with Image.open(io.BytesIO(whole)) as picture:
        assert is_truncated(picture)  # what Pillow reads from it
    assert not is_truncated(opened(whole, SHOW))


@pytest.mark.parametrize("through", [DecodePool(), open_picture], ids=["pool", "alone"])
def test_a_picture_with_too_many_pixels_is_refused_by_the_limit_that_the_user_sets(tmp_path, through):
    (tmp_path / "bomb.png").write_bytes(UNREADABLE["bomb.png"])
    advice = r"expected 178.9 at most, scale it or raise --max-megapixels$"
    with pytest.raises(PictureUnreadable, match=rf"it has 3,600.0 megapixels; {advice}"):
        through(tmp_path / "bomb.png")
    enough, less = DecodeOptions(max_megapixels=128 * 96 / 1e6), DecodeOptions(max_megapixels=0.0122)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(pixels(encoded(CAT, "PNG"), enough), CAT)
    with pytest.raises(PictureUnreadable, match=r"it has 0.0 megapixels; expected 0.0122 at most"):
        opened(encoded(CAT, "PNG"), less)


@pytest.mark.parametrize("decode_options", [DecodeOptions(0.002), DecodeOptions(0.002, show_truncated=True)])
def test_a_picture_within_another_counts_as_well(decode_options):
    """An icon may hold a larger one than it says."""
    icon = bytearray(encoded(Image.fromarray(CAT[:64, :64]), "ICO", sizes=[(64, 64)]))
    icon[6:8] = 16, 16
    with pytest.raises(PictureUnreadable, match=r"it has 0.0 megapixels; expected 0.002 at most"):
        opened(bytes(icon), decode_options)


def test_the_limit_of_pixels_is_the_programs_own_and_memory_grows_with_it(tmp_path, monkeypatch):
    Image.new("1", (10_000, 4_000)).save(tmp_path / "wide.png")
    monkeypatch.setattr(decode_pool_module, "MEMORY_BYTES", 250 << 20)
    with pytest.raises(PictureUnreadable, match="it takes too much memory"):
        DecodePool()(tmp_path / "wide.png")
    assert DecodePool(DecodeOptions(max_megapixels=1000))(tmp_path / "wide.png").size == (10_000, 4_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    assert open_picture(tmp_path / "wide.png").size == (10_000, 4_000)
    assert Image.MAX_IMAGE_PIXELS == 1


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "1e7", "many"])
def test_a_limit_that_is_none_is_refused(given, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_extract(None, ["--demo", f"--max-megapixels={given}"])
    assert ended.value.code == 2
    assert f"'{given}' is not a number above 0, and 1000000 at most" in capsys.readouterr().err
