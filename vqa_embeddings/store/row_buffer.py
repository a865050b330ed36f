"""Room for the rows of a segment, allocated once and used again."""

from __future__ import annotations

from functools import partial

import numpy as np

from vqa_embeddings.records import Extracted, Failed
from vqa_embeddings.schema import VectorColumn, by_path, shapes_of
from vqa_embeddings.store.columnar import Slices
from vqa_embeddings.store.run import Run


class RowBuffer:
    """The records of a segment, those with values as columns.

    Where they were made, each small array would hold on to its place among the model's large ones, and the process
    would grow for thousands of rows.
    """

    BLOCK = 1000  # rows

    def __init__(self, run: Run) -> None:
        self._layers, self._columns = run.layers, run.vectors
        self._shapes = shapes_of(self._columns)
        self._blocks: list[dict[str, np.ndarray]] = []  # by path, float32 [BLOCK, size]
        self._records: list[tuple[int, str, bool]] = []  # row, answer, whether its picture is cut off
        self.failed: list[Failed] = []

    def __len__(self) -> int:
        return len(self._records) + len(self.failed)

    def add(self, record: Extracted | Failed) -> None:
        """Take a record over. Vectors that the run does not store are left out.

        Raises:
            ValueError: a vector is missing, or has another length.
        """
        if isinstance(record, Failed):
            self.failed.append(record)
            return
        block, place = divmod(len(self._records), self.BLOCK)
        if block == len(self._blocks):
            sizes = ((column.path, column.size) for column in self._columns)
            self._blocks.append({path: np.empty((self.BLOCK, size), np.float32) for path, size in sizes})
        self._check(record)
        for path, values in by_path(record.vectors, self._layers):
            if path in self._blocks[block]:
                self._blocks[block][path][place] = values
        self._records.append((record.row, record.answer, record.truncated))

    def _check(self, record: Extracted) -> None:
        for name, expected in self._shapes.items():
            found = record.vectors[name].shape if name in record.vectors else None
            if found != expected:  # which numpy might stretch without a word
                raise ValueError(f"{name} of row {record.row + 1} has shape {found}; expected {expected}")

    def clear(self) -> None:
        """Begin again with nothing in it."""
        self._records, self.failed = [], []

    def in_order(self) -> tuple[np.ndarray, list[str], np.ndarray]:
        """Of the rows with values, in the order of the table: int64 `[n]`, their answers, and bool `[n]`, truncated."""
        order = self._sort()
        rows, answers, truncated = zip(*(self._records[place] for place in order), strict=True) if order else ((),) * 3
        return np.array(rows, np.int64), list(answers), np.array(truncated, bool)

    def vectors(self) -> dict[VectorColumn, Slices]:
        """What gives the rows of each column, in the same order."""
        order = self._sort()
        return {column: partial(self._take, column.path, order) for column in self._columns}

    def _sort(self) -> list[int]:
        return sorted(range(len(self._records)), key=lambda place: self._records[place][0])

    def _take(self, path: str, order: list[int], start: int, stop: int) -> np.ndarray:
        places = (divmod(place, self.BLOCK) for place in order[start:stop])
        return np.stack([self._blocks[block][path][place] for block, place in places])
