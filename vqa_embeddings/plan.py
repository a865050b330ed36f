"""Who does what. Pure functions of plain values: the same table and the same history give the same shares."""

from __future__ import annotations

import heapq
import zlib

import numpy as np

PICTURE_COST = 3.0  # what a picture costs once, in units of one question: vision tower and prefix against ~100 tokens


def split(pictures: np.ndarray, wanted: np.ndarray, shares: int) -> np.ndarray:
    """Deal the wanted rows to `shares` shares, all questions on one picture to the same one, the work balanced.

    The pictures go, the costliest first, each to the share that has the least so far (longest processing time
    first, at most 4/3 of the best possible maximum: R. L. Graham, 1969).

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
    share_of = np.full(len(questions), -1)
    costliest_first = np.argsort(-questions, kind="stable")[: np.count_nonzero(questions)]
    costs = PICTURE_COST + questions[costliest_first]
    loads = [(0.0, share) for share in range(shares)]
    for picture, cost in zip(costliest_first.tolist(), costs.tolist(), strict=True):
        load, share = loads[0]
        share_of[picture] = share
        heapq.heapreplace(loads, (load + cost, share))
    owner = np.full(len(pictures), -1)
    owner[wanted] = share_of[pictures[wanted]]
    return owner


def share_rows(
    pictures: np.ndarray, pending: np.ndarray, part: tuple[int, int], rank: int, size: int, agreed: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of one slice of the table, and those of them that one rank of `size` is to do now.

    A slice is fixed by the table alone, so that array tasks which start hours apart never leave a gap between
    them; within a slice, the ranks of a launch share what is left.

    Args:
        pictures: int `[n]`, the picture of each row.
        pending: bool `[n]`, the rows still to do.
        part: `(i, n)`, the slice.
        agreed: whether all ranks of the launch have the same `pending`. Where they may not, they share the slice
            as it is and skip what is done: as exact, and less even.
    Returns:
        bool `[n]`, the slice; int `[m]`, the rank's rows, picture after picture in the order of the table.
    """
    inside = split(pictures, np.ones(len(pictures), bool), part[1]) == part[0]
    owner = split(pictures, inside & pending if agreed else inside, size)
    mine = np.flatnonzero((owner == rank) & pending)
    return inside, mine[np.argsort(pictures[mine], kind="stable")]


def pack(flags: np.ndarray) -> bytes:
    """Flags as few bytes, for the exchange at start-up."""
    return zlib.compress(np.packbits(flags).tobytes(), 1)


def unpack(data: bytes, count: int) -> np.ndarray:
    """The inverse of `pack`: bool `[count]`."""
    return np.unpackbits(np.frombuffer(zlib.decompress(data), np.uint8), count=count).astype(bool)
