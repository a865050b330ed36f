"""Who this process is: rank, launcher, array slice. The environment is read here, and in `base.environment`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from vqa_embeddings.base.console import remind_meanwhile
from vqa_embeddings.cluster.mpi import MPICH, OPEN_MPI, agree_on_key
from vqa_embeddings.errors import SAME_COMMAND, InputError


@dataclass(frozen=True)
class World:
    """This process among those of its launch."""

    launcher: str = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launch_key: str | None = None  # the same at all ranks of one launch, and at no others
    mpi: str | None = None  # the family of MPI libraries through which the launcher's ranks find each other, if one can

    @property
    def main(self) -> bool:
        """Whether this is the process that speaks for the launch."""
        return self.rank == 0

    @property
    def can_agree(self) -> bool:
        """Whether the ranks have a way to learn at start-up what rank 0 has seen."""
        return self.size == 1 or self.launch_key is not None


def read_world() -> World:
    """`read_ranks`, and under `mpirun` the key that its ranks share, where mpi4py is installed.

    Raises:
        InputError: as `read_ranks`; or MPI is there and does not work.
    """
    world = read_ranks()
    if world.launcher == "mpi" and world.mpi and world.size > 1:
        with remind_meanwhile(world.rank, (0, 1), lambda: f"the other ranks of {world.size} to begin MPI"):
            return replace(world, launch_key=agree_on_key(world.mpi, world.rank, world.size))
    return world


def read_ranks(environment: Mapping[str, str] = os.environ) -> World:
    """The rank and world size given by whichever launcher is there: torchrun or accelerate, MPI, srun, or none.

    Of several, the innermost counts: an `mpirun` inside an `sbatch` script sees Slurm's variables too, and a script
    under `sbatch` alone, which has no step, is one process whatever `SLURM_NTASKS` says.

    Raises:
        InputError: the variables contradict each other, or each task of one launcher has started another launcher.
    """
    outer = _read_mpi(environment) or _read_step(environment) or World()
    return _read_torchrun(environment, outer) or outer


def _read_torchrun(env: Mapping[str, str], outer: World) -> World | None:
    """What torchrun's variables say; None where they are not set, or only repeat what the outer launcher says."""
    given = env.keys() & {"RANK", "WORLD_SIZE"}
    repeats = {"RANK": str(outer.rank), "WORLD_SIZE": str(outer.size)}
    # Scripts for srun and mpirun set these too; torchrun's own processes, one a node, count themselves besides.
    may_repeat = outer.launcher != "none" and "GROUP_WORLD_SIZE" not in env
    if not given or (may_repeat and all(env[name] == repeats[name] for name in given)):
        return None
    rank, size = _read_place(env, "RANK", "WORLD_SIZE")
    if outer.size > 1 and _read_number(env, "GROUP_WORLD_SIZE", "1") < 2:
        launcher = "mpirun" if outer.launcher == "mpi" else outer.launcher
        raise InputError(
            f"found RANK={rank} and WORLD_SIZE={size} in task {outer.rank} of {outer.size} of {launcher}: each task "
            f"begins a launch of its own, and would extract every row; use {launcher} or torchrun alone, or one "
            "torchrun a node, with --nnodes"
        )
    # torchrun's key-value store knows its launch; after an elastic restart it still holds the last attempt's keys
    has_store = env.keys() >= {"MASTER_ADDR", "MASTER_PORT"}
    key = f"attempt-{env.get('TORCHELASTIC_RESTART_COUNT', '0')}" if has_store else None
    return World("torchrun", rank, size, _read_number(env, "LOCAL_RANK", "0"), key)


