"""Pictures of every kind: seen as a viewer shows them, or a failed row with a reason; one that kills costs its row."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from odd_pictures import bad, lay, odd
from PIL import Image
from running import all_end

from vqa_embeddings import opener as opener_module
from vqa_embeddings.errors import PictureNotFound, PictureUnreadable, StorageFailed
from vqa_embeddings.images import PictureFolder, locate, open_picture
from vqa_embeddings.opener import Openers

ODD = odd()
UNREADABLE = {name: data for name, (data, error) in bad().items() if error == "PictureUnreadable"}
TOO_LONG = {"strip.png", "column.png"}  # pictures, which the model's processor does not take
STAGED = {"crash.jpg", "hang.jpg"}  # whole, until somebody stages what their names say


@pytest.fixture(scope="module")
def openers() -> Openers:
    return Openers()


@pytest.mark.parametrize("name", ODD)
def test_an_odd_picture_is_seen_as_a_viewer_shows_it(tmp_path, openers, name):
    data, pixels = ODD[name]
    lay(tmp_path, name, data)
    for picture in (open_picture(locate(tmp_path, name)), openers(locate(tmp_path, name))):
        assert picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture), pixels)


@pytest.mark.parametrize("name", sorted(UNREADABLE.keys() - TOO_LONG - STAGED))
def test_what_is_no_picture_is_refused_with_a_reason(tmp_path, openers, name):
    lay(tmp_path, name, UNREADABLE[name])
    for open_ in (open_picture, openers):
        with pytest.raises(PictureUnreadable, match=f"{name} cannot be read as a picture: ") as refused:
            open_(tmp_path / name)
        assert str(tmp_path) not in str(refused.value) and "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {name}, "something has been written, or run"


@pytest.mark.parametrize("name", ["script.eps", "layers.psd", "paper.pdf", "vector.svg", "film.mp4"])
def test_formats_that_are_not_for_photographs_are_not_even_tried(tmp_path, name):
    """Pillow would start Ghostscript for some."""
    lay(tmp_path, name, UNREADABLE[name])
    with pytest.raises(PictureUnreadable, match="it is none of JPEG, MPO, PNG"):
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


def the_opener(openers: Openers) -> psutil.Process:
    return psutil.Process(openers._of_thread.opener._process.pid)


def test_an_opener_that_was_killed_costs_nothing(tmp_path, openers):
    lay(tmp_path, "cat.png", ODD["bitmap.bmp"][0])
    first = openers(tmp_path / "cat.png")
    before = the_opener(openers)
    before.kill()
    assert np.array_equal(np.asarray(openers(tmp_path / "cat.png")), np.asarray(first))
    assert the_opener(openers).pid != before.pid


def test_a_picture_that_hangs_is_given_up_in_time_and_the_next_one_is_read(tmp_path, openers, monkeypatch):
    lay(tmp_path, "cat.png", ODD["bitmap.bmp"][0])
    openers(tmp_path / "cat.png")
    hanging = the_opener(openers)
    hanging.suspend()
    monkeypatch.setattr(opener_module, "OPEN_SECONDS", 0.5)
    begun = time.monotonic()
    with pytest.raises(PictureUnreadable, match="has not been opened within"):
        openers(tmp_path / "cat.png")
    assert time.monotonic() - begun < 2
    monkeypatch.undo()
    openers(tmp_path / "cat.png")
    assert all_end([hanging], 2)


def test_an_opener_hears_no_signal_but_ends_with_its_rank(tmp_path):
    lay(tmp_path, "cat.png", ODD["bitmap.bmp"][0])
    script = (
        "import sys, time; from pathlib import Path; from vqa_embeddings.opener import Openers\n"
        "openers = Openers(); openers(Path(sys.argv[1])); print('open', flush=True); time.sleep(60)"
    )
    rank = psutil.Popen([sys.executable, "-c", script, str(tmp_path / "cat.png")], stdout=-1)
    assert rank.stdout.readline() == b"open\n"
    (opener,) = rank.children()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        opener.send_signal(number)
    time.sleep(0.3)
    assert opener.is_running() and opener.status() != psutil.STATUS_ZOMBIE
    rank.kill()
    rank.wait()
    assert all_end([opener], 5)


def test_a_picture_that_takes_too_much_memory_costs_its_row(tmp_path, openers, monkeypatch):
    Image.new("1", (40_000, 4_000)).save(tmp_path / "wide.png")  # 160 million pixels, 0.5 GB as RGB
    assert openers(tmp_path / "wide.png").size == (40_000, 4_000)
    monkeypatch.setattr(opener_module, "MEMORY_BYTES", 300 << 20)
    with pytest.raises(PictureUnreadable, match="it takes too much memory"):
        Openers()(tmp_path / "wide.png")


def test_a_folder_of_pictures_that_goes_away_is_no_fault_of_the_rows(tmp_path):
    images = tmp_path / "images"
    lay(images, "cat.png", ODD["bitmap.bmp"][0])
    folder = PictureFolder(images)
    assert folder.locate("cat.png") == images / "cat.png"
    with pytest.raises(PictureNotFound):
        folder.locate("dog.png")
    images.rename(tmp_path / "elsewhere")
    with pytest.raises(StorageFailed, match="mount it again"):
        folder.locate("cat.png")
    images.mkdir()  # the mount point, say
    with pytest.raises(StorageFailed, match="mount it again"):
        folder.locate("cat.png")


def test_links_in_the_folder_are_followed(tmp_path):
    lay(tmp_path / "elsewhere", "cat.png", ODD["bitmap.bmp"][0])
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    open_picture(locate(tmp_path / "images", "linked/cat.png"))
    assert Path(locate(tmp_path / "images", "./linked//cat.png")).is_file()
