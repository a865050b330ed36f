"""A launch under way, which is asked to stop: what it shows, says and leaves behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import random
import re
import signal
import struct
import subprocess
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import h5py
import psutil

from tests.helpers.launching import COPIES, TERMS, begin, merge, of_copies, processes, segments
from tests.helpers.published_reader import read_published
from tests.system.test_rows import assert_equal_to_reference
from vqa_embeddings.store.heartbeat import read_heartbeats

LIMIT = 20  # seconds from a signal to the end


def until(condition: Callable[[], object], launch: subprocess.Popen, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert launch.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def all_end(some: list[psutil.Process], seconds: float) -> bool:
    """Whether they all end in time. The machine may take longer to clear away what nobody waits for."""
    deadline = time.monotonic() + seconds
    while any(map(runs, some)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(runs, some))


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


Processes = list[psutil.Process]  # of a launch, the launcher first


def the_launcher(launch: Processes) -> Processes:
    return launch[:1]


def everyone(launch: Processes) -> Processes:
    return launch


def listens(process: psutil.Process) -> bool:
    """Whether TERM does not simply end the process."""
    masks = re.findall(r"Sig(?:Blk|Cgt):\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return any(int(mask, 16) >> (signal.SIGTERM - 1) & 1 for mask in masks)


class Running:
    """A launch into `out`, and what it says."""

    def __init__(self, line: list[str], out: Path, log: Path, **environment: str) -> None:
        self.out, self._said, self._shown = out, log.with_suffix(".out"), log.with_suffix(".err")
        self._before = set(segments(out))
        screen, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
        with open(self._said, "wb") as said, open(terminal, "wb", buffering=0) as errors:
            self.process = begin(line, said, errors, **environment)
        self._shown.touch()
        threading.Thread(target=self._watch, args=(screen,), daemon=True).start()

    def _watch(self, screen: int) -> None:
        with open(self._shown, "wb", buffering=0) as shown, contextlib.suppress(OSError):  # once nobody writes any more
            while text := os.read(screen, 4096):
                shown.write(text)
        os.close(screen)

    def bar(self) -> int:
        """Rows that the bar, which is the main rank's, counts as done by all."""
        return max(map(int, re.findall(r" (\d+)/\d+ \[", self.shown())), default=0)

    def shown(self) -> str:
        return self._shown.read_text()

    def said(self) -> str:
        return self._said.read_text()

    def until_rows_are_done(self) -> None:
        until(self.bar, self.process)

    def until_all_have_begun(self, ranks: int) -> None:
        """The bar may count rows while another rank still loads its model."""
        until(lambda: len(read_heartbeats(self.out)) == ranks, self.process)

    def until_all_have_done_rows(self, ranks: int) -> None:
        self.until_all_have_begun(ranks)
        until(lambda: all(pace.done[-1] for pace in read_heartbeats(self.out)), self.process)

    def ends(self, number: signal.Signals, whom: Callable[[Processes], Processes] = the_launcher) -> int:
        """The exit status after a signal to some of the processes, within the limit; then none of them is left."""
        started = processes(self.process)
        for process in whom(started):
            process.send_signal(number)
        status = self.process.wait(LIMIT)
        assert all_end(started, 1), "a rank outlived its launcher"
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


def stop_at_random_moments(launches: Iterable[Running], chance: random.Random) -> None:
    """Ask each launch to stop, some while they start: it loses no row that its bar had counted."""
    at_work = 0
    starting = 0.0  # seconds that a start takes here
    for launch in launches:
        begun = time.monotonic()
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
        assert committed.total() >= done, "rows that were finished are lost"
        at_work += committed.total() > 0
    assert at_work >= TERMS // 2, "too few of the signals came while there was something to lose"


def assert_complete(out: Path, expected: dict[str, object]) -> None:
    """Every row of `many_rows` is there, once, with the values of an undisturbed run."""
    assert merge(out).returncode == 0
    rows = read_published(out)
    assert_equal_to_reference(rows, of_copies(expected, rows))
    assert len(rows) == 31 * COPIES
    assert json.loads((out / "coverage.json").read_text())["duplicates"] == 0
