"""Who speaks: of many ranks, the main one, and every one only about itself."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from vqa_embeddings.errors import SAME_COMMAND, InputError, NothingFinite, StorageError

if TYPE_CHECKING:
    from vqa_embeddings.cluster.world import World

FAILED, REFUSED = 1, 2  # exit statuses
SECOND_VOICE_SECONDS = 2.0
PATIENCE_SECONDS = 10.0  # after which a rank that waits for others says so
REMINDER_SECONDS = 300.0  # after which it says so again
CLEAR_LINE = "\r\033[K"  # for terminals


def say(world: World, sentence: str) -> None:
    """Print a sentence once for all ranks of the launch."""
    if world.main:
        speak(sentence)


def say_for_rank(world: World, sentence: str) -> None:
    """Print a sentence that is about this rank alone, in a terminal in the place of the main rank's bar."""
    place = CLEAR_LINE if not world.main and sys.stdout.isatty() else ""
    speak(f"{place}rank {world.rank}: {sentence}" if world.size > 1 else sentence)


@contextmanager
def wait_aloud(world: World, speakers: Container[int], for_whom: Callable[[], str]) -> Iterator[None]:
    """A block that waits for other ranks. After a while it says for whom, and then again, but rarely.

    Args:
        speakers: the ranks that say so: of a thousand that wait for the same one, the first.
        for_whom: is asked when that is to be said, in a thread.
    """
    if world.rank not in speakers:
        yield
        return
    over = threading.Event()
    reminder = threading.Thread(target=remind_while_waiting, args=(world.rank, for_whom, over.wait), daemon=True)
    reminder.start()
    try:
        yield
    finally:
        over.set()
        reminder.join()  # a process that ends while a thread is inside torch's store is aborted


def remind_while_waiting(rank: int, for_whom: Callable[[], str], over: Callable[[float], object]) -> None:
    """Say that this rank waits, and for whom, until that is over.

    Args:
        over: waits for so many seconds; true once the waiting has an end.
    """
    begun, pause = time.monotonic(), PATIENCE_SECONDS
    while not over(pause):
        speak(f"rank {rank}: has waited {time.monotonic() - begun:.0f} s for {for_whom()}", sys.stderr)
        pause = REMINDER_SECONDS


def refuse(refusal: InputError, world: World) -> int:
    """Say why nothing was done, and give the exit status.

    All ranks mostly refuse for the same reason. The main one says it; the others wait a moment, in which their
    launcher ends them, and speak only if it does not.
    """
    if not world.main:
        time.sleep(SECOND_VOICE_SECONDS)
    speak(f"error: {refusal}", sys.stderr)
    return REFUSED


def fail(failure: StorageError | NothingFinite | OSError, world: World, resume: str = SAME_COMMAND) -> int:
    """Say what has ended this rank's work, and give the exit status. What the system has not said is raised again.

    Args:
        resume: what goes on with the work, where that takes more words than SAME_COMMAND.
    """
    sentence = str(failure)
    if isinstance(failure, OSError):
        if failure.errno is None:
            raise failure
        what = failure.filename or "a file or a pipe"
        sentence = f"{what} fails ({failure.strerror}); mend the disk, and {SAME_COMMAND}"
    sentence = sentence.replace(SAME_COMMAND, resume)
    rank = f"rank {world.rank}: " if world.size > 1 else ""
    speak(f"error: {rank}{sentence}", sys.stderr)
    return FAILED


def speak(sentence: str, stream: TextIO | None = None) -> None:
    """Print it at once. Where nobody can hear it, as on a full disk of logs, the work goes on all the same."""
    stream = stream or sys.stdout
    if stream is not None:  # as it is where it was closed before the start
        encoding = stream.encoding or "utf-8"
        with suppress(OSError):
            print(sentence.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
