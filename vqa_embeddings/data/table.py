"""The table of questions: read as text, checked, and never changed."""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count, islice
from operator import itemgetter
from pathlib import Path
from typing import overload

import numpy as np

from vqa_embeddings.data import columns
from vqa_embeddings.data.columns import Columns
from vqa_embeddings.data.csv_reader import check_text, find_delimiter, read_records
from vqa_embeddings.errors import InputError, one_line, quoted

NAMED_ROWS = 3  # how many offending rows an error names
BLOCK_ROWS = 1024  # of a table in memory: larger blocks are no faster to read, and slower to make
FIRST_ROWS, LOOKED_FOR = 1000, 20  # the first rows of a table, and pictures of them that are looked for

Finder = Callable[[str], Path | None]  # where the file of a name lies


class Table:
    """The rows of a CSV in its order: four columns of text, each `[n]`. A missing ground truth is "".

    What is kept is what the fingerprint is made of: every field in UTF-8 with a NUL after it, row after row, in blocks
    of `BLOCK_ROWS` rows. Ten million rows take a little more memory than their file takes on the disk.
    """

    def __init__(
        self,
        ids: Iterable[str] = (),
        images: Iterable[str] = (),
        questions: Iterable[str] = (),
        truths: Iterable[str] = (),
    ) -> None:
        self._blocks: list[bytes] = []
        self.columns = Columns()  # that it was read from
        self._starts = array("q", [0])  # where each row begins, counted over all blocks, and where the last one ends
        self._add(zip(ids, images, questions, truths, strict=True))

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[str]], read_from: Columns | None = None) -> Table:
        """A table of rows, each `(id, image, question, truth)`; they may come one after another from a file."""
        table = cls()
        table.columns = read_from or table.columns
        table._add(rows)
        return table

    def _add(self, rows: Iterable[Sequence[str]]) -> None:
        rows = iter(rows)
        while batch := list(islice(rows, BLOCK_ROWS)):
            block = "\0".join(chain.from_iterable((*batch, [""]))).encode()
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 0) + 1
            if len(ends) != 4 * len(batch):
                raise ValueError(f"found {len(ends)} fields in {len(batch)} rows; expected 4 a row, and no NUL in them")
            self._starts.frombytes((self._starts[-1] + ends[3::4]).astype(np.int64).tobytes())
            self._blocks.append(block)

    @property
    def ids(self) -> Column:
        """The `question_id` of each row."""
        return Column(self, 0)

    @property
    def images(self) -> Column:
        """The picture of each row, as the CSV names it."""
        return Column(self, 1)

    @property
    def questions(self) -> Column:
        """The question of each row."""
        return Column(self, 2)

    @property
    def truths(self) -> Column:
        """The ground truth of each row."""
        return Column(self, 3)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def row(self, position: int) -> list[str]:
        """The row at a position as `[id, image, question, truth]`; IndexError where there is none."""
        position = range(len(self))[position]
        number = position // BLOCK_ROWS
        base = self._starts[number * BLOCK_ROWS]
        text = self._blocks[number][self._starts[position] - base : self._starts[position + 1] - base - 1]
        return text.decode().split("\0")

    def blocks(self) -> Iterator[list[str]]:
        """The fields of some rows, row after row, and then of some more, to the end."""
        return (block[:-1].decode().split("\0") for block in self._blocks)

    def spans(self) -> Iterator[tuple[bytes, np.ndarray]]:
        """Some rows as they are kept, and then some more: UTF-8, and where each field begins, int64 `[rows, 4]`."""
        for block in self._blocks:
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 0) + 1
            yield block, np.append(0, ends[:-1]).reshape(-1, 4)

    def pictures(self) -> np.ndarray:
        """The picture of each row as a number, int64 `[n]`, counted by first appearance."""
        numbers: defaultdict[str, int] = defaultdict(count().__next__)
        return np.fromiter(map(numbers.__getitem__, self.images), np.int64, len(self))

    def fingerprint(self) -> str:
        """SHA-256 over the four columns in order; blind to how the CSV quotes its fields or ends its lines."""
        digest = hashlib.sha256()
        for block in self._blocks:
            digest.update(block)
        return digest.hexdigest()


class Column(Sequence[str]):
    """One column of a table, `[n]`: a text by its position, texts by a slice, or all of them one after another."""

    def __init__(self, table: Table, place: int) -> None:
        self._table, self._place = table, place

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        return self._table.row(index)[self._place]

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(fields[self._place :: 4] for fields in self._table.blocks())


