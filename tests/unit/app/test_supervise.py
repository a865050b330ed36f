"""What is said and done after a launch: by the rows that the folder holds, and by what Slurm says of the job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.launching import ROOT
from tests.helpers.output_folders import ROWS, begin_run, commit
from vqa_embeddings.app import requeue as requeue_module
from vqa_embeddings.app import supervise as supervise_module
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.app.requeue import RowsLeft, count_fruitless, requeue, should_continue
from vqa_embeddings.app.supervise import RowCounter
from vqa_embeddings.cli.options import parse_extract
from vqa_embeddings.cluster.world import QueuedJob, read_queued_job
from vqa_embeddings.errors import StorageError
from vqa_embeddings.records import Failed

ARGUMENTS = ["--vqa-dataset", str(DATA / "vqa.csv"), "--images-dir", str(DATA)]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"JobState": "RUNNING", "Reason": "None"}, True),
        ({"JobState": "COMPLETING", "Reason": "TimeLimit"}, True),
        ({"JobState": "TIMEOUT", "Reason": "TimeLimit"}, True),
        ({"JobState": "COMPLETING", "Reason": "None"}, False),
        ({"JobState": "CANCELLED", "Reason": "None"}, False),
        ({"JobState": "RUNNING", "Reason": "None", "BatchFlag": "0"}, False),
    ],
    ids=["signalled", "time limit", "after it", "cancelled", "cancelled before", "salloc"],
)
def test_a_job_goes_on_unless_somebody_ended_it(facts, expected):
    assert should_continue({"BatchFlag": "1", **facts}) == expected


@pytest.mark.parametrize(
    ("earlier", "before", "left", "expected"),
    [
        (0, RowsLeft(9, 9), RowsLeft(5, 9), 0),
        (0, RowsLeft(5, 9), RowsLeft(5, 9), 1),
        (1, RowsLeft(5, 9), RowsLeft(5, 9), 2),
        (1, RowsLeft(5, 9), RowsLeft(4, 9), 0),
        (0, RowsLeft(), RowsLeft(9, 9), 1),
        (0, RowsLeft(), RowsLeft(8, 9), 0),
        (1, RowsLeft(), RowsLeft(), 2),
    ],
)
def test_runs_that_commit_nothing_are_counted_in_a_row(earlier, before, left, expected):
    assert count_fruitless(earlier, before, left) == expected


def test_a_job_has_the_name_that_scontrol_knows():
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "3"}
    assert (read_queued_job(array).name, read_queued_job(array).restarts) == ("7_2", 3)
    assert (read_queued_job({"SLURM_JOB_ID": "9"}).name, read_queued_job({"SLURM_JOB_ID": "9"}).restarts) == ("9", 0)
    assert read_queued_job({}) is None


def supervise(launcher: list[str], *arguments: str, **slurm: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "vqa_embeddings.cli.supervise", *launcher, "--", *ARGUMENTS, *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | slurm
    return subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize("status", [1, 2])
def test_what_the_launch_refused_or_broke_is_passed_on(tmp_path, status):
    launch = supervise(["bash", "-c", f"exit {status}"], "--output-dir", str(tmp_path))
    said, _ = launch.communicate(timeout=60)
    assert launch.returncode == status
    assert f"ended with status {status} and nothing begun" in said


def test_a_launch_that_says_it_did_well_is_not_believed(tmp_path):
    """As mpirun and srun do after a rank has died, or a node."""
    launch = supervise(["true"], "--output-dir", str(tmp_path))
    assert "a rank was stopped, or has died, with nothing begun" in launch.communicate(timeout=60)[0]
    assert launch.returncode == 1


def test_a_shell_inside_an_array_is_told_which_slice_goes_on(tmp_path):
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}
    launch = supervise(["true"], "--output-dir", str(tmp_path), **array)
    assert "continues (slice 3 of 16, from the Slurm array: elsewhere" in launch.communicate(timeout=60)[0]


def test_a_plan_leaves_nothing_undone(tmp_path):
    launch = supervise(["true"], "--output-dir", str(tmp_path), "--plan")
    assert launch.communicate(timeout=60)[0] == ""
    assert launch.returncode == 0


def test_rows_that_fail_again_are_no_reason_to_go_on(tmp_path):
    out = begin_run(tmp_path)
    commit(out, [Failed(row, "PictureNotFound", "it was not there") for row in range(ROWS)])
    launch = supervise(["true"], "--output-dir", str(out), "--retry-failed")
    assert f"tried again what had failed, with {ROWS} of its {ROWS} rows left" in launch.communicate(timeout=60)[0]
    assert launch.returncode == 0


@pytest.fixture
def job(tmp_path, monkeypatch) -> Callable[..., QueuedJob]:
    """Makes a job about which `scontrol` says what the test wants."""

    def make(restarts: int, **facts: str) -> QueuedJob:
        shown = " ".join(
            f"{key}={value}" for key, value in {"JobId": "7", "JobName": "größe", "BatchFlag": "1", **facts}.items()
        )
        scontrol = tmp_path / "bin" / "scontrol"
        scontrol.parent.mkdir(exist_ok=True)
        script = f'#!/bin/sh\n[ "$1" = requeue ] && echo "$2" >> {tmp_path}/requeued || echo "{shown}"\n'
        scontrol.write_text(script, encoding="latin-1")  # as a job's name may be
        scontrol.chmod(0o755)
        monkeypatch.setenv("PATH", str(scontrol.parent), prepend=os.pathsep)
        return QueuedJob("7", restarts)

    return make


def requeued(tmp_path: Path) -> int:
    return len((tmp_path / "requeued").read_text().split()) if (tmp_path / "requeued").exists() else 0


def test_a_job_gives_up_after_two_runs_in_a_row_without_a_commit(tmp_path, job):
    record = tmp_path / "shards" / ".stopped-7"
    running = {"JobState": "RUNNING"}
    assert requeue(job(0, Restarts="0", **running), record, RowsLeft(), RowsLeft(9, 9)) == 0
    assert requeue(job(1, Restarts="1", **running), record, RowsLeft(9, 9), RowsLeft(5, 9)) == 0
    assert requeue(job(2, Restarts="2", **running), record, RowsLeft(5, 9), RowsLeft(5, 9)) == 0
    # The third run has lost its node, and so left no record, but had committed a row.
    assert requeue(job(4, Restarts="4", **running), record, RowsLeft(4, 9), RowsLeft(4, 9)) == 0
    assert requeued(tmp_path) == 4
    assert requeue(job(5, Restarts="5", **running), record, RowsLeft(4, 9), RowsLeft(4, 9)) == 1
    assert requeued(tmp_path) == 4


def test_a_job_that_slurm_has_put_back_has_not_given_up(tmp_path, job, capsys):
    record = tmp_path / "shards" / ".stopped-7"
    for run in range(3):
        stopped = job(run, Restarts=str(run + 1), JobState="PENDING")
        assert requeue(stopped, record, RowsLeft(9, 9), RowsLeft(9, 9)) == 0
        assert "Slurm has put the job back" in capsys.readouterr().out
    assert requeued(tmp_path) == 0


def test_the_rows_of_a_slice_are_counted_anew_and_its_table_read_once(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    out = begin_run(tmp_path)
    rows = RowCounter(parse_extract(None, [*ARGUMENTS, "--slice", "0/2", "--output-dir", str(out)]))
    before = rows.count_left()
    assert before.rows == before.of < ROWS
    commit(out, [Failed(row, "PictureNotFound", "it was not there") for row in range(ROWS)])
    (out / "rows.csv").unlink()
    assert rows.count_left() == RowsLeft(0, before.of)


@pytest.mark.parametrize(("name", "passed_on"), [("accelerate", "TERM"), ("srun", "USR1"), ("mpirun", "USR1")])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_go_on_as_one_that_the_launcher_hands_to_its_ranks(tmp_path, name, passed_on, sent):
    launcher = tmp_path / name
    heard = "; ".join(f"trap 'echo heard {number}; exit 1' {number}" for number in ("TERM", "USR1"))
    launcher.write_text(f"#!/bin/bash\n{heard}\necho ready\nwhile :; do sleep 0.1; done\n")
    launcher.chmod(0o755)
    launch = supervise([str(launcher)], "--output-dir", str(tmp_path / "out"))
    assert launch.stdout.readline() == "ready\n"
    launch.send_signal(sent)
    said, _ = launch.communicate(timeout=60)
    assert said.splitlines() == [
        f"heard {passed_on}",
        "launch: stopped by a signal, with nothing begun; the same command continues",
    ]
    assert launch.returncode == 0


def test_a_disk_that_fails_keeps_no_job_from_going_on(tmp_path, monkeypatch):
    """Neither what cannot be counted nor what cannot be remembered is a reason to leave a job stopped."""

    def fails(*arguments):
        raise StorageError("the disk is full")

    asked = []
    monkeypatch.setattr(supervise_module, "read_run", fails)
    monkeypatch.setattr(requeue_module, "publish_text", fails)
    monkeypatch.setattr(
        requeue_module, "_ask_slurm", lambda job: {"Restarts": "0", "BatchFlag": "1", "JobState": "RUNNING"}
    )
    monkeypatch.setattr(requeue_module, "_scontrol", lambda *arguments: asked.append(arguments))
    options = parse_extract(None, [*ARGUMENTS, "--output-dir", str(tmp_path)])
    left = RowCounter(options).count_left()
    assert left == RowsLeft()
    assert requeue(QueuedJob("7", 0), tmp_path / "shards" / ".stopped-7", RowsLeft(9, 9), RowsLeft(5, 9)) == 0
    assert asked == [("requeue", "7")]
