"""Values that another program has probably changed: a warning before the work. They are not corrected."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vqa_embeddings.data.columns import IDENTITY, IMAGE, QUESTION, ROLES
from vqa_embeddings.data.table import Table
from vqa_embeddings.errors import quoted

MISSING = ("nan", "NaN", "None", "null", "NULL", "<NA>")  # missing values that became text
FIRST_BYTE_OF_MISSING = np.isin(np.arange(256), [ord(text[0]) for text in MISSING])
LONGEST_MISSING = max(map(len, MISSING))
# Numbers as programs rewrite them: with a fraction, or an exponent. 1e5 may be a name.
FRACTION = re.compile(rb"\0-?\d+\.0(?=\0)")
POWER = re.compile(rb"\0-?\d(?:\.\d+)?[eE]\+\d+(?=\0)")
BLANK = 0x20  # and all bytes below it, also the NUL that ends an empty field
WIDE_BLANKS, FEW_BYTES = (
    (0xC2, 0xE1, 0xE2, 0xE3),
    12,
)  # first bytes of Unicode's other blanks, in short fields


@dataclass
class _Found:
    """How many rows are affected, and the first of them."""

    count: int = 0
    first: int = 0

    def add(self, row: int) -> None:
        self.first = self.first if self.count else row
        self.count += 1


def find_warnings(table: Table) -> Iterator[str]:
    """One sentence for each kind of value that looks wrong."""
    found = _find(table)
    names = {role: table.columns.names.get(role, role) for role in ROLES}

    def rows(what: str, role: str) -> str:
        some = found[what][role]
        identity, text = quoted(table.ids[some.first]), table.row(some.first)[ROLES.index(role)]
        more = f"{some.count} rows, first {identity}" if some.count > 1 else f"row {identity}"
        return f"{names[role]} {quoted(text)} in {more}" if text.strip() else f"no {names[role]} in {more}"

    for what, roles, meaning in (
        ("empty", (IMAGE, QUESTION), "recorded as failed"),
        ("missing", (IMAGE, QUESTION), "it looks like a missing value, and is taken as it stands"),
        ("fractions", (IDENTITY, IMAGE), "pandas makes such of whole numbers beside a missing one: read the table "
            "with dtype=str where they had no fraction"),
        ("powers", (IDENTITY, IMAGE), "such numbers may have lost digits: format the column as text and export the "
            "table again where they had none"),
        ("swallowed", ROLES, "it holds a line break and the delimiter: where a quotation mark is text in this table, "
            "rows were swallowed, write it with csv's quotation marks"),
    ):  # fmt: skip
        for role in roles:
            if found[what][role].count:
                yield f"{rows(what, role)}: {meaning}"


def _find(table: Table) -> dict[str, dict[str, _Found]]:
    """The rows of each kind of suspicious value, by role; in one pass."""
    kinds = ("empty", "missing", "fractions", "powers", "swallowed")
    found = {kind: {role: _Found() for role in ROLES} for kind in kinds}
    first = 0
    for block, begins in table.raw_blocks():
        for row, role, text in _missing_values(block, begins):
            if not text.strip():
                found["empty"][role].add(first + row)
            elif text in MISSING:
                found["missing"][role].add(first + row)
        for kind, offset in _rewritten_values(block, table.columns.delimiter.encode()):
            row, column = divmod(int(np.searchsorted(begins.ravel(), offset)), len(ROLES))
            found[kind][ROLES[column]].add(first + row)
        first += len(begins)
    return found


def _missing_values(block: bytes, begins: np.ndarray) -> Iterator[tuple[int, str, str]]:
    """Row, role and text of the pictures and questions that may be empty, or read like a missing value."""
    data = np.frombuffer(block, np.uint8)
    for role in (IMAGE, QUESTION):
        begin, end = begins[:, ROLES.index(role)], begins[:, ROLES.index(role) + 1] - 1
        heads, sizes = data[begin], end - begin
        suspects = heads <= BLANK
        suspects |= FIRST_BYTE_OF_MISSING[heads] & (sizes <= LONGEST_MISSING)
        suspects |= np.isin(heads, WIDE_BLANKS) & (sizes <= FEW_BYTES)
        for row in np.flatnonzero(suspects).tolist():
            yield row, role, block[begin[row] : end[row]].decode()


def _rewritten_values(block: bytes, delimiter: bytes) -> Iterator[tuple[str, int]]:
    """Kind and offset of the fields that hold a rewritten number, or what may be several rows."""
    for kind, needle, pattern in (("fractions", b".0\0", FRACTION), ("powers", b"+", POWER)):
        if needle in block:  # each pattern begins at the NUL before the field
            yield from ((kind, match.start()) for match in pattern.finditer(b"\0" + block))
    at = block.find(b"\n") if delimiter != b"," else -1
    while at >= 0:
        begin, end = block.rfind(b"\0", 0, at) + 1, block.index(b"\0", at)
        if delimiter in block[begin:end]:
            yield "swallowed", begin
        at = block.find(b"\n", end)
