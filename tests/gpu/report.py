"""What a stage says, each line at once: a run that is cut is still useful."""

from __future__ import annotations

from dataclasses import dataclass


class Skipped(Exception):
    """The stage has nothing to do here; the message says why."""


def say(line: str) -> None:
    """Print a line, and see to it that it is seen."""
    print(line, flush=True)


@dataclass
class Report:
    """The checks of a stage."""

    checks: int = 0
    off: int = 0

    def check(self, right: bool, line: str) -> None:
        """Say what was found, and whether it is as expected."""
        self.checks += 1
        self.off += not right
        say(f"  {'ok ' if right else 'OFF'} {line}")
