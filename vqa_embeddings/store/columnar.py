"""The form of segments and of columnar parts: a matrix a layer, for those who read all rows at once.

/row                                            int64 [n], positions in the table, from 0, in order
/question_id, image_id, …, answer               UTF-8 [n], of fixed length, packed where it takes much room
/picture_truncated                              bool [n], whether the picture is cut off; only where one is
/vision_only_representation                     float32 [n, vision]
/vision_token_representation/layer_<k>          float32 [n, hidden]
/query_token_representation/layer_<k>           float32 [n, hidden]

All are chunked, a chunk has whole rows, and each has a checksum of its own (Fletcher-32). A matrix has a second one in
its attribute `chunk_sums`, for readers that are faster than HDF5 (`chunks`). Attribute `format` says which form it is:
a file that has another one is not of this version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from vqa_embeddings.schema import ANSWER, TRUNCATED, VectorColumn
from vqa_embeddings.store import chunks
from vqa_embeddings.store.hdf5 import Groups, get_dataset, text_of

FORMAT = 2
FORMAT_ATTRIBUTE = "format"
SEGMENT, COLUMNS = "segment", "columns"  # what the file is
CHUNK_BYTES = 1 << 20  # what readers keep of a dataset by default (HDF5 before 2.0): a row is then read once, not often
LONGEST_COLUMN = 16 << 20  # bytes of a text, all values as long as the longest, that are stored and read as they are
ROW = "row"

# Gives the rows `[start:stop]` of a column, float32 `[stop - start, size]`.
Slices = Callable[[int, int], np.ndarray]


def slices_of(matrix: np.ndarray) -> Slices:
    """The `Slices` of a matrix in memory."""
    return lambda start, stop: matrix[start:stop]


class OtherFormat(Exception):
    """A file is written in another format than this version's. The message says what is found, expected, and to do."""


def name_format(file: h5py.File, kind: str) -> None:
    """Write down which form the file has."""
    file.attrs[FORMAT_ATTRIBUTE] = np.bytes_(_format_of(kind))


def check_format(file: h5py.File, kind: str) -> None:
    """See that a file has this form.

    Raises:
        OtherFormat: it has another one.
    """
    found = text_of(file.attrs.get(FORMAT_ATTRIBUTE, b"no format"))
    if found != _format_of(kind):
        raise OtherFormat(
            f"{file.filename} is written as {found!r}, expected {_format_of(kind)!r}: use the version of this program "
            "that wrote it, or extract into another --output-dir"
        )


def _format_of(kind: str) -> str:
    return f"vqa_embeddings {kind} {FORMAT}"


def write_columns(
    file: h5py.File,
    rows: np.ndarray,
    texts: Mapping[str, Sequence[str]],
    truncated: np.ndarray,
    vectors: Mapping[VectorColumn, Slices],
    compression: str = "none",
) -> None:
    """Write the values of rows, of which there may be none.

    Args:
        rows: int64 `[n]`, their positions in the table, in order.
        texts: of each row, by the names of their datasets.
        truncated: bool `[n]`, the picture is cut off.
        vectors: what gives the rows of each.
        compression: "none" or "gzip".
    """
    write_dataset(file, ROW, rows)
    for name, values in texts.items():
        write_text(file, name, values)
    if truncated.any():
        write_dataset(file, TRUNCATED, truncated)
    for name in dict.fromkeys(column.name for column in vectors if column.layer is not None):
        Groups().new(file.id, name)
    for column, take in vectors.items():
        _write_matrix(file, column, len(rows), take, compression)


