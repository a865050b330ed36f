"""Start a launch, pass signals on to it, and see afterwards which rows are left. The files of launch/ begin with it:

    python -m vqa_embeddings.app.supervise accelerate launch extract_dist.py -- <arguments of extract_dist.py>

A launcher's own exit status says little: `accelerate launch` reports a signal as a failure of its own, and `srun` may
report a lost node as success. What the output folder holds decides. A Slurm job that a signal stopped with rows of its
own slice left is put back into the queue, until two runs in a row have committed nothing.

Exit status: the launch's where it failed; else 0 where every row of the slice is accounted for or a signal stopped the
launch, and 1 where rows are left for another reason.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np

from vqa_embeddings.app.options import ExtractOptions
from vqa_embeddings.base.console import print_line
from vqa_embeddings.base.files import publish_text
from vqa_embeddings.cli.options import parse_extract
from vqa_embeddings.cluster.messages import REFUSED
from vqa_embeddings.cluster.sharding import choose_slice
from vqa_embeddings.cluster.signals import StopFlag
from vqa_embeddings.cluster.world import QueuedJob, read_array_slice, read_queued_job, same_command
from vqa_embeddings.data.table import Table
from vqa_embeddings.errors import InputError, StorageError, one_line
from vqa_embeddings.store.catalog import scan
from vqa_embeddings.store.run import SHARDS_FOLDER, Run, read_run, read_run_rows

FRUITLESS_RUNS = 2  # in a row, after which a job does not go back into the queue by itself
MPI_LAUNCHERS = ("mpirun", "mpiexec", "orterun", "prterun")  # what their names begin with
STOPPED = {128 + number for number in StopFlag.SIGNALS}  # exit statuses of a launcher that a signal ended


def main(argv: Sequence[str]) -> int:
    """Run the launch that the arguments name, and say what has come of it. Returns the exit status."""
    if "--" not in argv:
        print("error: expected LAUNCHER... -- ARGUMENTS of extract_dist.py; found no --", file=sys.stderr)
        return REFUSED
    command, arguments = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    options = parse_extract(None, arguments)
    launch, slice_ = Launch([*command, *arguments]), Slice(options)
    if options.plan:  # nothing is done, and so nothing is left undone
        return launch.wait()
    before = slice_.count_left()  # while the launch loads its model
    status = launch.wait()
    left = slice_.count_left()
    signalled = launch.signalled or status in STOPPED
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


class Launch:
    """The launcher's process, and the signals that go on to it."""

    def __init__(self, command: Sequence[str]) -> None:
        # On TERM, srun kills its ranks at once, and Open MPI's mpirun after a second; USR1 they pass on, all kinds of
        # them. torchrun, which accelerate is, only passes TERM on.
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


@dataclass(frozen=True)
class Left:
    """How many rows of a slice are still to do, and how many it has; None where the folder holds no run yet."""

    rows: int | None = None
    of: int | None = None

    def __str__(self) -> str:
        if self.rows is None:
            return "nothing begun"
        return f"{self.rows} of its {self.of} rows left" if self.rows else f"all {self.of} rows accounted for"


class Slice:
    """The rows of this launch's slice. Its table is read once: after a signal there is no time for millions of rows."""

    def __init__(self, options: ExtractOptions) -> None:
        self._options = options
        self._known: tuple[Run, Table, np.ndarray] | None = None

    def count_left(self) -> Left:
        """The rows that are missing now, or have failed where those are to be tried again."""
        try:
            run, table, inside = self._known = self._known or self._read()
            coverage = scan(self._options.output_dir, run, table).coverage()
        except (InputError, StorageError, OSError):  # as the launch will be, and says why
            return Left()
        pending = coverage.failed if self._options.retry_failed else coverage.missing
        return Left(int(np.count_nonzero(inside & pending)), int(np.count_nonzero(inside)))

    def _read(self) -> tuple[Run, Table, np.ndarray]:
        run = read_run(self._options.output_dir)
        table = read_run_rows(self._options.output_dir, run)
        part = self._options.slice or read_array_slice() or (0, 1)
        return run, table, choose_slice(table.pictures(), part)


def requeue(job: QueuedJob, record: Path, before: Left, left: Left) -> int:
    """Put a job that a signal stopped back into the queue, unless it gets nowhere. Returns the exit status.

    Args:
        record: the file that holds, from one run of the job to the next, how many in a row have committed nothing.
        before: what was left when this run began.
    """
    fruitless = count_fruitless(_read_record(record, before) if job.restarts else 0, before, left)
    with suppress(StorageError, OSError):  # a full disk must not keep the job from going on
        record.parent.mkdir(parents=True, exist_ok=True)
        publish_text(record, f"{fruitless} {left.rows}\n")
    try:
        facts = _ask_slurm(job)
        if facts.get("Restarts") != str(job.restarts):
            log(f"stopped with {left}; Slurm has put the job back into the queue itself")
            return 0
        if not is_to_go_on(facts):
            state = f"{facts.get('JobState')}, reason {facts.get('Reason')}"
            log(f"stopped with {left}; Slurm ends the job ({state}): submit it again, it continues")
            return 0
        if fruitless >= FRUITLESS_RUNS:
            log(
                f"given up with {left}: {fruitless} runs in a row were stopped before they had committed anything; "
                "give the job more time (--time), or have it commit more often (--checkpoint-interval); submit it again"
            )
            return 1
        _scontrol("requeue", job.name)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        log(f"stopped with {left}, and not put back into the queue ({one_line(reason)}); submit it again, it continues")
        return 1
    log(f"stopped with {left}; put back into the queue")
    return 0


def count_fruitless(earlier: int, before: Left, left: Left) -> int:
    """How many runs in a row have committed nothing, this one included; `earlier` is what it was before this run."""
    at_first = left.of if before.rows is None else before.rows
    return earlier + 1 if left.rows == at_first or left.rows is None else 0


def is_to_go_on(facts: Mapping[str, str]) -> bool:
    """Whether a batch job that was asked to stop, and that Slurm has not put back into the queue, is meant to go on.

    One that is running was only sent a signal, and one at its time limit would otherwise end for good. One that ends
    for another reason was cancelled, and must not begin again.

    Args:
        facts: what `scontrol show job` says. While a job ends its state is COMPLETING, whatever the reason.
    """
    return facts.get("BatchFlag") == "1" and (facts.get("JobState") == "RUNNING" or facts.get("Reason") == "TimeLimit")


def log(sentence: str) -> None:
    """Print a sentence about the launch as a whole, as a line of its log."""
    print_line(f"launch: {sentence}")


def _read_record(path: Path, before: Left) -> int:
    """How many runs before this one have committed nothing; 0 where one since then, which left no record, has."""
    try:
        fruitless, rows = path.read_text().split()
        return int(fruitless) if rows == str(before.rows) else 0
    except (OSError, ValueError):
        return 0


def _ask_slurm(job: QueuedJob) -> dict[str, str]:
    shown = _scontrol("--oneliner", "show", "job", job.name)
    return dict(field.split("=", 1) for field in shown.split() if "=" in field)


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]  # which shows the names of jobs and folders, in whatever encoding they have
    done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", errors="replace", timeout=60)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
