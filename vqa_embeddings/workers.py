"""Several processes of one machine for work that consists of many like items. Data comes back in order."""

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


def in_this_process(function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
    """The `Workers` that need no other process."""
    return map(function, items)
