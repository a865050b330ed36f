"""Whether a Slurm job with rows left goes back into the queue, and putting it there."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vqa_embeddings.base.console import print_line
from vqa_embeddings.base.files import publish_text
from vqa_embeddings.cluster.world import QueuedJob
from vqa_embeddings.errors import StorageError, one_line

FRUITLESS_RUNS = 2  # in a row, after which a job does not go back into the queue by itself


@dataclass(frozen=True)
class RowsLeft:
    """How many rows of a slice are still to do, and how many it has; None where the folder holds no run yet."""

    rows: int | None = None
    of: int | None = None

    def __str__(self) -> str:
        if self.rows is None:
            return "nothing begun"
        return f"{self.rows} of its {self.of} rows left" if self.rows else f"all {self.of} rows accounted for"


def requeue(job: QueuedJob, record: Path, before: RowsLeft, left: RowsLeft) -> int:
    """Put a job with rows left back into the queue, unless it makes no progress. Returns the exit status.

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
        if not should_continue(facts):
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


def count_fruitless(earlier: int, before: RowsLeft, left: RowsLeft) -> int:
    """How many runs in a row have committed nothing, this one included; `earlier` is what it was before this run."""
    at_first = left.of if before.rows is None else before.rows
    return earlier + 1 if left.rows == at_first or left.rows is None else 0


def should_continue(facts: Mapping[str, str]) -> bool:
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


def _read_record(path: Path, before: RowsLeft) -> int:
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
