"""Segments: what one rank of one launch commits, a file at a time, each immutable from its first moment.

    OUT/shards/<launch>-r<rank>/<number>-<token>.h5           columnar, every chunk with a checksum of its own
    OUT/shards/<launch>-r<rank>/<number>-<token>.h5.sha256    SHA-256 of the whole file, as `sha256sum` writes it

The checksum gets its final name before the segment: a segment with its final name is committed.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np

from vqa_embeddings.base.files import list_folder, publish, publish_text, reading, sha256
from vqa_embeddings.base.process_pool import ProcessPool
from vqa_embeddings.data.table import Table
from vqa_embeddings.errors import InputError, one_line
from vqa_embeddings.records import Extracted, Failed
from vqa_embeddings.schema import ANSWER, IMAGE_ID, QUESTION_ID
from vqa_embeddings.store import columnar
from vqa_embeddings.store.columnar import ROW, OtherFormat
from vqa_embeddings.store.hdf5 import UNUSABLE, Groups, get_dataset, new_file, open_file, open_verified, text_of
from vqa_embeddings.store.row_buffer import RowBuffer
from vqa_embeddings.store.run import SHARDS_FOLDER, Run, shard_folder

SEGMENT_SUFFIX = ".h5"
CHECKSUM = ".sha256"
LARGEST = 512_000_000  # bytes of the vectors of a segment
LONGEST_TEXT = 4096  # bytes of an id, a name or a reason: in a column all take as much room as the longest
FAILED = "failed"  # the group with the rows that have no values
NO_CHECKSUM = "its checksum is not there"


@dataclass(frozen=True)
class Segment:
    """A committed segment and the rows that it is about, all int64 positions in the table."""

    path: Path
    rows: np.ndarray  # those whose values it holds
    failed: np.ndarray  # those of which it says why they have none: read_failures reads the reasons
    truncated: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # of `rows`: on pictures cut off


@dataclass(frozen=True)
class Corrupt:
    """A file that cannot be used, and why."""

    path: Path
    reason: str


def choose_length(run: Run, interval: int) -> int:
    """How many rows a segment has: so many as were asked for, and no more than it has room for."""
    return max(1, min(interval, LARGEST // run.row_bytes))


class ShardWriter:
    """Gathers the records of one rank and commits a segment every `interval` of them, and at the end.

    Segments are written behind the model's back, one at a time: while one is on its way to the disk the next may
    fill, and no further, so that memory does not grow where the disk is slow. Nor does it with the interval: a segment
    has 512 MB of vectors at most.

    Used as a context: whatever ends the block, what was added before is committed. An error of the disk is raised by
    whichever call comes next.
    """

    def __init__(self, folder: Path, launch: str, rank: int, run: Run, table: Table, interval: int) -> None:
        self._folder = shard_folder(folder, launch, rank)
        self._run, self._table, self._length = run, table, choose_length(run, interval)
        self._token = secrets.token_hex(3)  # two copies of the same rank never meet in a name
        self._number = 0
        # What is pending, and room that is free, or is being written.
        self._filling, self._spare = RowBuffer(run), RowBuffer(run)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="segments")
        self._behind: tuple[Future[None], RowBuffer] | None = None
        self.committed = 0
        self.failed = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.commit()
        finally:
            self._writer.shutdown()

    def add(self, records: Iterable[Extracted | Failed]) -> None:
        """Take records over, and begin to commit whenever there are enough for a segment."""
        for record in records:
            self._filling.add(record)
            if len(self._filling) == self._length:
                self.begin_commit()

    def begin_commit(self) -> None:
        """Make a segment of what is pending, behind the model's back. Waits for the one before."""
        self._end_commit()
        if not len(self._filling):
            return
        self._number += 1
        path, full = self._folder / f"{self._number:05d}-{self._token}.h5", self._filling
        self._filling, self._spare = self._spare, full
        self._behind = self._writer.submit(self._write, path, full), full

    def commit(self) -> None:
        """Make a segment of what is pending, and wait until all is committed."""
        self.begin_commit()
        self._end_commit()

    def _write(self, path: Path, buffer: RowBuffer) -> None:
        with suppress(OSError):  # which the next line will meet again. Not its parents: a folder that is gone stays so
            self._folder.mkdir(exist_ok=True)
        _write_segment(path, buffer, self._run, self._table)

    def _end_commit(self) -> None:
        if self._behind is None:
            return
        (written, buffer), self._behind = self._behind, None
        records, failed = len(buffer), len(buffer.failed)
        try:
            written.result()
        finally:
            buffer.clear()
        self.committed += records
        self.failed += failed


def write_segment(path: Path, records: Sequence[Extracted | Failed], run: Run, table: Table) -> None:
    """Commit the records as one segment."""
    buffer = RowBuffer(run)
    for record in records:
        buffer.add(record)
    _write_segment(path, buffer, run, table)


