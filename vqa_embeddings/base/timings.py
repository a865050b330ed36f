"""Where the time goes: seconds by stage of the work, and notes for the user."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

# What keeps the model from computing; all other stages are the model's own.
OUTSIDE = ("waiting for pictures", "waiting for the disk", "records")


class Timings:
    """Adds up wall time by stage. Most stages only queue work on a GPU; those that read its results wait for it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.notes: Counter[str] = Counter()  # sentences for the end of the run, and how often each occurred

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time of the block to a stage."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    def outside(self) -> float:
        """The share of the time in which the model did not compute, 0 to 1."""
        return sum(self.seconds.get(name, 0.0) for name in OUTSIDE) / (self.total() or 1.0)
