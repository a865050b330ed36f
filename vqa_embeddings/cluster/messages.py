"""What a rank tells the user: of many ranks the main one speaks for all, and each one only about itself."""

from __future__ import annotations

import sys
import time

from vqa_embeddings.base.console import CLEAR_LINE, print_line
from vqa_embeddings.cluster.world import World
from vqa_embeddings.errors import SAME_COMMAND, InputError, NothingFiniteError, SelfCheckError, StorageError

FAILED, REFUSED = 1, 2  # exit statuses
OTHER_RANKS_PAUSE = 2.0  # seconds before a rank other than the main one reports a refusal


def say(world: World, sentence: str) -> None:
    """Print a sentence once for all ranks of the launch."""
    if world.main:
        print_line(sentence)


def say_for_rank(world: World, sentence: str) -> None:
    """Print a sentence that is about this rank alone. In a terminal it replaces the main rank's progress bar."""
    place = CLEAR_LINE if not world.main and sys.stdout.isatty() else ""
    print_line(f"{place}rank {world.rank}: {sentence}" if world.size > 1 else sentence)


def refuse(refusal: InputError, world: World) -> int:
    """Print why nothing was done, and return the exit status.

    Usually all ranks refuse for the same reason. The main one prints it. The others wait a moment, in which their
    launcher ends them, and print it only if it does not.
    """
    if not world.main:
        time.sleep(OTHER_RANKS_PAUSE)
    print_line(f"error: {refusal}", sys.stderr)
    return REFUSED


def fail(
    failure: StorageError | NothingFiniteError | SelfCheckError | OSError, world: World, resume: str = SAME_COMMAND
) -> int:
    """Print what has ended this rank's work, and return the exit status.

    Args:
        resume: how to go on with the work, where that takes more words than SAME_COMMAND.
    Raises:
        OSError: the failure itself, where it has no number of the system's and so is an error of this program.
    """
    sentence = str(failure)
    if isinstance(failure, OSError):
        if failure.errno is None:
            raise failure
        what = failure.filename or "a file or a pipe"
        sentence = f"{what} fails ({failure.strerror}); repair the disk, and {SAME_COMMAND}"
    sentence = sentence.replace(SAME_COMMAND, resume)
    rank = f"rank {world.rank}: " if world.size > 1 else ""
    print_line(f"error: {rank}{sentence}", sys.stderr)
    return FAILED