def _read_mpi(env: Mapping[str, str]) -> World | None:
    if env.keys() & {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"}:
        place = _read_place(env, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
        return World("mpi", *place, _read_number(env, "OMPI_COMM_WORLD_LOCAL_RANK", "0"), mpi=OPEN_MPI)
    # In a Slurm job, MPICH's and Intel's mpiexec start a proxy on each node with srun: the step is then that of the
    # proxies, not of the ranks. PMI_RANK without MPI_LOCALRANKID in a step is srun's own, for --mpi=pmi2.
    inside_step = "SLURM_STEP_ID" in env and "MPI_LOCALRANKID" not in env
    if env.keys() & {"PMI_RANK", "PMI_SIZE"} and not inside_step:
        place = _read_place(env, "PMI_RANK", "PMI_SIZE")
        return World("mpi", *place, _read_number(env, "MPI_LOCALRANKID", "0"), mpi=MPICH)
    return None


def _read_step(env: Mapping[str, str]) -> World | None:
    if "SLURM_STEP_ID" not in env:
        return None
    place = _read_place(env, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    # The port is srun's own. Job numbers alone are used again, on another cluster or after a long time.
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "SLURM_SRUN_COMM_PORT")
    key = "-".join(env.get(name, "0") for name in names)
    family = OPEN_MPI if "PMIX_RANK" in env else MPICH if "PMI_RANK" in env else None
    return World("srun", *place, _read_number(env, "SLURM_LOCALID", "0"), key, family)


def _read_place(env: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    """Rank and world size, of which a launcher sets both or neither."""
    rank, size = _whole(env.get(rank_name)), _whole(env.get(size_name))
    if rank is None or size is None or rank >= size:
        raise _impossible(env, (rank_name, size_name), "a rank from 0 to one less than the size")
    return rank, size


def _read_number(env: Mapping[str, str], name: str, usual: str) -> int:
    number = _whole(env.get(name, usual))
    if number is None:
        raise _impossible(env, (name,), "a whole number")
    return number


def _whole(text: str | None) -> int | None:
    """The number that a variable holds, from 0 up; None where it holds none."""
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 10 else None


def _impossible(env: Mapping[str, str], names: Sequence[str], expected: str) -> InputError:
    found = " and ".join(f"{name}={env[name]}" if name in env else f"no {name}" for name in names)
    return InputError(
        f"found {found} in the environment, expected {expected}; "
        "begin with a launcher that sets them all, or take them out of the environment"
    )


def read_array_slice(environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """The slice of a task of a Slurm array: its index, and how many tasks there are.

    Raises:
        InputError: the array's task numbers are not evenly spaced, or not numbers.
    """
    env = environment
    if "SLURM_ARRAY_TASK_ID" not in env:
        return None
    usual = {"ID": "0", "MIN": "0", "COUNT": "1", "STEP": "1"}
    task, first, count, step = (_read_number(env, f"SLURM_ARRAY_TASK_{name}", usual[name]) for name in usual)
    index, rest = divmod(task - first, step) if step else (-1, 0)
    if rest or not 0 <= index < count:
        raise InputError(
            f"array task {task} of {count} tasks from {first} in steps of {step} has no place in an even split; "
            "give --slice i/n, or use an array such as 0-7"
        )
    return index, count


def choose_slice(given: tuple[int, int] | None) -> tuple[int, int]:
    """Index and count of the slice of the table that this process belongs to: as given, or the array's, or all of it.

    Raises:
        InputError: as `read_array_slice`.
    """
    return given or read_array_slice() or (0, 1)


def same_command(given: tuple[int, int] | None, environment: Mapping[str, str] = os.environ) -> str:
    """How to continue the work of this process, as the end of a sentence.

    Args:
        given: the slice that its command names. Without one, the slice is the Slurm array's, which a shell outside the
            array does not know and a shell started inside it does.
    """
    array = None
    with suppress(InputError):
        array = read_array_slice(environment)
    if given or not array or array[1] == 1:
        return SAME_COMMAND
    index, count = array
    return (
        f"{SAME_COMMAND} (slice {index} of {count}, from the Slurm array: elsewhere with "
        f"--slice {index}/{count}, or the whole table with --slice 0/1)"
    )


@dataclass(frozen=True)
class QueuedJob:
    """The Slurm job that this process runs in."""

    name: str  # as scontrol knows it: a number, or array_task
    restarts: int  # how often it had been requeued when this run of it began


def read_queued_job(environment: Mapping[str, str] = os.environ) -> QueuedJob | None:
    """The Slurm job that this process runs in, if it does."""
    env = environment
    if "SLURM_JOB_ID" not in env:
        return None
    name = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in env:
        name = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return QueuedJob(name, int(env.get("SLURM_RESTART_COUNT", "0")))


def new_launch() -> str:
    """A name for one launch: when it began, and a token, so that no two launches share it."""
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
