"""The table of questions: read as text, checked, and never changed."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vqa_embeddings.errors import Refused

ID_COLUMN = "question_id"
IMAGE_COLUMNS = ("image_id", "image_name")
QUESTION_COLUMN = "question"
ANSWER_COLUMNS = ("answer", "gt_answer", "ground_truth_answer")
NAMED_ROWS = 3  # how many offending rows an error names


@dataclass(frozen=True)
class Table:
    """The rows of a CSV in its order: four columns of text, each `[n]`. A missing ground truth is ""."""

    ids: list[str]
    images: list[str]
    questions: list[str]
    truths: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def pictures(self) -> np.ndarray:
        """The picture of each row as a number, int64 `[n]`, counted by first appearance."""
        numbers: dict[str, int] = {}
        return np.fromiter((numbers.setdefault(name, len(numbers)) for name in self.images), np.int64, len(self))

    def fingerprint(self) -> str:
        """SHA-256 over the four columns in order; blind to how the CSV quotes its fields or ends its lines."""
        digest = hashlib.sha256()
        for row in zip(self.ids, self.images, self.questions, self.truths, strict=True):
            digest.update("\0".join((*row, "")).encode())  # no field holds a NUL: read_table refuses it
        return digest.hexdigest()


def read_table(path: Path) -> Table:
    """Read a CSV of questions.

    Raises:
        Refused: the file is missing, not UTF-8 or UTF-16 text, no CSV, without the columns, or without rows; or an
            id is empty, ".", repeated, or holds a "/" or a NUL, none of which can name a group of an HDF5 file.
    """
    rows = _records(path)
    _, header = next(rows, (0, []))
    if not any(header):
        raise Refused(f"{path} is empty; expected a CSV with the columns question_id, image_id, question and answer")
    columns = _columns(path, header)
    table = Table([], [], [], [])
    shared: dict[str, str] = {}  # the same picture names, questions and answers come again and again: keep one copy
    lines: list[int] = []
    for line, row in rows:
        if len(row) != len(header):
            raise Refused(f"{path} line {line} has {len(row)} fields; expected {len(header)}, as in its header")
        for column, values in zip(columns, (table.ids, table.images, table.questions, table.truths), strict=True):
            field = "" if column is None else row[column]
            values.append(field if values is table.ids else shared.setdefault(field, field))
        lines.append(line)
    if not len(table):
        raise Refused(f"{path} has a header and no rows; expected one question a row")
    _check_ids(path, table.ids, lines)
    return table


def sample(count: int, size: int) -> list[int]:
    """Positions of `size` rows of `count`, sampled as pandas' `sample(random_state=42)` does, in CSV order."""
    chosen = np.random.RandomState(42).choice(count, min(size, count), replace=False)
    return sorted(int(position) for position in chosen)


def read_rows(path: Path) -> tuple[list[str], Iterator[list[str]]]:
    """The header of a CSV that `read_table` accepted, and its rows one after another, all columns as they are."""
    rows = _records(path)
    _, header = next(rows)
    return header, (row for _, row in rows)


def select(table: Table, positions: Sequence[int]) -> Table:
    """The rows at these positions, as a table of their own."""
    columns = (table.ids, table.images, table.questions, table.truths)
    return Table(*([column[position] for position in positions] for column in columns))


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV with the line each begins on; blank lines are no records."""
    csv.field_size_limit(1 << 30)
    # strict: a quotation mark that is never closed would otherwise swallow the rest of the table without a word
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    line = 1
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise Refused(f"{path} line {line} is not CSV ({error}); check the quotation marks from there on") from None
        if row:
            yield line, row
        line = reader.line_num + 1


def _text(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise Refused(f"{path} is not a regular file; expected the CSV of questions, write it to a file first")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise Refused(f"{path} is not there; expected the CSV of questions, check --vqa-dataset") from None
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}); expected the CSV of questions") from None
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(
            f"{path} is not {'UTF-16' if wide else 'UTF-8'} text (byte {error.start}); save it as UTF-8 CSV"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise Refused(f"{path} line {line} holds a NUL character; expected text, remove it or export the table again")
    return text


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


def _check_ids(path: Path, ids: list[str], lines: list[int]) -> None:
    seen: set[str] = set()
    bad: list[str] = []
    for identity, line in zip(ids, lines, strict=True):
        if identity in ("", ".") or "/" in identity:
            bad.append(f"line {line}: {identity!r} cannot name an HDF5 group")
        elif identity in seen:
            bad.append(f"line {line}: {identity!r} is there already")
        seen.add(identity)
        if len(bad) == NAMED_ROWS:
            break
    if bad:
        raise Refused(
            f"{path} holds ids that cannot be used ({'; '.join(bad)}); every {ID_COLUMN} must be unique, "
            'not empty, not ".", and without "/"'
        )
