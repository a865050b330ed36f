"""The folder of pictures: a missing picture is its row's fault, a folder, disk or server that has gone is not."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unicodedata import normalize

import pytest
from PIL import Image

from tests.helpers.odd_pictures import lay, odd
from vqa_embeddings.app.plan_summary import find_absent
from vqa_embeddings.data import picture_folder as folder_module
from vqa_embeddings.data import similar_names
from vqa_embeddings.data.decode import open_picture
from vqa_embeddings.data.picture_folder import GONE, PictureFolder
from vqa_embeddings.data.picture_paths import locate
from vqa_embeddings.data.table import Table
from vqa_embeddings.errors import PictureNotFound, PictureOutsideFolder, PictureUnreadable, StorageError

ODD = odd()


@pytest.fixture
def folder(tmp_path) -> PictureFolder:
    for name in ("cat.png", "more/cat.png"):
        lay(tmp_path / "images", name, ODD["bitmap.bmp"][0])
    return PictureFolder(tmp_path / "images")


def test_a_picture_that_is_missing_is_the_rows_fault(folder):
    for name in ("dog.png", "more/dog.png", "less/dog.png", "a\0b.png", "x" * 300, "more"):
        folder.read("cat.png", open_picture)
        folder.read("more/cat.png", open_picture)
        with pytest.raises(PictureNotFound):
            folder.read(name, open_picture)


GUESSED = [
    ("dog", "dog.jpg"),
    ("dog.jpg", "dog.jpeg"),
    ("dog.jpg", "dog.JPG"),
    ("dog.png", "dog"),
    ("Dog.PNG", "dog.png"),
    ("dog.jpg ", "dog.jpg"),
    ("139", "000000000139.jpg"),
    ("139.0", "000000000139.jpg"),
    ("139.jpg", "000000000139.jpg"),
    ("COCO_val2014_000000000139.jpg", "000000000139.jpg"),
    ("images/dog.jpg", "dog.jpg"),
    ("coco/images/val2014/dog.jpg", "val2014/dog.jpg"),
    ("more\\dog.jpg", "more/dog.jpg"),
    ("C:\\pictures\\dog.jpg", "dog.jpg"),
    ("http://example.org/2014/dog.jpg", "dog.jpg"),
    ("/data/images/dog.jpg", "dog.jpg"),
    ("../images/dog.jpg", "dog.jpg"),
    ("~/images/dog.jpg", "dog.jpg"),
]
LISTED = [
    ("139", "COCO_val2014_000000000139.jpg"),
    ("139", "val2014/COCO_val2014_000000000139.jpg"),
    ("dog.jpg", "val2014/dog.jpg"),
    ("größe.jpg", "GRÖSSE.png"),
]


@pytest.mark.parametrize(
    ("name", "there", "listed"), [*((*pair, 0) for pair in GUESSED), *((*pair, 1000) for pair in GUESSED + LISTED)]
)
def test_a_picture_that_is_missing_is_said_to_be_where_it_is_and_not_taken(folder, monkeypatch, name, there, listed):
    """With no entry listed, as in a folder of a million files, of which those that are listed are others."""
    monkeypatch.setattr(similar_names, "MAX_ENTRIES", listed)
    lay(folder.path, there, ODD["bitmap.bmp"][0])
    kind = PictureOutsideFolder if name.startswith(("/", "..")) else PictureNotFound
    with pytest.raises(kind) as failed:
        folder.read(name, open_picture)
    assert str(failed.value).endswith(f"; there is {there!r}: if that is meant, correct the table or --images-dir")


@pytest.mark.parametrize(
    "name", ["dog.png", "cow", "12", "less/dog.png", "/data/dog.png", "../dog.png", "round.jpg", "."]
)
def test_what_is_not_there_is_not_said_to_be(folder, name):
    (folder.path / "round.jpg").symlink_to("nowhere.jpg")
    for spelling in (name, f"./{name}"):
        with pytest.raises((PictureNotFound, PictureOutsideFolder)) as failed:
            folder.read(spelling, open_picture)
        assert "there is" not in str(failed.value)


def test_a_million_missing_pictures_cost_a_look_each_and_one_listing(folder, monkeypatch):
    looked: Counter[str] = Counter()
    for module, name in ((os, "scandir"), (os.path, "isfile")):
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, name=name, whole=whole: looked.update([name]) or whole(path))
    for number in range(3 * similar_names.MAX_SEARCHES):
        with pytest.raises(PictureNotFound):
            folder.read(f"images/{number}.jpg", open_picture)
    assert looked["scandir"] == 2  # of the folder, and of the one in it
    assert looked["isfile"] <= similar_names.MAX_SEARCHES * similar_names.MAX_TRIED


def test_a_look_on_a_broken_disk_changes_nothing(folder, monkeypatch):
    def fail(*arguments: object) -> object:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "scandir", fail)
    monkeypatch.setattr(os.path, "isfile", lambda path: False)
    with pytest.raises(PictureNotFound, match=r"put one there$"):
        folder.read("dog.jpg", open_picture)
    monkeypatch.setattr(Path, "stat", fail)
    monkeypatch.setattr(folder, "hint", lambda name: pytest.fail("looked where the disk is at fault"))
    with pytest.raises(PictureNotFound, match="Input/output error"):
        folder.read("dog.jpg", open_picture)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_the_other_unicode_form_of_a_name_is_the_same_picture_where_the_very_name_is_not_there(tmp_path, forms):
    named, there = (normalize(form, "Ånger é/größe é.png") for form in forms)
    lay(tmp_path, there, ODD["bitmap.bmp"][0])
    folder = PictureFolder(tmp_path)
    assert folder.read(named, os.fspath) == str(tmp_path / there)
    lay(tmp_path, named, ODD["rgba.png"][0])
    assert folder.read(named, os.fspath) == str(tmp_path / named)
    assert folder.read(there, os.fspath) == str(tmp_path / there)


@pytest.mark.parametrize("given", ["as it lies", "through a link", "relative", "relative in a linked folder"])
def test_an_absolute_name_that_leads_to_the_folder_is_taken(tmp_path, monkeypatch, given):
    lay(tmp_path / "real" / "images", "more/cat.png", ODD["bitmap.bmp"][0])
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    monkeypatch.setenv("PWD", str(tmp_path / ("link" if given == "relative in a linked folder" else "real")))
    path = {"as it lies": tmp_path / "real" / "images", "through a link": tmp_path / "link" / "images"}
    folder = PictureFolder(path.get(given, Path("images")))
    names = ["real"] if given in ("as it lies", "relative") else ["real", "link"]
    for name in names:
        for spelling in (f"{tmp_path}/{name}/images/more/cat.png", f"/{tmp_path}/{name}//images/./more//cat.png"):
            assert folder.read(spelling, open_picture).size == (128, 96)
    with pytest.raises(PictureNotFound, match="No such file"):
        folder.read(f"{tmp_path}/real/images/dog.bmp", open_picture)
    for name in (f"{tmp_path}/real/images", "/"):
        with pytest.raises((PictureNotFound, PictureOutsideFolder)):
            folder.read(name, open_picture)
    for name in (f"{tmp_path}/real/images2/cat.png", f"{tmp_path}/real/images/../images/more/cat.png", "more/../cat"):
        with pytest.raises(PictureOutsideFolder) as failed:
            folder.read(name, open_picture)
        assert ("has a '..'" if ".." in name else "does not begin with") in str(failed.value)


def test_a_table_without_any_right_name_is_warned_of_with_what_is_there(folder):
    table = Table(["1", "2"], ["139", "140"], ["?", "?"], ["", ""])
    assert "there is" not in find_absent(folder, table, SimpleNamespace(rows=[0, 1]))
    folder = PictureFolder(folder.path)  # which lists its entries again
    lay(folder.path, "000000000139.jpg", ODD["bitmap.bmp"][0])
    warning = find_absent(folder, table, SimpleNamespace(rows=[0, 1]))
    assert warning.endswith("not even '139', but there is '000000000139.jpg'")


@pytest.mark.parametrize("read_before", [True, False])
@pytest.mark.parametrize("made_again", [True, False])
def test_a_folder_of_pictures_that_goes_away_is_no_fault_of_the_rows(folder, read_before, made_again):
    if read_before:
        folder.read("cat.png", open_picture)
    folder.path.rename(folder.path.with_name("elsewhere"))
    if made_again:  # as the mount point is, say
        folder.path.mkdir()
    for name in ("cat.png", "more/cat.png", "dog.png", str(folder.path / "cat.png")):
        with pytest.raises(StorageError, match=r"images is no longer the folder .* mount it again"):
            folder.read(name, open_picture)


def test_a_folder_that_goes_away_between_finding_a_picture_and_reading_it_is_no_fault_of_the_rows(folder):
    def open_too_late(path: Path) -> Image.Image:
        folder.path.rename(folder.path.with_name("elsewhere"))
        return open_picture(path)

    with pytest.raises(StorageError, match="mount it again"):
        folder.read("cat.png", open_too_late)


@pytest.mark.parametrize("linked", [True, False])
def test_a_disk_below_the_folder_or_behind_its_links_that_goes_away_is_no_fault_of_the_rows(folder, small_disk, linked):
    disk = small_disk(1 << 20)
    (disk / "deep").mkdir()
    lay(disk / "deep", "cat.png", ODD["bitmap.bmp"][0])
    if linked:
        (folder.path / "disk").symlink_to(disk)
    else:
        subprocess.run(["mount", "--bind", disk, folder.path / "more"], check=True)
    place = "disk" if linked else "more"
    try:
        folder.read(f"{place}/deep/cat.png", open_picture)
        with pytest.raises(PictureNotFound):
            folder.read(f"{place}/deep/dog.png", open_picture)
    finally:
        subprocess.run(["umount", "--lazy", disk if linked else folder.path / "more"], check=True)
    for name in ("deep/cat.png", "deep/dog.png", "other/cat.png"):
        with pytest.raises(StorageError, match="is no longer the folder"):
            folder.read(f"{place}/{name}", open_picture)
    folder.read("cat.png", open_picture)


def fails_with(number: int) -> Callable[[Path], Image.Image]:
    def open_(path: Path) -> Image.Image:
        raise PictureUnreadable("cannot be read", number)

    return open_


@pytest.mark.parametrize("number", sorted(GONE))
def test_a_file_server_that_is_gone_is_no_fault_of_the_rows(folder, number):
    with pytest.raises(StorageError, match="which is not the picture's fault"):
        folder.read("cat.png", fails_with(number))


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EUCLEAN])
def test_bad_blocks_cost_their_rows_and_a_broken_disk_ends_the_run(folder, number, monkeypatch):
    """Whether the disk is broken is seen by the last picture that it gave."""
    folder.read("cat.png", open_picture)
    for _ in range(2 * folder_module.IN_A_ROW_AT_FIRST):
        with pytest.raises(PictureUnreadable):
            folder.read("more/cat.png", fails_with(number))
    folder.read("cat.png", open_picture)
    (folder.path / "cat.png").unlink()
    for _ in range(folder_module.IN_A_ROW - 1):
        with pytest.raises(PictureUnreadable):
            folder.read("more/cat.png", fails_with(number))
    with pytest.raises(PictureNotFound):
        folder.read("dog.png", open_picture)
    with pytest.raises(StorageError, match="which is not the picture's fault"):
        folder.read("more/cat.png", fails_with(number))


def test_a_disk_that_gives_nothing_from_the_beginning_ends_the_run(folder):
    for _ in range(folder_module.IN_A_ROW_AT_FIRST - 1):
        with pytest.raises(PictureUnreadable):
            folder.read("cat.png", fails_with(errno.EIO))
    with pytest.raises(StorageError, match="Input/output error"):
        folder.read("cat.png", fails_with(errno.EIO))


def test_pictures_that_nobody_may_read_are_the_rows_fault_however_many(folder):
    for _ in range(50):
        with pytest.raises(PictureUnreadable):
            folder.read("cat.png", fails_with(errno.EACCES))
    folder.read("cat.png", open_picture)


@pytest.mark.parametrize("name", ["a/" * 500_000, "x" * 1_000_000, "../" * 500_000, "/" + "é" * 500_000])
def test_a_name_of_a_megabyte_takes_no_time_and_little_room(folder, name):
    begun = time.monotonic()
    with pytest.raises(PictureNotFound, match="is too long; expected a path of 4096 bytes at most") as failed:
        folder.read(name, open_picture)
    assert time.monotonic() - begun < 1 and len(str(failed.value)) < 1000


def test_a_folder_whose_names_must_not_be_listed_is_read_by_name():
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as place:
        lay(Path(place), "cat.png", ODD["bitmap.bmp"][0])
        Path(place).chmod(0o711)
        if root:
            os.seteuid(65534)
        try:
            PictureFolder(Path(place)).read("cat.png", open_picture)
        finally:
            if root:
                os.seteuid(0)


def test_links_in_the_folder_are_followed(tmp_path):
    lay(tmp_path / "elsewhere", "cat.png", ODD["bitmap.bmp"][0])
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    open_picture(locate(tmp_path / "images", "linked/cat.png"))
    assert Path(locate(tmp_path / "images", "./linked//cat.png")).is_file()
