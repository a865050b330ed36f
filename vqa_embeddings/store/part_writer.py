"""Writing one part: its rows gathered from segments and older parts, the file made aside, hashed and renamed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vqa_embeddings.base.files import publish, sync_and_hash
from vqa_embeddings.data.table import Table
from vqa_embeddings.errors import StorageError
from vqa_embeddings.records import Extracted
from vqa_embeddings.store.hash_ledger import announce
from vqa_embeddings.store.hdf5 import new_file
from vqa_embeddings.store.parts import PART_LAYOUTS
from vqa_embeddings.store.row_sources import PartRows, SegmentRows, read_source
from vqa_embeddings.store.run import Run
from vqa_embeddings.store.segments import VISION_ONLY, VISION_TOKEN, vector_shapes, vectors_of


@dataclass(frozen=True)
class PartJob:
    """All that a process needs to write one part."""

    path: Path
    layout: str
    number: int
    first: int
    last: int
    size: int
    rows: Table  # those of the part alone
    sources: list[SegmentRows | PartRows]
    run: Run
    compression: str


def write_part(job: PartJob) -> tuple[Path, str]:
    """Write one part, or replace it, atomically. Returns where it lies, and its SHA-256 in hex."""
    records = [record for source in job.sources for record in read_source(source, job.rows, job.first, job.run)]
    records.sort(key=lambda record: record.row)
    _check_sizes(records, job)
    digest = ""

    def write(temporary: Path) -> None:
        nonlocal digest
        _write(temporary, job, records)
        digest = sync_and_hash(temporary)
        announce(job.path, digest)

    publish(job.path, write)
    return job.path, digest


def _check_sizes(records: Sequence[Extracted], job: PartJob) -> None:
    expected = vector_shapes(job.run)
    for record in records:
        found = {name: vector.shape for name, vector in vectors_of(record).items()}
        if found != expected:
            further = "".join(f" and {expected[name]}" for name in job.run.extra_vectors)
            raise StorageError(
                f"row {record.row + 1} has vectors of shapes {', '.join(map(str, found.values()))}; expected "
                f"{expected[VISION_ONLY]} and twice {expected[VISION_TOKEN]}{further}: its file is not this run's, "
                "move it away, and merge again"
            )


def _write(path: Path, job: PartJob, records: Sequence[Extracted]) -> None:
    run = job.run
    with new_file(path) as file:
        attributes = {
            "model_name": run.model,
            "model_type": run.model_type,
            "device": run.device,
            "dtype": run.dtype,
            "created_at": run.created_at,
            "num_samples": len(records),
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
        if records:
            PART_LAYOUTS[job.layout].write_rows(file, records, job.rows, job.first, run, job.compression)
