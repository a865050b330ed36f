"""Processes of this machine for work that consists of many similar items."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2  # items handed out for each process: one in hand, one waiting


class ProcessPool(Protocol):
    """A `map` whose calls run in several processes, or in this one."""

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
        """The results in the order of the items. An item is taken from the iterable when its turn comes."""


@contextmanager
def start_pool(processes: int) -> Iterator[ProcessPool]:
    """A pool of so many processes until the end of the block. They start with the first items; 1 is this process."""
    if processes == 1:
        yield in_this_process
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as executor:

        def in_the_pool(function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
            handed_out: deque[Future[Result]] = deque()
            for item in items:
                handed_out.append(executor.submit(function, item))
                if len(handed_out) == AHEAD * processes:
                    yield handed_out.popleft().result()
            while handed_out:
                yield handed_out.popleft().result()

        yield in_the_pool


def in_this_process(function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
    """The `ProcessPool` that needs no other process."""
    return map(function, items)
