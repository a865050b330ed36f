"""A picture that crashes, hangs or fills the memory of its decode process costs its row, and not the run."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.helpers.odd_pictures import bad, lay, odd
from tests.helpers.running import all_end, until
from vqa_embeddings.data import decode_pool as decode_pool_module
from vqa_embeddings.data.decode_pool import DecodePool
from vqa_embeddings.errors import PictureUnreadable, StorageError

ODD = odd()
UNREADABLE = {name: data for name, (data, error) in bad().items() if error == "PictureUnreadable"}


@pytest.fixture(scope="module")
def pool() -> DecodePool:
    return DecodePool()


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


@pytest.mark.slow
def test_a_picture_that_takes_too_much_memory_costs_its_row(tmp_path, pool, monkeypatch):
    Image.new("1", (40_000, 4_000)).save(tmp_path / "wide.png")  # 160 million pixels, 0.5 GB as RGB
    assert pool(tmp_path / "wide.png").size == (40_000, 4_000)
    monkeypatch.setattr(decode_pool_module, "MEMORY_BYTES", 300 << 20)
    with pytest.raises(PictureUnreadable, match="it takes too much memory"):
        DecodePool()(tmp_path / "wide.png")


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


@pytest.mark.slow
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
