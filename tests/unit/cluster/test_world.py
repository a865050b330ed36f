"""The rank comes from whoever launched."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from tests.helpers.launching import ROOT, begin, command, kill, processes, run
from vqa_embeddings.base import console as voice
from vqa_embeddings.cluster import world as world_module
from vqa_embeddings.cluster.world import (
    World,
    _publish_plan,
    from_rank_zero,
    name_ranks,
    put,
    read_array_slice,
    read_ranks,
    same_command,
    take,
)
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


def test_ranks_without_a_store_agree_through_a_file(tmp_path: Path):
    main, other = (World("srun", rank, 2, rank, "job-0-0") for rank in (0, 1))
    plan = bytes(range(256))
    assert from_rank_zero(main, tmp_path, lambda: plan) == plan
    assert from_rank_zero(other, tmp_path, lambda: b"not asked") == plan


def test_of_the_ranks_that_wait_for_a_file_one_says_for_whom(tmp_path: Path, monkeypatch):
    """Rank 0 has its plan when that was said."""
    said, heard = [], threading.Event()
    monkeypatch.setattr(voice, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(voice, "speak", lambda sentence, stream: (said.append(sentence), heard.set()))
    ranks = [World("srun", rank, 3, rank, "job-0-0") for rank in range(3)]
    make = {True: lambda: b"plan" if heard.wait(60) else b"", False: lambda: b"not asked"}
    taken: list[bytes] = []

    def begin_rank(rank: World) -> None:
        taken.append(from_rank_zero(rank, tmp_path / "out" / "shards", make[rank.main]))

    threads = [threading.Thread(target=begin_rank, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == [b"plan"] * 3
    assert said == [f"rank 1: has waited 0 s for rank 0, which reads what {tmp_path}/out holds before any rank begins"]


MEETING = """
import sys, time
from pathlib import Path
from vqa_embeddings.base import console as voice
from vqa_embeddings.cluster.world import from_rank_zero, read_world

voice.PATIENCE_SECONDS = voice.REMINDER_SECONDS = 0.1

def until(word):
    deadline = time.monotonic() + 120  # after which nobody has heard it
    while not (Path(sys.argv[1]) / word).exists() and time.monotonic() < deadline:
        time.sleep(0.01)

world = read_world()
if world.rank == 2:
    until("come")
assert from_rank_zero(world, Path("OUT/shards"), lambda: until("planned") or b"plan") == b"plan"
"""


def test_ranks_of_torchrun_say_for_whom_they_wait(tmp_path: Path):
    (tmp_path / "meeting.py").write_text(MEETING)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    line = [*torchrun, str(tmp_path / "meeting.py"), str(tmp_path)]
    launch = begin(line, stderr=subprocess.PIPE, PYTHONPATH=str(ROOT))
    try:
        said = []
        for event, sentence in [
            ("planned", "s for rank 0, which reads what OUT holds before any rank begins\n"),
            ("come", "s for rank 2 to begin\n"),
        ]:
            while not said or not said[-1].endswith(sentence):
                said.append(launch.stderr.readline().decode())
                assert said[-1], said
            assert said[-1].startswith(f"rank {1 if event == 'planned' else 0}: has waited ")
            (tmp_path / event).touch()
        rest = launch.communicate(timeout=60)[1].decode()
        assert launch.returncode == 0, rest
        assert "rank 2: " not in "".join(said) + rest
    finally:
        kill(processes(launch))


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ([], "the last ranks"),
        ([3], "rank 3"),
        ([3, 5], "ranks 3, 5"),
        (range(1, 1000), "ranks 1, 2, 3, 4, 5 and 994 more"),
    ],
)
def test_many_ranks_are_named_in_a_few_words(ranks, named):
    assert name_ranks(ranks) == named


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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_nobody_meets_says_so_in_a_sentence(tmp_path, monkeypatch, rank):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", **place}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(world_module, "START_UP_SECONDS", 1)
    with pytest.raises(InputError, match=rf"^rank {rank} has not met the other ranks of 2 \(.*and begin again$"):
        from_rank_zero(read_ranks(), tmp_path, lambda: b"plan")


def test_another_rank_makes_the_plan_where_rank_0_has_died(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(world_module, "STAND_IN_SECONDS", 0.3)
    main, second, third = (World("srun", rank, 3, rank, "job-0-0") for rank in range(3))
    assert from_rank_zero(second, tmp_path, lambda: b"the second's plan") == b"the second's plan"
    for late in (main, third):
        assert from_rank_zero(late, tmp_path, lambda: b"not asked") == b"the second's plan"
    assert "rank 1: nothing has come for 0.3 s from the ranks before this one; it takes" in capsys.readouterr().out


def test_of_two_plans_the_first_counts_for_all(tmp_path: Path):
    main = World("srun", 0, 2, 0, "job-0-0")

    def slow_plan() -> bytes:
        _publish_plan(tmp_path / ".launch-job-0-0" / "plan-1", lambda: b"faster")
        return b"slower"

    assert from_rank_zero(main, tmp_path, slow_plan) == b"faster"


def test_ranks_that_run_the_program_again_in_one_step_do_not_take_the_old_plan(tmp_path: Path):
    main, other = (World("srun", rank, 2, rank, "job-0-0") for rank in (0, 1))
    for plan in (b"first", b"second"):
        from_rank_zero(main, tmp_path, lambda plan=plan: plan)
    assert [from_rank_zero(other, tmp_path, lambda: b"not asked") for _ in range(2)] == [b"first", b"second"]


@pytest.mark.parametrize("error", [InputError("the folder holds another run"), OSError("no such disk")])
def test_ranks_without_a_store_learn_that_there_will_be_no_plan(tmp_path: Path, error: Exception):
    main, other = (World("srun", rank, 2, rank, "job-0-0") for rank in (0, 1))

    def fail() -> bytes:
        raise error

    with pytest.raises(type(error)):
        from_rank_zero(main, tmp_path, fail)
    with pytest.raises(InputError, match=str(error)):
        from_rank_zero(other, tmp_path, lambda: b"not asked")
    for rank in (main, other):  # which try again, in the same job step
        assert from_rank_zero(rank, tmp_path, lambda: b"the plan") == b"the plan"


def test_a_plan_of_any_size_goes_through_the_store():
    """The flags of 100 million rows may be 12.5 MB; a value above 8 MiB ends the connection."""
    store = TCPStore("127.0.0.1", 0, 1, True)
    plan = bytes(range(256)) * 50_000
    put(store, plan)
    assert take(store) == plan
