"""Several processes for work that consists of many like items: of this machine, or the ranks of a launch."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from vqa_embeddings.base.console import say
from vqa_embeddings.cluster.mpi import NoMPI, begin_aloud, begin_mpi
from vqa_embeddings.cluster.world import World

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2  # items handed out for each process: one in hand, one waiting


class Workers(Protocol):
    """What does the work of several processes, or of this one."""

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
        """The results in the order of the items, as `map` gives them. An item is made when its turn comes."""


@contextmanager
def start_workers(processes: int) -> Iterator[Workers]:
    """So many processes until the end of the block, none of which begins before there is work; 1 is this one alone."""
    if processes == 1:
        yield in_this_process
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:

        def in_the_pool(function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
            handed_out: deque[Future[Result]] = deque()
            for item in items:
                handed_out.append(pool.submit(function, item))
                if len(handed_out) == AHEAD * processes:
                    yield handed_out.popleft().result()
            while handed_out:
                yield handed_out.popleft().result()

        yield in_the_pool


@contextmanager
def gather_ranks(world: World, processes: int) -> Iterator[Workers | None]:
    """The ranks of a launch, all with this block: rank 0 gets them as its workers, the others None once they are done.

    Where MPI cannot bring them together, rank 0 says so and works alone, with so many processes.
    """
    try:
        with begin_aloud(world.rank, world.size):
            mpi = begin_mpi(world.mpi, world.rank, world.size)
    except NoMPI as reason:
        say(world, f"rank 0 works alone, without the other {world.size - 1}: {reason}")
        with start_workers(processes) as workers:
            yield workers if world.main else None
        return
    from mpi4py.futures import MPICommExecutor

    if processes > 1:
        say(world, f"{world.size} ranks share the work, a process each; --jobs {processes} is for one rank alone")
    try:
        with MPICommExecutor(mpi.COMM_WORLD) as executor:  # where the others stay until rank 0 leaves it
            yield _with_the_others(executor, world.size - 1) if executor else None
    finally:
        mpi.Finalize()


def _with_the_others(executor: Any, others: int) -> Workers:
    """So many ranks, to which `executor` leads, and this one, which takes an item whenever they have enough to do."""

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


def in_this_process(function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
    """The `Workers` that need no other process."""
    return map(function, items)
