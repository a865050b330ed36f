"""Where the values of rows are to be read: in segments, and in parts those that no segment holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vqa_embeddings.base.files import sha256
from vqa_embeddings.data.table import Table
from vqa_embeddings.records import Extracted
from vqa_embeddings.store.catalog import Catalog
from vqa_embeddings.store.coverage import NOBODY, Coverage
from vqa_embeddings.store.hdf5 import open_verified
from vqa_embeddings.store.parts import PART_LAYOUTS, Part
from vqa_embeddings.store.run import Run
from vqa_embeddings.store.segments import Segment, read_records


@dataclass(frozen=True)
class SegmentRows:
    """Some rows of a segment: their positions in it."""

    path: Path
    positions: list[int]


@dataclass(frozen=True)
class PartRows:
    """Some rows of a part that is there: their positions in the table."""

    path: Path
    layout: str
    rows: list[int]


def find_sources(
    segments: Sequence[Segment], parts: Sequence[Part], coverage: Coverage, rows: np.ndarray
) -> list[SegmentRows | PartRows]:
    """The files from which the values of rows, int64 `[n]` and in order, are to be read.

    Args:
        parts: those that may be read, for rows that no segment holds.
    """
    holders = coverage.holder[rows]
    sources: list[SegmentRows | PartRows] = [
        SegmentRows(segments[holder].path, coverage.position[rows[holders == holder]].tolist())
        for holder in np.unique(holders[holders != NOBODY])
    ]
    left = rows[holders == NOBODY]
    for part in parts:
        if not len(left):
            break
        if part.last <= left[0] or left[-1] < part.first:
            continue
        taken = np.intersect1d(left, part.rows)
        if len(taken):
            sources.append(PartRows(part.path, part.layout, taken.tolist()))
            left = np.setdiff1d(left, taken)
    return sources


def read_source(source: SegmentRows | PartRows, table: Table, first: int, run: Run) -> list[Extracted]:
    """The records of some rows, from a file whose hash is right.

    Args:
        table: has their ids.
        first: position of its first row in the run's table.
    """
    if isinstance(source, SegmentRows):
        return read_records(source.path, source.positions, run.extra_vectors)
    with open_verified(source.path) as file:
        return PART_LAYOUTS[source.layout].read_rows(file, source.rows, table, first, run)


@dataclass(frozen=True)
class VerifiedReader:
    """Reads rows from files whose hash is right only: damage could keep HDF5 busy for ever.

    Attributes:
        recorded: SHA-256 of each part by its file name.
        verified: the names of those whose hash was seen by this merge; a part that has another one is passed over.
    """

    catalog: Catalog
    coverage: Coverage
    parts: Sequence[Part]
    recorded: dict[str, str]
    verified: set[str]

    def __call__(self, rows: np.ndarray) -> list[Extracted]:
        """The records of rows, int64 `[n]` and in order."""
        table, run, segments = self.catalog.table, self.catalog.run, self.catalog.segments
        stretches = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        sources = (s for some in stretches for s in find_sources(segments, self.parts, self.coverage, some))
        return [record for s in sources if self._is_whole(s) for record in read_source(s, table, 0, run)]

    def _is_whole(self, source: SegmentRows | PartRows) -> bool:
        name = source.path.name
        if isinstance(source, PartRows) and name not in self.verified:
            if sha256(source.path) != self.recorded[name]:
                return False
            self.verified.add(name)
        return True
