"""Who this process is: rank, launcher, array slice. The environment is read here, and in `base.environment`.

A single process takes the same path as a thousand. After `from_rank_zero`, at start-up, no rank ever waits for
another.
"""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from vqa_embeddings.base.console import say_for_rank, wait_aloud
from vqa_embeddings.base.files import publish
from vqa_embeddings.cluster.mpi import MPICH, OPEN_MPI, agree_on_key
from vqa_embeddings.cluster.signals import follow_parent
from vqa_embeddings.errors import SAME_COMMAND, InputError, one_line

START_UP_SECONDS = 3600  # rank 0 may have 100,000 segments to look into before it knows what is left
STAND_IN_SECONDS = 300  # after which the next rank makes the plan, where rank 0 may have died before it could
LONGEST_PAUSE = 2.0  # seconds between two looks for a file: a thousand ranks ask the same metadata server
STORE_BYTES = 4 << 20  # of one value: torch's key-value store cuts the connection above 8 MiB
ACCELERATE = {"accelerate", "accelerate-launch", "accelerate.commands.launch"}  # what its command line begins with
NAMED_RANKS = 5  # of those that are waited for
PLAN, NO_PLAN = b"plan", b"no plan"  # the first line of the file through which ranks agree


@dataclass(frozen=True)
class World:
    """This process among those of its launch."""

    launcher: str = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launch_key: str | None = None  # what all ranks of one launch, and no others, have in common
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
    """`read_ranks`, and under `mpirun` the key that its ranks have in common, where mpi4py is installed.

    A launcher that would leave its ranks behind has them asked to stop when it ends.

    Raises:
        InputError: as `read_ranks`; or MPI is there and does not work.
    """
    world = read_ranks()
    if world.launcher == "torchrun" or _is_child_of_accelerate():
        # USR1, USR2 and KILL end torchrun without a word to its ranks, and every signal accelerate with one process.
        follow_parent(signal.SIGTERM, os.getppid())
    if world.launcher == "mpi" and world.mpi and world.size > 1:
        with wait_aloud(world, (0, 1), lambda: f"the other ranks of {world.size} to begin MPI"):
            return replace(world, launch_key=agree_on_key(world.mpi, world.rank, world.size))
    return world


def read_ranks(environment: Mapping[str, str] = os.environ) -> World:
    """The rank and world size given by whichever launcher is there: torchrun or accelerate, MPI, srun, or none.

    Of several, the innermost counts: an `mpirun` inside an `sbatch` script sees Slurm's variables too, and a script
    under `sbatch` alone, which has no step, is one process whatever `SLURM_NTASKS` says.

    Raises:
        InputError: the variables say what cannot be, or each task of one launcher has begun another one.
    """
    outer = _read_mpi(environment) or _read_step(environment) or World()
    return _read_torchrun(environment, outer) or outer


def _is_child_of_accelerate() -> bool:
    """Whether `accelerate launch` has started this one process itself, as it does without torchrun for one."""
    try:
        line = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
    except OSError:  # no Linux
        return False
    return not ACCELERATE.isdisjoint(Path(word).name for word in line[:3])


def _read_torchrun(env: Mapping[str, str], outer: World) -> World | None:
    """What torchrun's variables say; None where they are not there, or only repeat what the launcher outside says."""
    given = env.keys() & {"RANK", "WORLD_SIZE"}
    outside = {"RANK": str(outer.rank), "WORLD_SIZE": str(outer.size)}
    # Scripts for srun and mpirun set these too; torchrun's own processes, one a node, count themselves besides.
    repeated = outer.launcher != "none" and "GROUP_WORLD_SIZE" not in env
    if not given or (repeated and all(env[name] == outside[name] for name in given)):
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
    # The port is srun's own: job numbers come again, on another cluster or after a long time.
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
        InputError: the array's task numbers are not evenly spaced, or are no numbers.
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


