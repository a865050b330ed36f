"""Planning and coverage of a table of ten million rows: seconds of each step, and the memory that it takes at most.

    PYTHONPATH=. python tests/benchmarks/planning.py [--quick] [SCRATCH]

SCRATCH needs 3 GB and is a temporary folder where none is named. No GPU is used.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.runs import random_run
from vqa_embeddings.app.merge_record import write_record
from vqa_embeddings.base.files import new_csv
from vqa_embeddings.base.timings import Timings
from vqa_embeddings.cluster.sharding import PICTURE_COST, share_rows, split
from vqa_embeddings.data.table_reader import read_table
from vqa_embeddings.data.table_warnings import find_warnings
from vqa_embeddings.records import Extracted, Failed
from vqa_embeddings.schema import QUERY_TOKEN, VISION_ONLY, VISION_TOKEN
from vqa_embeddings.store.catalog import Catalog
from vqa_embeddings.store.coverage import plan_parts
from vqa_embeddings.store.run import check_run, claim_run, keep_rows, read_run, read_run_rows
from vqa_embeddings.store.segments import Segment, ShardWriter, read_segments

ROWS, QUICK_ROWS = 10_000_000, 200_000
QUESTIONS_A_PICTURE = 10
SHARES = 1024
PART_ROWS = SEGMENT_ROWS = 1000
MISSING = 0.005  # of the segments
SEGMENT_FILES = 200  # that are really there, with small vectors; of the others, only the row numbers are
FAILED_ROWS = 500  # of each of these files
HIDDEN, VISION, LAYERS = 8, 6, [0, 8, 16, 24, 31]

SUBJECTS = (
    "dog",
    "cat",
    "woman",
    "man",
    "child",
    "car",
    "bus",
    "train",
    "horse",
    "umbrella",
    "laptop",
    "pizza",
    "kite",
)
RELATIONS = ("standing on", "wearing", "holding", "next to", "behind", "looking at", "made of", "to the left of")
OBJECTS = ("table", "chair", "grass", "road", "shirt", "hat", "fence", "wall", "building", "tree", "plate", "bowl")


def measure(scratch: Path, quick: bool) -> dict[str, object]:
    """Make a table below `scratch`, plan its extraction, and account for its rows, each in a process of its own.

    Returns:
        `rows`, `pictures`, `csv_gib`; for `planning` and `coverage` the `seconds` of each step and `peak_gib`, the most
        memory that its process held; `slowest_over_mean`, the load of the fullest of 1,024 shares over the mean one;
        `segment_ms`, milliseconds to read which rows a segment file holds.
    """
    rows = QUICK_ROWS if quick else ROWS
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        path, out = Path(folder) / "vqa.csv", Path(folder) / "out"
        with new_csv(path, ["question_id", "image_id", "question", "answer"]) as add:
            for row in _questions(rows):
                add(row)
        planning, slowest = _apart(_plan, path, out)
        coverage, segment_ms = _apart(_account, out)
        return {
            "rows": rows,
            "pictures": rows // QUESTIONS_A_PICTURE,
            "csv_gib": path.stat().st_size / 2**30,
            "planning": planning,
            "coverage": coverage,
            "slowest_over_mean": slowest,
            "segment_ms": segment_ms,
        }


def table(result: dict[str, Any]) -> str:
    """The figures of `measure` as a table in Markdown, with a sentence before and one after it."""
    lines = [
        f"{result['rows']:,} rows on {result['pictures']:,} pictures, a CSV of {result['csv_gib']:.2f} GiB:",
        "",
        "| | step | s | peak memory, GiB |",
        "|---|---|---|---|",
    ]
    for process in ("planning", "coverage"):
        seconds, peak = result[process]["seconds"], result[process]["peak_gib"]
        lines += [f"| {process} | {step} | {value:.2f} | |" for step, value in seconds.items()]
        lines.append(f"| {process} | all | {sum(seconds.values()):.2f} | {peak:.2f} |")
    fullest, each = result["slowest_over_mean"], result["segment_ms"]
    lines += [
        "",
        f"The fullest of {SHARES} shares has {fullest:.5f} times the mean load; a segment takes {each:.2f} ms.",
    ]
    return "\n".join(lines)


def _apart(task: Callable[..., float], *arguments: Path) -> tuple[dict[str, Any], float]:
    """Run a task in a fresh process: its times, its peak memory, and what it returns."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, task, arguments).result()


def _measured(task: Callable[..., float], arguments: tuple[Path, ...]) -> tuple[dict[str, Any], float]:
    clock = Timings()
    value = task(clock, *arguments)
    return {"seconds": clock.seconds, "peak_gib": _peak_gib()}, value


