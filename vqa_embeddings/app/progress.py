"""How far a launch is: the main rank shows one bar for all of them, or lines where there is no terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from vqa_embeddings.cluster.world import World
from vqa_embeddings.layers.device import Device, peak_memory
from vqa_embeddings.records import Extracted, Failed
from vqa_embeddings.store.heartbeat import HEARTBEAT_FILE, WRITE_SECONDS, HeartbeatWriter, read_latest
from vqa_embeddings.store.run import shard_folder

BAR_SECONDS = 0.5  # between two updates of the bar in a terminal
FIRST_LINE_SECONDS, LINE_SECONDS = 1.0, 60.0  # in a log: the first line soon, the next twice as late, up to a minute
LINE_FORMAT = "{percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
RANKS_A_SECOND = 20  # whose heartbeats the main rank reads for the bar


class Progress:
    """Counts the rows of this rank and writes them into its heartbeat; at the main rank it shows those of all ranks."""

    def __init__(
        self, world: World, folder: Path, launch: str, rows: int, rows_of_all_ranks: int, device: Device
    ) -> None:
        """Begin with nothing done.

        Args:
            folder: the output folder.
            launch: name of the launch.
            rows: how many this rank is to do.
            rows_of_all_ranks: how many all ranks of the launch are to do.
            device: what this rank computes on.
        """
        self._done = self._failed = 0
        self._heartbeat = HeartbeatWriter(
            folder, launch, world.rank, rows, device.description, partial(peak_memory, device.name)
        )
        together = world.size > 1 and world.can_agree
        self._bar = _Bar(rows_of_all_ranks if together else rows) if world.main else None
        others = [rank for rank in range(world.size) if rank != world.rank] if together and world.main else []
        self._other_ranks = _OtherRanks([shard_folder(folder, launch, rank) / HEARTBEAT_FILE for rank in others])

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._other_ranks.stop()
        self._heartbeat.update(self._done, self._failed, last=True)
        if self._bar:
            self._bar.show(*self._of_all_ranks(), last=True)

    def update(self, records: Sequence[Extracted | Failed]) -> None:
        """Count the records that a unit of work has finished."""
        self._done += len(records)
        self._failed += sum(isinstance(record, Failed) for record in records)
        self._heartbeat.update(self._done, self._failed)
        if self._bar:
            self._bar.show(*self._of_all_ranks())

    def _of_all_ranks(self) -> tuple[int, int]:
        return self._done + self._other_ranks.done, self._failed + self._other_ranks.failed


class _OtherRanks:
    """What the other ranks have done, by their heartbeats. A thread reads them, so that a slow disk delays no rank."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.done = self.failed = 0
        self._paths = paths
        self._stopped = threading.Event()
        if paths:
            threading.Thread(target=self._read, name="progress", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _read(self) -> None:
        pause = max(WRITE_SECONDS, len(self._paths) / RANKS_A_SECOND) / 2
        while not self._stopped.wait(pause):
            done, failed = zip(*map(read_latest, self._paths), strict=True)
            self.done, self.failed = sum(done), sum(failed)


class _Bar:
    """A bar in a terminal, or lines in a log."""

    def __init__(self, rows: int) -> None:
        self._lines = not sys.stderr.isatty()
        self._pause = FIRST_LINE_SECONDS if self._lines else BAR_SECONDS
        self._next = time.monotonic() + self._pause
        form = {"bar_format": LINE_FORMAT} if self._lines else {"dynamic_ncols": True}
        stream = _ErrorStream(self._lines)
        self._bar = tqdm(total=rows, unit=" rows", file=stream, mininterval=0, miniters=1, smoothing=0.05, **form)

    def show(self, done: int, failed: int, last: bool = False) -> None:
        """Show it, unless it was shown a moment ago and is not the last time."""
        if not last and time.monotonic() < self._next:
            return
        self._bar.set_postfix_str(f"{failed} failed" if failed else "", refresh=False)
        if last:
            self._bar.n = done
            self._bar.close()  # which shows it
            return
        self._bar.update(done - self._bar.n)
        self._pause = min(2 * self._pause, LINE_SECONDS) if self._lines else BAR_SECONDS
        self._next = time.monotonic() + self._pause


class _ErrorStream:
    """Standard error, for tqdm. Where it cannot be written, as with logs on a full disk, the work goes on."""

    def __init__(self, lines: bool) -> None:
        self._lines = lines

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        if self._lines:
            text = text.strip()
            text = text and text + "\n"
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()
