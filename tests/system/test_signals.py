"""A request to stop costs no row that was finished, whoever asks, whenever, and however often."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest

from tests.helpers.launching import COPIES, ROOT, TERMS, arguments_for, command, merge, processes, run, segments
from tests.helpers.published_reader import read_published
from tests.helpers.running import (
    LIMIT,
    Running,
    all_end,
    assert_complete,
    everyone,
    listens,
    stop_at_random_moments,
    until,
)
from tests.helpers.tables import table_rows, write_table
from tests.system.test_rows import assert_equal_to_reference
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.cluster.signals import REPEAT_SECONDS, StopFlag
from vqa_embeddings.data.read_ahead import read_ahead


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    pipe, environment = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env=environment)


def start(out: Path, log: Path, ranks: int, *arguments: object) -> Running:
    return Running(command(ranks, *arguments, "--output-dir", out), out, log)


ASKED = """
import hashlib, os, sys, time
from vqa_embeddings.cluster import signals

class Counting(signals.StopFlag):
    heard = 0

    def _receive(self, number):
        super()._receive(number)
        self.heard += 1

signals.REPEAT_SECONDS = 600  # until all three are heard, on whatever machine
stop = Counting().install(print)
stop.defer()
for number in range(3):  # the scheduler's, and what the launcher passes on
    os.kill(os.getpid(), signals.signal.{name})
    while stop.heard == number:
        time.sleep(0.01)
signals.REPEAT_SECONDS = 0
print("asked", stop.requested(), stop.signal, stop.is_new(), stop.is_new(), flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)  # some minutes in which no handler of Python's is called
"""


@pytest.mark.parametrize("number", StopFlag.SIGNALS)
def test_the_first_signal_asks_its_echoes_are_ignored_and_a_later_one_ends_at_once(number):
    asked = python(ASKED.format(name=number.name))
    said = asked.stdout.readline().split()
    assert said == ["asked", "True", number.name, "True", "False"]
    asked.send_signal(signal.SIGUSR1)
    assert asked.wait(5) == 128 + signal.SIGUSR1
    assert not asked.stderr.read()


HEARING = """
import os, signal, time
from vqa_embeddings.cluster.signals import StopFlag

def say(name):
    raise OSError("nobody reads this")

signal.pthread_sigmask(signal.SIG_BLOCK, StopFlag.SIGNALS)  # as MPICH's launcher hands it down
StopFlag().install(say)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


def test_a_request_is_heard_whatever_the_launcher_blocks_and_whoever_listens():
    assert python(HEARING).wait(10) == 0


WRITING = """
import os, signal, sys, time
from pathlib import Path
from vqa_embeddings.cluster import signals
from vqa_embeddings.base.files import publish
signals.REPEAT_SECONDS = 0

def write(path):
    path.write_bytes(b"half of it")
    os.kill(os.getpid(), signal.SIGTERM)
    while not stop.requested():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

stop = signals.StopFlag().install(print)
stop.defer()
publish(Path(sys.argv[1]), write)
"""


def test_a_second_signal_in_the_middle_of_a_write_leaves_a_temporary_file_and_no_other(tmp_path):
    writing = python(WRITING, tmp_path / "00001-abc.h5")
    assert writing.wait(10) == 128 + signal.SIGTERM
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".tmp"


STUCK = """
import os, signal, threading, time
from vqa_embeddings.cluster.signals import StopFlag, run_program

class Late:
    def __del__(self):  # as the interpreter tears everything down
        os.kill(os.getpid(), signal.SIGTERM)

late = Late()

def main():
    StopFlag().install(print).defer()
    threading.Thread(target=time.sleep, args=(60,)).start()
    print("done")
    {last}

run_program(main)
"""


@pytest.mark.parametrize(("last", "status"), [("return 0", 0), ("raise ValueError('broken disk')", 1)])
def test_neither_a_stuck_thread_nor_a_signal_in_the_last_moments_changes_how_a_run_ends(last, status):
    ending = python(STUCK.format(last=last))
    said, errors = ending.communicate(timeout=10)
    assert (ending.returncode, said) == (status, "done\n")
    assert ("ValueError: broken disk" in errors) == (status == 1)


