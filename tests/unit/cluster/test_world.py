"""The rank comes from whoever launched."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.launching import command, run
from vqa_embeddings.cluster.world import read_array_slice, read_ranks, same_command
from vqa_embeddings.errors import InputError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
STEP = {**BATCH, "SLURM_PROCID": "5", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}
PROXY = {**STEP, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}  # one of two, one a node


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("none", 0, 1, 0)),
        (TORCHRUN, ("torchrun", 3, 8, 1)),
        (STEP, ("srun", 5, 8, 1)),
        (BATCH, ("none", 0, 1, 0)),
        ({**BATCH, **OPEN_MPI}, ("mpi", 2, 4, 0)),
        ({**PROXY, **OPEN_MPI}, ("mpi", 2, 4, 0)),
        (MPICH, ("mpi", 3, 4, 1)),
        ({**BATCH, **MPICH}, ("mpi", 3, 4, 1)),
        ({**PROXY, **MPICH}, ("mpi", 3, 4, 1)),
        ({**STEP, "PMI_RANK": "5", "PMI_SIZE": "8"}, ("srun", 5, 8, 1)),
        ({**BATCH, **TORCHRUN}, ("torchrun", 3, 8, 1)),
        ({**PROXY, **TORCHRUN, "GROUP_WORLD_SIZE": "2"}, ("torchrun", 3, 8, 1)),
        ({**STEP, "RANK": "5", "WORLD_SIZE": "8"}, ("srun", 5, 8, 1)),
        ({**STEP, "WORLD_SIZE": "8", "MASTER_ADDR": "x"}, ("srun", 5, 8, 1)),
        ({**OPEN_MPI, "RANK": "2"}, ("mpi", 2, 4, 0)),
    ],
    ids=[
        "alone",
        "torchrun",
        "srun",
        "sbatch without a step",
        "Open MPI in sbatch",
        "Open MPI from a daemon that srun has started",
        "MPICH",
        "MPICH in sbatch",
        "MPICH from a proxy that srun has started",
        "srun --mpi=pmi2",
        "torchrun in sbatch",
        "one torchrun a node in srun",
        "srun, repeated by a script",
        "srun, half repeated by a script",
        "mpirun, half repeated by a script",
    ],
)
def test_the_rank_is_the_innermost_launchers(environment, expected):
    world = read_ranks(environment)
    assert (world.launcher, world.rank, world.size, world.local_rank) == expected


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK=5 and WORLD_SIZE=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 and WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "RANK=0 and WORLD_SIZE=two"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "RANK=0 and WORLD_SIZE=999"),
        ({"RANK": "0"}, "RANK=0 and no WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "no RANK and WORLD_SIZE=2"),
        ({**TORCHRUN, "LOCAL_RANK": ""}, "LOCAL_RANK= in"),
        ({**STEP, "WORLD_SIZE": "2"}, "no RANK and WORLD_SIZE=2"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_RANK=0 and no OMPI_COMM_WORLD_SIZE"),
        ({"PMI_RANK": "4", "PMI_SIZE": "4"}, "PMI_RANK=4 and PMI_SIZE=4"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, "SLURM_PROCID=0 and no SLURM_STEP_NUM_TASKS"),
        ({**PROXY, **TORCHRUN}, "RANK=3 and WORLD_SIZE=8 in task 1 of 2 of srun"),
        ({**PROXY, **TORCHRUN, "GROUP_WORLD_SIZE": "1"}, "RANK=3 and WORLD_SIZE=8 in task 1 of 2 of srun"),
        ({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "1"}, "RANK=0 and WORLD_SIZE=1 in task 2 of 4 of mpirun"),
    ],
)
def test_ranks_that_cannot_be_are_refused(environment, found):
    with pytest.raises(InputError) as refused:
        read_ranks(environment)
    assert found in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_launch_with_an_impossible_rank_exits_2_with_one_sentence(tmp_path: Path):
    done = run(command(0, "--demo", "--output-dir", tmp_path / "out"), RANK="5", WORLD_SIZE="2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: found RANK=5 and WORLD_SIZE=2 in the environment, expected")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ranks_of_a_step_share_a_key_that_a_requeued_job_does_not():
    keys = [read_ranks(environment).launch_key for environment in (STEP, {**STEP, "SLURM_PROCID": "6"})]
    assert keys[0] == keys[1]
    assert read_ranks({**STEP, "SLURM_RESTART_COUNT": "1"}).launch_key != keys[0]


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
        with pytest.raises(InputError, match="--slice"):
            read_array_slice(environment)
    else:
        assert read_array_slice(environment) == expected


@pytest.mark.parametrize(("name", "value"), [("ID", "x"), ("COUNT", "four"), ("COUNT", "0"), ("STEP", "0")])
def test_an_array_task_that_cannot_be_is_refused(name, value):
    environment = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "4", f"SLURM_ARRAY_TASK_{name}": value}
    with pytest.raises(InputError, match=r"array task|SLURM_ARRAY_TASK"):
        read_array_slice(environment)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        (TORCHRUN, True),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, False),
        (STEP, True),
        (OPEN_MPI, False),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, False),
    ],
)
def test_ranks_agree_where_the_launcher_tells_launches_apart(environment, expected):
    assert read_ranks(environment).can_agree == expected


def test_the_attempts_of_an_elastic_launch_have_keys_of_their_own():
    """The agent's store survives a restart: under the same key, ranks would read the plan of the last attempt."""
    keys = {read_ranks({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": count}).launch_key for count in "012"}
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("given", "environment", "more"),
    [
        (None, {}, ""),
        (None, {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "5"}, ""),
        (
            None,
            {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"},
            " (slice 3 of 16, from the Slurm array: elsewhere with --slice 3/16, or the whole table with --slice 0/1)",
        ),
        ((0, 1), {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}, ""),
        (None, {"SLURM_ARRAY_TASK_ID": "none of the array's"}, ""),
    ],
)
def test_what_continues_says_which_slice_an_array_has_given(given, environment, more):
    assert same_command(given, environment) == "the same command continues" + more
