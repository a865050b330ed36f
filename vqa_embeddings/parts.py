"""Parts: numbered files in the published layout, a group a question, read by the published files' readers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from h5py import h5d, h5g, h5p, h5s, h5t

from vqa_embeddings.errors import Refused, one_line
from vqa_embeddings.files import publish, sha256, sync_and_hash
from vqa_embeddings.hdf5 import (
    Groups,
    get_dataset,
    misread,
    new_file,
    new_memory_file,
    open_file,
    open_verified,
    text_of,
)
from vqa_embeddings.records import Extracted
from vqa_embeddings.run import COVERAGE_FILE, MODEL_TYPE, Run
from vqa_embeddings.shards import PIXEL_MEAN, UNUSABLE, VECTORS, Corrupt, read_records
from vqa_embeddings.table import Table

PART_NAME = "phi4_multimodal_embeddings_part_{:03d}.h5"
PART_PATTERN = re.compile(r"phi4_multimodal_embeddings_part_(\d{3,})\.h5")
TEXTS = ("image_id", "question", "ground_truth_answer", "answer")
GZIP_LEVEL = 4  # h5py's default, which the published files were written with


@dataclass(frozen=True)
class Part:
    """A part that is there, and the rows that it holds: int64 positions in the table."""

    path: Path
    number: int
    size: int
    rows: np.ndarray


@dataclass(frozen=True)
class Source:
    """Where some rows of a part come from: positions in a segment, or rows of the part that it replaces."""

    path: Path
    positions: list[int]


@dataclass(frozen=True)
class PartJob:
    """All that a process needs to write one part."""

    path: Path
    number: int
    first: int
    last: int
    size: int
    rows: Table  # those of the part alone
    sources: list[Source]
    old_rows: list[int]  # rows that are taken over from the part as it is now
    run: Run
    compression: str


def part_path(folder: Path, number: int) -> Path:
    """Where part `number` lies."""
    return folder / PART_NAME.format(number)


def recorded_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each part by its file name, as the last merge recorded them; none where no merge has."""
    try:
        entries = json.loads((folder / COVERAGE_FILE).read_text(encoding="utf-8"))["parts"]
        return {str(entry["file"]): str(entry["sha256"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def count_part_bytes(folder: Path) -> int:
    """What the parts that are there take on the disk."""
    return sum(path.stat().st_size for path in find_parts(folder).values())


def find_parts(folder: Path) -> dict[int, Path]:
    """The files in the output folder that are named like parts, by number."""
    named = ((PART_PATTERN.fullmatch(path.name), path) for path in folder.glob("*.h5"))
    return dict(sorted((int(match[1]), path) for match, path in named if match))


def read_parts(folder: Path, run: Run, table: Table) -> tuple[list[Part], list[Corrupt]]:
    """The parts in the output folder by number, and those that are damaged.

    Raises:
        Refused: a file is named like a part and belongs to something else.
        StorageFailed: the disk does not let one be read.
    """
    parts: list[Part] = []
    corrupt: list[Corrupt] = []
    recorded = recorded_hashes(folder)
    for number, path in find_parts(folder).items():
        try:
            parts.append(_read_part(path, number, run, table, path.name in recorded))
        except UNUSABLE as error:
            with suppress(FileNotFoundError):  # set aside by another merge at this moment
                if sha256(path) == recorded.get(path.name):
                    raise misread(path, error) from error
                corrupt.append(Corrupt(path, one_line(error)))
    return parts, corrupt


def write_part(job: PartJob) -> tuple[Path, str]:
    """Write one part, or replace it, atomically. Returns where it lies, and its SHA-256 in hex."""
    records = [record for s in job.sources for record in read_records(s.path, s.positions, job.run.pixel_mean)]
    if job.old_rows:
        records += _read_old(job)
    records.sort(key=lambda record: record.row)
    digest = ""

    def write(temporary: Path) -> None:
        nonlocal digest
        _write(temporary, job, records)
        digest = sync_and_hash(temporary)

    publish(job.path, write)
    return job.path, digest


def _write(path: Path, job: PartJob, records: Sequence[Extracted]) -> None:
    run = job.run
    with new_file(path) as file:
        attributes = {
            "model_name": run.model,
            "model_type": MODEL_TYPE,
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
            _write_rows(file.id, job, records)


def _write_rows(root: h5g.GroupID, job: PartJob, records: Sequence[Extracted]) -> None:
    table = job.rows
    group = _RowGroup(records[0], job.run, job.compression)
    for record in records:
        index = record.row - job.first
        group.fill((table.images[index], table.questions[index], table.truths[index], record.answer), record)
        group.copy(root, table.ids[index])


class _RowGroup:
    """The group of one row, in memory: filled with the values of one row after another, and copied into the part.

    Filling and copying it takes half the time that making its eighteen objects one by one takes.
    """

    def __init__(self, example: Extracted, run: Run, compression: str) -> None:
        self._run = run
        self._groups = Groups()
        self._file = new_memory_file()
        self._group = self._groups.new(self._file.id, "row")
        for name in VECTORS[1:]:
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
        for (dataset, size), (name, values) in zip(self._vectors, _vectors(record, self._run), strict=True):
            if values.shape != (size,):  # the low-level interface would read what lies behind a shorter one
                raise ValueError(f"row {record.row} has a {name} of shape {values.shape}, expected ({size},)")
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
    yield VECTORS[0], record.vision_only
    if run.pixel_mean:
        yield PIXEL_MEAN, record.pixel_mean
    for name, states in zip(VECTORS[1:], (record.vision_token, record.query_token), strict=True):
        for layer, values in zip(run.layers, states, strict=True):
            yield f"{name}/layer_{layer}", values


def _read_part(path: Path, number: int, run: Run, table: Table, recorded: bool) -> Part:
    with open_file(path) as file:
        if text_of(file.attrs.get("run", b"")) != run.key:
            if recorded:
                raise ValueError("it was this run's, and says that it is not")
            raise Refused(f"{path} belongs to another run or program; move it away, or check --output-dir")
        first, last, size = (int(file.attrs[name]) for name in ("first_row", "last_row", "part_size"))
        names = list(file)
    position = {identity: row for row, identity in enumerate(table.ids[first - 1 : last], start=first - 1)}
    strange = [name for name in names if name not in position]
    if strange:
        raise ValueError(f"it holds {strange[0]!r}, which is not among its rows {first} to {last}")
    return Part(path, number, size, np.array(sorted(position[name] for name in names), np.int64))


def _read_old(job: PartJob) -> list[Extracted]:
    records = []
    with open_verified(job.path) as file:
        for row in job.old_rows:
            read = partial(_read_dataset, file, job.rows.ids[row - job.first])
            states = [np.stack([read(f"{name}/layer_{layer}")[:] for layer in job.run.layers]) for name in VECTORS[1:]]
            mean = read(PIXEL_MEAN)[:] if job.run.pixel_mean else np.zeros(0, np.float32)
            answer = read("answer").asstr()[()]
            records.append(Extracted(row, read(VECTORS[0])[:], states[0], states[1], mean, answer))
    return records


def _read_dataset(file: h5py.File, identity: str, name: str) -> h5py.Dataset:
    return get_dataset(file, f"{identity}/{name}")
