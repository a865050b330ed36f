"""What one output folder holds: `run.json`, the rows it is about, and the refusal to mix two runs in it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path

from vqa_embeddings.base.files import publish, publish_json
from vqa_embeddings.data.table import Table
from vqa_embeddings.data.table_reader import read_table
from vqa_embeddings.errors import InputError
from vqa_embeddings.schema import VectorColumn, list_columns

RUN_FILE = "run.json"
ROWS_FILE = "rows.csv"
COVERAGE_FILE = "coverage.json"
SHARDS_FOLDER = "shards"
# What runs of earlier versions, which knew one model, do not say of it.
FIRST_MODEL_TYPE, FIRST_FILE_PREFIX = "phi-4-multimodal", "phi4_multimodal"
FIRST_EXTRA_VECTORS = {"pixel_mean_representation": 448}  # with --pixel-mean

# What every launch into one folder must agree on, and how an error names it. The rest of a run is only recorded:
# the same weights under another path are the same model, and its vectors do not depend on the kind of device.
IDENTITY = {
    "rows": "number of rows of the CSV",
    "rows_sha256": "rows of the CSV",
    "model_sha256": "model",
    "layout": "checkpoint layout",
    "lora": "--lora",
    "dtype": "--dtype",
    "attn_implementation": "--attn-implementation",
    "layers": "layers",
    "max_new_tokens": "--max-new-tokens",
    "pixel_mean": "--pixel-mean",
}
ALSO_NAMED = {"columns": "columns", "extra_vectors": "further vectors"}  # where they differ, beside IDENTITY or alone


def shard_folder(folder: Path, launch: str, rank: int) -> Path:
    """Where a rank of a launch writes."""
    return folder / SHARDS_FOLDER / f"{launch}-r{rank}"


@dataclass(frozen=True)
class Run:
    """What an output folder's run extracts, as `run.json` has it. Sizes are lengths of vectors."""

    rows: int
    rows_sha256: str
    model: str
    revision: str
    model_sha256: str
    layout: str
    lora: str
    dtype: str
    attn_implementation: str
    layers: list[int]
    max_new_tokens: int
    pixel_mean: bool
    hidden_size: int
    vision_size: int
    device: str
    versions: dict[str, str]
    created_at: str = ""
    model_type: str = FIRST_MODEL_TYPE  # attribute of its parts
    file_prefix: str = FIRST_FILE_PREFIX  # what the names of its parts begin with
    extra_vectors: dict[str, int] = field(default_factory=dict)  # that are stored beside, by their names in a part
    images_dir: str = ""  # where its pictures lay, for the report's small ones
    columns: dict[str, str] = field(default_factory=dict)  # of its table, by role; of earlier versions empty

    @property
    def row_bytes(self) -> int:
        """What the vectors of one row take, on the disk as in memory."""
        return 4 * sum(column.size for column in self.vectors)

    @property
    def vectors(self) -> list[VectorColumn]:
        """The vectors that each row has, in the order in which they are stored."""
        sizes = {"vision_size": self.vision_size, "hidden_size": self.hidden_size}
        return list_columns(self.layers, sizes, self.extra_vectors)

    @property
    def key(self) -> str:
        """Short digest of all that must agree; every segment and part carries it."""
        identity = {name: getattr(self, name) for name in IDENTITY}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def check_run(folder: Path, wanted: Run, make: bool = True) -> bool:
    """See before anything slow that `folder` can be written to, and holds no other run.

    Args:
        make: whether to make it where it is not there.
    Returns:
        Whether the run is there already.
    Raises:
        InputError: `folder` is not fit; where it holds another run, the differences are named.
    """
    try:
        found = (folder / RUN_FILE).exists()
        if found:
            _refuse_differences(folder, read_run(folder), wanted)
        else:
            _refuse_strangers(folder)
        if make:
            (folder / SHARDS_FOLDER).mkdir(parents=True, exist_ok=True)
        if not os.access(nearest(folder / SHARDS_FOLDER), os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error.strerror}); choose another --output-dir") from None
    return found