def _peak_gib() -> float:
    """Peak resident memory of this process; ru_maxrss begins with what the process had that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def _plan(clock: Timings, path: Path, out: Path) -> float:
    """What a rank does before it loads the model. Returns the load of the fullest of many shares over the mean."""
    with clock("read the CSV and check its ids"):
        rows = read_table(path)
    with clock("fingerprint"):
        fingerprint = rows.fingerprint()
    with clock("look for what a program has changed"):
        list(find_warnings(rows))
    with clock("number the pictures"):
        pictures = rows.pictures()
    pending = np.ones(len(rows), bool)
    with clock("share: slice 3/8, rank 2 of 8"):
        share_rows(pictures, pending, (3, 8), 2, 8)
    with clock(f"share: {SHARES} ranks"):
        share_rows(pictures, pending, (0, 1), 2, SHARES)
    with clock("begin the run, with a copy of the CSV"):
        run = random_run(len(rows), fingerprint, LAYERS, HIDDEN, VISION)
        check_run(out, run)
        claim_run(out, run)
        keep_rows(out, lambda target: shutil.copyfile(path, target))
    return _slowest_over_mean(pictures, split(pictures, pending, SHARES))


def _slowest_over_mean(pictures: np.ndarray, owner: np.ndarray) -> float:
    _, first = np.unique(pictures, return_index=True)
    loads = np.bincount(owner, minlength=SHARES) + PICTURE_COST * np.bincount(owner[first], minlength=SHARES)
    return float(loads.max() / loads.mean())


def _account(clock: Timings, out: Path) -> float:
    """What a merge does besides verifying segments and writing parts. Returns milliseconds to look into a segment."""
    with clock("read the run's table and check its fingerprint"):
        run = read_run(out)
        rows = read_run_rows(out, run)
    order = np.random.default_rng(0).permutation(len(rows)).reshape(-1, SEGMENT_ROWS)
    order = order[: round(len(order) * (1 - MISSING))]
    files = min(SEGMENT_FILES, len(order) // 2)
    with ShardWriter(out, "measured", 0, run, rows, SEGMENT_ROWS) as shard:
        for some in order[:files]:
            shard.add(map(_failed, some[:FAILED_ROWS].tolist()))
            shard.add(map(_extracted, some[FAILED_ROWS:].tolist()))
    look = f"look into {files} segment files"
    with clock(look):
        segments, corrupt = read_segments(out, run, verify=False)
    assert (len(segments), corrupt) == (files, [])
    segments += [Segment(out / "not written", np.sort(some), np.zeros(0, np.int64)) for some in order[files:]]
    catalog = Catalog(run, rows, segments, [], [])
    with clock(f"cover {len(segments)} segments"):
        coverage = catalog.coverage()
    with clock("plan the parts"):
        plan_parts(coverage, PART_ROWS, {})
    failed, missing = int(coverage.failed.sum()), int(coverage.missing.sum())
    assert (failed, missing) == (files * FAILED_ROWS, len(rows) - order.size)
    with clock(f"list {missing} missing and {failed} failed rows"):
        write_record(out, coverage, 0, [], [], catalog.failures(coverage.failed))
    return 1000 * clock.seconds[look] / files


def _extracted(row: int) -> Extracted:
    states = np.zeros((len(LAYERS), HIDDEN), np.float32)
    vectors = {VISION_ONLY: np.zeros(VISION, np.float32), VISION_TOKEN: states, QUERY_TOKEN: states}
    return Extracted(row, vectors, "yes")


def _failed(row: int) -> Failed:
    return Failed(row, "PictureNotFound", f"picture_{row}.jpg is not there; expected a file below images")


def _questions(count: int) -> Iterator[list[str]]:
    """Rows as VQA tables have them: pictures in any order, two of three questions asked often, the third only once."""
    pictures = count // QUESTIONS_A_PICTURE
    asked = [f"Is the {s} {r} the {o} or the {p}?" for s, r, o, p in product(SUBJECTS, RELATIONS, OBJECTS, OBJECTS)]
    random.Random(0).shuffle(asked)
    for row in range(count):
        question = asked[row % len(asked)]
        if row % 3 == 0:
            question = f"{question[:-1]}, as in question {row}?"
        picture = row * 7919 % pictures  # a prime: every picture comes, and never twice in a row
        yield [f"question_comb_{row}", f"COCO_train2014_{picture:012d}.jpg", question, ("no", "yes")[row % 2]]


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--quick"]
    with tempfile.TemporaryDirectory() as temporary:
        figures = measure(Path(arguments[0] if arguments else temporary), "--quick" in sys.argv)
    print(json.dumps(figures, indent=2))
    print(table(figures))