def read_table(path: Path, known: Mapping[str, str] | None = None, find_file: Finder | None = None) -> Table:
    """Read a CSV of questions. Between its fields may be a comma, a semicolon, a tab or a `|`, as its header says.

    Args:
        known: the columns of the run that it belongs to, as `columns.choose` takes them.
        find_file: tells which of several columns names the pictures; without it the first that may.
    Raises:
        InputError: the file is missing, not UTF-8 or UTF-16 text, no CSV, without the columns, or without rows; or an
            id is empty, ".", repeated, or holds a "/" or a NUL, none of which can name a group of an HDF5 file.
    """
    check_text(path)
    delimiter = find_delimiter(path)
    rows = map(itemgetter(1), read_records(path, delimiter))
    header = columns.clean(next(rows, []), known)
    _check_header(path, header)
    first = list(islice(rows, FIRST_ROWS))
    candidates = columns.undecided(header, known)
    files = _look_for_files(path, candidates, header, first, find_file) if find_file else None
    chosen = replace(columns.choose(header, known, files), delimiter=delimiter)
    for name in chosen.names.values():
        if header.count(name) > 1:
            raise InputError(
                f"{path} has {header.count(name)} columns {name}; expected one, rename or remove the others"
            )
    places = [header.index(name) for name in chosen.names.values()]
    taken = map(itemgetter(*places), chain(first, rows))
    table = Table.from_rows(taken if len(places) == 4 else ((*row, "") for row in taken), chosen)
    if not len(table):
        raise InputError(f"{path} has a header and no rows; expected one question a row, check --vqa-dataset")
    _check_ids(path, table.ids)
    return table


def sample(count: int, size: int) -> list[int]:
    """Positions of `size` rows of `count`, sampled as pandas' `sample(random_state=42)` does, in CSV order."""
    chosen = np.random.RandomState(42).choice(count, min(size, count), replace=False)
    return sorted(int(position) for position in chosen)


def read_rows(path: Path) -> tuple[list[str], Iterator[list[str]]]:
    """The header of a CSV that `read_table` accepted, and its rows one after another, all columns as they are."""
    records = map(itemgetter(1), read_records(path, find_delimiter(path)))
    return next(records), records


def select(table: Table, positions: Iterable[int]) -> Table:
    """The rows at these positions, as a table of their own."""
    return Table.from_rows(map(table.row, positions), table.columns)


def _check_header(path: Path, header: Sequence[str]) -> None:
    if not any(header):
        raise InputError(
            f"{path} is empty, or its first line names no column; expected a CSV with the columns question_id, "
            "image_id, question and answer"
        )
    found = columns.find(header)
    absent = [" or ".join(columns.NAMES[role]) for role in columns.NEEDED if not found[role]]
    if absent:
        shown = ", ".join(name if name.isprintable() and name == name.strip() else repr(name) for name in header)
        raise InputError(
            f"{path} has no column {', '.join(absent)}; found {one_line(shown)}; rename its columns or add what lacks"
        )


def _look_for_files(
    path: Path, candidates: Sequence[str], header: Sequence[str], first: Sequence[Sequence[str]], find_file: Finder
) -> columns.Files:
    """Where the files of the first values of these columns lie, none of which comes twice; of no column nothing."""
    places = [header.index(name) for name in candidates]
    distinct = dict.fromkeys(tuple(row[place] for place in places) for row in first)
    spread = list(distinct)[:: max(1, len(distinct) // LOOKED_FOR)][:LOOKED_FOR]
    values = list(zip(*spread, strict=True))
    files = {name: list(map(find_file, some)) for name, some in zip(candidates, values, strict=bool(values))}
    if values and not any(map(any, files.values())):
        raise InputError(
            f"{path} has the columns {' and '.join(candidates)}, and the first values of neither are pictures (such as "
            f"{' and '.join(quoted(next(filter(None, some), '')) for some in values)}); expected those of one to be, "
            "check --images-dir, or whether they lack their suffix"
        )
    return files


def _check_ids(path: Path, ids: Sequence[str]) -> None:
    """Refuse ids that cannot name a group, or name one twice. Only those are compared that a digest makes suspect."""
    seen: set[str] = set()
    bad: dict[int, str] = {}
    for position in _suspects(ids).tolist():
        identity = ids[position]
        if identity in ("", ".") or "/" in identity:
            bad[position] = f"{quoted(identity)} cannot name an HDF5 group"
        elif identity in seen:
            bad[position] = f"{quoted(identity)} is there already"
        seen.add(identity)
        if len(bad) == NAMED_ROWS:
            break
    if bad:
        named = "; ".join(f"line {line}: {bad[position]}" for position, line in _lines(path, bad))
        raise InputError(
            f"{path} holds ids that cannot be used ({named}); every {columns.IDENTITY} must be unique, "
            'not empty, not ".", and without "/": rename these'
        )


def _suspects(ids: Sequence[str]) -> np.ndarray:
    """The positions, int64 and in order, of all ids that are not usable or not unique, and perhaps of some others."""
    # To be looked at again, an id with a "/" is as good as an empty one.
    digests = np.fromiter((hash("" if "/" in identity else identity) for identity in ids), np.int64, len(ids))
    ordered = np.sort(digests)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    return np.flatnonzero(np.isin(digests, np.append(repeated, (hash(""), hash(".")))))


def _lines(path: Path, positions: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Each of these positions of rows with the line of the CSV that its row begins on."""
    wanted = set(positions)
    records = islice(read_records(path, find_delimiter(path)), 1, max(wanted) + 2)
    return ((position, line) for position, (line, _) in enumerate(records) if position in wanted)
