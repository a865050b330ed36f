"""Who this process is: rank, launcher, array slice, signals. The only module that reads the environment.

A single process takes the same path as a thousand. After `from_rank_zero`, at start-up, no rank ever waits for
another.
"""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import FrameType
from typing import Any

from vqa_embeddings.errors import Refused
from vqa_embeddings.files import publish

START_UP_SECONDS = 3600  # rank 0 may have 100,000 segments to look into before it knows what is left
LONGEST_PAUSE = 2.0  # seconds between two looks for a file: a thousand ranks ask the same metadata server
STORE_BYTES = 4 << 20  # of one value: torch's key-value store cuts the connection above 8 MiB
REPEAT_SECONDS = 3  # schedulers signal ranks and launcher, which passes it on: one request, not two


@dataclass(frozen=True)
class World:
    """This process among those of its launch."""

    launcher: str = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launch_key: str | None = None  # what all ranks of one launch, and no others, have in common; MPI names nothing

    @property
    def main(self) -> bool:
        """Whether this is the process that speaks for the launch."""
        return self.rank == 0

    @property
    def can_agree(self) -> bool:
        """Whether the ranks have a way to learn at start-up what rank 0 has seen."""
        return self.size == 1 or self.launch_key is not None


def read_world(environment: Mapping[str, str] = os.environ) -> World:
    """The rank and world size given by whichever launcher is there: torchrun or accelerate, MPI, srun, or none.

    The innermost launcher is asked first: an `mpirun` inside an `sbatch` script sees Slurm's variables too, and a
    script under `sbatch` alone, which has no step, is one process whatever `SLURM_NTASKS` says.
    """
    env = environment
    if "RANK" in env and "WORLD_SIZE" in env:
        # torchrun's key-value store knows its launch; after an elastic restart it still holds the last attempt's keys
        key = f"attempt-{env.get('TORCHELASTIC_RESTART_COUNT', '0')}" if "MASTER_ADDR" in env else None
        return World("torchrun", int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")), key)
    if "OMPI_COMM_WORLD_RANK" in env:
        local = int(env.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"))
        return World("mpi", int(env["OMPI_COMM_WORLD_RANK"]), int(env["OMPI_COMM_WORLD_SIZE"]), local)
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        key = "-".join(env.get(name, "0") for name in names)
        local = int(env.get("SLURM_LOCALID", "0"))
        return World("srun", int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), local, key)
    if "PMI_RANK" in env and "PMI_SIZE" in env:
        return World("mpi", int(env["PMI_RANK"]), int(env["PMI_SIZE"]), int(env.get("MPI_LOCALRANKID", "0")))
    return World()


def read_array_slice(environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """The slice of a task of a Slurm array: its index, and how many tasks there are.

    Raises:
        Refused: the array's task numbers are not evenly spaced.
    """
    env = environment
    if "SLURM_ARRAY_TASK_ID" not in env:
        return None
    task, first = int(env["SLURM_ARRAY_TASK_ID"]), int(env.get("SLURM_ARRAY_TASK_MIN", "0"))
    count, step = int(env.get("SLURM_ARRAY_TASK_COUNT", "1")), int(env.get("SLURM_ARRAY_TASK_STEP", "1"))
    index, rest = divmod(task - first, step)
    if rest or not 0 <= index < count:
        raise Refused(
            f"array task {task} of {count} tasks from {first} in steps of {step} has no place in an even split; "
            "give --slice i/n, or use an array such as 0-7"
        )
    return index, count


def new_launch() -> str:
    """A name for one launch: when it began, and a token, so that no two launches share it."""
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def from_rank_zero(world: World, folder: Path, make: Callable[[], bytes]) -> bytes:
    """What rank 0 made, at every rank of the launch: the one exchange, at start-up, and none after it.

    Under torchrun it goes through the launcher's own key-value store; under srun through a file in `folder`,
    which all ranks share, named after the job step. Never NCCL. Ranks that cannot agree each get their own.
    """
    if world.size == 1 or not world.can_agree:
        return make()
    if world.launcher == "torchrun":
        return _through_store(world, make)
    return _through_file(world, folder / f".launch-{world.launch_key}", make)


def _through_store(world: World, make: Callable[[], bytes]) -> bytes:
    from torch.distributed import PrefixStore, rendezvous

    timeout = timedelta(seconds=START_UP_SECONDS)
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    store = PrefixStore(f"vqa_embeddings/{world.launch_key}", store)
    if world.main:
        put(store, make())
    payload = take(store)
    # Without torchrun's agent the store lives in rank 0, which must then not leave before all have read.
    store.add("read", 1)
    if world.main:
        deadline = time.monotonic() + START_UP_SECONDS
        while store.add("read", 0) < world.size and time.monotonic() < deadline:
            time.sleep(0.05)
    return payload


def put(store: Any, payload: bytes) -> None:
    """Leave the plan in the launcher's store, in pieces that it takes; the number of them last."""
    pieces = [payload[start : start + STORE_BYTES] for start in range(0, len(payload), STORE_BYTES)]
    for number, piece in enumerate(pieces):
        store.set(f"plan/{number}", piece)
    store.set("plan", str(len(pieces)))


def take(store: Any) -> bytes:
    """What rank 0 has left in the store, or will."""
    return b"".join(store.get(f"plan/{number}") for number in range(int(store.get("plan"))))


def _through_file(world: World, path: Path, make: Callable[[], bytes]) -> bytes:
    if world.main:
        payload = make()
        publish(path, lambda temporary: temporary.write_bytes(payload))
        return payload
    deadline = time.monotonic() + START_UP_SECONDS
    pause = 0.1
    while not path.exists():
        if time.monotonic() > deadline:
            raise Refused(
                f"rank {world.rank} waited {START_UP_SECONDS} s for rank 0's plan in {path}; "
                "check that rank 0 runs and that all ranks see the same output folder"
            )
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    return path.read_bytes()


class StopFlag:
    """Set by TERM, INT, USR1 or USR2; the loop looks at it between batches. A second request ends the process."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.signal: str | None = None
        self._since = 0.0

    def install(self) -> StopFlag:
        """Take the signals over. Before this call they end the process at once, which harms nothing either."""
        for number in self.SIGNALS:
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > REPEAT_SECONDS:
            os._exit(128 + number)

    def requested(self) -> bool:
        """Whether the run was asked to stop."""
        return self.signal is not None