def _write_segment(path: Path, buffer: RowBuffer, run: Run, table: Table) -> None:
    def write(temporary: Path) -> None:
        with new_file(temporary) as file:
            columnar.name_format(file, columnar.SEGMENT)
            file.attrs.update({"run": np.bytes_(run.key.encode()), "layers": run.layers})
            rows, answers, truncated = buffer.in_order()
            texts = {**_names(rows.tolist(), table), ANSWER: answers}
            columnar.write_columns(file, rows, texts, truncated, buffer.vectors())
            _write_failed(h5py.Group(Groups().new(file.id, FAILED)), buffer.failed, table)
        publish_text(checksum_path(path), f"{sha256(temporary)}  {path.name}\n")

    publish(path, write)


def read_segments(folder: Path, run: Run, verify: ProcessPool | None) -> tuple[list[Segment], list[Corrupt]]:
    """The committed segments below the output folder, in the order of their names, and those that cannot be used.

    Args:
        verify: who hashes every file to compare; without, its row numbers are read, and its checksum has to be there.
    Raises:
        InputError: one is written in the form of another version, and so may all be.
    """
    segments: list[Segment] = []
    corrupt: list[Corrupt] = []
    paths = find_segments(folder)
    reasons = verify(find_damage, paths) if verify else map(_find_no_checksum, paths)
    for path, reason in zip(paths, reasons, strict=True):
        try:
            if reason is None:
                segments.append(_read_index(path, run))
        except OtherFormat as other:
            reason = find_damage(path)
            if reason is None:
                raise InputError(str(other)) from None
        except UNUSABLE as error:
            reason = one_line(error)
        if reason is not None and path.exists():  # and not set aside or pruned by a merge at this moment
            corrupt.append(Corrupt(path, reason))
    return segments, corrupt


def find_segments(folder: Path) -> list[Path]:
    """The files with a segment's name below the output folder, in the order of their names. Raises as `list_folder`."""
    shards = list_folder(folder / SHARDS_FOLDER)
    return [path for shard in shards for path in list_folder(shard) if path.name.endswith(SEGMENT_SUFFIX)]


def checksum_path(path: Path) -> Path:
    """Where the checksum of a segment lies."""
    return path.with_name(path.name + CHECKSUM)


def find_damage(path: Path) -> str | None:
    """Why a segment is not what was committed, or None where its checksum holds.

    Raises:
        StorageError: the disk does not let it be read, which says nothing about the segment.
    """
    checksum = checksum_path(path)
    try:
        with reading(checksum):
            expected = checksum.read_bytes().decode(errors="replace").partition(" ")[0]
    except FileNotFoundError:
        return NO_CHECKSUM
    try:
        found = sha256(path)
    except FileNotFoundError:
        return "it is no longer there"
    return None if found == expected else f"its SHA-256 is {found[:12]}…, expected {expected[:12]}…"


def _find_no_checksum(path: Path) -> str | None:
    return None if checksum_path(path).exists() else NO_CHECKSUM


def read_failures(path: Path) -> list[Failed]:
    """The rows of a segment that failed, each with the reason."""
    with open_verified(path) as file:
        rows, errors, messages = (get_dataset(file, f"failed/{name}") for name in ("row", "error", "message"))
        columns = rows[:].tolist(), errors.asstr()[:], messages.asstr()[:]
        return [Failed(row, error, message) for row, error, message in zip(*columns, strict=True)]


def _write_failed(group: h5py.Group, records: Sequence[Failed], table: Table) -> None:
    records = sorted(records, key=lambda record: record.row)
    rows = [record.row for record in records]
    columnar.write_dataset(group, ROW, np.array(rows, np.int64))
    told = {"error": [record.error for record in records], "message": [_short(record.message) for record in records]}
    for name, values in {**_names(rows, table), **told}.items():
        columnar.write_text(group, name, values)


def _names(rows: Sequence[int], table: Table) -> dict[str, list[str]]:
    """What people know rows by."""
    ids, images = table.ids, table.images
    return {QUESTION_ID: [_short(ids[row]) for row in rows], IMAGE_ID: [_short(images[row]) for row in rows]}


def _short(text: str) -> str:
    """A text that is there for people to see; a row's number says where the table has it whole."""
    return text.encode(errors="backslashreplace")[:LONGEST_TEXT].decode(errors="ignore")


def _read_index(path: Path, run: Run) -> Segment:
    with open_file(path) as file:
        columnar.check_format(file, columnar.SEGMENT)
        if text_of(file.attrs["run"]) != run.key:
            raise ValueError("it belongs to another run")
        rows, failed = (columnar.read_numbers(file, name, run.rows) for name in (ROW, f"{FAILED}/{ROW}"))
        truncated = rows[columnar.read_truncated(file, len(rows))]
    for positions in (rows, failed):
        if len(positions) and not 0 <= positions.min() <= positions.max() < run.rows:
            raise ValueError("it is about rows that the table has not")
    return Segment(path, rows, failed, truncated)
