"""Tables that are not CSV: what the file is, and the command that converts it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from vqa_embeddings.data.columns import IDENTITY

TO_CSV = "to_csv('vqa.csv', index=False)"
# Name and conversion to CSV, by magic number.
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
# Not pandas.read_json, which turns the id "007" into 7, and 7 into 7.0 if another one is missing.
JSON_LINES = (
    "JSON lines",
    f"pandas.DataFrame(map(json.loads, open({{path!r}}, encoding='utf-8-sig')), dtype=object).{TO_CSV}",
)
JSON = ("JSON", f"pandas.DataFrame(json.load(open({{path!r}}, encoding='utf-8-sig')){{rows}}, dtype=object).{TO_CSV}")
JSON_HEAD = re.compile(r'\{\s*["}]|\[\s*[\[{"\d\]]')


def other_format(path: Path, head: bytes) -> str | None:
    """What a binary file is, and the command that makes a CSV of it, as a sentence; None if it may be text.

    Args:
        path: of the file.
        head: its first bytes.
    """
    for magic_number, (name, conversion) in FORMATS.items():
        if head.startswith(magic_number):
            return _describe(path, name, conversion)
    return None


def other_text_format(path: Path, head: str) -> str | None:
    """What a text file without the header of a CSV is, and the command that makes a CSV of it; None if unknown.

    Args:
        path: of the file.
        head: its first characters, without white space before them.
    """
    if not JSON_HEAD.match(head):
        return None
    rows = "['questions']" if '"questions"' in head else ""  # as VQAv2 has them
    return _describe(path, *(JSON_LINES if _is_json_lines(head) else JSON), rows)


def _is_json_lines(head: str) -> bool:
    """Whether the first line is the JSON object of a row."""
    first, _, rest = head.partition("\n")
    try:
        found = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and (IDENTITY in found or rest.lstrip().startswith("{"))


def _describe(path: Path, name: str, conversion: str, rows: str = "") -> str:
    command = conversion.format(path=str(path), quoted=shlex.quote(str(path)), rows=rows)
    return f"{path} is {name}; expected CSV, convert it: {command}"
