"""A request to stop costs no row that was finished, whoever asks, whenever, and however often."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import h5py
import psutil
import pytest
from conftest import (
    COPIES,
    ROOT,
    TERMS,
    arguments_for,
    begin,
    command,
    merge,
    of_copies,
    processes,
    run,
    segments,
    table_rows,
    write_table,
)
from published_reader import read_published
from test_rows import assert_equal_to_reference

from vqa_embeddings.demo import DATA
from vqa_embeddings.images import read_ahead
from vqa_embeddings.signals import StopFlag

LIMIT = 20  # seconds from a signal to the end


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    pipe, environment = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env=environment)


def until(condition: Callable[[], object], launch: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert launch.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


Processes = list[psutil.Process]  # of a launch, the launcher first


def the_launcher(launch: Processes) -> Processes:
    return launch[:1]


def everyone(launch: Processes) -> Processes:
    return launch


def listens(process: psutil.Process) -> bool:
    """Whether TERM does not simply end the process."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


class Running:
    """A launch, and what it says."""

    def __init__(self, out: Path, log: Path, ranks: int, *arguments: object) -> None:
        self.out, self._said, self._shown = out, log.with_suffix(".out"), log.with_suffix(".err")
        self._before = set(segments(out))
        with open(self._said, "wb") as said, open(self._shown, "wb") as shown:
            self.process = begin(command(ranks, *arguments, "--output-dir", out), stdout=said, stderr=shown)

    def bar(self) -> int:
        """Rows that the bar, which is the main rank's, counts as done."""
        return max(map(int, re.findall(r" (\d+)/\d+ \[", self.shown())), default=0)

    def shown(self) -> str:
        return self._shown.read_text()

    def said(self) -> str:
        return self._said.read_text()

    def until_rows_are_done(self) -> None:
        until(self.bar, self.process)

    def ends(self, number: signal.Signals, whom: Callable[[Processes], Processes] = the_launcher) -> int:
        """The exit status after a signal to some of the processes, within the limit; then none of them is left."""
        started = processes(self.process)
        for process in whom(started):
            process.send_signal(number)
        status = self.process.wait(LIMIT)
        assert not psutil.wait_procs(started, 1)[1], "a rank outlived its launcher"
        return status

    def committed(self) -> Counter[int]:
        """Rows in the segments of this launch, by rank."""
        rows: Counter[int] = Counter()
        for path in set(segments(self.out)) - self._before:
            with h5py.File(path) as file:
                rows[int(path.parent.name.rpartition("-r")[2])] += len(file["row"])
        return rows

    def reported(self) -> dict[int, tuple[int, int, int]]:
        """What each rank says that it has extracted, what failed, and what is left."""
        found = re.findall(r"(?:rank (\d+): )?(\d+) rows extracted, (\d+) failed, (\d+) left", self.said())
        return {int(rank or 0): (int(rows), int(failed), int(left)) for rank, rows, failed, left in found}


ASKED = """
import hashlib, os, sys, time
from vqa_embeddings import signals
signals.REPEAT_SECONDS = 0.5
stop = signals.StopFlag().install()
for _ in range(3):  # the scheduler's, and what the launcher passes on
    os.kill(os.getpid(), signals.signal.{name})
    time.sleep(0.05)
print("asked", stop.requested(), stop.signal, stop.is_new(), stop.is_new(), flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)  # some minutes in which no handler of Python's is called
"""


@pytest.mark.parametrize("number", StopFlag.SIGNALS)
def test_the_first_signal_asks_its_echoes_are_ignored_and_a_later_one_ends_at_once(number):
    asked = python(ASKED.format(name=number.name))
    said = asked.stdout.readline().split()
    assert said == ["asked", "True", number.name, "True", "False"]
    time.sleep(0.6)
    asked.send_signal(signal.SIGUSR1)
    assert asked.wait(5) == 128 + signal.SIGUSR1
    assert not asked.stderr.read()


WRITING = """
import os, signal, sys, time
from pathlib import Path
from vqa_embeddings import signals
from vqa_embeddings.files import publish
signals.REPEAT_SECONDS = 0.1

def write(path):
    path.write_bytes(b"half of it")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

signals.StopFlag().install()
publish(Path(sys.argv[1]), write)
"""


def test_a_second_signal_in_the_middle_of_a_write_leaves_a_temporary_file_and_no_other(tmp_path):
    writing = python(WRITING, tmp_path / "00001-abc.h5")
    assert writing.wait(10) == 128 + signal.SIGTERM
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".tmp"


