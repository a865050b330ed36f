"""From a CSV to a `Table`: which columns are read, and what makes a table unusable. Values stay the text they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path

import numpy as np

from vqa_embeddings.data import columns
from vqa_embeddings.data.columns import Columns
from vqa_embeddings.data.csv_reader import check_text, find_delimiter, read_records
from vqa_embeddings.data.table import Table
from vqa_embeddings.errors import InputError, one_line, quoted

NAMED_ROWS = 3  # how many unusable rows an error names
FIRST_ROWS, SAMPLED_PICTURES = 1000, 20  # rows, and pictures of these rows, that tell which column names pictures

Finder = Callable[[str], Path | None]  # from the name of a picture to its file


def read_table(path: Path, known: Mapping[str, str] | None = None, find_file: Finder | None = None) -> Table:
    """Read a CSV of questions. The header tells whether a comma, a semicolon, a tab or a `|` separates the fields.

    Args:
        path: of the CSV.
        known: the columns of the run that it belongs to, as for `columns.choose`.
        find_file: tells which of several columns names the pictures. Without it the first one is taken.
    Raises:
        InputError: the file is missing, not UTF-8 or UTF-16 text, not CSV, without the columns, or without rows; or an
            id is empty, ".", repeated, or holds a "/" or a NUL, so that it cannot name a group of an HDF5 file.
    """
    check_text(path)
    delimiter = find_delimiter(path)
    rows = map(itemgetter(1), read_records(path, delimiter))
    header = columns.clean(next(rows, []), known)
    _check_header(path, header)
    first_rows = list(islice(rows, FIRST_ROWS))
    candidates = columns.undecided(header, known)
    files = _find_files(path, candidates, header, first_rows, find_file) if find_file else None
    chosen = replace(columns.choose(header, known, files), delimiter=delimiter)
    fields = _take_columns(path, header, chosen, chain(first_rows, rows))
    table = Table.from_rows(fields, chosen)
    if not len(table):
        raise InputError(f"{path} has a header and no rows; expected one question a row, check --vqa-dataset")
    _check_ids(path, table.ids)
    return table


def read_rows(path: Path) -> tuple[list[str], Iterator[list[str]]]:
    """The header of a CSV that `read_table` has accepted, and an iterator over its rows: all columns, unchanged."""
    records = map(itemgetter(1), read_records(path, find_delimiter(path)))
    return next(records), records


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
            f"{path} has no column {', '.join(absent)}; found {one_line(shown)}; rename its columns or add the missing"
        )


def _find_files(
    path: Path, candidates: Sequence[str], header: Sequence[str], rows: Sequence[Sequence[str]], find_file: Finder
) -> columns.Files:
    """The files that some distinct values of each candidate column name; empty without candidates."""
    indices = [header.index(name) for name in candidates]
    distinct = dict.fromkeys(tuple(row[index] for index in indices) for row in rows)
    spread = list(distinct)[:: max(1, len(distinct) // SAMPLED_PICTURES)][:SAMPLED_PICTURES]
    values = list(zip(*spread, strict=True))
    files = {name: list(map(find_file, some)) for name, some in zip(candidates, values, strict=bool(values))}
    if values and not any(map(any, files.values())):
        raise InputError(
            f"{path} has the columns {' and '.join(candidates)}, and the first values of neither are pictures (such as "
            f"{' and '.join(quoted(next(filter(None, some), '')) for some in values)}); expected those of one to be, "
            "check --images-dir, or whether they lack their suffix"
        )
    return files


def _take_columns(
    path: Path, header: Sequence[str], chosen: Columns, rows: Iterable[Sequence[str]]
) -> Iterable[Sequence[str]]:
    """Of each row the fields of the chosen columns, with an empty ground truth if the table has none."""
    for name in chosen.names.values():
        if header.count(name) > 1:
            raise InputError(
                f"{path} has {header.count(name)} columns {name}; expected one, rename or remove the others"
            )
    indices = [header.index(name) for name in chosen.names.values()]
    taken = map(itemgetter(*indices), rows)
    return taken if len(indices) == len(columns.ROLES) else ((*row, "") for row in taken)


def _check_ids(path: Path, ids: Sequence[str]) -> None:
    """Refuse ids that cannot name a group, or name one twice. Only ids with a suspicious hash are compared."""
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
    """The positions of all ids that are unusable or repeated, and perhaps of some others: int64, ascending."""
    # An id with a "/" gets the hash of an empty one, which makes it a suspect.
    hashes = np.fromiter((hash("" if "/" in identity else identity) for identity in ids), np.int64, len(ids))
    ordered = np.sort(hashes)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    return np.flatnonzero(np.isin(hashes, np.append(repeated, (hash(""), hash(".")))))


def _lines(path: Path, positions: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Each of these positions with the line of the CSV on which its row begins."""
    wanted = set(positions)
    records = islice(read_records(path, find_delimiter(path)), 1, max(wanted) + 2)
    return ((position, line) for position, (line, _) in enumerate(records) if position in wanted)