def choose_chunk(count: int, row_bytes: int) -> int:
    """How many of so many rows a chunk has: all chunks the same, as the last one takes the room of a whole one."""
    most = max(1, CHUNK_BYTES // row_bytes)
    return -(-count // -(-count // most))


def write_dataset(parent: h5py.Group, name: str, values: np.ndarray) -> None:
    """A dataset of values, `[n]`, with a checksum for each chunk."""
    if not len(values):
        parent.create_dataset(name, data=values, track_times=False)
        return
    chunk = choose_chunk(len(values), values.itemsize)
    parent.create_dataset(name, data=values, chunks=(chunk,), fletcher32=True, track_times=False)


def write_text(parent: h5py.Group, name: str, values: Sequence[str]) -> None:
    """Texts of a fixed length, padded with NULs, which are compressed where they would take much room."""
    encoded = [value.encode() for value in values]
    longest = max(map(len, encoded), default=0) or 1
    dtype = h5py.string_dtype("utf-8", longest)
    if longest * len(encoded) <= LONGEST_COLUMN:
        write_dataset(parent, name, np.array(encoded, dtype))
        return
    chunk = choose_chunk(len(encoded), longest)
    dataset = parent.create_dataset(
        name, (len(encoded),), dtype, chunks=(chunk,), fletcher32=True, compression="gzip", track_times=False
    )
    for start in range(0, len(encoded), chunk):
        dataset[start : start + chunk] = np.array(encoded[start : start + chunk], dtype)


def _write_matrix(file: h5py.File, column: VectorColumn, count: int, take: Slices, compression: str) -> None:
    shape = (count, column.size)
    if not count:
        file.create_dataset(column.path, shape, np.float32, track_times=False)
        return
    step = choose_chunk(count, 4 * column.size)
    filters: dict[str, Any] = {"compression": "gzip", "shuffle": True} if compression == "gzip" else {}
    dataset = file.create_dataset(
        column.path, shape, np.float32, chunks=(step, column.size), fletcher32=True, track_times=False, **filters
    )
    sums = []
    for start in range(0, count, step):
        values = take(start, min(start + step, count))
        dataset[start : start + len(values)] = values
        sums.append(chunks.sum_chunk(values))
    dataset.attrs[chunks.CHUNK_SUMS] = np.array(sums, np.uint64)


def read_numbers(file: h5py.File, name: str, most: int) -> np.ndarray:
    """The row numbers of this name, int64 `[n]`, also of a file that has not been hashed.

    Raises:
        ValueError: they are none, or more than there can be.
    """
    numbers = get_dataset(file, name)
    if numbers.dtype.kind != "i" or numbers.ndim != 1 or len(numbers) > most:
        raise ValueError("its row numbers are none")
    return numbers[:]


def read_truncated(file: h5py.File, count: int) -> np.ndarray:
    """Which of a file's rows, of which there are so many, have a picture that is cut off: bool `[count]`.

    Raises:
        ValueError: it does not say so of each row.
    """
    if TRUNCATED not in file:
        return np.zeros(count, bool)
    flags = get_dataset(file, TRUNCATED)
    if flags.dtype != bool or flags.shape != (count,):
        raise ValueError(f"its {TRUNCATED} has another length, or other values, than its rows have")
    return flags[:]


def read_answers(file: h5py.File, places: np.ndarray) -> list[str]:
    """The answers of the rows at these places, int64 `[m]`, one at least.

    Raises:
        ValueError: the file has fewer.
    """
    answers = get_dataset(file, ANSWER)
    first, last = int(places.min()), int(places.max()) + 1
    if last > len(answers):
        raise ValueError(f"{ANSWER} has {len(answers)} rows, fewer than the file has")
    at_once = max(1, LONGEST_COLUMN // answers.dtype.itemsize)  # rows; a long text takes its room in all of them
    texts: list[str] = []
    for start in range(first, last, at_once):
        texts += list(answers.asstr()[start : min(start + at_once, last)])
    return [texts[place - first] for place in places.tolist()]


def read_matrix(
    file: h5py.File,
    column: VectorColumn,
    places: np.ndarray,
    matrix: np.ndarray,
    into: np.ndarray,
    scratch: chunks.Scratch,
) -> None:
    """Read a vector of some rows into rows of a matrix. The checksums of the chunks that they lie in are verified.

    Args:
        places: int64 `[m]`, one at least, where in the file.
        matrix: float32 `[n, size]`.
        into: int64 `[m]`, where in the matrix.
    Raises:
        ValueError: the vectors have another length.
        OSError: a checksum does not hold.
    """
    dataset = get_dataset(file, column.path)
    if dataset.shape[1:] != (column.size,):
        raise ValueError(f"{column.path} has vectors of the shape {dataset.shape[1:]}, expected ({column.size},)")
    if int(places.max()) >= len(dataset):
        raise ValueError(f"{column.path} has {len(dataset)} rows, fewer than the file has")
    if chunks.can_read(dataset):
        chunks.read_rows(dataset, places, matrix, into, scratch)
        return
    first = int(places.min())
    stretch = dataset[first : int(places.max()) + 1]
    matrix[chunks.as_slice(into)] = stretch[chunks.as_slice(places - first)]
