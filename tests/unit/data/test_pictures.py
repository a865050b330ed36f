"""Pictures of every kind: seen as a viewer shows them, or a failed row with a reason; one that kills costs its row."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from unicodedata import normalize

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.helpers.odd_pictures import bad, lay, odd
from tests.helpers.running import all_end, until
from vqa_embeddings.app.plan_summary import find_absent
from vqa_embeddings.data import decode_pool as decode_pool_module
from vqa_embeddings.data import picture_folder as folder_module
from vqa_embeddings.data import read_ahead as read_ahead_module
from vqa_embeddings.data import similar_names
from vqa_embeddings.data.decode import open_picture
from vqa_embeddings.data.decode_pool import DecodePool
from vqa_embeddings.data.picture_folder import GONE, PictureFolder
from vqa_embeddings.data.picture_paths import locate
from vqa_embeddings.data.read_ahead import read_ahead
from vqa_embeddings.data.table import Table
from vqa_embeddings.errors import PictureNotFound, PictureOutsideFolder, PictureUnreadable, StorageError

ODD = odd()
UNREADABLE = {name: data for name, (data, error) in bad().items() if error == "PictureUnreadable"}
TOO_LONG = {"strip.png", "column.png"}  # pictures, which the model's processor does not take
STAGED = {"crash.jpg", "hang.jpg"}  # whole, until somebody stages what their names say


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


def staged(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Have every new Python process run `code` before all else."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(folder))


def decode_process_of(pool: DecodePool) -> psutil.Process:
    return psutil.Process(pool._local.process._process.pid)


def test_a_decode_process_that_was_killed_costs_nothing(tmp_path, pool):
    lay(tmp_path, "cat.png", ODD["bitmap.bmp"][0])
    first = pool(tmp_path / "cat.png")
    before = decode_process_of(pool)
    before.kill()
    assert np.array_equal(np.asarray(pool(tmp_path / "cat.png")), np.asarray(first))
    assert decode_process_of(pool).pid != before.pid


def test_a_picture_that_hangs_is_given_up_in_time_and_the_next_one_is_read(tmp_path, monkeypatch):
    for name, data in (("cat.jpg", b""), ("hang.jpg", b"hang")):
        lay(tmp_path, name, UNREADABLE["hang.jpg"].removesuffix(b"hang") + data)
    slow = "lambda stream, **b: (time.sleep(60 * stream.getvalue().endswith(b'hang')), whole(stream, **b))[1]"
    staged(monkeypatch, tmp_path / "staged", f"import time, PIL.Image as m; whole = m.open; m.open = {slow}")
    pool = DecodePool()
    pool(tmp_path / "cat.jpg")
    hanging = decode_process_of(pool)
    with monkeypatch.context() as impatient:
        impatient.setattr(decode_pool_module, "OPEN_SECONDS", 1)
        begun = time.monotonic()
        with pytest.raises(PictureUnreadable, match="has not been opened within 1 s"):
            pool(tmp_path / "hang.jpg")
        assert time.monotonic() - begun < 3
    pool(tmp_path / "cat.jpg")
    assert all_end([hanging], 2)


def test_a_decode_process_ignores_signals_but_ends_with_its_rank(tmp_path):
    lay(tmp_path, "cat.png", ODD["bitmap.bmp"][0])
    script = (
        "import sys, time; from pathlib import Path; from vqa_embeddings.data.decode_pool import DecodePool\n"
        "pool = DecodePool(); pool(Path(sys.argv[1])); print('open', flush=True); time.sleep(60)"
    )
    rank = psutil.Popen([sys.executable, "-c", script, str(tmp_path / "cat.png")], stdout=-1)
    assert rank.stdout.readline() == b"open\n"
    (process,) = rank.children()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        process.send_signal(number)
    time.sleep(0.3)
    assert process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    rank.kill()
    rank.wait()
    assert all_end([process], 5)


def test_a_picture_that_takes_too_much_memory_costs_its_row(tmp_path, pool, monkeypatch):
    Image.new("1", (40_000, 4_000)).save(tmp_path / "wide.png")  # 160 million pixels, 0.5 GB as RGB
    assert pool(tmp_path / "wide.png").size == (40_000, 4_000)
    monkeypatch.setattr(decode_pool_module, "MEMORY_BYTES", 300 << 20)
    with pytest.raises(PictureUnreadable, match="it takes too much memory"):
        DecodePool()(tmp_path / "wide.png")


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
    folder = PictureFolder(folder.path)  # which lists what is there anew
    lay(folder.path, "000000000139.jpg", ODD["bitmap.bmp"][0])
    warning = find_absent(folder, table, SimpleNamespace(rows=[0, 1]))
    assert warning.endswith("not even '139', but there is '000000000139.jpg'")


@pytest.mark.parametrize("read_before", [True, False])
@pytest.mark.parametrize("made_anew", [True, False])
def test_a_folder_of_pictures_that_goes_away_is_no_fault_of_the_rows(folder, read_before, made_anew):
    if read_before:
        folder.read("cat.png", open_picture)
    folder.path.rename(folder.path.with_name("elsewhere"))
    if made_anew:  # as the mount point is, say
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


def test_a_server_that_does_not_answer_at_all_ends_the_run_and_not_one_that_is_slow(monkeypatch):
    monkeypatch.setattr(read_ahead_module, "LONGEST_WAIT", 1.5)
    slow = read_ahead(range(6), lambda key: time.sleep(0.3) or key, 1)
    assert [found for _, found in slow] == [0, 1, 2, 3, 4, 5]
    over = Event()
    with pytest.raises(StorageError, match="no picture has come for 0 minutes, and the next would be that of 0"):
        next(read_ahead(range(4), lambda key: over.wait(60), 1))
    over.set()


@pytest.mark.parametrize("through", [DecodePool(), open_picture], ids=["pool", "alone"])
def test_what_the_system_says_of_a_file_is_known_by_its_number(tmp_path, through):
    with pytest.raises(PictureUnreadable, match="No such file or directory") as failed:
        through(tmp_path / "gone.png")
    assert failed.value.errno == errno.ENOENT
    lay(tmp_path, "half.png", ODD["bitmap.bmp"][0][:100])
    with pytest.raises(PictureUnreadable) as failed:
        through(tmp_path / "half.png")
    assert failed.value.errno is None


def test_a_decode_process_that_cannot_start_is_no_fault_of_the_picture(tmp_path, monkeypatch):
    lay(tmp_path, "cat.png", ODD["bitmap.bmp"][0])
    staged(monkeypatch, tmp_path / "staged", "import os, sys; sys.stderr.write('no room for that\\n'); os._exit(3)")
    with pytest.raises(StorageError, match=r"ends at its start \(no room for that\)"):
        DecodePool()(tmp_path / "cat.png")


def test_a_decode_process_that_does_not_become_ready_is_no_fault_of_the_picture(tmp_path, monkeypatch):
    lay(tmp_path, "cat.png", ODD["bitmap.bmp"][0])
    staged(monkeypatch, tmp_path / "staged", "import time; time.sleep(60)")
    monkeypatch.setattr(decode_pool_module, "START_SECONDS", 1)
    with pytest.raises(StorageError, match="has not started within 1 s"):
        DecodePool()(tmp_path / "cat.png")


def test_a_machine_that_is_full_of_processes_is_waited_for_and_then_said(tmp_path, monkeypatch):
    lay(tmp_path, "cat.png", ODD["bitmap.bmp"][0])
    start, tries = decode_pool_module.start_child, 0

    def start_at_times(*arguments, **settings):
        nonlocal tries
        tries += 1
        if tries in free:
            return start(*arguments, **settings)
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(decode_pool_module, "start_child", start_at_times)
    monkeypatch.setattr(decode_pool_module, "PAUSES", (0.01, 0.01))
    free = {3}
    DecodePool()(tmp_path / "cat.png")
    free = set()
    with pytest.raises(StorageError, match=r"no process can be started .*temporarily unavailable"):
        DecodePool()(tmp_path / "cat.png")


def test_a_file_that_nobody_delivers_is_no_fault_of_the_picture(tmp_path, pool, monkeypatch):
    os.mkfifo(tmp_path / "slow.png")
    monkeypatch.setattr(decode_pool_module, "OPEN_SECONDS", 1)
    with pytest.raises(StorageError, match=r"slow.png has not been read within 1 s"):
        pool(tmp_path / "slow.png")


def test_what_others_print_does_not_get_between_the_pixels(tmp_path, monkeypatch):
    lay(tmp_path, "cat.png", ODD["bitmap.bmp"][0])
    print_often = "import os, PIL.Image as module; whole = module.open; print('hello'); os.write(2, b'hello')\n"
    print_more = (
        "module.open = lambda *a, **b: (os.write(1, b'x' * 9999), os.write(2, b'y' * 99999), whole(*a, **b))[2]"
    )
    staged(monkeypatch, tmp_path / "staged", print_often + print_more)
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    for _ in range(3):
        assert np.array_equal(np.asarray(DecodePool()(tmp_path / "cat.png")), ODD["bitmap.bmp"][1])


def test_a_job_that_was_suspended_goes_on_with_its_picture(tmp_path, monkeypatch):
    lay(tmp_path, "cat.png", ODD["bitmap.bmp"][0])
    slow = f"import time, PIL.Image as module; whole, begun = module.open, open({str(tmp_path / 'begun')!r}, 'a')\n"
    slow += "module.open = lambda *a, **b: (print(file=begun, flush=True), time.sleep(1.5), whole(*a, **b))[2]"
    staged(monkeypatch, tmp_path / "staged", slow)
    script = (
        "import sys; from pathlib import Path; import vqa_embeddings.data.decode_pool as module\n"
        "decode = module.DecodePool(); decode(Path(sys.argv[1])); module.OPEN_SECONDS = 3; print('open', flush=True)\n"
        "decode(Path(sys.argv[1])); print('open', flush=True)"
    )
    rank = psutil.Popen([sys.executable, "-c", script, str(tmp_path / "cat.png")], stdout=-1)
    assert rank.stdout.readline() == b"open\n"
    until(lambda: (tmp_path / "begun").stat().st_size == 2, rank)
    both = [rank, *rank.children()]
    assert len(both) == 2
    for process in both:
        process.suspend()
    time.sleep(4)
    rank.resume()  # which looks at the clock first
    time.sleep(0.2)
    both[1].resume()
    assert rank.stdout.readline() == b"open\n"
    assert rank.wait() == 0


def test_links_in_the_folder_are_followed(tmp_path):
    lay(tmp_path / "elsewhere", "cat.png", ODD["bitmap.bmp"][0])
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    open_picture(locate(tmp_path / "images", "linked/cat.png"))
    assert Path(locate(tmp_path / "images", "./linked//cat.png")).is_file()
