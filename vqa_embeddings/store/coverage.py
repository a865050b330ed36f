"""Which rows are extracted, failed or missing, and what each part is to hold. Pure functions of plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NOBODY = -1


@dataclass(frozen=True)
class Coverage:
    """Every row of the table is extracted, failed or missing, and nothing else.

    Attributes:
        holder: int64 `[n]`, the first of the segments that holds the row's values, `NOBODY` where none does.
        position: int64 `[n]`, where in that segment.
        extracted: bool `[n]`, a segment or a part holds the row's values.
        failed: bool `[n]`, not extracted, and a segment says why.
        duplicates: how many further copies of rows the segments hold.
    """

    holder: np.ndarray
    position: np.ndarray
    extracted: np.ndarray
    failed: np.ndarray
    duplicates: int

    @property
    def missing(self) -> np.ndarray:
        """bool `[n]`, neither extracted nor failed."""
        return ~(self.extracted | self.failed)

    def pending(self, retry_failed: bool) -> np.ndarray:
        """bool `[n]`, what a launch is to do: the missing rows, or with `retry_failed` the failed ones."""
        return self.failed if retry_failed else self.missing


def cover(
    count: int, held: Sequence[np.ndarray], in_parts: Iterable[np.ndarray], failed: Iterable[np.ndarray]
) -> Coverage:
    """Account for every one of `count` rows.

    Args:
        held: for each segment, the rows whose values it holds; of several copies the first counts.
        in_parts: for each part, the rows that it holds.
        failed: for each segment, the rows that it says have failed. A row that was extracted as well has not failed.
    """
    holder = np.full(count, NOBODY, np.int64)
    position = np.full(count, NOBODY, np.int64)
    duplicates = 0
    for segment, rows in enumerate(held):
        unique, where = np.unique(rows, return_index=True)
        fresh = holder[unique] == NOBODY
        holder[unique[fresh]], position[unique[fresh]] = segment, where[fresh]
        duplicates += len(rows) - int(fresh.sum())
    extracted = holder != NOBODY
    for rows in in_parts:
        extracted[rows] = True
    has_failed = np.zeros(count, bool)
    for rows in failed:
        has_failed[rows] = True
    return Coverage(holder, position, extracted, has_failed & ~extracted, duplicates)


def find_truncated(coverage: Coverage, held: Sequence[np.ndarray], in_parts: Iterable[np.ndarray]) -> np.ndarray:
    """bool `[n]`, the values of the row are those of a picture that is cut off.

    Args:
        held: for each segment, those of its rows that say so; what the row's holder says counts.
        in_parts: for each part likewise; what it says counts of rows that no segment holds.
    """
    truncated = np.zeros(len(coverage.holder), bool)
    for holder, rows in (*enumerate(held), *((NOBODY, rows) for rows in in_parts)):
        truncated[rows[coverage.holder[rows] == holder]] = True
    return truncated


@dataclass(frozen=True)
class PartPlan:
    """What a merge does about one part: `number` from 1, rows `first` to `last - 1` of the table, from 0."""

    number: int
    first: int
    last: int
    action: str  # KEEP, WRITE or WAIT


KEEP, WRITE, WAIT = "keep", "write", "wait"


def plan_parts(coverage: Coverage, size: int, there: Mapping[int, np.ndarray]) -> list[PartPlan]:
    """Which parts to keep, to write, or to leave until their rows are accounted for.

    Args:
        size: rows of the table a part.
        there: for each part that is there and in order, by its number, the rows that it holds.
    """
    plans = []
    missing = coverage.missing
    for number, first in enumerate(range(0, len(missing), size), start=1):
        last = min(first + size, len(missing))
        expected = first + np.flatnonzero(coverage.extracted[first:last])
        if number in there and np.array_equal(np.sort(there[number]), expected):
            action = KEEP
        elif missing[first:last].any():
            action = WAIT
        else:
            action = WRITE
        plans.append(PartPlan(number, first, last, action))
    return plans
