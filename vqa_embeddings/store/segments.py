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
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np

from vqa_embeddings.base.files import list_folder, publish, publish_text, reading, sha256
from vqa_embeddings.base.process_pool import ProcessPool
from vqa_embeddings.data.table import Table
from vqa_embeddings.errors import one_line
from vqa_embeddings.records import Extracted, Failed
from vqa_embeddings.store.hdf5 import Groups, get_dataset, new_file, open_file, open_verified, text_of
from vqa_embeddings.store.run import SHARDS_FOLDER, Run, shard_folder

SEGMENT_SUFFIX = ".h5"
CHECKSUM = ".sha256"
FORMAT = b"vqa_embeddings segment 1"
CHUNK_ROWS = 16
LONGEST_TEXT = 4096  # bytes of an id, a name or a reason: in a column all take as much room as the longest
VISION_ONLY = "vision_only_representation"
VISION_TOKEN = "vision_token_representation"
QUERY_TOKEN = "query_token_representation"
STATES = (VISION_TOKEN, QUERY_TOKEN)  # of several layers each
TRUNCATED = "picture_truncated"  # only where there is such a row: bool, whether its picture is cut off
NO_CHECKSUM = "its checksum is not there"
# What a file raises that is not what its name says.
UNUSABLE = (OSError, KeyError, ValueError, RuntimeError, AttributeError, TypeError)


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


class ShardWriter:
    """Gathers the records of one rank and commits a segment every `interval` of them, and at the end.

    Segments are written behind the model's back, one at a time: while one is on its way to the disk the next may
    fill, and no further, so that memory does not grow where the disk is slow.

    Used as a context: whatever ends the block, what was added before is committed. An error of the disk is raised by
    whichever call comes next.
    """

    def __init__(self, folder: Path, launch: str, rank: int, run: Run, table: Table, interval: int) -> None:
        self._folder = shard_folder(folder, launch, rank)
        self._run, self._table, self._interval = run, table, interval
        self._token = secrets.token_hex(3)  # two copies of the same rank never meet in a name
        self._number = 0
        self._pending: list[Extracted | Failed] = []
        # For what is pending, and for what is being written.
        self._filling, self._spare = _Memory(run), _Memory(run)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="segments")
        self._behind: tuple[Future[None], list[Extracted | Failed]] | None = None
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
            kept = self._filling.keep(len(self._pending), record) if isinstance(record, Extracted) else record
            self._pending.append(kept)
            if len(self._pending) == self._interval:
                self.begin_commit()

    def begin_commit(self) -> None:
        """Make a segment of what is pending, behind the model's back. Waits for the one before."""
        self._end_commit()
        if not self._pending:
            return
        self._number += 1
        path, records = self._folder / f"{self._number:05d}-{self._token}.h5", self._pending
        self._pending = []
        self._filling, self._spare = self._spare, self._filling  # free again: what was in it has been written
        self._behind = self._writer.submit(self._write, path, records), records

    def commit(self) -> None:
        """Make a segment of what is pending, and wait until all is committed."""
        self.begin_commit()
        self._end_commit()

    def _write(self, path: Path, records: list[Extracted | Failed]) -> None:
        with suppress(OSError):  # which the next line will meet again. Not its parents: a folder that is gone stays so
            self._folder.mkdir(exist_ok=True)
        write_segment(path, records, self._run, self._table)

    def _end_commit(self) -> None:
        if self._behind is None:
            return
        (written, records), self._behind = self._behind, None
        written.result()
        self.committed += len(records)
        self.failed += sum(isinstance(record, Failed) for record in records)


class _Memory:
    """Room for the vectors of a segment's rows, allocated once and used again.

    Where they were made, each small array would hold on to its place among the model's large ones, and the process
    would grow for thousands of rows.
    """

    BLOCK = 1000  # rows

    def __init__(self, run: Run) -> None:
        self._shapes = vector_shapes(run)
        self._blocks: list[dict[str, np.ndarray]] = []

    def keep(self, place: int, record: Extracted) -> Extracted:
        """The same record, its vectors copied to this place; those that the run does not store are left out."""
        vectors = vectors_of(record)
        block, index = divmod(place, self.BLOCK)
        if block == len(self._blocks):
            shapes = self._shapes.items()
            self._blocks.append({name: np.empty((self.BLOCK, *shape), np.float32) for name, shape in shapes})
        copies = {name: room[index] for name, room in self._blocks[block].items()}
        for name, copy in copies.items():
            if vectors[name].shape != copy.shape:  # which numpy might stretch without a word
                raise ValueError(
                    f"{name} of row {record.row + 1} has shape {vectors[name].shape}; expected {copy.shape}"
                )
            copy[...] = vectors[name]
        return replace(
            record,
            vision_only=copies.pop(VISION_ONLY),
            vision_token=copies.pop(VISION_TOKEN),
            query_token=copies.pop(QUERY_TOKEN),
            extra=copies,
        )


def vector_shapes(run: Run) -> dict[str, tuple[int, ...]]:
    """The shapes of a row's vectors, and of its states in all layers together, by their names in a segment."""
    states = (len(run.layers), run.hidden_size)
    extra = {name: (size,) for name, size in run.extra_vectors.items()}
    return {VISION_ONLY: (run.vision_size,), VISION_TOKEN: states, QUERY_TOKEN: states, **extra}


def vectors_of(record: Extracted) -> dict[str, np.ndarray]:
    """A row's vectors, and its states in all layers together, by their names in a segment."""
    own = {VISION_ONLY: record.vision_only, VISION_TOKEN: record.vision_token, QUERY_TOKEN: record.query_token}
    return {**own, **record.extra}