STUCK = """
import os, signal, threading, time
from vqa_embeddings.signals import StopFlag, run_program

class Late:
    def __del__(self):  # as the interpreter tears everything down
        os.kill(os.getpid(), signal.SIGTERM)

late = Late()

def main():
    StopFlag().install()
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
    come, asked = Event(), time.monotonic() + 0.5

    def stopping() -> bool:
        return time.monotonic() > asked

    def prepare(key: str) -> str:
        if key == "stuck":
            come.wait(5)
        return key

    pictures = read_ahead(["first", "stuck", "third"], prepare, 1, stopping)
    assert next(pictures) == ("first", "first")
    assert list(pictures) == []
    assert time.monotonic() < asked + 2
    come.set()
    assert list(read_ahead(["fourth"], prepare, 0, stopping)) == []


@pytest.mark.parametrize("moment", ["importing", "loading"])
def test_an_interrupted_start_is_quiet_and_harmless(tmp_path, photographs, moment):
    launch = Running(tmp_path / "out", tmp_path / "log", 0, *photographs)
    if moment == "importing":
        until(lambda: "libtorch" in Path(f"/proc/{launch.process.pid}/maps").read_text(), launch.process)
    else:
        until(lambda: "device:" in launch.said(), launch.process)
    assert launch.ends(signal.SIGINT) == -signal.SIGINT
    assert "Traceback" not in launch.shown()
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


def test_a_run_whose_pictures_do_not_come_ends_in_time_with_what_was_finished(tmp_path, checkpoint, stuck_picture):
    rows = [row for row in table_rows() if row["image_id"] in ("rocket.jpg", "hubble.jpg")]
    table = write_table(tmp_path / "vqa.csv", rows)
    inputs = [*arguments_for(table, checkpoint, stuck_picture), "--batch-size", 1, "--checkpoint-interval", 2]
    launch = Running(tmp_path / "out", tmp_path / "log", 0, *inputs)
    until(lambda: segments(tmp_path / "out"), launch.process)
    time.sleep(1)  # the third row is done too, and nothing is left but to wait
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
    """Open MPI kills two seconds after it asked. A second request does not wait for the rows in hand either."""
    launch = Running(tmp_path / "out", tmp_path / "log", 0, *endless)
    until(lambda: launch.bar() == 3, launch.process)
    launch.process.terminate()
    asked = time.monotonic()
    until(lambda: segments(tmp_path / "out"), launch.process, 2)
    if last == signal.SIGTERM:
        time.sleep(max(0.0, asked + 1.5 - time.monotonic()))
        assert launch.process.poll() is None, "the rows in hand were done too soon to show anything"
    launch.process.send_signal(last)
    assert launch.process.wait(1) == (-last if last == signal.SIGKILL else 128 + last)
    assert launch.committed() == {0: 3}
    assert "extracted: 3; failed: 0" in merge(tmp_path / "out").stdout


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_run_asked_to_stop_commits_the_batch_in_hand(tmp_path, many_rows, checkpoint, ranks):
    """Alone it exits 0. Of two ranks, each is asked as by a scheduler: at once with the launcher, which asks again."""
    inputs = [*arguments_for(many_rows, checkpoint), "--batch-size", 1]
    launch = Running(tmp_path / "out", tmp_path / "log", ranks, *inputs)
    launch.until_rows_are_done()
    until(lambda: all(map(listens, processes(launch.process))), launch.process)
    done = launch.bar()
    assert not segments(tmp_path / "out")
    assert launch.ends(signal.SIGTERM, everyone) == 0 or ranks
    assert launch.said().count("stopped by SIGTERM after a commit") == max(ranks, 1)
    committed = launch.committed()
    assert {rank: rows for rank, (rows, _, _) in launch.reported().items()} == committed
    assert committed[0] >= done
    rows = committed.total()
    assert rows < 31 * COPIES
    assert f"extracted: {rows}; failed: 0; missing: {31 * COPIES - rows}" in merge(tmp_path / "out").stdout


def test_term_to_accelerate_at_random_moments_loses_nothing_that_was_finished(
    tmp_path, many_rows, checkpoint, expected
):
    chance = random.Random(11)
    out, inputs = tmp_path / "out", [*arguments_for(many_rows, checkpoint), "--batch-size", 1]
    at_work = 0
    starting = 0.0  # seconds that a start takes here
    for number in range(TERMS):
        begun = time.monotonic()
        launch = Running(out, tmp_path / f"log{number}", 2, *inputs)
        if starting and chance.random() < 0.25:
            time.sleep(chance.uniform(0, starting))
        else:
            launch.until_rows_are_done()
            starting = starting or time.monotonic() - begun
            time.sleep(chance.uniform(0, 0.5))
        done = launch.bar()
        launch.ends(signal.SIGTERM)
        committed = launch.committed()
        assert {rank: rows for rank, (rows, _, _) in launch.reported().items() if rows} == committed
        assert committed[0] >= done, "rows that were finished are lost"
        at_work += committed.total() > 0
    assert at_work >= TERMS // 2, "too few of the signals came while there was something to lose"
    assert run(command(2, *inputs, "--output-dir", out)).returncode == 0
    assert merge(out).returncode == 0
    rows = read_published(out)
    assert_equal_to_reference(rows, of_copies(expected, rows))
    assert len(rows) == 31 * COPIES
    assert json.loads((out / "coverage.json").read_text())["duplicates"] == 0


def test_a_rank_that_dies_costs_the_other_nothing(tmp_path, many_rows, checkpoint):
    """torchrun ends the other one, which commits first."""
    inputs = [*arguments_for(many_rows, checkpoint), "--batch-size", 1]
    launch = Running(tmp_path / "out", tmp_path / "log", 2, *inputs)
    launch.until_rows_are_done()
    done = launch.bar()
    victims = [process for process in processes(launch.process)[1:] if process.environ().get("RANK") == "1"]
    victims[0].kill()
    assert launch.process.wait(LIMIT + 10) != 0
    assert launch.reported()[0][0] == launch.committed()[0] >= done
    assert "stopped by SIGTERM after a commit" in launch.said()


def test_of_two_launches_with_different_settings_at_the_same_moment_one_is_refused(tmp_path, photographs, expected):
    logs = [tmp_path / "merged", tmp_path / "adapter"]
    launches = [Running(tmp_path / "out", log, 0, *photographs, "--lora", log.name) for log in logs]
    statuses = [launch.process.wait(300) for launch in launches]
    assert sorted(statuses) == [0, 2], [launch.shown() for launch in launches]
    refused = launches[statuses.index(2)]
    assert refused.shown().count("error: ") == 1
    assert "--lora: " in refused.shown()
    assert merge(tmp_path / "out").returncode == 0
    rows = read_published(tmp_path / "out")
    assert rows.keys() == expected.keys()
    assert_equal_to_reference(rows, expected)
