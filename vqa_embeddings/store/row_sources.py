"""Where the values of rows are to be read: in segments, and in parts those that no segment holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np

from vqa_embeddings.base.files import sha256
from vqa_embeddings.errors import SAME_COMMAND, StorageError
from vqa_embeddings.records import RowValues
from vqa_embeddings.schema import VectorColumn
from vqa_embeddings.store import columnar, grouped
from vqa_embeddings.store.catalog import Catalog
from vqa_embeddings.store.chunks import Scratch
from vqa_embeddings.store.coverage import NOBODY, Coverage
from vqa_embeddings.store.hdf5 import get_dataset, open_verified
from vqa_embeddings.store.parts import Part
from vqa_embeddings.store.segments import Segment

MOST_ROWS = 1 << 32  # of a file whose hash is right


@dataclass(frozen=True)
class Source:
    """Some rows of a file, one at least.

    Attributes:
        grouped: it is a part in the published layout, otherwise one in columns, or a segment.
        rows: int64 `[m]`, their positions in the table.
        places: int64 `[m]`, where in the file's columns.
        into: int64 `[m]`, where among the rows that were asked for.
        stamp: of a part that another may replace under its name, what tells the two apart.
    """

    path: Path
    grouped: bool
    rows: np.ndarray
    places: np.ndarray
    into: np.ndarray
    stamp: tuple[int, ...] = ()

    def read_matrix(
        self, file: h5py.File, column: VectorColumn, ids: Callable[[int], str], matrix: np.ndarray, scratch: Scratch
    ) -> None:
        """Read a vector of the rows from the open file into those of a matrix, float32 `[n, size]`.

        Args:
            ids: gives the id of a row by its position in the table.
        """
        if self.grouped:
            grouped.read_matrix(file, column, [ids(row) for row in self.rows.tolist()], matrix, self.into)
        else:
            columnar.read_matrix(file, column, self.places, matrix, self.into, scratch)

    def read_answers(self, file: h5py.File, ids: Callable[[int], str], answers: list[str]) -> None:
        """Read the answers of the rows from the open file into a list of `n`; `ids` as for `read_matrix`."""
        if self.grouped:
            found = grouped.read_answers(file, [ids(row) for row in self.rows.tolist()])
        else:
            found = columnar.read_answers(file, self.places)
        for place, answer in zip(self.into.tolist(), found, strict=True):
            answers[place] = answer

    def read_truncated(self, file: h5py.File, ids: Callable[[int], str]) -> np.ndarray:
        """bool `[m]`, the pictures of the rows are cut off; `ids` as for `read_matrix`."""
        if self.grouped:
            return np.array([grouped.is_truncated(file, ids(row)) for row in self.rows.tolist()], bool)
        return columnar.read_truncated(file, len(get_dataset(file, columnar.ROW)))[self.places]

    def locate(self, file: h5py.File) -> Source:
        """The same rows where the open file has them: another merge may have replaced a part since it was looked into.

        Raises:
            StorageError: it does not have them.
        """
        if self.grouped:  # where rows are found by their ids
            return self
        rows = columnar.read_numbers(file, columnar.ROW, MOST_ROWS)
        if int(self.places.max()) < len(rows) and np.array_equal(rows[self.places], self.rows):
            return self
        order = np.argsort(rows, kind="stable")
        found = order[np.minimum(np.searchsorted(rows[order], self.rows), len(rows) - 1)] if len(rows) else order
        if len(found) != len(self.rows) or not np.array_equal(rows[found], self.rows):
            raise StorageError(f"{self.path} no longer holds the rows that it held at first: {SAME_COMMAND}")
        return replace(self, places=found)


def part_source(part: Part, rows: np.ndarray, asked: np.ndarray) -> Source:
    """Rows of a part, int64 `[m]`, among those that were asked for; both in order."""
    places, into = np.searchsorted(part.rows, rows), np.searchsorted(asked, rows)
    return Source(part.path, part.layout == "grouped", rows, places, into, part.stamp)


def segment_source(segment: Segment, coverage: Coverage, rows: np.ndarray, asked: np.ndarray) -> Source:
    """Rows of which this segment is the holder, int64 `[m]`, among those that were asked for; both in order."""
    return Source(segment.path, False, rows, coverage.position[rows], np.searchsorted(asked, rows))


def find_sources(
    segments: Sequence[Segment], parts: Sequence[Part], coverage: Coverage, rows: np.ndarray
) -> list[Source]:
    """The files from which the values of rows, int64 `[n]` and in order, are to be read.

    Args:
        parts: those that may be read, for rows that no segment holds.
    """
    holders = coverage.holder[rows]
    sources = [
        segment_source(segments[holder], coverage, rows[holders == holder], rows)
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
            sources.append(part_source(part, taken, rows))
            left = np.setdiff1d(left, taken)
    return sources


def read_values(
    sources: Sequence[Source], columns: Sequence[VectorColumn], rows: np.ndarray, ids: Callable[[int], str]
) -> RowValues:
    """The values of rows, from files whose hash is right.

    Args:
        sources: those of `find_sources`.
        rows: int64 `[n]`, positions in the table.
        ids: gives the id of a row by its position.
    Raises:
        StorageError: a file cannot be read, or none has one of the rows.
    """
    count = len(rows)
    _check_covered(sources, rows)
    matrices = {column.path: np.empty((count, column.size), np.float32) for column in columns}
    answers, truncated, scratch = [""] * count, np.zeros(count, bool), Scratch()
    for source in sources:
        with open_verified(source.path) as file:
            source = source.locate(file)
            for column in columns:
                source.read_matrix(file, column, ids, matrices[column.path], scratch)
            truncated[source.into] = source.read_truncated(file, ids)
            source.read_answers(file, ids, answers)
    return RowValues(rows, matrices, answers, truncated)


def _check_covered(sources: Sequence[Source], rows: np.ndarray) -> None:
    """What no file has would be whatever lay in the memory before."""
    found = np.zeros(len(rows), bool)
    for source in sources:
        found[source.into] = True
    if not found.all():
        raise StorageError(f"row {rows[~found][0] + 1} is no longer in the files that had it: {SAME_COMMAND}")


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

    def __call__(self, rows: np.ndarray) -> RowValues:
        """The values of rows, int64 `[n]` and in order, less those of parts that are passed over."""
        parts = list(self.parts)
        while True:
            sources = find_sources(self.catalog.segments, parts, self.coverage, rows)
            used = {source.path for source in sources}
            damaged = {part.path for part in parts if part.path in used and not self._is_whole(part)}
            if not damaged:
                break
            parts = [part for part in parts if part.path not in damaged]
        readable = rows[np.isin(rows, np.concatenate([source.rows for source in sources] or [rows[:0]]))]
        if len(readable) < len(rows):
            sources = find_sources(self.catalog.segments, parts, self.coverage, readable)
        return read_values(sources, self.catalog.run.vectors, readable, self.catalog.table.ids.__getitem__)

    def _is_whole(self, part: Part) -> bool:
        name = part.path.name
        if name not in self.verified:
            if sha256(part.path) != self.recorded[name]:
                return False
            self.verified.add(name)
        return True
