"""Parts: numbered files, each with some rows of the table, in the published layout or in the columnar one."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from vqa_embeddings.base.files import list_folder, publish, publish_text, reading, sha256, sync_and_hash
from vqa_embeddings.data.table import Table
from vqa_embeddings.errors import InputError, StorageError, one_line
from vqa_embeddings.records import Extracted
from vqa_embeddings.store import columnar, grouped
from vqa_embeddings.store.hdf5 import misread, new_file, open_file, open_verified, stamp_of, text_of
from vqa_embeddings.store.run import COVERAGE_FILE, Run
from vqa_embeddings.store.segments import CHECKSUM, UNUSABLE, Corrupt, read_records

# How the files of each layout are named, and what writes and reads them.
NAMES = {"grouped": "{prefix}_embeddings_part_{number}.h5", "columnar": "{prefix}_columns_part_{number}.h5"}
LAYOUTS = {"grouped": grouped, "columnar": columnar}


@dataclass(frozen=True)
class Part:
    """A part that is there, and the rows that it holds: int64 positions in the table, in order."""

    path: Path
    layout: str
    number: int
    first: int  # the rows that it is about, those that failed among them, are first to last - 1
    last: int
    size: int
    rows: np.ndarray
    truncated: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # of `rows`: on pictures cut off
    stamp: tuple[int, ...] = ()  # of the file that was read, by `stamp_of`


@dataclass(frozen=True)
class Source:
    """Some rows of a segment: their positions in it."""

    path: Path
    positions: list[int]


@dataclass(frozen=True)
class OldRows:
    """Some rows of a part that is there: their positions in the table."""

    path: Path
    layout: str
    rows: list[int]


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
    sources: list[Source | OldRows]
    run: Run
    compression: str


def part_path(folder: Path, run: Run, layout: str, number: int) -> Path:
    """Where part `number` of a run lies."""
    return folder / NAMES[layout].format(prefix=run.file_prefix, number=f"{number:03d}")


def announced_path(path: Path) -> Path:
    """Where the hash of a part lies from the moment before it is there until a merge has recorded it."""
    return path.with_name(f".{path.name}{CHECKSUM}")


def recorded_hashes(folder: Path) -> dict[str, set[str]]:
    """The SHA-256 that a part may have, by its file name; of one that no merge has recorded or announced, nothing.

    It is the one that the last merge recorded, or that of a part which a merge has written since, and was then ended.

    Raises:
        InputError: the record is not what a merge wrote: without it, damage would go unseen.
        StorageError: it cannot be read.
    """
    hashes: defaultdict[str, set[str]] = defaultdict(set)
    path = folder / COVERAGE_FILE
    try:
        with reading(path):
            entries = json.loads(path.read_bytes())["parts"]
        for entry in entries:
            hashes[str(entry["file"])].add(str(entry["sha256"]))
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not what a merge has written ({one_line(error)}); restore it, or remove it: "
            "the parts are then taken as they are"
        ) from None
    for announced in list_folder(folder):
        if announced.name.startswith(".") and announced.name.endswith(f".h5{CHECKSUM}"):
            with suppress(FileNotFoundError), reading(announced):
                digest = announced.read_bytes().decode(errors="replace").partition(" ")[0]
                hashes[announced.name[1 : -len(CHECKSUM)]].add(digest)
    return dict(hashes)


def count_part_bytes(folder: Path, layout: str = "grouped") -> int:
    """What the parts that are there take on the disk, whatever run they are of."""
    return sum(path.stat().st_size for path in folder.glob(NAMES[layout].format(prefix="*", number="*")))


def read_parts(folder: Path, run: Run, table: Table) -> tuple[list[Part], list[Corrupt]]:
    """The parts in the output folder by layout and number, and those that are damaged.

    Raises:
        InputError: a file is named like a part and belongs to something else.
        StorageError: the disk does not let one be read.
    """
    parts: list[Part] = []
    corrupt: list[Corrupt] = []
    recorded = recorded_hashes(folder)
    for layout in LAYOUTS:
        for number, path in _find_parts(folder, run, layout).items():
            read = partial(_read_part, path, layout, number, run, table, path.name in recorded)
            try:
                parts.append(_read_surely(read, path, recorded.get(path.name, set())))
            except FileNotFoundError:  # set aside by another merge at this moment
                continue
            except UNUSABLE as error:
                corrupt.append(Corrupt(path, one_line(error)))
    return parts, corrupt


def _read_surely(read: Callable[[], Part], path: Path, recorded: set[str]) -> Part:
    """What `read` gives, or its error where the file is to blame for it, and not the disk.

    Raises:
        StorageError: the disk does not let the file be read, or its hash is right.
    """
    try:
        return read()
    except UNUSABLE as error:
        if sha256(path) in recorded:
            raise misread(path, error) from error
        return read()  # the disk is there: now it is the file


def read_source(source: Source | OldRows, table: Table, first: int, run: Run) -> list[Extracted]:
    """The records of some rows, from a file whose hash is right.

    Args:
        table: has their ids.
        first: position of its first row in the run's table.
    """
    if isinstance(source, Source):
        return read_records(source.path, source.positions, run.extra_vectors)
    with open_verified(source.path) as file:
        return LAYOUTS[source.layout].read_rows(file, source.rows, table, first, run)


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
        publish_text(announced_path(job.path), f"{digest}  {job.path.name}\n")

    publish(job.path, write)
    return job.path, digest


def _check_sizes(records: Sequence[Extracted], job: PartJob) -> None:
    run = job.run
    states = (len(run.layers), run.hidden_size)
    for record in records:
        found = (record.vision_only.shape, record.vision_token.shape, record.query_token.shape)
        extra = {name: len(vector) for name, vector in record.extra.items()}
        if found != ((run.vision_size,), states, states) or extra != run.extra_vectors:
            raise StorageError(
                f"row {record.row + 1} has vectors of shapes {', '.join(map(str, found))}; expected "
                f"({run.vision_size},) and twice {states}: its file is not this run's, move it away, and merge again"
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
            LAYOUTS[job.layout].write_rows(file, records, job.rows, job.first, run, job.compression)


def _find_parts(folder: Path, run: Run, layout: str) -> dict[int, Path]:
    """The files in the output folder that are named like the run's parts of this layout, by number."""
    before, after = NAMES[layout].format(prefix=run.file_prefix, number="\0").split("\0")
    pattern = re.compile(re.escape(before) + r"(\d{3,})" + re.escape(after))
    named = ((pattern.fullmatch(path.name), path) for path in list_folder(folder))
    return dict(sorted((int(match[1]), path) for match, path in named if match))


def _read_part(path: Path, layout: str, number: int, run: Run, table: Table, recorded: bool) -> Part:
    with open_file(path) as file:
        if text_of(file.attrs.get("run", b"")) != run.key:
            if recorded:
                raise ValueError("it was this run's, and says that it is not")
            raise InputError(f"{path} belongs to another run or program; move it away, or check --output-dir")
        first, last, size = (int(file.attrs[name]) for name in ("first_row", "last_row", "part_size"))
        rows, truncated = LAYOUTS[layout].read_index(file, table, first - 1, last)
        return Part(path, layout, number, first - 1, last, size, rows, truncated, stamp_of(file))