def test_a_picture_that_does_not_come_is_not_waited_for_after_a_request():
    come, asked = Event(), float("inf")

    def stopping() -> bool:
        return time.monotonic() > asked

    def prepare(key: str) -> str:
        if key == "stuck":
            come.wait(5)
        return key

    pictures = read_ahead(["first", "stuck", "third"], prepare, 1, stopping)
    assert next(pictures) == ("first", "first")
    asked = time.monotonic() + 0.5
    assert list(pictures) == []
    assert time.monotonic() < asked + 2
    come.set()
    assert list(read_ahead(["fourth"], prepare, 0, stopping)) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["importing", "loading"])
def test_a_start_that_is_stopped_ends_well_and_harms_nothing(tmp_path, photographs, moment, number):
    launch = start(tmp_path / "out", tmp_path / "log", 0, *photographs)
    if moment == "importing":
        until(lambda: "libtorch" in Path(f"/proc/{launch.process.pid}/maps").read_text(), launch.process)
    else:
        until(lambda: "device:" in launch.said(), launch.process)
    assert launch.ends(number) == 0
    assert launch.said().splitlines()[-1] == (
        f"stopped by {number.name} before a row was begun; the same command continues"
    )
    assert not launch.shown()
    assert not segments(tmp_path / "out")


@pytest.fixture
def stuck_picture(tmp_path) -> Iterator[Path]:
    """The pictures, one of which nobody can open for 45 s, as on a file server that does not answer."""
    images = shutil.copytree(DATA, tmp_path / "images")
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel's word that somebody waits
    holder = os.open(images / "hubble.jpg", os.O_RDONLY)
    fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    yield images
    fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    os.close(holder)
    signal.signal(signal.SIGIO, before)


# The third row follows the second so soon that the bar would not show it before the picture that does not come.
EVERY_ROW = """
from vqa_embeddings.app import progress
from vqa_embeddings.cluster import signals
progress.BAR_SECONDS = 0
import extract_dist
signals.run_program(extract_dist.main)
"""


def test_a_run_whose_pictures_do_not_come_ends_in_time_with_what_was_finished(tmp_path, checkpoint, stuck_picture):
    rows = [row for row in table_rows() if row["image_id"] in ("rocket.jpg", "hubble.jpg")]
    table = write_table(tmp_path / "vqa.csv", rows)
    inputs = [*arguments_for(table, checkpoint, stuck_picture), "--batch-size", 1, "--checkpoint-interval", 2]
    line = [sys.executable, "-c", EVERY_ROW, *map(str, inputs), "--output-dir", str(tmp_path / "out")]
    launch = Running(line, tmp_path / "out", tmp_path / "log", PYTHONPATH=str(ROOT))
    until(lambda: segments(tmp_path / "out") and launch.bar() == 3, launch.process)  # nothing is left but to wait
    assert launch.ends(signal.SIGTERM) == 0
    assert launch.reported() == {0: (3, 0, len(rows) - 3)}
    assert launch.committed() == {0: 3}
    assert "stopped by SIGTERM after a commit" in launch.said()


@pytest.fixture
def endless(tmp_path, checkpoint) -> list[object]:
    """The arguments of a run whose first three answers are short, and the others too long for the time to end."""
    rows = [row for name in ("rocket.jpg", "coffee.jpg") for row in table_rows() if row["image_id"] == name]
    inputs = arguments_for(write_table(tmp_path / "vqa.csv", rows), checkpoint)
    return [*inputs, "--max-new-tokens", 20_000, "--batch-size", 4]


