"""The columnar layout of a part: a matrix a layer, for those who read all rows at once.

/row                                            int64 [n], positions in the table, from 0, in order
/question_id, image_id, question, ground_truth_answer, answer         UTF-8 [n]
/picture_truncated                              bool [n], whether the picture is cut off; only where one is
/vision_only_representation                     float32 [n, vision]
/vision_token_representation/layer_<k>          float32 [n, hidden]
/query_token_representation/layer_<k>           float32 [n, hidden]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import h5py
import numpy as np

from vqa_embeddings.data.table import Table
from vqa_embeddings.records import Extracted
from vqa_embeddings.store.hdf5 import Groups, get_dataset
from vqa_embeddings.store.run import Run
from vqa_embeddings.store.segments import (
    CHUNK_ROWS,
    QUERY_TOKEN,
    STATES,
    VISION_ONLY,
    VISION_TOKEN,
    read_truncated,
    write_truncated,
)

TEXTS = ("question_id", "image_id", "question", "ground_truth_answer", "answer")


def write_rows(
    file: h5py.File, records: Sequence[Extracted], table: Table, first: int, run: Run, compression: str
) -> None:
    """Write the records, of which there is one at least, as the rows of the matrices.

    Args:
        table: the rows of the part alone.
        first: position of the first of them in the whole table.
        compression: "none" or "gzip".
    """
    rows = [record.row for record in records]
    file.create_dataset("row", data=np.array(rows, np.int64), track_times=False)
    texts = zip(*([*table.row(record.row - first), record.answer] for record in records), strict=True)
    for name, column in zip(TEXTS, texts, strict=True):
        file.create_dataset(name, data=list(column), dtype=h5py.string_dtype("utf-8"), track_times=False)
    write_truncated(file, records)
    for name in STATES:
        Groups().new(file.id, name)
    packed = {"compression": "gzip", "shuffle": True} if compression == "gzip" else {}
    for name, values in _matrices(records, run):
        chunks = (min(CHUNK_ROWS, len(values)), values.shape[1]) if packed else None
        file.create_dataset(name, data=values, chunks=chunks, track_times=False, **packed)


def read_index(file: h5py.File, table: Table, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that a part holds, int64 `[n]` and in order, and those of them whose picture is cut off.

    Raises:
        ValueError: it holds one that is not among its rows `first` to `last - 1` of the table, or one twice.
    """
    if "row" not in file:  # all rows of the part have failed
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    rows = get_dataset(file, "row")[:]
    if len(rows) and not (first <= rows.min() and rows.max() < last and np.all(np.diff(rows) > 0)):
        raise ValueError(f"it holds rows that are not among {first + 1} to {last}, or not in their order")
    return rows, rows[read_truncated(file, len(rows))]


def read_rows(file: h5py.File, rows: Sequence[int], table: Table, first: int, run: Run) -> list[Extracted]:
    """Records of a part; the arguments as those of `write_rows`."""
    places = np.searchsorted(get_dataset(file, "row")[:], rows)
    vision_only, answers = get_dataset(file, VISION_ONLY)[:], get_dataset(file, "answer").asstr()[:]
    states = [
        np.stack([get_dataset(file, f"{name}/layer_{layer}")[:] for layer in run.layers], axis=1) for name in STATES
    ]
    extra = {name: get_dataset(file, name)[:] for name in run.extra_vectors}
    truncated = read_truncated(file, len(answers)).tolist()
    return [
        Extracted(
            row=row,
            vision_only=vision_only[place],
            vision_token=states[0][place],
            query_token=states[1][place],
            extra={name: matrix[place] for name, matrix in extra.items()},
            answer=answers[place],
            truncated=truncated[place],
        )
        for row, place in zip(rows, places.tolist(), strict=True)
    ]


def _matrices(records: Sequence[Extracted], run: Run) -> Iterator[tuple[str, np.ndarray]]:
    """The vectors of all rows, each float32 `[n, size]`, by name."""
    yield VISION_ONLY, np.stack([record.vision_only for record in records])
    for name in run.extra_vectors:
        yield name, np.stack([record.extra[name] for record in records])
    for index, layer in enumerate(run.layers):
        yield f"{VISION_TOKEN}/layer_{layer}", np.stack([record.vision_token[index] for record in records])
        yield f"{QUERY_TOKEN}/layer_{layer}", np.stack([record.query_token[index] for record in records])
