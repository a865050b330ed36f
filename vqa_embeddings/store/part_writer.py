"""Writing one part: its rows gathered from segments and older parts, the file made aside, hashed and renamed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from vqa_embeddings.base.files import publish, sync_and_hash
from vqa_embeddings.data.table import Table
from vqa_embeddings.records import RowValues
from vqa_embeddings.schema import ANSWER, TABLE_TEXTS
from vqa_embeddings.store import columnar, grouped
from vqa_embeddings.store.hash_ledger import announce
from vqa_embeddings.store.hdf5 import new_file
from vqa_embeddings.store.row_sources import Source, read_values
from vqa_embeddings.store.run import Run


@dataclass(frozen=True)
class PartJob:
    """All that a process needs to write one part."""

    path: Path
    layout: str
    number: int
    first: int
    last: int
    size: int
    table: Table  # the rows of the part alone
    rows: np.ndarray  # int64 [n], those that it is to hold
    sources: list[Source]
    run: Run
    compression: str


def write_part(job: PartJob) -> tuple[Path, str]:
    """Write one part, or replace it, atomically. Returns where it lies, and its SHA-256 in hex."""
    values = read_values(job.sources, job.run.vectors, job.rows, lambda row: job.table.ids[row - job.first])
    digest = ""

    def write(temporary: Path) -> None:
        nonlocal digest
        _write(temporary, job, values)
        digest = sync_and_hash(temporary)
        announce(job.path, digest)

    publish(job.path, write)
    return job.path, digest


def _write(path: Path, job: PartJob, values: RowValues) -> None:
    run = job.run
    with new_file(path) as file:
        attributes = {
            "model_name": run.model,
            "model_type": run.model_type,
            "device": run.device,
            "dtype": run.dtype,
            "created_at": run.created_at,
            "num_samples": len(values),
            "revision": run.revision,
            "model_sha256": run.model_sha256,
            "layout": run.layout,
            "lora": run.lora,
            "attn_implementation": run.attn_implementation,
            "layers": run.layers,
            "max_new_tokens": run.max_new_tokens,
            "run": np.bytes_(run.key.encode()),
            "part_size": job.size,
            "first_row": job.first + 1,
            "last_row": job.last,
            **{f"{name}_version": number for name, number in run.versions.items()},
        }
        for name, value in attributes.items():
            file.attrs[name] = value
        if job.layout == "columnar":
            _write_columns(file, job, values)
        elif len(values):
            grouped.write_rows(file, values, job.table, job.first, run.vectors, job.compression == "gzip")


def _write_columns(file: h5py.File, job: PartJob, values: RowValues) -> None:
    columnar.name_format(file, columnar.COLUMNS)
    texts = zip(*(job.table.row(row - job.first) for row in values.rows.tolist()), strict=True)
    named = dict(zip(TABLE_TEXTS, texts, strict=True)) if len(values) else dict.fromkeys(TABLE_TEXTS, ())
    vectors = {column: columnar.slices_of(values.matrices[column.path]) for column in job.run.vectors}
    texts_of = {**named, ANSWER: values.answers}
    columnar.write_columns(file, values.rows, texts_of, values.truncated, vectors, job.compression)
