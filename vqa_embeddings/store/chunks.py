"""Rows of a chunked matrix, read beside HDF5: a chunk goes from the file to its place in memory, in any thread.

HDF5 reads one chunk at a time under a lock, copies it twice, and takes longer over its checksum than over its bytes.
This is for matrices as `columnar` writes them: float32, chunks of whole rows, Fletcher-32 and no other filter. What is
held against the bytes is attribute `chunk_sums`, at the speed of memory.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5z

CHUNK_SUMS = "chunk_sums"  # attribute of a matrix, uint64 [chunks]: what `sum_chunk` gives for each
CHECKSUM_BYTES = 4  # Fletcher-32, behind each chunk
FLOAT = np.dtype("<f4")


class Scratch:
    """Memory for chunks of which not all rows are wanted together. To allocate it takes as long as to read one."""

    def __init__(self) -> None:
        self._room = np.empty(0, np.float32)

    def take(self, rows: int, size: int) -> np.ndarray:
        """Room for a chunk, float32 `[rows, size]`; what was in it is gone."""
        if len(self._room) < rows * size:
            self._room = np.empty(rows * size, np.float32)
        return self._room[: rows * size].reshape(rows, size)


def sum_chunk(rows: np.ndarray) -> int:
    """The sum, modulo 2^64, of the bytes of float32 `[n, size]` as little-endian numbers of 64 bits.

    Zeros stand for half a number that is missing, and rows of zeros behind the last one change nothing. Every flipped
    bit changes the sum.
    """
    flat = rows.reshape(-1)
    total = int(np.add.reduce(flat[: len(flat) // 2 * 2].view("<u8"), dtype=np.uint64))
    last = int(flat[-1:].view("<u4")[0]) if len(flat) % 2 else 0
    return (total + last) % (1 << 64)


def can_read(dataset: h5py.Dataset) -> bool:
    """Whether it is a matrix of that kind."""
    low = dataset.id
    creation = low.get_create_plist()
    if low.rank != 2 or low.dtype != FLOAT or creation.get_layout() != h5d.CHUNKED:
        return False
    filters = [creation.get_filter(number)[0] for number in range(creation.get_nfilters())]
    plain = filters == [h5z.FILTER_FLETCHER32] and creation.get_chunk()[1] == low.shape[1]
    return plain and h5a.exists(low, CHUNK_SUMS.encode())


def read_rows(
    dataset: h5py.Dataset, places: np.ndarray, matrix: np.ndarray, into: np.ndarray, scratch: Scratch
) -> None:
    """Read rows of a matrix that `can_read` knows into rows of another one.

    Args:
        places: int64 `[m]`, where in the dataset.
        matrix: float32 `[n, size]`.
        into: int64 `[m]`, where in `matrix`.
    Raises:
        OSError: the file ends before a chunk does, or a chunk does not have its sum.
    """
    length, size = dataset.id.get_create_plist().get_chunk()
    descriptor, sums = dataset.file.id.get_vfd_handle(), _read_sums(dataset)
    spare = scratch.take(length, size)
    if not (places[1:] > places[:-1]).all():
        order = np.argsort(places, kind="stable")
        places, into = places[order], into[order]
    numbers = places // length
    begins = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()
    for begin, end in pairwise([*begins, len(places)]):
        number = int(numbers[begin])
        inside, target = as_slice(places[begin:end] - number * length), as_slice(into[begin:end])
        whole = end - begin == length and isinstance(inside, slice) and isinstance(target, slice)
        chunk = matrix[target] if whole else spare
        _read_chunk(dataset, descriptor, number, chunk)
        if number >= len(sums) or sum_chunk(chunk) != sums[number]:
            raise OSError(f"chunk {number} of {dataset.name} does not have the sum that was stored for it")
        if not whole:
            matrix[target] = spare[inside]


def as_slice(places: np.ndarray) -> slice | np.ndarray:
    """Places, int64 `[n]`, as a slice where each is one more than the one before; else they themselves."""
    first, last = int(places[0]), int(places[-1])
    if last - first == len(places) - 1 and (places[1:] > places[:-1]).all():
        return slice(first, last + 1)
    return places


def _read_sums(dataset: h5py.Dataset) -> list[int]:
    attribute = h5a.open(dataset.id, CHUNK_SUMS.encode())
    sums = np.empty(attribute.shape, np.uint64)
    attribute.read(sums)
    return sums.tolist()


def _read_chunk(dataset: h5py.Dataset, descriptor: int, number: int, target: np.ndarray) -> None:
    """Read one of the chunks, float32 `[rows, size]`."""
    found = dataset.id.get_chunk_info_by_coord((number * len(target), 0))
    if found.byte_offset is None or found.filter_mask or found.size != target.nbytes + CHECKSUM_BYTES:
        raise OSError(f"chunk {number} of {dataset.name} is not as it was written")
    whole: Any = target  # mypy takes no array for a buffer
    left, offset = memoryview(whole).cast("B"), found.byte_offset
    while left:
        got = os.preadv(descriptor, [left], offset)
        if not got:
            raise OSError(f"it ends in chunk {number} of {dataset.name}")
        left, offset = left[got:], offset + got
