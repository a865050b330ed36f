"""One launch from outside: its launcher's process, the signals passed on to it, and the rows that are left after it."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import numpy as np

from vqa_embeddings.app.options import ExtractOptions
from vqa_embeddings.app.requeue import RowsLeft, log, requeue
from vqa_embeddings.cluster.sharding import rows_of_slice
from vqa_embeddings.cluster.signals import StopFlag
from vqa_embeddings.cluster.world import choose_slice, read_queued_job, same_command
from vqa_embeddings.data.table import Table
from vqa_embeddings.errors import InputError, StorageError
from vqa_embeddings.store.catalog import scan
from vqa_embeddings.store.run import SHARDS_FOLDER, Run, read_run, read_run_rows

MPI_LAUNCHERS = ("mpirun", "mpiexec", "orterun", "prterun")  # what their names begin with
STOPPED = {128 + number for number in StopFlag.SIGNALS}  # exit statuses of a launcher that a signal ended


def supervise(command: Sequence[str], options: ExtractOptions) -> int:
    """Run a launch, count the rows that it leaves, and print what follows. Returns the exit status.

    Args:
        command: the launcher, the program, and the program's arguments.
        options: those arguments, parsed.
    """
    launcher, rows = LauncherProcess(command), RowCounter(options)
    if options.plan:  # nothing is done, and so nothing is left undone
        return launcher.wait()
    before = rows.count_left()  # while the launch loads its model
    status = launcher.wait()
    left = rows.count_left()
    signalled = launcher.signalled or status in STOPPED
    if not signalled and status:
        log(f"the launch ended with status {status} and {left}; what it printed says why")
        return status
    if left.rows == 0 or (options.retry_failed and not signalled):  # rows that fail again are data
        log(str(left) if left.rows == 0 else f"tried again what had failed, with {left}: failed.csv will say why")
        return 0
    job = read_queued_job()
    if job is not None:
        return requeue(job, options.output_dir / SHARDS_FOLDER / f".stopped-{job.name}", before, left)
    ended = "stopped by a signal" if signalled else "a rank was stopped, or has died"
    log(f"{ended}, with {left}; {same_command(options.slice)}")
    return 0 if signalled else 1


class LauncherProcess:
    """The launcher's process, and the signals that go on to it."""

    def __init__(self, command: Sequence[str]) -> None:
        # On TERM, srun kills its ranks at once, and Open MPI's mpirun after a second; USR1 they pass on, all kinds of
        # them. torchrun, on which accelerate is built, only passes TERM on.
        name = Path(command[0]).name
        self._number = signal.SIGUSR1 if name.startswith(("srun", *MPI_LAUNCHERS)) else signal.SIGTERM
        self._process: subprocess.Popen[bytes] | None = None
        self.signalled = False
        # A scheduler may send TERM to every process at once. The ranks can do with that, Open MPI's mpirun cannot.
        kept_out = {signal.SIGTERM, signal.SIGINT} if name.startswith(MPI_LAUNCHERS) else set()
        for number in StopFlag.SIGNALS:
            signal.signal(number, self._pass_on)
        signal.pthread_sigmask(signal.SIG_BLOCK, kept_out)  # which the launcher inherits
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # srun and mpirun would read what is typed
        signal.pthread_sigmask(signal.SIG_UNBLOCK, kept_out)
        if self.signalled:  # between the two lines above
            self._process.send_signal(self._number)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
        if self._process is not None:
            self._process.send_signal(self._number)

    def wait(self) -> int:
        """Its exit status, as a shell gives it: 128 and the number of the signal that ended it."""
        assert self._process is not None
        status = self._process.wait()
        return status if status >= 0 else 128 - status


class RowCounter:
    """Counts the rows of a launch's slice that are left.

    The table is read once: after a signal there is no time to read millions of rows.
    """

    def __init__(self, options: ExtractOptions) -> None:
        self._options = options
        self._known: tuple[Run, Table, np.ndarray] | None = None

    def count_left(self) -> RowsLeft:
        """The rows that are missing now, or have failed where those are to be tried again."""
        try:
            run, table, inside = self._known = self._known or self._read()
            coverage = scan(self._options.output_dir, run, table).coverage()
        except (InputError, StorageError, OSError):  # the launch meets the same error, and reports it
            return RowsLeft()
        pending = coverage.pending(self._options.retry_failed)
        return RowsLeft(int(np.count_nonzero(inside & pending)), int(np.count_nonzero(inside)))

    def _read(self) -> tuple[Run, Table, np.ndarray]:
        run = read_run(self._options.output_dir)
        table = read_run_rows(self._options.output_dir, run)
        return run, table, rows_of_slice(table.pictures(), choose_slice(self._options.slice))
