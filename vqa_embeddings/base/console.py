"""Lines for the user on standard output and standard error, and reminders of a process that waits for others."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

PATIENCE_SECONDS = 10.0  # after which a rank that waits for others says so
REMINDER_SECONDS = 300.0  # after which it says so again
CLEAR_LINE = "\r\033[K"  # for terminals


def print_line(sentence: str, stream: TextIO | None = None) -> None:
    """Print a line and flush it. Where it cannot be written, as with logs on a full disk, the work goes on.

    Args:
        stream: standard output by default.
    """
    stream = stream or sys.stdout
    if stream is not None:  # as it is where it was closed before the start
        encoding = stream.encoding or "utf-8"
        with suppress(OSError):
            print(sentence.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


@contextmanager
def remind_meanwhile(rank: int, speakers: Container[int], waited_for: Callable[[], str]) -> Iterator[None]:
    """A block in which this rank waits for other ranks. After a while it prints for which, and then again, rarely.

    Args:
        rank: this process's rank.
        speakers: the ranks that print it: of a thousand that wait for the same rank, only the first.
        waited_for: names the ranks, when a reminder is due; called in a thread.
    """
    if rank not in speakers:
        yield
        return
    over = threading.Event()
    reminder = threading.Thread(target=remind_while_waiting, args=(rank, waited_for, over.wait), daemon=True)
    reminder.start()
    try:
        yield
    finally:
        over.set()
        reminder.join()  # a process that ends while a thread is inside torch's store is aborted


def remind_while_waiting(rank: int, waited_for: Callable[[], str], over: Callable[[float], object]) -> None:
    """Print that this rank waits, and for which ranks, until the wait is over.

    Args:
        over: waits for so many seconds; true once the wait has ended.
    """
    begun, pause = time.monotonic(), PATIENCE_SECONDS
    while not over(pause):
        print_line(f"rank {rank}: has waited {time.monotonic() - begun:.0f} s for {waited_for()}", sys.stderr)
        pause = REMINDER_SECONDS
