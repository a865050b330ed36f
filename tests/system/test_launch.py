"""The files of launch/ that a user edits, as they are, without a queue."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launching import ROOT, begin, merge, run

LAUNCH = ROOT / "launch"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]


def assert_two_ranks_did_all(out: Path, said: str) -> None:
    assert "rows to do now, 2 ranks" in said
    assert len({path.parent for path in out.glob("shards/*/*.h5")}) == 2, "one of the ranks has done nothing"
    assert merge(out).returncode == 0


@pytest.mark.parametrize("script", ["array.sbatch", "multinode.sbatch"])
def test_a_job_script_runs_on_this_machine(tmp_path, photographs, script):
    done = run(
        ["bash", str(LAUNCH / "slurm" / script), *map(str, photographs), "--output-dir", str(tmp_path)], NPROC="2"
    )
    assert done.returncode == 0, done.stderr
    assert_two_ranks_did_all(tmp_path, done.stdout)
    assert "launch: all 31 rows accounted for" in done.stdout


def test_a_signal_before_the_launch_listens_and_a_step_around_sbatch_do_not_mislead_a_job(tmp_path, photographs):
    """Slurm runs a copy of the script, in the environment of the shell that sbatch was called from."""
    script = shutil.copy(LAUNCH / "slurm" / "array.sbatch", tmp_path / "slurm_script")
    (tmp_path / "python").write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && kill -USR2 $PPID && kill -USR1 $PPID\nexec {sys.executable} "$@"\n'
    )
    (tmp_path / "python").chmod(0o755)
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEPID": "0"}
    done = run(
        ["bash", str(script), *map(str, photographs), "--max-new-tokens", "1", "--output-dir", str(tmp_path / "out")],
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        VQA_EMBEDDINGS_HOME=str(ROOT),
        NPROC="1",
        **step,
    )
    assert done.returncode == 0, done.stderr
    assert "launch: all 31 rows accounted for" in done.stdout


def test_the_configuration_for_cpus_starts_two_ranks(tmp_path, photographs):
    config = str(LAUNCH / "accelerate" / "cpu.yaml")
    done = run(
        [*ACCELERATE, config, str(ROOT / "extract_dist.py"), *map(str, photographs), "--output-dir", str(tmp_path)]
    )
    assert done.returncode == 0, done.stderr
    assert_two_ranks_did_all(tmp_path, done.stdout)


def test_the_configuration_for_several_nodes_makes_one_launch_of_them(tmp_path, photographs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = [str(LAUNCH / "accelerate" / "several_nodes.yaml"), "--num_processes", "2"]
    where = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    script = [str(ROOT / "extract_dist.py"), *map(str, photographs), "--output-dir", str(tmp_path)]
    line = [*ACCELERATE, *config, *where, "--machine_rank"]
    nodes = [begin([*line, number, *script], stdout=subprocess.PIPE, stderr=None) for number in "01"]
    said = [node.communicate(timeout=300)[0].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert_two_ranks_did_all(tmp_path, said[0])


def submit(*arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    line = [shutil.which("bash"), str(LAUNCH / "slurm" / "submit.sh"), *arguments]
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, "PATH": path})


def test_what_cannot_be_right_is_refused_before_it_is_in_the_queue(tmp_path):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for arguments, reason in [
        (["--tasks", "0", "--", "--demo"], "--tasks 0, expected a number from 1"),
        (["--tasks", "4", "--demo"], "no -- before the arguments"),
        (["--", "--images-dir", "x"], "--vqa-dataset not given"),
        (["--", "--demo", "--slice", "3/3"], "i runs from 0 to n-1"),
        (["--wait", "--", "--demo"], "--wait does not go with a merge"),
        (["--", "--demo", "--slice", "0/2"], "each task's slice is the array's"),
        (["--", "--demo", "--help"], "usage: extract_dist.py"),
    ]:
        done = submit(*arguments, path=path)
        assert (done.returncode, done.stdout) == (0 if "--help" in arguments else 2, ""), arguments
        assert reason in done.stderr


def test_the_merge_waits_for_the_array_where_that_may_run(tmp_path):
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {tmp_path}/said\necho "7;far"\n')
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    where = ["-A", "group", "--partition=low", "-Mfar", "--mail-user", "me"]
    done = submit("--tasks", "3", *where, "--time=9", "--export=NONE", "--", "--demo", "--output-dir", "a b", path=path)
    assert done.stdout == "array job 7\nmerge job 7\n"
    array, merge = (tmp_path / "said").read_text().splitlines()
    known = "--export=VQA_EMBEDDINGS_HOME,NPROC"
    scripts = [f"{LAUNCH}/slurm/{name}.sbatch" for name in ("array", "merge")]
    assert array == f"--parsable --array=0-2 {' '.join(where)} --time=9 {known} {scripts[0]} --demo --output-dir a b"
    assert merge == f"--parsable {' '.join(where)} {known} --dependency=afterany:7 {scripts[1]} --output-dir a b"


def test_without_a_queue_submitting_says_what_to_do(tmp_path):
    for name in ("dirname", "realpath"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = submit("--", "--demo", path=str(tmp_path))
    assert done.returncode == 2
    assert "launch/slurm/array.sbatch" in done.stderr
