"""Tables of questions: those of the demo, and those that a test writes."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from vqa_embeddings.app.demo import DATA


def table_rows(path: Path = DATA / "vqa.csv") -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
