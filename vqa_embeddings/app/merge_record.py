"""What a merge leaves in writing: `coverage.json`, `missing.csv` and `failed.csv`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from vqa_embeddings.base.file_names import from_disk
from vqa_embeddings.base.files import new_csv, publish, publish_json, sha256
from vqa_embeddings.data.table_reader import read_rows
from vqa_embeddings.records import Failed
from vqa_embeddings.store.coverage import Coverage
from vqa_embeddings.store.parts import Part
from vqa_embeddings.store.run import COVERAGE_FILE, ROWS_FILE
from vqa_embeddings.store.segments import Corrupt

MISSING_FILE = "missing.csv"
FAILED_FILE = "failed.csv"


def describe_part(part: Part, digest: str | None) -> dict[str, Any]:
    """A part as `coverage.json` has it.

    Args:
        digest: its SHA-256 where it is known; otherwise it is computed here.
    """
    return {
        "file": part.path.name,
        "first_row": part.first + 1,
        "last_row": part.last,
        "samples": len(part.rows),
        "sha256": digest or sha256(part.path),
    }


def write_record(
    folder: Path,
    coverage: Coverage,
    truncated: int,
    corrupt: Iterable[Corrupt],
    parts: Sequence[Mapping[str, Any]],
    failures: Mapping[int, Failed],
    devices: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Write the lists of rows and `coverage.json`, and return what that says.

    Args:
        truncated: rows whose picture is cut off.
        corrupt: files that were not used.
        parts: as `describe_part` has them.
        failures: why rows failed, by row.
        devices: as `sum_up_devices` has them.
    """
    _list_rows(folder, coverage, failures)
    summary = {
        "rows": len(coverage.extracted),
        "extracted": int(coverage.extracted.sum()),
        "failed": int(coverage.failed.sum()),
        "missing": int(coverage.missing.sum()),
        "duplicates": coverage.duplicates,
        "truncated_pictures": truncated,
        "corrupt_segments": [
            {"path": from_disk(damaged.path.relative_to(folder)), "reason": damaged.reason} for damaged in corrupt
        ],
        "parts": parts,
        "devices": devices,
    }
    publish_json(folder / COVERAGE_FILE, summary)
    return summary


def _list_rows(folder: Path, coverage: Coverage, reasons: Mapping[int, Failed]) -> None:
    """The rows without values, as `rows.csv` has them, which is gone through once, and not at all where all have."""
    left = ~coverage.extracted
    header, every_row = read_rows(folder / ROWS_FILE)
    rows = compress(every_row, left.tobytes()) if left.any() else iter(())

    def write(missing: Path, failed: Path) -> None:
        with new_csv(missing, header) as add_missing, new_csv(failed, [*header, "error", "message"]) as add_failed:
            for position, row in zip(np.flatnonzero(left).tolist(), rows, strict=True):
                if coverage.failed[position]:
                    add_failed([*row, reasons[position].error, reasons[position].message])
                else:
                    add_missing(row)

    publish(folder / MISSING_FILE, lambda missing: publish(folder / FAILED_FILE, lambda failed: write(missing, failed)))
