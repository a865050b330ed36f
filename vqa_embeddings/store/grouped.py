"""The published layout of a part: a group a question, as the published files' readers expect it.

/<question_id>/image_id, question, ground_truth_answer, answer         scalar UTF-8
/<question_id>/vision_only_representation                              float32 [vision]
/<question_id>/vision_token_representation/layer_<k>                   float32 [hidden]
/<question_id>/query_token_representation/layer_<k>                    float32 [hidden]

Where a row's picture is cut off, its group has the attribute `picture_truncated`, and the file says how many have.
"""

from __future__ import annotations

from collections.abc import Sequence

import h5py
import numpy as np
from h5py import h5d, h5f, h5g, h5p, h5s, h5t

from vqa_embeddings.data.table import Table
from vqa_embeddings.records import RowValues
from vqa_embeddings.schema import ANSWER, QUESTION_ID, TABLE_TEXTS, TRUNCATED, VectorColumn
from vqa_embeddings.store.hdf5 import Groups, get_dataset, get_group, new_memory_file

TRUNCATED_COUNT = "truncated_pictures"  # attribute of the file: how many groups have theirs, where any has
GZIP_LEVEL = 4  # h5py's default, which the published files were written with


def write_rows(
    file: h5py.File, values: RowValues, table: Table, first: int, columns: Sequence[VectorColumn], gzip: bool
) -> None:
    """Write a group for each row, of which there is one at least.

    Args:
        table: the rows of the part alone.
        first: position of the first of them in the whole table.
        columns: the vectors, in the order in which they are written.
    """
    group = _RowGroup(columns, gzip)
    matrices = [values.matrices[column.path] for column in columns]
    for place, row in enumerate(values.rows.tolist()):
        name, *texts = table.row(row - first)
        group.fill([*texts, values.answers[place]], [matrix[place] for matrix in matrices])
        group.copy(file.id, name)
        if values.truncated[place]:
            file[name].attrs[TRUNCATED] = True
    truncated = int(values.truncated.sum())
    if truncated:
        file.attrs[TRUNCATED_COUNT] = truncated


def read_index(file: h5py.File, table: Table, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that a part holds, int64 `[n]` and in order, and those of them whose picture is cut off.

    Raises:
        ValueError: it holds one that is not among its rows `first` to `last - 1` of the table.
    """
    names = list(file)
    position = {identity: row for row, identity in enumerate(table.ids[first:last], start=first)}
    strange = [name for name in names if name not in position]
    if strange:
        raise ValueError(f"it holds {strange[0]!r}, which is not among its rows {first + 1} to {last}")
    marked = names if TRUNCATED_COUNT in file.attrs else []  # opening each group takes long
    truncated = [name for name in marked if is_truncated(file, name)]
    rows, cut = (np.array(sorted(position[name] for name in some), np.int64) for some in (names, truncated))
    return rows, cut


def read_answers(file: h5py.File, ids: Sequence[str]) -> list[str]:
    """The answers of rows by their ids."""
    return [get_dataset(file, f"{identity}/{ANSWER}").asstr()[()] for identity in ids]


def is_truncated(file: h5py.File, identity: str) -> bool:
    """Whether the picture of a row is cut off."""
    return bool(get_group(file, identity).attrs.get(TRUNCATED, False))


def read_matrix(
    file: h5py.File, column: VectorColumn, ids: Sequence[str], matrix: np.ndarray, into: np.ndarray
) -> None:
    """Read a vector of each row's group into rows of a matrix, in a quarter of the time that h5py's groups take.

    Args:
        matrix: float32 `[n, size]`.
        into: int64 `[m]`, where in it the rows of these ids belong.
    Raises:
        ValueError: a vector has another length, or leads to another file.
    """
    own = h5f.get_name(file.id)
    for identity, place in zip(ids, into.tolist(), strict=True):
        dataset = h5d.open(file.id, f"{identity}/{column.path}".encode())
        if h5f.get_name(dataset) != own or dataset.get_offset() is None:  # of another file, or not simply in this one
            get_dataset(file, f"{identity}/{column.path}")  # which says so
        if dataset.shape != (column.size,):
            raise ValueError(f"{column.path} of {identity!r} has the shape {dataset.shape}, expected ({column.size},)")
        dataset.read(h5s.ALL, h5s.ALL, matrix[place])


class _RowGroup:
    """The group of one row, in memory: filled with the values of one row after another, and copied into the part.

    Filling and copying it takes half the time that making its eighteen objects one by one takes.
    """

    def __init__(self, columns: Sequence[VectorColumn], gzip: bool) -> None:
        self._groups = Groups()
        self._file = new_memory_file()
        self._group = self._groups.new(self._file.id, "row")
        for name in dict.fromkeys(column.name for column in columns if column.layer is not None):
            self._groups.new(self._group, name)
        self._creation = h5p.create(h5p.DATASET_CREATE)
        self._creation.set_obj_track_times(False)
        texts = [name for name in TABLE_TEXTS if name != QUESTION_ID]  # which is the group's own name
        self._texts = [self._new_text(name) for name in (*texts, ANSWER)]
        self._vectors = [(self._new_vector(column, gzip), column.size) for column in columns]

    def fill(self, texts: Sequence[str], vectors: Sequence[np.ndarray]) -> None:
        """Give the group the values of a row: its texts and its vectors, in the order of the schema."""
        for dataset, text in zip(self._texts, texts, strict=True):
            dataset.write(h5s.ALL, h5s.ALL, np.array(text.encode(), object), h5t.PYTHON_OBJECT)
        for (dataset, size), values in zip(self._vectors, vectors, strict=True):
            assert values.shape == (size,)  # the low-level interface would read what lies behind a shorter one
            dataset.write(h5s.ALL, h5s.ALL, np.ascontiguousarray(values, np.float32), h5t.NATIVE_FLOAT)

    def copy(self, root: h5g.GroupID, name: str) -> None:
        """Put the group as it is into a part, under this name."""
        self._groups.copy(self._group, root, name)

    def _new_text(self, name: str) -> h5d.DatasetID:
        kind = h5t.py_create(h5py.string_dtype("utf-8"), logical=True)
        return h5d.create(self._group, name.encode(), kind, h5s.create(h5s.SCALAR), self._creation)

    def _new_vector(self, column: VectorColumn, gzip: bool) -> h5d.DatasetID:
        creation = self._creation.copy()
        if gzip:
            creation.set_chunk((column.size,))
            creation.set_deflate(GZIP_LEVEL)
        space = h5s.create_simple((column.size,))
        return h5d.create(self._group, column.path.encode(), h5t.IEEE_F32LE, space, creation)
