"""The rank comes from whoever launched, and the first signal only asks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from vqa_embeddings.errors import Refused
from vqa_embeddings.world import World, from_rank_zero, put, read_array_slice, read_world, take

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
STEP = {**BATCH, "SLURM_PROCID": "5", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("none", 0, 1, 0)),
        (TORCHRUN, ("torchrun", 3, 8, 1)),
        (STEP, ("srun", 5, 8, 1)),
        (BATCH, ("none", 0, 1, 0)),
        ({**BATCH, **OPEN_MPI}, ("mpi", 2, 4, 0)),
        ({**STEP, **TORCHRUN}, ("torchrun", 3, 8, 1)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, ("mpi", 1, 2, 1)),
    ],
    ids=["alone", "torchrun", "srun", "sbatch without a step", "mpirun in sbatch", "torchrun in srun", "mpich"],
)
def test_the_rank_is_the_innermost_launchers(environment, expected):
    world = read_world(environment)
    assert (world.launcher, world.rank, world.size, world.local_rank) == expected


def test_ranks_of_a_step_share_a_key_that_a_requeued_job_does_not():
    keys = [read_world(environment).launch_key for environment in (STEP, {**STEP, "SLURM_PROCID": "6"})]
    assert keys[0] == keys[1]
    assert read_world({**STEP, "SLURM_RESTART_COUNT": "1"}).launch_key != keys[0]


@pytest.mark.parametrize(
    ("task", "first", "count", "step", "expected"),
    [
        ("0", "0", "4", "1", (0, 4)),
        ("7", "4", "4", "1", (3, 4)),
        ("6", "0", "4", "2", (3, 4)),
        ("9", "0", "3", "1", None),
    ],
)
def test_the_slice_is_the_array_tasks(task, first, count, step, expected):
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_STEP")
    environment = dict(zip(names, (task, first, count, step), strict=True))
    if expected is None:
        with pytest.raises(Refused, match="--slice"):
            read_array_slice(environment)
    else:
        assert read_array_slice(environment) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        (TORCHRUN, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, False),
        (STEP, True),
        (OPEN_MPI, False),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, False),
    ],
)
def test_ranks_agree_where_the_launcher_tells_launches_apart(environment, expected):
    assert read_world(environment).can_agree == expected


def test_the_attempts_of_an_elastic_launch_have_keys_of_their_own():
    """The agent's store survives a restart: under the same key, ranks would read the plan of the last attempt."""
    keys = {read_world({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": count}).launch_key for count in "012"}
    assert len(keys) == 3


def test_ranks_without_a_store_agree_through_a_file(tmp_path: Path):
    main, other = (World("srun", rank, 2, rank, "job-0-0") for rank in (0, 1))
    assert from_rank_zero(main, tmp_path, lambda: b"plan") == b"plan"
    assert from_rank_zero(other, tmp_path, lambda: b"not asked") == b"plan"


def test_a_plan_of_any_size_goes_through_the_store():
    """The flags of 100 million rows may be 12.5 MB; a value above 8 MiB ends the connection."""
    store = TCPStore("127.0.0.1", 0, 1, True)
    plan = bytes(range(256)) * 50_000
    put(store, plan)
    assert take(store) == plan


SCRIPT = """
import os, signal, time
from vqa_embeddings import world
world.REPEAT_SECONDS = 0.5
stop = world.StopFlag().install()
for _ in range(3):  # the scheduler's, and what the launcher passes on
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
print("asked", bool(stop), stop.signal, flush=True)
time.sleep(1)
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(5)
print("not reached")
"""


def test_the_first_signal_asks_its_echoes_are_ignored_and_a_later_one_ends():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["asked", "True", "SIGTERM"]
    assert done.returncode == 128 + signal.SIGUSR1
