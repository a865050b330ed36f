"""The ranks of a launch as a process pool, through MPI."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from vqa_embeddings.base.process_pool import AHEAD, Item, ProcessPool, Result, start_pool
from vqa_embeddings.cluster.messages import say
from vqa_embeddings.cluster.mpi import NoMPI, begin_mpi, remind_from_child
from vqa_embeddings.cluster.world import World


@contextmanager
def gather_ranks(world: World, processes: int) -> Iterator[ProcessPool | None]:
    """All ranks of a launch enter this block. Rank 0 gets them as its pool; the others get None, once they are done.

    Where MPI cannot bring them together, rank 0 says so and works alone, with a pool of so many processes.
    """
    try:
        with remind_from_child(world.rank, world.size):
            mpi = begin_mpi(world.mpi, world.rank, world.size)
    except NoMPI as reason:
        say(world, f"rank 0 works alone, without the other {world.size - 1}: {reason}")
        with start_pool(processes) as pool:
            yield pool if world.main else None
        return
    from mpi4py.futures import MPICommExecutor

    if processes > 1:
        say(world, f"{world.size} ranks share the work, a process each; --jobs {processes} is for one rank alone")
    try:
        with MPICommExecutor(mpi.COMM_WORLD) as executor:  # where the others stay until rank 0 leaves it
            yield _pool_of_ranks(executor, world.size - 1) if executor else None
    finally:
        mpi.Finalize()


def _pool_of_ranks(executor: Any, others: int) -> ProcessPool:
    """The pool of `others` ranks, reached through `executor`, and of this rank, which works while they have enough."""

    def in_the_ranks(function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
        results: deque[Future[Result]] = deque()
        for item in items:
            if sum(not result.done() for result in results) < AHEAD * others:
                results.append(executor.submit(function, item))
            else:
                results.append(Future())
                results[-1].set_result(function(item))
            while results and results[0].done():
                yield results.popleft().result()
        while results:
            yield results.popleft().result()

    return in_the_ranks
