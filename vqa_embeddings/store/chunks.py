"""Rows of a chunked matrix, read beside HDF5: a chunk goes from the file to its place in memory, in any thread.

HDF5 reads one chunk at a time under a lock, copies it twice, and takes longer over its checksum than over its bytes.
This is for matrices as `columnar` writes them: float32, chunks of whole rows, Fletcher-32 and no other filter. Of the
checksum the first of two sums is held against the bytes: every flipped bit changes it, and whatever else happens to a
chunk in all but one of 65,535 cases.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5z

CHECKSUM_BYTES = 4  # behind each chunk: the first sum, then the second, which weights the words by their places
MODULUS = 65535
HALF = np.uint64(32)  # of the bits of a number
FLOAT = np.dtype("<f4")


class Scratch:
    """What one thread needs to read chunks. To allocate it for each file would take as long as to read them."""

    def __init__(self) -> None:
        self._rooms: dict[str, np.ndarray] = {}

    def take(self, name: str, count: int, dtype: type[np.generic]) -> np.ndarray:
        """Room for so many numbers, `[count]`; what was in it is gone."""
        room = self._rooms.get(name)
        if room is None or len(room) < count:
            room = self._rooms[name] = np.empty(count, dtype)
        return room[:count]


def can_read(dataset: h5py.Dataset) -> bool:
    """Whether it is a matrix of that kind."""
    low = dataset.id
    creation = low.get_create_plist()
    if low.rank != 2 or low.dtype != FLOAT or creation.get_layout() != h5d.CHUNKED:
        return False
    filters = [creation.get_filter(number)[0] for number in range(creation.get_nfilters())]
    return filters == [h5z.FILTER_FLETCHER32] and creation.get_chunk()[1] == low.shape[1]


def read_rows(
    dataset: h5py.Dataset, places: np.ndarray, matrix: np.ndarray, into: np.ndarray, scratch: Scratch
) -> None:
    """Read rows of a matrix that `can_read` knows into rows of another one.

    Args:
        places: int64 `[m]`, where in the dataset.
        matrix: float32 `[n, size]`.
        into: int64 `[m]`, where in `matrix`.
    Raises:
        OSError: the file ends before a chunk does, or a checksum does not hold.
    """
    length, size = dataset.id.get_create_plist().get_chunk()
    descriptor = dataset.file.id.get_vfd_handle()
    spare = scratch.take("chunk", length * size, np.float32).reshape(length, size)
    order = np.argsort(places, kind="stable")
    places, into = places[order], into[order]
    numbers = places // length
    begins = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()
    for begin, end in pairwise([*begins, len(places)]):
        number = int(numbers[begin])
        inside, target = as_slice(places[begin:end] - number * length), as_slice(into[begin:end])
        whole = end - begin == length and isinstance(inside, slice) and isinstance(target, slice)
        chunk = matrix[target] if whole else spare
        _read_chunk(dataset, descriptor, number, chunk, scratch)
        if not whole:
            matrix[target] = spare[inside]


def as_slice(places: np.ndarray) -> slice | np.ndarray:
    """Places, int64 `[n]`, as a slice where each is one more than the one before; else they themselves."""
    first, last = int(places[0]), int(places[-1])
    if last - first == len(places) - 1 and (places[1:] > places[:-1]).all():
        return slice(first, last + 1)
    return places


def first_sum(data: np.ndarray, scratch: Scratch) -> int:
    """The first sum of the checksum that HDF5 gives to float32 `[rows, size]`, modulo 65535.

    It adds up 16-bit words, the first byte of each the high one. A number of 64 bits is its four words' sum modulo
    65535, and words whose bytes are swapped add up to 256 times as much.
    """
    flat = data.reshape(-1)
    numbers = flat[: len(flat) // 2 * 2].view("<u8")
    last = int(flat[-1:].view("<u4")[0]) if len(flat) % 2 else 0
    upper = np.right_shift(numbers, HALF, out=scratch.take("half", len(numbers), np.uint64))
    high = int(np.add.reduce(upper))
    low = (int(np.add.reduce(numbers)) - (high << 32)) % (1 << 64)  # the sum of all lacks what 64 bits cannot hold
    return (high + low + last) * 256 % MODULUS


def _read_chunk(dataset: h5py.Dataset, descriptor: int, number: int, target: np.ndarray, scratch: Scratch) -> None:
    """Read one of the chunks, float32 `[rows, size]`, and see that its checksum holds."""
    found = dataset.id.get_chunk_info_by_coord((number * len(target), 0))
    if found.byte_offset is None or found.filter_mask or found.size != target.nbytes + CHECKSUM_BYTES:
        raise OSError(f"chunk {number} of {dataset.name} is not as it was written")
    checksum = bytearray(CHECKSUM_BYTES)
    whole: Any = target  # mypy takes no array for a buffer
    left, offset = [memoryview(whole).cast("B"), memoryview(checksum)], found.byte_offset
    while left:
        got = os.preadv(descriptor, left, offset)
        if not got:
            raise OSError(f"it ends in chunk {number} of {dataset.name}")
        offset += got
        while left and got >= len(left[0]):
            got -= len(left.pop(0))
        if got:
            left[0] = left[0][got:]
    if first_sum(target, scratch) != int.from_bytes(checksum[:2], "little") % MODULUS:  # HDF5 may leave 65535 for 0
        raise OSError(f"the checksum of chunk {number} of {dataset.name} does not hold")
