"""A CSV as a file: its encoding, its delimiter, its records one after another, and what is no CSV by its name."""

from __future__ import annotations

import codecs
import csv
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from vqa_embeddings.data.columns import IDENTITY, NEEDED, count_needed
from vqa_embeddings.errors import InputError

DELIMITERS = (",", ";", "\t", "|")  # the first that fits
BYTE_ORDER_MARK = "\ufeff"
CHUNK_BYTES = 1 << 20  # of a file that is looked through
FIELD_CHARACTERS = 1 << 26  # a longer field is a quotation mark that was never closed: 4 bytes each while it is read
HEAD_CHARACTERS = 1 << 16  # that are looked at to tell JSON from a CSV

TO_CSV = "to_csv('vqa.csv', index=False)"
# What tables come in besides, by how such a file begins: its name, and what makes a CSV of it.
FORMATS = {
    b"\x1f\x8b": ("compressed with gzip", "gzip -dc {quoted} > vqa.csv"),
    b"BZh": ("compressed with bzip2", "bzip2 -dc {quoted} > vqa.csv"),
    b"\xfd7zXZ\0": ("compressed with xz", "xz -dc {quoted} > vqa.csv"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "zstd -dc {quoted} > vqa.csv"),
    b"PAR1": ("Parquet", f"pandas.read_parquet({{path!r}}).{TO_CSV}"),
    b"ARROW1": ("Arrow", f"pandas.read_feather({{path!r}}).{TO_CSV}"),
    b"PK\x03\x04": ("an Excel workbook, or another zip", f"pandas.read_excel({{path!r}}, dtype=str).{TO_CSV}"),
    b"\xd0\xcf\x11\xe0": ("an old Excel workbook", f"pandas.read_excel({{path!r}}, dtype=str).{TO_CSV}"),
}
# Not pandas.read_json, which makes 7 of the id "007", or 7.0 of 7 beside a missing one.
JSON_LINES = (
    "JSON lines",
    f"pandas.DataFrame(map(json.loads, open({{path!r}}, encoding='utf-8-sig')), dtype=object).{TO_CSV}",
)
JSON = ("JSON", f"pandas.DataFrame(json.load(open({{path!r}}, encoding='utf-8-sig')){{part}}, dtype=object).{TO_CSV}")
JSON_HEAD = re.compile(r'\{\s*["}]|\[\s*[\[{"\d\]]')


def read_records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV with the line each begins on, all as long as the first; blank lines are no records.

    Raises:
        InputError: the file cannot be read, or a record is no CSV or of another length; the line is named.
    """
    csv.field_size_limit(FIELD_CHARACTERS)
    line = 1
    width = 0
    with _refusing(path), open(path, encoding=_encoding(path), newline="") as stream:
        head = stream.readline().lstrip(BYTE_ORDER_MARK)  # the first mark is the encoding's
        # Where a blank follows each delimiter of the header, those of the rows are no text either.
        spaced = 0 < head.count(delimiter) == head.count(delimiter + " ")
        # strict: a quotation mark that is never closed would otherwise swallow the rest of the table without a word
        reader = csv.reader(chain((head,), stream), strict=True, delimiter=delimiter, skipinitialspace=spaced)
        try:
            for row in reader:
                if row:
                    width = width or len(row)
                    if len(row) != width:
                        raise InputError(
                            f"{path} line {line} has {len(row)} fields; expected {width}, as in its header: "
                            "mend that line"
                        )
                    yield line, row
                line = reader.line_num + 1
        except csv.Error as error:
            raise InputError(
                f"{path} line {line} is not CSV ({error}); check the quotation marks from there on"
            ) from None


def find_delimiter(path: Path) -> str:
    """The delimiter under which the header names all columns that are needed, else the most of them, else a comma.

    Raises:
        InputError: the file is JSON.
    """
    counts = {delimiter: count_needed(_header(path, delimiter)) for delimiter in DELIMITERS}
    best = max(DELIMITERS, key=counts.__getitem__)
    if counts[best] < len(NEEDED):
        _refuse_json(path)
    return best


def check_text(path: Path) -> None:
    """Refuse a file that is not text, or holds a NUL, saying what it is or where. Reads it once, a chunk at a time."""
    encoding = _encoding(path)
    decoder = codecs.getincrementaldecoder(encoding)()
    end, line = 0, 1
    with _refusing(path), open(path, "rb") as stream:
        _refuse_formats(path, stream.peek(16))
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
    """A file that cannot be opened or read is refused."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path} is not there; expected the CSV of questions, check --vqa-dataset") from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); expected the CSV of questions, check its permissions"
        ) from None


def _encoding(path: Path) -> str:
    """UTF-16 where the file begins with its byte-order mark, UTF-8 otherwise."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a regular file; expected the CSV of questions, write it to a file first")
    with _refusing(path), open(path, "rb") as stream:
        return "utf-16" if stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _header(path: Path, delimiter: str) -> list[str]:
    """The first record under a delimiter; none where it is no CSV under it, or there is none."""
    try:
        return next(read_records(path, delimiter), (0, []))[1]
    except InputError:
        return []


def _refuse_formats(path: Path, head: bytes) -> None:
    for magic, (name, conversion) in FORMATS.items():
        if head.startswith(magic):
            raise _other_format(path, name, conversion)


def _refuse_json(path: Path) -> None:
    """Refuse JSON by its name: a file that begins like it, and has not the header of a CSV."""
    with _refusing(path), open(path, encoding=_encoding(path), newline="") as stream:
        text = stream.read(HEAD_CHARACTERS).lstrip(BYTE_ORDER_MARK + " \t\r\n")
    if JSON_HEAD.match(text):
        part = "['questions']" if '"questions"' in text else ""  # as VQAv2 has them
        raise _other_format(path, *(JSON_LINES if _is_json_lines(text) else JSON), part)


def _is_json_lines(text: str) -> bool:
    """Whether the first line is an object by itself, that of a row."""
    first, _, rest = text.partition("\n")
    try:
        found = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and (IDENTITY in found or rest.lstrip().startswith("{"))


def _other_format(path: Path, name: str, conversion: str, part: str = "") -> InputError:
    command = conversion.format(path=str(path), quoted=shlex.quote(str(path)), part=part)
    return InputError(f"{path} is {name}; expected CSV, convert it: {command}")
