"""Who does what. Pure functions of plain values: the same table and the same history give the same shares."""

from __future__ import annotations

import heapq
import zlib

import numpy as np

UNIT_ROWS = 250  # of neighbouring pictures, dealt together: the 1000 rows of a part then lie in about five segments
SHARE_UNITS = 256  # that a share has at least, so that it has no more than its part: small tables go by the picture
PICTURE_COST = 10.0  # what a picture costs once, in units of one question and its answer: see tests/benchmarks


def split(pictures: np.ndarray, wanted: np.ndarray, shares: int) -> np.ndarray:
    """Deal the wanted rows to `shares` shares, all questions on one picture to the same one, the work balanced.

    Some pictures that follow each other make a unit. The units go, the costliest first, each to the share that has
    the least so far (longest processing time first, at most 4/3 of the best possible maximum: R. L. Graham, 1969).

    Args:
        pictures: int `[n]`, the picture of each row, counted from 0 without large gaps.
        wanted: bool `[n]`, which rows there are to do.
        shares: how many shares.
    Returns:
        int64 `[n]`: the share of each row, -1 where it is not wanted.
    """
    if shares == 1:
        return np.where(wanted, 0, -1)
    questions = np.bincount(pictures[wanted])
    asked = np.flatnonzero(questions)
    costs = PICTURE_COST + questions[asked]
    size = unit_size(len(asked), int(questions.sum()), shares)
    units = np.add.reduceat(costs, np.arange(0, len(asked), size)) if size > 1 else costs
    costliest_first = np.argsort(-units, kind="stable")
    dealt = np.empty(len(units), np.int64)
    dealt[costliest_first] = deal(units[costliest_first], shares)
    share_of = np.full(len(questions), -1)
    share_of[asked] = np.repeat(dealt, size)[: len(asked)]
    owner = np.full(len(pictures), -1)
    owner[wanted] = share_of[pictures[wanted]]
    return owner


def unit_size(pictures: int, rows: int, shares: int) -> int:
    """How many neighbouring pictures go to a share together, where so many pictures have so many rows to do."""
    return max(1, min(UNIT_ROWS * pictures // max(1, rows), pictures // (SHARE_UNITS * shares)))


def deal(costs: np.ndarray, shares: int) -> np.ndarray:
    """Give each cost in turn to the share with the least so far, and of several to the first.

    Args:
        costs: float `[m]`, the highest first.
        shares: how many shares.
    Returns:
        int64 `[m]`: the share of each.
    """
    loads = [(0.0, share) for share in range(shares)]  # a heap: the least load, and of equal ones the first share
    dealt = []
    for cost in costs.tolist():
        load, share = loads[0]
        dealt.append(share)
        heapq.heapreplace(loads, (load + cost, share))
    return np.array(dealt, np.int64)


def rows_of_slice(pictures: np.ndarray, slice_: tuple[int, int]) -> np.ndarray:
    """The rows of slice `i` of `n`, as bool `[rows]`: fixed by the table alone.

    Array tasks that start hours apart then never leave a gap between them, whatever was done in the meantime.

    Args:
        pictures: int `[rows]`, the picture of each row.
        slice_: `(i, n)`.
    """
    index, count = slice_
    return split(pictures, np.ones(len(pictures), bool), count) == index


def share_rows(
    pictures: np.ndarray, pending: np.ndarray, slice_: tuple[int, int], rank: int, size: int, agreed: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of one slice of the table, and those of them that one rank of `size` is to do now.

    Within a slice, the ranks of a launch share what is left.

    Args:
        pictures: int `[n]`, the picture of each row.
        pending: bool `[n]`, the rows still to do.
        slice_: `(i, n)`, the slice.
        agreed: whether all ranks of the launch have the same `pending`. Where they may not, they share the slice
            unchanged, and skip what is done: no row is lost or done twice, but the work is less even.
    Returns:
        bool `[n]`, the slice; int `[m]`, the rank's rows, picture after picture in the order of the table.
    """
    inside = rows_of_slice(pictures, slice_)
    owner = split(pictures, inside & pending if agreed else inside, size)
    mine = np.flatnonzero((owner == rank) & pending)
    return inside, mine[np.argsort(pictures[mine], kind="stable")]


def pack(flags: np.ndarray) -> bytes:
    """Flags as few bytes, for the exchange at start-up."""
    return zlib.compress(np.packbits(flags).tobytes(), 1)


def unpack(data: bytes, count: int) -> np.ndarray:
    """The inverse of `pack`: bool `[count]`."""
    return np.unpackbits(np.frombuffer(zlib.decompress(data), np.uint8), count=count).astype(bool)
