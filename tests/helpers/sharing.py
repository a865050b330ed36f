"""What several processes of one run of the tests need, computed by one of them."""

from __future__ import annotations

import contextlib
import fcntl
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file among the processes of this run of the tests, or say that another one holds it."""
    with open(path, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def compute_together(folder: Path, keys: Sequence[str], compute: Callable[[str], object]) -> dict[str, object]:
    """`compute(key)` by key; of several processes that ask for them at once, each computes those that no other has."""
    for wait in (False, True):
        for key in keys:
            path = folder / key
            with locked(folder / f"{key}.lock", wait) as ours:
                if ours and not path.exists():
                    path.with_suffix(".tmp").write_bytes(pickle.dumps(compute(key)))
                    path.with_suffix(".tmp").rename(path)
    return {key: pickle.loads((folder / key).read_bytes()) for key in keys}
