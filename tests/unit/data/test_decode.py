"""Pictures of every kind: seen as a viewer shows them, or a failed row with a reason."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.odd_pictures import bad, lay, odd
from vqa_embeddings.data.decode import open_picture
from vqa_embeddings.data.decode_pool import DecodePool
from vqa_embeddings.data.picture_paths import locate
from vqa_embeddings.errors import PictureUnreadable

ODD = odd()
UNREADABLE = {name: data for name, (data, error) in bad().items() if error == "PictureUnreadable"}
TOO_LONG = {"strip.png", "column.png"}  # pictures that the model's processor does not accept
STAGED = {"crash.jpg", "hang.jpg"}  # whole; tests patch the decoder to do what their names say


@pytest.fixture(scope="module")
def pool() -> DecodePool:
    return DecodePool()


@pytest.mark.parametrize("name", ODD)
def test_an_odd_picture_is_seen_as_a_viewer_shows_it(tmp_path, pool, name):
    data, pixels = ODD[name]
    lay(tmp_path, name, data)
    for picture in (open_picture(locate(tmp_path, name)), pool(locate(tmp_path, name))):
        assert picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture), pixels)


@pytest.mark.parametrize("name", sorted(UNREADABLE.keys() - TOO_LONG - STAGED))
def test_what_is_no_picture_is_refused_with_a_reason(tmp_path, pool, name):
    lay(tmp_path, name, UNREADABLE[name])
    for open_ in (open_picture, pool):
        with pytest.raises(PictureUnreadable, match=f"{name} cannot be read as a picture: ") as refused:
            open_(tmp_path / name)
        assert str(tmp_path) not in str(refused.value) and "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {name}, "something has been written, or run"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("script.eps", "a PostScript document"),
        ("layers.psd", "a Photoshop document"),
        ("paper.pdf", "a PDF document"),
        ("vector.svg", "an SVG drawing"),
        ("film.mp4", "a video"),
    ],
)
def test_formats_that_are_not_for_photographs_are_not_even_tried(tmp_path, monkeypatch, name, kind):
    """Pillow would start Ghostscript for some."""
    lay(tmp_path, name, UNREADABLE[name])
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it is tried"))
    with pytest.raises(PictureUnreadable, match=f": it is {kind}, which is not read; convert it to JPEG or PNG$"):
        open_picture(tmp_path / name)


def test_a_picture_that_must_not_be_read_is_refused():
    root = os.geteuid() == 0  # who may read everything
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        lay(Path(folder), "secret.png", ODD["rgba.png"][0])
        (Path(folder) / "secret.png").chmod(0)
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(PictureUnreadable, match="Permission denied"):
                open_picture(locate(Path(folder), "secret.png"))
        finally:
            if root:
                os.seteuid(0)


@pytest.mark.parametrize("through", [DecodePool(), open_picture], ids=["pool", "alone"])
def test_what_the_system_says_of_a_file_is_known_by_its_number(tmp_path, through):
    with pytest.raises(PictureUnreadable, match="No such file or directory") as failed:
        through(tmp_path / "gone.png")
    assert failed.value.errno == errno.ENOENT
    lay(tmp_path, "half.png", ODD["bitmap.bmp"][0][:100])
    with pytest.raises(PictureUnreadable) as failed:
        through(tmp_path / "half.png")
    assert failed.value.errno is None
