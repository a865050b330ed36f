"""Parts: numbered files, each with some rows of the table, in the published layout or in the columnar one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from vqa_embeddings.base.files import list_folder, sha256
from vqa_embeddings.data.table import Table
from vqa_embeddings.errors import InputError, one_line
from vqa_embeddings.store import columnar, grouped
from vqa_embeddings.store.hash_ledger import possible_hashes
from vqa_embeddings.store.hdf5 import UNUSABLE, misread, open_file, stamp_of, text_of
from vqa_embeddings.store.run import Run
from vqa_embeddings.store.segments import Corrupt

# How the files of each layout are named.
NAMES = {"grouped": "{prefix}_embeddings_part_{number}.h5", "columnar": "{prefix}_columns_part_{number}.h5"}


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


def part_path(folder: Path, run: Run, layout: str, number: int) -> Path:
    """Where part `number` of a run lies."""
    return folder / NAMES[layout].format(prefix=run.file_prefix, number=f"{number:03d}")


def count_part_bytes(folder: Path, run: Run, layout: str = "grouped") -> int:
    """What the run's parts that are there take on the disk."""
    return sum(path.stat().st_size for path in _find_parts(folder, run, layout).values())


def read_parts(folder: Path, run: Run, table: Table) -> tuple[list[Part], list[Corrupt]]:
    """The parts in the output folder by layout and number, and those that are damaged.

    Raises:
        InputError: a file is named like a part and belongs to something else, or is in the form of another version.
        StorageError: the disk does not let one be read.
    """
    parts: list[Part] = []
    corrupt: list[Corrupt] = []
    known = possible_hashes(folder)
    for layout in NAMES:
        for number, path in _find_parts(folder, run, layout).items():
            read = partial(_read_part, path, layout, number, run, table, path.name in known)
            try:
                parts.append(_read_surely(read, path, known.get(path.name, set())))
            except FileNotFoundError:  # set aside by another merge at this moment
                continue
            except columnar.OtherFormat as other:
                if path.name not in known or sha256(path) in known[path.name]:
                    raise InputError(str(other)) from None
                corrupt.append(Corrupt(path, one_line(other)))
            except UNUSABLE as error:
                corrupt.append(Corrupt(path, one_line(error)))
    return parts, corrupt


def _read_surely(read: Callable[[], Part], path: Path, known: set[str]) -> Part:
    """What `read` gives, or its error where the file is to blame for it, and not the disk.

    Raises:
        StorageError: the disk does not let the file be read, or its hash is right.
    """
    try:
        return read()
    except UNUSABLE as error:
        if sha256(path) in known:
            raise misread(path, error) from error
        return read()  # the disk is there: now it is the file


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
        if layout == "grouped":
            rows, truncated = grouped.read_index(file, table, first - 1, last)
        else:
            columnar.check_format(file, columnar.COLUMNS)
            rows = columnar.read_numbers(file, columnar.ROW, run.rows)
            truncated = rows[columnar.read_truncated(file, len(rows))]
            if len(rows) and not (first - 1 <= rows.min() and rows.max() < last and np.all(np.diff(rows) > 0)):
                raise ValueError(f"it holds rows that are not among {first} to {last}, or not in their order")
        return Part(path, layout, number, first - 1, last, size, rows, truncated, stamp_of(file))
