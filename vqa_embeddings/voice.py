"""Who speaks: of many ranks, the main one, and every one only about itself."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TextIO

from vqa_embeddings.errors import Refused, StorageFailed
from vqa_embeddings.world import World

FAILED, REFUSED = 1, 2  # exit statuses
SECOND_VOICE_SECONDS = 2.0
CLEAR_LINE = "\r\033[K"  # for terminals


def say(world: World, sentence: str) -> None:
    """Print a sentence once for all ranks of the launch."""
    if world.main:
        _print(sentence)


def say_for_rank(world: World, sentence: str) -> None:
    """Print a sentence that is about this rank alone, in a terminal in the place of the main rank's bar."""
    place = CLEAR_LINE if not world.main and sys.stdout.isatty() else ""
    _print(f"{place}rank {world.rank}: {sentence}" if world.size > 1 else sentence)


def refuse(refusal: Refused, world: World) -> int:
    """Say why nothing was done, and give the exit status.

    All ranks mostly refuse for the same reason. The main one says it; the others wait a moment, in which their
    launcher ends them, and speak only if it does not.
    """
    if not world.main:
        time.sleep(SECOND_VOICE_SECONDS)
    _print(f"error: {refusal}", sys.stderr)
    return REFUSED


def fail(failure: StorageFailed | OSError, world: World) -> int:
    """Say what has ended this rank's work, and give the exit status. What the system has not said is raised again."""
    sentence = str(failure)
    if isinstance(failure, OSError):
        if failure.errno is None:
            raise failure
        what = failure.filename or "a file or a pipe"
        sentence = f"{what} fails ({failure.strerror}); mend the disk, and the same command continues"
    rank = f"rank {world.rank}: " if world.size > 1 else ""
    _print(f"error: {rank}{sentence}", sys.stderr)
    return FAILED


def _print(sentence: str, stream: TextIO | None = None) -> None:
    """Print it at once. Where nobody can hear it, as on a full disk of logs, the work goes on all the same."""
    stream = stream or sys.stdout
    if stream is not None:  # as it is where it was closed before the start
        encoding = stream.encoding or "utf-8"
        with suppress(OSError):
            print(sentence.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
