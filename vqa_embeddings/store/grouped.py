"""The published layout of a part: a group a question, as the published files' readers expect it.

/<question_id>/image_id, question, ground_truth_answer, answer         scalar UTF-8
/<question_id>/vision_only_representation                              float32 [vision]
/<question_id>/vision_token_representation/layer_<k>                   float32 [hidden]
/<question_id>/query_token_representation/layer_<k>                    float32 [hidden]

Where a row's picture is cut off, its group has the attribute `picture_truncated`, and the file says how many have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import h5py
import numpy as np
from h5py import h5d, h5g, h5p, h5s, h5t

from vqa_embeddings.data.table import Table
from vqa_embeddings.records import Extracted
from vqa_embeddings.store.hdf5 import Groups, get_dataset, get_group, new_memory_file
from vqa_embeddings.store.run import Run
from vqa_embeddings.store.segments import STATES, TRUNCATED, VISION_ONLY

TEXTS = ("image_id", "question", "ground_truth_answer", "answer")
TRUNCATED_COUNT = "truncated_pictures"  # attribute of the file: how many groups have theirs, where any has
GZIP_LEVEL = 4  # h5py's default, which the published files were written with


def write_rows(
    file: h5py.File, records: Sequence[Extracted], table: Table, first: int, run: Run, compression: str
) -> None:
    """Write a group for each record, of which there is one at least.

    Args:
        table: the rows of the part alone.
        first: position of the first of them in the whole table.
        compression: "none" or "gzip".
    """
    group = _RowGroup(records[0], run, compression)
    for record in records:
        index = record.row - first
        group.fill((table.images[index], table.questions[index], table.truths[index], record.answer), record)
        group.copy(file.id, table.ids[index])
        if record.truncated:
            file[table.ids[index]].attrs[TRUNCATED] = True
    truncated = sum(record.truncated for record in records)
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
    truncated = [name for name in marked if _is_truncated(file, name)]
    rows, cut = (np.array(sorted(position[name] for name in some), np.int64) for some in (names, truncated))
    return rows, cut


def read_rows(file: h5py.File, rows: Sequence[int], table: Table, first: int, run: Run) -> list[Extracted]:
    """Records of a part; the arguments as those of `write_rows`."""
    records = []
    for row in rows:
        read = partial(_read_dataset, file, table.ids[row - first])
        states = [np.stack([read(f"{name}/layer_{layer}")[:] for layer in run.layers]) for name in STATES]
        extra = {name: read(name)[:] for name in run.extra_vectors}
        answer, truncated = read("answer").asstr()[()], _is_truncated(file, table.ids[row - first])
        records.append(Extracted(row, read(VISION_ONLY)[:], states[0], states[1], extra, answer, truncated))
    return records


def _is_truncated(file: h5py.File, identity: str) -> bool:
    return bool(get_group(file, identity).attrs.get(TRUNCATED, False))


def _read_dataset(file: h5py.File, identity: str, name: str) -> h5py.Dataset:
    return get_dataset(file, f"{identity}/{name}")


class _RowGroup:
    """The group of one row, in memory: filled with the values of one row after another, and copied into the part.

    Filling and copying it takes half the time that making its eighteen objects one by one takes.
    """

    def __init__(self, example: Extracted, run: Run, compression: str) -> None:
        self._run = run
        self._groups = Groups()
        self._file = new_memory_file()
        self._group = self._groups.new(self._file.id, "row")
        for name in STATES:
            self._groups.new(self._group, name)
        self._creation = h5p.create(h5p.DATASET_CREATE)
        self._creation.set_obj_track_times(False)
        self._texts = [self._new_text(name) for name in TEXTS]
        self._vectors = [
            (self._new_vector(name, len(values), compression == "gzip"), len(values))
            for name, values in _vectors(example, run)
        ]

    def fill(self, texts: Sequence[str], record: Extracted) -> None:
        """Give the group the values of a row, its texts in the order of `TEXTS`."""
        for dataset, text in zip(self._texts, texts, strict=True):
            dataset.write(h5s.ALL, h5s.ALL, np.array(text.encode(), object), h5t.PYTHON_OBJECT)
        for (dataset, size), (_, values) in zip(self._vectors, _vectors(record, self._run), strict=True):
            assert values.shape == (size,)  # the low-level interface would read what lies behind a shorter one
            dataset.write(h5s.ALL, h5s.ALL, np.ascontiguousarray(values, np.float32), h5t.NATIVE_FLOAT)

    def copy(self, root: h5g.GroupID, name: str) -> None:
        """Put the group as it is into a part, under this name."""
        self._groups.copy(self._group, root, name)

    def _new_text(self, name: str) -> h5d.DatasetID:
        kind = h5t.py_create(h5py.string_dtype("utf-8"), logical=True)
        return h5d.create(self._group, name.encode(), kind, h5s.create(h5s.SCALAR), self._creation)

    def _new_vector(self, name: str, size: int, gzip: bool) -> h5d.DatasetID:
        creation = self._creation.copy()
        if gzip:
            creation.set_chunk((size,))
            creation.set_deflate(GZIP_LEVEL)
        return h5d.create(self._group, name.encode(), h5t.IEEE_F32LE, h5s.create_simple((size,)), creation)


def _vectors(record: Extracted, run: Run) -> Iterator[tuple[str, np.ndarray]]:
    """The vectors of a row, each float32 `[n]`, by their names in its group."""
    yield VISION_ONLY, record.vision_only
    yield from ((name, record.extra[name]) for name in run.extra_vectors)
    for name, states in zip(STATES, (record.vision_token, record.query_token), strict=True):
        for layer, values in zip(run.layers, states, strict=True):
            yield f"{name}/layer_{layer}", values
