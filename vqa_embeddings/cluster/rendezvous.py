"""The one exchange between the ranks of a launch: at start-up, what rank 0 has found reaches all of them.

A single process takes the same path as a thousand. After `from_rank_zero` no rank ever waits for another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from vqa_embeddings.base.console import remind_meanwhile
from vqa_embeddings.base.files import publish
from vqa_embeddings.cluster.messages import say_for_rank
from vqa_embeddings.cluster.world import World
from vqa_embeddings.errors import InputError, one_line

START_UP_SECONDS = 3600  # rank 0 may have 100,000 segments to look into before it knows what is left
# Nothing tells the ranks of a job step that rank 0 has died before it published the plan: srun may keep the others
# (--no-kill), and a file only ever is not there yet. They would wait, with their GPUs, until the job's time limit.
# Every rank sees the same folder and can make the same plan, so after this time the next rank stands in for rank 0.
STAND_IN_SECONDS = 300
LONGEST_PAUSE = 2.0  # seconds between two looks for a file: a thousand ranks ask the same metadata server
STORE_BYTES = 4 << 20  # of one value: torch's key-value store cuts the connection above 8 MiB
NAMED_RANKS = 5  # of those that are waited for
PLAN, NO_PLAN = b"plan", b"no plan"  # the first line of the file through which ranks agree


def from_rank_zero(world: World, folder: Path, make: Callable[[], bytes]) -> bytes:
    """What rank 0 made, at every rank of the launch.

    Under torchrun it goes through the launcher's own key-value store, and under srun and mpirun through a file. It
    never takes NCCL. Ranks that cannot agree each make their own.

    Args:
        folder: shared by all ranks. The file lies there, in a folder named after the launch.
        make: is called at rank 0, or at a rank that stands in for it.
    Raises:
        InputError: rank 0 has refused, or has failed to make it; or the ranks have not met in time.
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
    with remind_meanwhile(world.rank, (0, 1), lambda: "the other ranks to begin" if world.main else _rank_zero(folder)):
        store, _, _ = next(rendezvous("env://", timeout=timeout))
    store = PrefixStore(f"vqa_embeddings/{world.launch_key}", store)
    if world.main:
        put(store, make())
    with remind_meanwhile(world.rank, (1,), lambda: _rank_zero(folder)):
        payload = take(store)
    # Without torchrun's agent the store lives in rank 0, which must then not leave before all have read.
    store.set(f"read/{world.rank}", "")
    store.add("read", 1)
    if world.main:
        deadline = time.monotonic() + START_UP_SECONDS
        with remind_meanwhile(world.rank, (0,), lambda: f"{name_ranks(_missing_ranks(store, world.size))} to begin"):
            while store.add("read", 0) < world.size and time.monotonic() < deadline:
                time.sleep(0.05)
    return payload


def _rank_zero(folder: Path) -> str:
    return f"rank 0, which reads what {folder.parent} holds before any rank begins"


def _missing_ranks(store: Any, size: int) -> list[int]:
    return [rank for rank in range(size) if not store.check([f"read/{rank}"])]


def name_ranks(ranks: Sequence[int]) -> str:
    """These ranks in words, and of many the first ones. There are none if the last have come in the meantime."""
    if not ranks:
        return "the last ranks"
    named, more = ranks[:NAMED_RANKS], len(ranks) - NAMED_RANKS
    listed = ", ".join(map(str, named)) + (f" and {more} more" if more > 0 else "")
    return f"rank{'s' * (len(ranks) > 1)} {listed}"


def put(store: Any, payload: bytes) -> None:
    """Put the plan into the launcher's store, in pieces of a size that it accepts, and then their number."""
    pieces = [payload[start : start + STORE_BYTES] for start in range(0, len(payload), STORE_BYTES)]
    for number, piece in enumerate(pieces):
        store.set(f"plan/{number}", piece)
    store.set("plan", str(len(pieces)))


def take(store: Any) -> bytes:
    """Wait for the plan that rank 0 puts into the store, and return it."""
    return b"".join(store.get(f"plan/{number}") for number in range(int(store.get("plan"))))


def _through_file(world: World, folder: Path, make: Callable[[], bytes]) -> bytes:
    """The launch's plan. Rank 0 makes it at once; rank N makes it after N times `STAND_IN_SECONDS` without one.

    A script may run the program several times in one job step: each rank takes each plan once, in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken = f"-taken-by-{world.rank}"
    path = folder / f"plan-{len(list(folder.glob(f'*{taken}'))) + 1}"
    turn = time.monotonic() + STAND_IN_SECONDS * world.rank
    pause = 0.1
    try:
        with remind_meanwhile(world.rank, (1,), lambda: _rank_zero(folder.parent)):
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
    """Make the plan and publish it for all ranks, or why there is none. The first file published counts."""
    try:
        content = PLAN + b"\n" + make()
    except Exception as error:
        reason = str(error) if isinstance(error, InputError) else f"another rank could not begin: {one_line(error)}"
        told = NO_PLAN + b"\n" + reason.encode(errors="backslashreplace")
        publish(path, lambda temporary: temporary.write_bytes(told), replace=False)
        raise
    publish(path, lambda temporary: temporary.write_bytes(content), replace=False)
