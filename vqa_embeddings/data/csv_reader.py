"""A CSV as a file: its encoding, its delimiter, and its records one after another."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from vqa_embeddings.data.columns import NEEDED, count_needed
from vqa_embeddings.data.table_formats import other_format, other_text_format
from vqa_embeddings.errors import InputError

DELIMITERS = (",", ";", "\t", "|")  # the first that fits
BYTE_ORDER_MARK = "\ufeff"
CHUNK_BYTES = 1 << 20  # of a file that is checked
FIELD_CHARACTERS = 1 << 26  # a longer field is a quotation mark that was never closed: 4 bytes each while it is read
HEAD_CHARACTERS = 1 << 16  # in which JSON is told from a CSV


def read_records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV, each with the line on which it begins. Blank lines are skipped.

    Raises:
        InputError: the file cannot be read, a record is not CSV, or its length differs from the first one's; the line
            is named.
    """
    csv.field_size_limit(FIELD_CHARACTERS)
    line = 1
    width = 0
    with _refusing(path), open(path, encoding=_encoding(path), newline="") as stream:
        head = stream.readline().lstrip(BYTE_ORDER_MARK)  # the first mark is the encoding's
        # If a blank follows every delimiter of the header, the blanks behind those of the rows are not text either.
        spaced = 0 < head.count(delimiter) == head.count(delimiter + " ")
        # strict: otherwise a quotation mark that is never closed would swallow the rest of the table without an error
        reader = csv.reader(chain((head,), stream), strict=True, delimiter=delimiter, skipinitialspace=spaced)
        try:
            for row in reader:
                if row:
                    width = width or len(row)
                    if len(row) != width:
                        raise InputError(
                            f"{path} line {line} has {len(row)} fields; expected {width}, as in its header: "
                            "correct that line"
                        )
                    yield line, row
                line = reader.line_num + 1
        except csv.Error as error:
            raise InputError(
                f"{path} line {line} is not CSV ({error}); check the quotation marks from there on"
            ) from None


def find_delimiter(path: Path) -> str:
    """The delimiter with which the header names the most of the columns that are needed; a comma if none does.

    Raises:
        InputError: the file is JSON.
    """
    counts = {delimiter: count_needed(_header(path, delimiter)) for delimiter in DELIMITERS}
    best = max(DELIMITERS, key=counts.__getitem__)
    if counts[best] < len(NEEDED) and (found := other_text_format(path, _read_head(path))):
        raise InputError(found)
    return best


def check_text(path: Path) -> None:
    """Refuse a file that is not text, or holds a NUL. Read it once, a chunk at a time.

    Raises:
        InputError: it is a table in another format, or not text; its format, or the place, is named.
    """
    encoding = _encoding(path)
    decoder = codecs.getincrementaldecoder(encoding)()
    end, line = 0, 1
    with _refusing(path), open(path, "rb") as stream:
        if found := other_format(path, stream.peek(16)):
            raise InputError(found)
        while True:
            chunk = stream.read(CHUNK_BYTES)
            end += len(chunk)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                name = "UTF-16" if encoding == "utf-16" else "UTF-8"
                byte = end - len(error.object) + error.start
                raise InputError(f"{path} is not {name} text (byte {byte}); save it as UTF-8 CSV") from None
            if "\0" in text:
                line += text.count("\n", 0, text.index("\0"))
                raise InputError(
                    f"{path} line {line} holds a NUL character; expected text, remove it or export the table again"
                )
            line += text.count("\n")
            if not chunk:
                return


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn the errors of opening and reading the file into InputError."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path} is not there; expected the CSV of questions, check --vqa-dataset") from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); expected the CSV of questions, check its permissions"
        ) from None


def _encoding(path: Path) -> str:
    """UTF-16 if the file begins with its byte-order mark, otherwise UTF-8."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a regular file; expected the CSV of questions, write it to a file first")
    with _refusing(path), open(path, "rb") as stream:
        return "utf-16" if stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _header(path: Path, delimiter: str) -> list[str]:
    """The first record with this delimiter; empty if there is none, or it is not CSV."""
    try:
        return next(read_records(path, delimiter), (0, []))[1]
    except InputError:
        return []


def _read_head(path: Path) -> str:
    with _refusing(path), open(path, encoding=_encoding(path), newline="") as stream:
        return stream.read(HEAD_CHARACTERS).lstrip(BYTE_ORDER_MARK + " \t\r\n")
