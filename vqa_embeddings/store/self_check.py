"""The last self-check of a run, as `run.json` keeps it: beside what the run is, and no part of it.

    "self_check": {"reference", "dtype", "device", "rows", "vectors": [{"name", "layer", "error", "cosine"}],
                   "answers_equal", "allowed", "passed", "fault", "checked_at"}

Launches that ask for none leave it as it is; another check replaces it, except for one that failed on another device.
Errors and cosines that are not finite are kept as text, which JSON has no numbers for. Runs of earlier versions have
none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vqa_embeddings.base.files import publish_json
from vqa_embeddings.errors import InputError
from vqa_embeddings.schema import short_name
from vqa_embeddings.store.run import RUN_FILE, read_run

FIELD = "self_check"


@dataclass(frozen=True)
class VectorCheck:
    """How far one vector is from the reference's, at most, in all rows that were compared."""

    name: str  # as in `schema`
    layer: int | None
    error: float  # see `app.self_check.Difference`
    cosine: float

    def __str__(self) -> str:
        return short_name(self.name) if self.layer is None else f"{short_name(self.name)} layer {self.layer}"


@dataclass(frozen=True)
class SelfCheck:
    """Some rows of a run, compared with what another implementation of the model gives."""

    reference: str  # what that was, as the family describes it
    dtype: str
    device: str
    rows: Sequence[str]  # their question ids
    vectors: Sequence[VectorCheck]  # the largest error first
    answers_equal: int
    allowed: str  # how far the two may differ, in words
    passed: bool
    fault: str  # what was beyond that, in words; empty where nothing was
    checked_at: str  # in UTC, as ISO 8601

    def __str__(self) -> str:
        count = len(self.rows)
        rows = f"{count} row{'s' * (count > 1)} against {self.reference}"
        if not self.vectors:
            return f"{rows}: no vector was compared"
        worst, cosine = self.vectors[0], min(vector.cosine for vector in self.vectors)
        return (
            f"{rows}: largest error {worst.error:.1e} of a vector's "
            f"largest value ({worst}), smallest cosine {cosine:.6f}, {self.answers_equal} of {count} answers equal"
        )


def record_self_check(folder: Path, check: SelfCheck) -> bool:
    """Write it into the run that `folder` holds, in place of an earlier one. Returns whether it was written.

    It is not where there is no run. One that has passed does not replace one that has failed on another device (by its
    description), as rows of that device may be in the run.

    Raises:
        InputError: `run.json` is not that of a run.
        StorageError: it cannot be written.
    """
    path = folder / RUN_FILE
    if not path.exists():
        return False
    read_run(folder)  # which refuses what is none
    earlier = read_self_check(folder)
    if check.passed and earlier and not earlier.passed and earlier.device != check.device:
        return False
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    vectors = [{**asdict(one), "error": _for_json(one.error), "cosine": _for_json(one.cosine)} for one in check.vectors]
    publish_json(path, {**values, FIELD: {**asdict(check), "vectors": vectors}})
    return True


def read_self_check(folder: Path) -> SelfCheck | None:
    """The last one of the run in `folder`; None where there is none, or nothing that can be read."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, InputError):
        values = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))[FIELD]
        vectors = [
            VectorCheck(**{**one, "error": _from_json(one["error"]), "cosine": _from_json(one["cosine"])})
            for one in values["vectors"]
        ]
        check = SelfCheck(**{**values, "vectors": vectors})
        return check if _is_well_formed(check) else None
    return None


def _for_json(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def _from_json(value: Any) -> float:
    """The number that `_for_json` has written.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not (isinstance(value, int | float) or value in ("inf", "-inf", "nan")):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _is_well_formed(check: SelfCheck) -> bool:
    texts = [check.reference, check.dtype, check.device, check.allowed, check.fault, check.checked_at]
    texts += [vector.name for vector in check.vectors]
    layers = [vector.layer for vector in check.vectors if vector.layer is not None]
    return (
        isinstance(check.rows, list)
        and all(isinstance(text, str) for text in [*texts, *check.rows])
        and all(type(count) is int for count in [*layers, check.answers_equal])
        and isinstance(check.passed, bool)
    )
