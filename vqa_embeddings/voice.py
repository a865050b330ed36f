"""Who speaks: of many ranks, the main one, and every one only about itself."""

from __future__ import annotations

import sys
import time

from vqa_embeddings.errors import Refused, StorageFailed
from vqa_embeddings.world import World

FAILED, REFUSED = 1, 2  # exit statuses
SECOND_VOICE_SECONDS = 2.0


def say(world: World, sentence: str) -> None:
    """Print a sentence once for all ranks of the launch."""
    if world.main:
        print(sentence, flush=True)


def say_for_rank(world: World, sentence: str) -> None:
    """Print a sentence that is about this rank alone."""
    print(f"rank {world.rank}: {sentence}" if world.size > 1 else sentence, flush=True)


def refuse(refusal: Refused, world: World) -> int:
    """Say why nothing was done, and give the exit status.

    All ranks mostly refuse for the same reason. The main one says it; the others wait a moment, in which their
    launcher ends them, and speak only if it does not.
    """
    if not world.main:
        time.sleep(SECOND_VOICE_SECONDS)
    print(f"error: {refusal}", file=sys.stderr, flush=True)
    return REFUSED


def fail(failure: StorageFailed | OSError, world: World) -> int:
    """Say what has ended this rank's work, and give the exit status. What is not about a file is raised again."""
    sentence = str(failure)
    if isinstance(failure, OSError):
        if failure.filename is None:
            raise failure
        sentence = f"{failure.filename} fails ({failure.strerror}); mend the disk, and the same command continues"
    rank = f"rank {world.rank}: " if world.size > 1 else ""
    print(f"error: {rank}{sentence}", file=sys.stderr, flush=True)
    return FAILED