def same_command(given: tuple[int, int] | None, environment: Mapping[str, str] = os.environ) -> str:
    """What goes on with the work of this process, as the end of a sentence.

    Args:
        given: the slice that its command names. Otherwise the environment may, which another shell does not have, and
            one that was begun inside the array still has.
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


def from_rank_zero(world: World, folder: Path, make: Callable[[], bytes]) -> bytes:
    """What rank 0 made, at every rank of the launch: the one exchange, at start-up, and none after it.

    Under torchrun it goes through the launcher's own key-value store; under srun and mpirun through a file below
    `folder`, which all ranks share, in a folder named after the launch. Never NCCL. Ranks that cannot agree each get
    their own.

    Raises:
        InputError: rank 0 has refused, or has failed to make it; or the ranks do not meet.
    """
    if world.size == 1 or not world.can_agree:
        return make()
    if world.launcher == "torchrun":
        from torch.distributed import DistError

        try:
            return _through_store(world, folder, make)
        except DistError as error:
            raise InputError(
                f"rank {world.rank} has not met the other ranks of {world.size} ({one_line(error)}); "
                "see whether all of them have started, and begin again"
            ) from None
    return _through_file(world, folder / f".launch-{world.launch_key}", make)


def _through_store(world: World, folder: Path, make: Callable[[], bytes]) -> bytes:
    from torch.distributed import PrefixStore, rendezvous

    timeout = timedelta(seconds=START_UP_SECONDS)
    with wait_aloud(world, (0, 1), lambda: "the other ranks to begin" if world.main else _rank_zero(folder)):
        store, _, _ = next(rendezvous("env://", timeout=timeout))
    store = PrefixStore(f"vqa_embeddings/{world.launch_key}", store)
    if world.main:
        put(store, make())
    with wait_aloud(world, (1,), lambda: _rank_zero(folder)):
        payload = take(store)
    # Without torchrun's agent the store lives in rank 0, which must then not leave before all have read.
    store.set(f"read/{world.rank}", "")
    store.add("read", 1)
    if world.main:
        deadline = time.monotonic() + START_UP_SECONDS
        with wait_aloud(world, (0,), lambda: f"{name_ranks(_not_come(store, world.size))} to begin"):
            while store.add("read", 0) < world.size and time.monotonic() < deadline:
                time.sleep(0.05)
    return payload


def _rank_zero(folder: Path) -> str:
    return f"rank 0, which reads what {folder.parent} holds before any rank begins"


def _not_come(store: Any, size: int) -> list[int]:
    return [rank for rank in range(size) if not store.check([f"read/{rank}"])]


def name_ranks(ranks: Sequence[int]) -> str:
    """These ranks in words, and only the first of many by their numbers; the last ones may come at this moment."""
    if not ranks:
        return "the last ranks"
    named, more = ranks[:NAMED_RANKS], len(ranks) - NAMED_RANKS
    listed = ", ".join(map(str, named)) + (f" and {more} more" if more > 0 else "")
    return f"rank{'s' * (len(ranks) > 1)} {listed}"


def put(store: Any, payload: bytes) -> None:
    """Leave the plan in the launcher's store, in pieces that it takes; the number of them last."""
    pieces = [payload[start : start + STORE_BYTES] for start in range(0, len(payload), STORE_BYTES)]
    for number, piece in enumerate(pieces):
        store.set(f"plan/{number}", piece)
    store.set("plan", str(len(pieces)))


def take(store: Any) -> bytes:
    """What rank 0 has left in the store, or will."""
    return b"".join(store.get(f"plan/{number}") for number in range(int(store.get("plan"))))


def _through_file(world: World, folder: Path, make: Callable[[], bytes]) -> bytes:
    """The launch's plan. Rank 0 makes it at once, and each further rank where all before it seem not to live.

    A script may run the program several times in one job step: each rank takes each plan once, in their order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken = f"-taken-by-{world.rank}"
    path = folder / f"plan-{len(list(folder.glob(f'*{taken}'))) + 1}"
    turn = time.monotonic() + STAND_IN_SECONDS * world.rank
    pause = 0.1
    try:
        with wait_aloud(world, (1,), lambda: _rank_zero(folder.parent)):
            while not path.exists() and time.monotonic() < turn:
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        if not path.exists():
            if not world.main:
                waited = f"nothing has come for {STAND_IN_SECONDS * world.rank} s"
                say_for_rank(world, f"{waited} from the ranks before this one; it takes the place of rank 0")
            _publish_plan(path, make)
    finally:
        path.with_name(path.name + taken).touch()
    kind, _, payload = path.read_bytes().partition(b"\n")
    if kind != PLAN:
        raise InputError(payload.decode())
    return payload


def _publish_plan(path: Path, make: Callable[[], bytes]) -> None:
    """Make the plan, and leave it, or why there is none, for all ranks: the first one that is there counts."""
    try:
        content = PLAN + b"\n" + make()
    except Exception as error:
        reason = str(error) if isinstance(error, InputError) else f"another rank could not begin: {one_line(error)}"
        told = NO_PLAN + b"\n" + reason.encode(errors="backslashreplace")
        publish(path, lambda temporary: temporary.write_bytes(told), replace=False)
        raise
    publish(path, lambda temporary: temporary.write_bytes(content), replace=False)
