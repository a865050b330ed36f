"""Pictures prepared ahead of the model by a pool of threads, in the order in which they are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import takewhile
from typing import TypeVar

from vqa_embeddings.errors import SAME_COMMAND, RowError, StorageError, one_line

K = TypeVar("K")
T = TypeVar("T")

LONGEST_WAIT = 1800.0  # seconds for the next picture: more than a decode process takes to start, read and decode it
POLL_SECONDS = 0.1  # between two checks of `stopping` while a picture is awaited


def read_ahead(
    keys: Iterable[K], prepare: Callable[[K], T], workers: int, stopping: Callable[[], bool] = lambda: False
) -> Iterator[tuple[K, T | RowError]]:
    """Yield `prepare(key)` for every key in order, and run up to `2 * workers` of them ahead in threads.

    Once `stopping` returns true the iteration ends. It does not wait for a thread that may never return.

    Args:
        keys: what to prepare.
        prepare: is called in a thread, or in the caller's where there are no workers.
        workers: number of threads; with 0 nothing is prepared ahead.
        stopping: whether to end early.
    Yields:
        The key, and the result or the `RowError` that was raised instead. Any other error is raised here.
    Raises:
        StorageError: the next result does not come within `LONGEST_WAIT`. Time in which the process is suspended does
            not count.
    """

    def attempt(key: K) -> T | RowError:
        try:
            return prepare(key)
        except RowError as failure:
            return failure

    if workers == 0:
        yield from ((key, attempt(key)) for key in takewhile(lambda _: not stopping(), keys))
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pictures")
    pending: deque[tuple[K, Future[T | RowError]]] = deque()
    left = iter(keys)
    try:
        while True:
            while len(pending) < 2 * workers and (key := next(left, None)) is not None:
                pending.append((key, pool.submit(attempt, key)))
            if not pending:
                return
            key, future = pending.popleft()
            if not _wait_for(future, key, stopping):
                return
            yield key, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _wait_for(future: Future[T], key: object, stopping: Callable[[], bool]) -> bool:
    """Wait for a result; False if `stopping` returned true first.

    Polls are counted, not seconds: a suspended process must not find its time used up when it continues.
    """
    for _ in range(round(LONGEST_WAIT / POLL_SECONDS)):
        if stopping():
            return False
        if wait([future], POLL_SECONDS).done:
            return True
    raise StorageError(
        f"no picture has come for {LONGEST_WAIT / 60:.0f} minutes, and the next would be that of "
        f"{one_line(key)}; repair the file server, and {SAME_COMMAND}"
    )
