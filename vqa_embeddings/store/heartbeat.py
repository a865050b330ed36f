"""How far each rank is: a line every few seconds beside its segments, for people to look at.

    OUT/shards/<launch>-r<rank>/pace.csv    time,to_do,done,failed,memory,device

Nothing is decided by these files. They count rows that are done and may not be committed yet, and one that cannot be
written ends no run. Those of earlier versions have no memory and no device.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vqa_embeddings.store.run import SHARDS_FOLDER, shard_folder

HEARTBEAT_FILE = "pace.csv"
HEADER = "time,to_do,done,failed,memory,device"
WRITE_SECONDS = 5.0  # between two lines of a rank
LINE_BYTES = 120  # that a line has at most
DEVICE_BYTES = 48  # that the name of a device takes of it
LISTED = 20  # shards of ranks that no longer work
RECENT_SECONDS = 300.0  # over which rows a second are taken
SILENT_SECONDS = 180.0  # after which a rank that has not done all it had to is taken for stopped


@dataclass(frozen=True)
class Heartbeat:
    """What one rank of one launch has said, line after line.

    Attributes:
        shard: name of its folder.
        times: float `[n]`, seconds since 1970 by its own clock.
        to_do: rows that were its share.
        done: int64 `[n]`, rows done so far, those that failed among them.
        failed: int64 `[n]`.
        memory: the most that it has used so far, bytes: of the GPU, or where it has none of the machine; 0 of a file
            that does not say.
        device: what it computes on; empty likewise.
    """

    shard: str
    times: np.ndarray
    to_do: int
    done: np.ndarray
    failed: np.ndarray
    memory: int = 0
    device: str = ""

    @property
    def left(self) -> int:
        """Rows of its share that were not done when it last said something."""
        return self.to_do - int(self.done[-1])

    def is_at_work(self, now: float) -> bool:
        """Whether it seems to go on, `now` being seconds since 1970."""
        return self.left > 0 and now - float(self.times[-1]) < SILENT_SECONDS

    def rows_per_second(self) -> float:
        """Over the last minutes that it has been at work; 0 where it has said one thing only."""
        since = int(np.searchsorted(self.times, self.times[-1] - RECENT_SECONDS))
        seconds = float(self.times[-1] - self.times[since])
        return float(self.done[-1] - self.done[since]) / seconds if seconds > 0 else 0.0


class HeartbeatWriter:
    """Says how far this rank is, at most every few seconds.

    Args:
        folder: the output folder.
        to_do: rows that are its share.
        device: the name of what it computes on.
        memory: gives the most memory that it has used so far, bytes. Called for each line.
    """

    def __init__(
        self, folder: Path, launch: str, rank: int, to_do: int, device: str = "", memory: Callable[[], int] = int
    ) -> None:
        self._path = shard_folder(folder, launch, rank) / HEARTBEAT_FILE
        self._to_do = to_do
        self._device = name_device(device)
        self._memory = memory
        self._next = 0.0
        self._write(f"{HEADER}\n", 0, 0)

    def update(self, done: int, failed: int, last: bool = False) -> None:
        """Say it, unless it was said a moment ago and is not the last word."""
        if last or time.monotonic() >= self._next:
            self._write("", done, failed)

    def _write(self, before: str, done: int, failed: int) -> None:
        with suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)  # not its parents: a folder that is gone stays so
            with open(self._path, "ab", buffering=0) as stream:
                numbers = f"{time.time():.1f},{self._to_do},{done},{failed},{self._memory()}"
                stream.write(f"{before}{numbers},{self._device}\n".encode())
        self._next = time.monotonic() + WRITE_SECONDS


def name_device(name: str) -> str:
    """The name of a device as a field of a line: without commas and line breaks, and short."""
    plain = "".join(character if character.isascii() and character.isprintable() else " " for character in name)
    return " ".join(plain.replace(",", " ").split())[:DEVICE_BYTES].strip()


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """What all ranks of all launches into an output folder have said, by the names of their shards."""
    found = (read_heartbeat(path) for path in sorted((folder / SHARDS_FOLDER).glob(f"*/{HEARTBEAT_FILE}")))
    return [heartbeat for heartbeat in found if heartbeat is not None]


def read_heartbeat(path: Path) -> Heartbeat | None:
    """What one rank has said; None where that is nothing, or no longer readable."""
    try:
        lines = path.read_bytes().decode(errors="replace").splitlines(keepends=True)
    except OSError:
        return None
    said = [line for line in map(_parse, lines) if line is not None]
    if not said:
        return None
    times, to_do, done, failed = np.array([one[:4] for one in said]).T
    order = np.argsort(times, kind="stable")  # clocks are set back, too
    return Heartbeat(
        path.parent.name,
        times[order],
        int(to_do[-1]),
        done[order].astype(np.int64),
        failed[order].astype(np.int64),
        max(one.memory for one in said),
        next((one.device for one in said if one.device), ""),
    )


def read_latest(path: Path) -> tuple[int, int]:
    """Rows that a rank has done, and how many of them failed, by its last line; zeros where there is none."""
    with suppress(OSError), open(path, "rb", buffering=0) as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - 3 * LINE_BYTES))
        lines = stream.read().decode(errors="replace").splitlines(keepends=True)
        for said in map(_parse, reversed(lines)):
            if said is not None:
                return int(said.done), int(said.failed)
    return 0, 0


class _Said(NamedTuple):
    time: float
    to_do: float
    done: float
    failed: float
    memory: int
    device: str


def _parse(line: str) -> _Said | None:
    """What a whole line says; None of the header, of a line that is being written, or of damage."""
    fields = line.rstrip("\n").split(",")
    if len(fields) == 4:  # of an earlier version
        fields += ["0", ""]
    with suppress(ValueError):
        *numbers, memory, device = fields
        time_, to_do, done, failed = map(float, numbers)
        whole = line.endswith("\n") and memory.isdecimal() and device == name_device(device)
        if whole and 0 <= failed <= done <= to_do < np.inf and np.isfinite(time_):
            return _Said(time_, to_do, done, failed, int(memory), device)
    return None


def describe_shards(committed: Mapping[str, tuple[int, int]], heartbeats: Iterable[Heartbeat], now: float) -> list[str]:
    """A table of the shards, those at work in full, and how long they will take together.

    Args:
        committed: for each shard, rows extracted and rows failed in its segments.
        heartbeats: what their ranks have said.
        now: seconds since 1970.
    """
    at_work = {heartbeat.shard: heartbeat for heartbeat in heartbeats if heartbeat.is_at_work(now)}
    lines = [*_describe_ended(committed, at_work.keys()), *_describe_working(committed, at_work)]
    if not lines:
        return []
    header = ("shard", "committed", "failed", "done now", "rows/s")
    return [*_align([header, *lines]), _describe_rate(list(at_work.values()))]


Line = tuple[str, ...]


def _describe_ended(committed: Mapping[str, tuple[int, int]], at_work: Collection[str]) -> Iterator[Line]:
    """A line for each of the last shards whose ranks have ended, and one for all before."""
    ended = sorted(committed.keys() - set(at_work))
    before, listed = ended[:-LISTED], ended[-LISTED:]
    if before:
        extracted, failed = (sum(counts) for counts in zip(*(committed[name] for name in before), strict=True))
        yield f"{len(before)} before these", str(extracted), str(failed), "", ""
    yield from ((name, *map(str, committed[name]), "", "") for name in listed)


def _describe_working(committed: Mapping[str, tuple[int, int]], at_work: Mapping[str, Heartbeat]) -> Iterator[Line]:
    for name, heartbeat in sorted(at_work.items()):
        extracted, failed = map(str, committed.get(name, (0, 0)))
        done = f"{heartbeat.done[-1]} of {heartbeat.to_do}"
        yield name, extracted, failed, done, f"{heartbeat.rows_per_second():.1f}"


def _align(lines: Sequence[Line]) -> Iterator[str]:
    """The lines as a table: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *texts in lines:
        yield "  ".join([name.ljust(widths[0]), *map(str.rjust, texts, widths[1:])]).rstrip()


def _describe_rate(heartbeats: Sequence[Heartbeat]) -> str:
    if not heartbeats:
        return "no rank is at work"
    rate, left = sum(one.rows_per_second() for one in heartbeats), sum(one.left for one in heartbeats)
    ranks = f"{len(heartbeats)} rank{'s' * (len(heartbeats) > 1)} at work"
    if rate == 0:
        return f"{ranks}, {left} rows to do, and no speed measured yet"
    minutes = f"over the last {RECENT_SECONDS / 60:.0f} minutes"
    return f"{ranks}, {rate:.1f} rows/s {minutes}: {duration(left / rate)} left for their {left} rows"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as a person says them: 2:05:00, 3:20."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
