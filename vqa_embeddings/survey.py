"""What in a table looks as if a program had changed it on its way here: said before the work, never mended."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vqa_embeddings.columns import IDENTITY, IMAGE, QUESTION, ROLES
from vqa_embeddings.table import Table

MISSING = ("nan", "NaN", "None", "null", "NULL", "<NA>")  # values that were missing, made into text
FRACTION = re.compile(r"-?\d+\.0")
POWER = re.compile(rb"\0-?\d(?:\.\d+)?[eE]\+\d+(?=\0)")  # as spreadsheets and pandas write it; 1e5 may be a name
BLANK = 0x20  # and all bytes below it, the NUL that ends an empty field among them


@dataclass
class _Found:
    """How many rows have something, and the first of them."""

    count: int = 0
    first: int = 0

    def add(self, row: int) -> None:
        self.first = self.first if self.count else row
        self.count += 1


def survey(table: Table) -> Iterator[str]:
    """A sentence for each thing that looks wrong; none for a table that looks right."""
    empty, missing, powers = _look(table)
    names = {role: table.columns.names.get(role, role) for role in ROLES}

    def rows(found: _Found, role: str) -> str:
        identity, text = table.ids[found.first], table.row(found.first)[ROLES.index(role)]
        more = f"{found.count} rows, first {identity!r}" if found.count > 1 else f"row {identity!r}"
        return f"{names[role]} {text!r} in {more}" if text.strip() else f"no {names[role]} in {more}"

    for role, what in ((IMAGE, "looked for"), (QUESTION, "asked")):
        if empty[role].count:
            yield f"{rows(empty[role], role)}: recorded as failed"
        if missing[role].count:
            yield f"{rows(missing[role], role)}: it looks like a missing value, and is {what} as it stands"
    for role, column in ((IDENTITY, table.ids), (IMAGE, table.images)):
        if example := _find_fractions(column):
            yield (
                f"{names[role]} is {example!r} and the like in all rows, which pandas makes of whole numbers beside a "
                "missing one: read the table with dtype=str where they had no fraction"
            )
        if powers[role].count:
            yield (
                f"{rows(powers[role], role)}: such numbers may have lost digits, format the column as text and "
                "export the table again where they had none"
            )


def _look(table: Table) -> tuple[dict[str, _Found], dict[str, _Found], dict[str, _Found]]:
    """What is empty, reads like a missing value, or like a number with an exponent, by role; in one pass."""
    empty, missing, powers = ({role: _Found() for role in ROLES} for _ in range(3))
    begin_of_missing = np.isin(np.arange(256), [ord(text[0]) for text in MISSING])
    longest = max(map(len, MISSING))
    first = 0
    for block, begins in table.spans():
        data = np.frombuffer(block, np.uint8)
        for role in (IMAGE, QUESTION):
            begin, end = begins[:, ROLES.index(role)], begins[:, ROLES.index(role) + 1] - 1
            heads = data[begin]
            suspects = (heads <= BLANK) | (begin_of_missing[heads] & (end - begin <= longest))
            for row in np.flatnonzero(suspects).tolist():
                text = block[begin[row] : end[row]].decode()
                if not text.strip():
                    empty[role].add(first + row)
                elif text in MISSING:
                    missing[role].add(first + row)
        if b"+" in block:
            places = [np.searchsorted(begins.ravel(), match.start()) for match in POWER.finditer(b"\0" + block)]
            for place in map(int, places):
                powers[ROLES[place % 4]].add(first + place // 4)
        first += len(begins)
    return empty, missing, powers


def _find_fractions(column: Sequence[str]) -> str | None:
    """The first of a column whose texts all are whole numbers with a fraction, or empty; None of any other."""
    example = None
    for text in column:
        if text and not FRACTION.fullmatch(text):
            return None
        example = example or text
    return example