def nearest(path: Path) -> Path:
    """The path itself, or the first folder above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def claim_run(folder: Path, wanted: Run) -> bool:
    """Begin the run in `folder`, or join the one that is there. Any number of processes may do so at once.

    Args:
        folder: the output folder, which `check_run` has seen.
        wanted: what this launch extracts.
    Returns:
        Whether this process, and so no other, began it.
    Raises:
        InputError: another launch was faster, and its run is another one.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    run = {**asdict(wanted), "created_at": now}
    began = not (folder / RUN_FILE).exists() and publish_json(folder / RUN_FILE, run, replace=False)
    _refuse_differences(folder, read_run(folder), wanted)
    return began


def keep_rows(folder: Path, write_rows: Callable[[Path], object]) -> None:
    """Lay the table beside the run that `folder` holds, unless it is there, or no run is.

    A table may have 10 GB: of a thousand ranks that start together only the one that began the run should do this,
    and at the end of a launch each, where that one has not come to it.

    Args:
        write_rows: writes the CSV that becomes `rows.csv` to the path that it is given.
    """
    if (folder / RUN_FILE).exists() and not (folder / ROWS_FILE).exists():
        publish(folder / ROWS_FILE, write_rows)


def read_run(folder: Path) -> Run:
    """The run that `folder` holds.

    Raises:
        InputError: there is none, or `run.json` was not written by this program.
    """
    path = folder / RUN_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError(f"{values!r}")
        if values.get("pixel_mean") and "extra_vectors" not in values:
            values["extra_vectors"] = FIRST_EXTRA_VECTORS
        run = Run(**{known.name: values[known.name] for known in fields(Run) if known.name in values})
        for name in ("columns", "extra_vectors"):
            if not isinstance(getattr(run, name), dict):
                raise TypeError(f"{name} {getattr(run, name)!r}")
        return run
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{folder} holds no {RUN_FILE}; expected the output folder of extract_dist.py, "
            "check --output-dir or run the extraction first"
        ) from None
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{path} is not a run of this program ({error!r}); restore it or use a new --output-dir"
        ) from None


def known_columns(folder: Path) -> dict[str, str] | None:
    """The columns that the run in `folder` was begun with; None where there is none, or `check_run` will refuse it."""
    try:
        return read_run(folder).columns
    except (InputError, OSError):
        return None


def read_run_rows(folder: Path, run: Run) -> Table:
    """The table that the run is about, from `rows.csv`.

    Raises:
        InputError: `rows.csv` is missing, or is not what `run.json` says.
    """
    path = folder / ROWS_FILE
    if not path.exists():
        raise InputError(f"{path} is not there; expected the run's table, start the extraction again to write it")
    table = read_table(path, run.columns)
    if table.fingerprint() != run.rows_sha256:
        raise InputError(f"{path} is not the table that {RUN_FILE} names; put the original CSV back in its place")
    return table


def _refuse_strangers(folder: Path) -> None:
    stranger = next(folder.glob("*.h5"), None) or next((folder / SHARDS_FOLDER).glob("*/*.h5"), None)
    if stranger is not None:
        raise InputError(
            f"{folder} holds {stranger.name} but no {RUN_FILE}, so it belongs to something else; "
            "choose a new --output-dir"
        )


def _refuse_differences(folder: Path, found: Run, wanted: Run) -> None:
    differing = [name for name in IDENTITY if getattr(found, name) != getattr(wanted, name)]
    if not differing and found.extra_vectors != wanted.extra_vectors:  # where no option of the above explains it
        differing = ["extra_vectors"]
    if not differing:
        return
    if "rows_sha256" in differing and found.columns and found.columns != wanted.columns:
        differing.append("columns")
    described = "; ".join(
        f"{(IDENTITY | ALSO_NAMED)[name]}: {_short(getattr(found, name))} there, {_short(getattr(wanted, name))} now"
        for name in differing
    )
    raise InputError(
        f"{folder} belongs to another run ({described}); use a new --output-dir, or the same input and options"
    )


def _short(value: object) -> str:
    text = str(value)
    if isinstance(value, dict):  # columns by what they hold, lengths of vectors by their names
        shown = (each if isinstance(each, str) else f"{name} {each}" for name, each in value.items())
        text = ", ".join(shown) or "none"
    return text[:12] if len(text) == 64 else text