@pytest.mark.parametrize("last", [signal.SIGKILL, signal.SIGTERM], ids=["a kill", "a second signal"])
def test_what_was_finished_is_committed_before_the_rows_in_hand_are_done(tmp_path, endless, last):
    """Open MPI kills a second after it asked. A second request does not wait for the rows in hand either."""
    launch = start(tmp_path / "out", tmp_path / "log", 0, *endless)
    until(lambda: launch.bar() == 3, launch.process)
    launch.process.terminate()
    until(lambda: segments(tmp_path / "out"), launch.process, 2)  # for which it has heard the request
    if last == signal.SIGTERM:
        time.sleep(1.1 * REPEAT_SECONDS)  # or it would be an echo
        assert launch.process.poll() is None, "the rows in hand were done too soon to show anything"
    launch.process.send_signal(last)
    assert launch.process.wait(5) == (-last if last == signal.SIGKILL else 128 + last)
    assert launch.committed() == {0: 3}
    assert "extracted: 3; failed: 0" in merge(tmp_path / "out").stdout


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_run_asked_to_stop_commits_the_batch_in_hand(tmp_path, many_rows, checkpoint, ranks):
    """Alone it exits 0. Of two ranks, each is asked as by a scheduler: at once with the launcher, which asks again."""
    inputs = [*arguments_for(many_rows, checkpoint), "--batch-size", 1]
    launch = start(tmp_path / "out", tmp_path / "log", ranks, *inputs)
    launch.until_all_have_done_rows(max(ranks, 1))
    until(lambda: all(map(listens, processes(launch.process))), launch.process)
    done = launch.bar()
    assert not segments(tmp_path / "out")
    assert launch.ends(signal.SIGTERM, everyone) == 0 or ranks
    assert launch.said().count("stopped by SIGTERM after a commit") == max(ranks, 1)
    committed = launch.committed()
    assert {rank: rows for rank, (rows, _, _) in launch.reported().items()} == committed
    assert committed.total() >= done
    rows = committed.total()
    assert rows < 31 * COPIES
    assert f"extracted: {rows}; failed: 0; missing: {31 * COPIES - rows}" in merge(tmp_path / "out").stdout


def test_term_to_accelerate_at_random_moments_loses_nothing_that_was_finished(
    tmp_path, many_rows, checkpoint, expected
):
    out, inputs = tmp_path / "out", [*arguments_for(many_rows, checkpoint), "--batch-size", 1]
    launches = (start(out, tmp_path / f"log{number}", 2, *inputs) for number in range(TERMS))
    stop_at_random_moments(launches, random.Random(11))
    inputs += ["--batch-size", 16]  # the last run is to end soon
    assert run(command(2, *inputs, "--output-dir", out)).returncode == 0
    assert_complete(out, expected)


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGTERM), (2, signal.SIGUSR2), (2, signal.SIGKILL)])
def test_ranks_do_not_go_on_without_their_launcher(tmp_path, many_rows, checkpoint, ranks, number):
    """These signals end it without a word to the ranks."""
    launch = start(tmp_path / "out", tmp_path / "log", ranks, *arguments_for(many_rows, checkpoint), "--batch-size", 1)
    launch.until_all_have_begun(ranks)
    launch.until_rows_are_done()
    done, started = launch.bar(), processes(launch.process)
    launch.process.send_signal(number)
    launch.process.wait(LIMIT)
    assert all_end(started[1:], LIMIT)
    assert launch.said().count("stopped by SIGTERM after a commit") == ranks
    assert launch.committed()[0] >= done


def test_a_rank_that_dies_costs_the_other_nothing(tmp_path, many_rows, checkpoint):
    """torchrun ends the other one, which commits first."""
    inputs = [*arguments_for(many_rows, checkpoint), "--batch-size", 1]
    launch = start(tmp_path / "out", tmp_path / "log", 2, *inputs)
    launch.until_rows_are_done()
    done = launch.bar()
    victims = [process for process in processes(launch.process)[1:] if process.environ().get("RANK") == "1"]
    victims[0].kill()
    assert launch.process.wait(LIMIT + 10) != 0
    assert launch.reported()[0][0] == launch.committed()[0] >= done
    assert "stopped by SIGTERM after a commit" in launch.said()


def test_of_two_launches_with_different_settings_at_the_same_moment_one_is_refused(tmp_path, photographs, expected):
    logs = [tmp_path / "merged", tmp_path / "adapter"]
    launches = [start(tmp_path / "out", log, 0, *photographs, "--lora", log.name) for log in logs]
    statuses = [launch.process.wait(300) for launch in launches]
    assert sorted(statuses) == [0, 2], [launch.shown() for launch in launches]
    refused = launches[statuses.index(2)]
    assert refused.shown().count("error: ") == 1
    assert "--lora: " in refused.shown()
    assert merge(tmp_path / "out").returncode == 0
    rows = read_published(tmp_path / "out")
    assert rows.keys() == expected.keys()
    assert_equal_to_reference(rows, expected)
