"""What an output folder holds of its run: read by the extraction, to go on, and by the merge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vqa_embeddings.base.process_pool import ProcessPool
from vqa_embeddings.data.table import Table
from vqa_embeddings.records import Failed
from vqa_embeddings.store.coverage import Coverage, cover, find_truncated
from vqa_embeddings.store.parts import Part, read_parts
from vqa_embeddings.store.run import Run
from vqa_embeddings.store.segments import Corrupt, Segment, read_failures, read_segments


@dataclass(frozen=True)
class Catalog:
    """The run, its table, and the files that hold rows of it."""

    run: Run
    table: Table
    segments: list[Segment]
    parts: list[Part]
    corrupt: list[Corrupt]

    def coverage(self) -> Coverage:
        """Which rows are extracted, failed or missing."""
        return cover(
            len(self.table),
            [segment.rows for segment in self.segments],
            [part.rows for part in self.parts],
            [segment.failed for segment in self.segments],
        )

    def truncated(self, coverage: Coverage) -> np.ndarray:
        """bool `[n]`, the row was extracted on a picture that is cut off; `coverage` is that of these files."""
        in_segments = [segment.truncated for segment in self.segments]
        return find_truncated(coverage, in_segments, [part.truncated for part in self.parts])

    def failures(self, wanted: np.ndarray) -> dict[int, Failed]:
        """Why rows failed, by row: the last reason that was recorded, as launches are named after their start.

        Args:
            wanted: bool `[n]`, the rows to be told about; only segments in which one of them failed are read again.
        """
        telling = (segment.path for segment in self.segments if wanted[segment.failed].any())
        return {failed.row: failed for path in telling for failed in read_failures(path) if wanted[failed.row]}


def scan(folder: Path, run: Run, table: Table, verify: ProcessPool | None = None) -> Catalog:
    """Read what the folder holds: names, row numbers and, given workers, whether every segment's checksum holds."""
    segments, corrupt = read_segments(folder, run, verify)
    parts, damaged = read_parts(folder, run, table)
    return Catalog(run, table, segments, parts, corrupt + damaged)
