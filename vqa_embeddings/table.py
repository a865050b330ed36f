"""The table of questions: read as text, checked, and never changed."""

from __future__ import annotations

import codecs
import csv
import hashlib
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count, islice
from operator import itemgetter
from pathlib import Path
from typing import overload

import numpy as np

from vqa_embeddings.errors import Refused

ID_COLUMN = "question_id"
IMAGE_COLUMNS = ("image_id", "image_name")
QUESTION_COLUMN = "question"
ANSWER_COLUMNS = ("answer", "gt_answer", "ground_truth_answer")
NAMED_ROWS = 3  # how many offending rows an error names
BLOCK_ROWS = 1024  # of a table in memory: larger blocks are no faster to read, and slower to make
CHUNK_BYTES = 1 << 20  # of a file that is looked through
FIELD_CHARACTERS = 1 << 26  # a longer field is a quotation mark that was never closed: 4 bytes each while it is read


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
        self._starts = array("q", [0])  # where each row begins, counted over all blocks, and where the last one ends
        self._add(zip(ids, images, questions, truths, strict=True))

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[str]]) -> Table:
        """A table of rows, each `(id, image, question, truth)`; they may come one after another from a file."""
        table = cls()
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


def read_table(path: Path) -> Table:
    """Read a CSV of questions.

    Raises:
        Refused: the file is missing, not UTF-8 or UTF-16 text, no CSV, without the columns, or without rows; or an
            id is empty, ".", repeated, or holds a "/" or a NUL, none of which can name a group of an HDF5 file.
    """
    _check_text(path)
    records = _records(path)
    _, header = next(records, (0, []))
    if not any(header):
        raise Refused(f"{path} is empty; expected a CSV with the columns question_id, image_id, question and answer")
    *columns, truth = _columns(path, header)
    rows = map(itemgetter(1), records)
    if truth is None:
        take = itemgetter(*columns)
        table = Table.from_rows((*take(row), "") for row in rows)
    else:
        table = Table.from_rows(map(itemgetter(*columns, truth), rows))
    if not len(table):
        raise Refused(f"{path} has a header and no rows; expected one question a row, check --vqa-dataset")
    _check_ids(path, table.ids)
    return table


def sample(count: int, size: int) -> list[int]:
    """Positions of `size` rows of `count`, sampled as pandas' `sample(random_state=42)` does, in CSV order."""
    chosen = np.random.RandomState(42).choice(count, min(size, count), replace=False)
    return sorted(int(position) for position in chosen)


def read_rows(path: Path) -> tuple[list[str], Iterator[list[str]]]:
    """The header of a CSV that `read_table` accepted, and its rows one after another, all columns as they are."""
    records = _records(path)
    _, header = next(records)
    return header, map(itemgetter(1), records)


def select(table: Table, positions: Iterable[int]) -> Table:
    """The rows at these positions, as a table of their own."""
    return Table.from_rows(map(table.row, positions))


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """A file that cannot be opened or read is refused."""
    try:
        yield
    except FileNotFoundError:
        raise Refused(f"{path} is not there; expected the CSV of questions, check --vqa-dataset") from None
    except OSError as error:
        raise Refused(
            f"{path} cannot be read ({error.strerror}); expected the CSV of questions, check its permissions"
        ) from None


def _encoding(path: Path) -> str:
    """UTF-16 where the file begins with its byte-order mark, UTF-8 otherwise."""
    if path.exists() and not path.is_file():
        raise Refused(f"{path} is not a regular file; expected the CSV of questions, write it to a file first")
    with _refusing(path), open(path, "rb") as stream:
        return "utf-16" if stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _check_text(path: Path) -> None:
    """Refuse a file that is not text, or holds a NUL, saying where. Reads it once, a chunk at a time."""
    encoding = _encoding(path)
    decoder = codecs.getincrementaldecoder(encoding)()
    end, line = 0, 1
    with _refusing(path), open(path, "rb") as stream:
        while True:
            chunk = stream.read(CHUNK_BYTES)
            end += len(chunk)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                name = "UTF-16" if encoding == "utf-16" else "UTF-8"
                byte = end - len(error.object) + error.start
                raise Refused(f"{path} is not {name} text (byte {byte}); save it as UTF-8 CSV") from None
            if "\0" in text:
                line += text.count("\n", 0, text.index("\0"))
                raise Refused(
                    f"{path} line {line} holds a NUL character; expected text, remove it or export the table again"
                )
            line += text.count("\n")
            if not chunk:
                return


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV with the line each begins on, all as long as the first; blank lines are no records."""
    csv.field_size_limit(FIELD_CHARACTERS)
    line = 1
    width = 0
    with _refusing(path), open(path, encoding=_encoding(path), newline="") as stream:
        # strict: a quotation mark that is never closed would otherwise swallow the rest of the table without a word
        reader = csv.reader(stream, strict=True)
        try:
            for row in reader:
                if row:
                    width = width or len(row)
                    if len(row) != width:
                        raise Refused(
                            f"{path} line {line} has {len(row)} fields; expected {width}, as in its header: "
                            "mend that line"
                        )
                    yield line, row
                line = reader.line_num + 1
        except csv.Error as error:
            raise Refused(f"{path} line {line} is not CSV ({error}); check the quotation marks from there on") from None


def _columns(path: Path, header: list[str]) -> tuple[int, int, int, int | None]:
    def find(names: tuple[str, ...]) -> int | None:
        name = next((name for name in names if name in header), None)
        if name is not None and header.count(name) > 1:
            raise Refused(f"{path} has {header.count(name)} columns {name}; expected one, rename or remove the others")
        return None if name is None else header.index(name)

    identity, image, question = find((ID_COLUMN,)), find(IMAGE_COLUMNS), find((QUESTION_COLUMN,))
    if identity is None or image is None or question is None:
        wanted = {ID_COLUMN: identity, " or ".join(IMAGE_COLUMNS): image, QUESTION_COLUMN: question}
        absent = ", ".join(name for name, position in wanted.items() if position is None)
        raise Refused(f"{path} has no column {absent}; found {', '.join(header)}; rename its columns or add what lacks")
    return identity, image, question, find(ANSWER_COLUMNS)


def _check_ids(path: Path, ids: Sequence[str]) -> None:
    """Refuse ids that cannot name a group, or name one twice. Only those are compared that a digest makes suspect."""
    seen: set[str] = set()
    bad: dict[int, str] = {}
    for position in _suspects(ids).tolist():
        identity = ids[position]
        if identity in ("", ".") or "/" in identity:
            bad[position] = f"{identity!r} cannot name an HDF5 group"
        elif identity in seen:
            bad[position] = f"{identity!r} is there already"
        seen.add(identity)
        if len(bad) == NAMED_ROWS:
            break
    if bad:
        named = "; ".join(f"line {line}: {bad[position]}" for position, line in _lines(path, bad))
        raise Refused(
            f"{path} holds ids that cannot be used ({named}); every {ID_COLUMN} must be unique, "
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
    records = islice(_records(path), 1, max(wanted) + 2)
    return ((position, line) for position, (line, _) in enumerate(records) if position in wanted)
