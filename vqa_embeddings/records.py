"""The result of a row: its values, or the reason why it has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Extracted:
    """The values of one row; `row` is its position in the table, from 0."""

    row: int
    vision_only: np.ndarray  # float32 [vision]
    vision_token: np.ndarray  # float32 [layers, hidden]
    query_token: np.ndarray  # float32 [layers, hidden]
    extra: Mapping[str, np.ndarray]  # further vectors of its picture, float32 [n], by their names in a part
    answer: str
    truncated: bool = False  # its picture is cut off, and what there is of it was shown


@dataclass(frozen=True)
class Failed:
    """A row that has no values, and why."""

    row: int
    error: str
    message: str
