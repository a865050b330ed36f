"""The result of a row: its values, or the reason why it has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Extracted:
    """The values of one row; `row` is its position in the table, from 0."""

    row: int
    vectors: Mapping[str, np.ndarray]  # by their names in `schema` and those of the model's own; float32 [size], or
    # [layers, size] of those that every layer has
    answer: str
    truncated: bool = False  # its picture is cut off, and what there is of it was shown


@dataclass(frozen=True)
class Failed:
    """A row that has no values, and why."""

    row: int
    error: str
    message: str


@dataclass(frozen=True)
class RowValues:
    """The values of several rows, column by column; `rows` are positions in the table, int64 `[n]`."""

    rows: np.ndarray
    matrices: Mapping[str, np.ndarray]  # float32 [n, size], by their paths in a file
    answers: list[str]
    truncated: np.ndarray  # bool [n]

    def __len__(self) -> int:
        return len(self.rows)