def write_segment(path: Path, records: Sequence[Extracted | Failed], run: Run, table: Table) -> None:
    """Commit the records as one segment."""
    done = sorted((record for record in records if isinstance(record, Extracted)), key=lambda record: record.row)
    failed = sorted((record for record in records if isinstance(record, Failed)), key=lambda record: record.row)

    def write(temporary: Path) -> None:
        with new_file(temporary) as file:
            file.attrs.update({"format": np.bytes_(FORMAT), "run": np.bytes_(run.key.encode()), "layers": run.layers})
            _write_extracted(file, done, run, table)
            _write_failed(h5py.Group(Groups().new(file.id, "failed")), failed, table)
        publish_text(checksum_path(path), f"{sha256(temporary)}  {path.name}\n")

    publish(path, write)


def read_segments(folder: Path, run: Run, verify: ProcessPool | None) -> tuple[list[Segment], list[Corrupt]]:
    """The committed segments below the output folder, in the order of their names, and those that cannot be used.

    Args:
        verify: who hashes every file to compare; without, its row numbers are read, and its checksum has to be there.
    """
    segments: list[Segment] = []
    corrupt: list[Corrupt] = []
    paths = find_segments(folder)
    reasons = verify(find_damage, paths) if verify else map(_find_no_checksum, paths)
    for path, reason in zip(paths, reasons, strict=True):
        try:
            if reason is None:
                segments.append(_read_index(path, run))
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


def read_records(path: Path, positions: Sequence[int], extra: Iterable[str]) -> list[Extracted]:
    """The records at these positions of a segment's extracted rows; their vectors are views of what was read.

    Args:
        extra: names of the further vectors that it holds.
    """
    extra, lowest, highest = list(extra), min(positions), max(positions) + 1
    with open_verified(path) as file:
        columns = {
            name: get_dataset(file, name)[lowest:highest] for name in ("row", "answer", VISION_ONLY, *STATES, *extra)
        }
        truncated = read_truncated(file, len(get_dataset(file, "row")))[lowest:highest].tolist()
    return [
        Extracted(
            row=int(columns["row"][place]),
            vision_only=columns[VISION_ONLY][place],
            vision_token=columns[VISION_TOKEN][place],
            query_token=columns[QUERY_TOKEN][place],
            extra={name: columns[name][place] for name in extra},
            answer=columns["answer"][place].decode(),
            truncated=truncated[place],
        )
        for place in (position - lowest for position in positions)
    ]


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


def write_truncated(file: h5py.File, records: Sequence[Extracted]) -> None:
    """What `read_truncated` reads."""
    flags = np.array([record.truncated for record in records], bool)
    if flags.any():
        file.create_dataset(TRUNCATED, data=flags, track_times=False)


def read_failures(path: Path) -> list[Failed]:
    """The rows of a segment that failed, each with the reason."""
    with open_verified(path) as file:
        rows, errors, messages = (get_dataset(file, f"failed/{name}") for name in ("row", "error", "message"))
        columns = rows[:].tolist(), errors.asstr()[:], messages.asstr()[:]
        return [Failed(row, error, message) for row, error, message in zip(*columns, strict=True)]


def _write_extracted(file: h5py.File, records: Sequence[Extracted], run: Run, table: Table) -> None:
    count = len(records)
    file.create_dataset("row", data=np.array([record.row for record in records], np.int64), track_times=False)
    _write_text(file, "question_id", [_short(table.ids[record.row]) for record in records])
    _write_text(file, "image_id", [_short(table.images[record.row]) for record in records])
    _write_text(file, "answer", [record.answer for record in records])
    write_truncated(file, records)
    vectors = [vectors_of(record) for record in records]
    for name, shape in vector_shapes(run).items():
        if name in run.extra_vectors and not records:
            continue
        data = np.empty((count, *shape), np.float32)
        for position, of_row in enumerate(vectors):
            data[position] = of_row[name]
        chunks = (min(CHUNK_ROWS, count), *shape) if count else None
        file.create_dataset(name, data=data, chunks=chunks, fletcher32=bool(count), track_times=False)


def _write_failed(group: h5py.Group, records: Sequence[Failed], table: Table) -> None:
    group.create_dataset("row", data=np.array([record.row for record in records], np.int64), track_times=False)
    _write_text(group, "question_id", [_short(table.ids[record.row]) for record in records])
    _write_text(group, "image_id", [_short(table.images[record.row]) for record in records])
    _write_text(group, "error", [record.error for record in records])
    _write_text(group, "message", [_short(record.message) for record in records])


def _short(text: str) -> str:
    """A text that is there for people to see; a row's number says where the table has it whole."""
    return text.encode(errors="backslashreplace")[:LONGEST_TEXT].decode(errors="ignore")


def _write_text(group: h5py.Group, name: str, values: Sequence[str]) -> None:
    """Text of a fixed length, padded with NULs: what HDF5 keeps beside the rest, under the same checksums."""
    encoded = [value.encode() for value in values]
    dtype = h5py.string_dtype("utf-8", max((len(value) for value in encoded), default=0) or 1)
    group.create_dataset(name, data=np.array(encoded, dtype), dtype=dtype, track_times=False)


def _read_index(path: Path, run: Run) -> Segment:
    with open_file(path) as file:
        if text_of(file.attrs["run"]) != run.key:
            raise ValueError("it belongs to another run")
        columns = get_dataset(file, "row"), get_dataset(file, "failed/row")
        if any(column.dtype.kind != "i" or column.ndim != 1 or len(column) > run.rows for column in columns):
            raise ValueError("its row numbers are none")
        rows, failed = (column[:] for column in columns)
        truncated = rows[read_truncated(file, len(rows))]
    for positions in (rows, failed):
        if len(positions) and not 0 <= positions.min() <= positions.max() < run.rows:
            raise ValueError("it is about rows that the table has not")
    return Segment(path, rows, failed, truncated)
