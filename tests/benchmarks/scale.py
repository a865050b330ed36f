"""100 million rows on 1,024 GPUs: how even the shares are, how near the rows of a part lie, and the arithmetic.

    python -m tests.benchmarks.scale [--quick]

The shares are those that the program's own plan makes of a table; what a row takes is drawn at random. Wants some
12 GB of memory and 4 minutes (--quick: ten million rows, half a minute). SCALE.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np

from vqa_embeddings.cluster import sharding as plan
from vqa_embeddings.store.parts import NAMES
from vqa_embeddings.store.run import FIRST_FILE_PREFIX

ROWS, QUICK_ROWS = 100_000_000, 10_000_000
RANKS, TASKS = 1024, 128  # in one launch, or as so many array tasks of 8
SEGMENT_ROWS = PART_ROWS = 1000
PARTS_LOOKED_AT = 200

# What a row takes on an H200 in bfloat16, in milliseconds: 14 TFLOP for a picture of 1,065 tokens at 450 TFLOP/s,
# and what is left of 200 rows/s at 14 questions a picture for a question and its answer.
PICTURE_MS, USUAL_TOKENS, QUESTION_MS = 31.1, 1065, 2.8
TOKENS = np.array([545, 1065, 2625, 3393, 5133])  # of pictures from 448x448 to 1536x2048
COMMON = np.array([0.10, 0.50, 0.25, 0.10, 0.05])  # how many are of which size: an assumption
ANSWER_SPREAD = 1.0  # of the logarithm of an answer's length: one in a hundred is ten times the median

SEGMENT_BYTES, PART_BYTES = 128_588, 132_548  # a row, measured with vectors of the full size
CSV_BYTES = 111.7  # a row, of the table of planning.py


@dataclass(frozen=True)
class Case:
    """A table: how many questions its pictures have, and which size each picture has."""

    name: str
    questions: Callable[[np.random.Generator, int], np.ndarray]  # of enough pictures for so many rows
    sizes: Callable[[np.random.Generator, int], np.ndarray]  # index into TOKENS, of so many pictures


def _even(questions: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    return lambda _, rows: np.full(-(-rows // questions), questions)


def _like_vqa(chance: np.random.Generator, rows: int) -> np.ndarray:
    """3 and more, 5.4 on average, as VQAv2 has them."""
    return 3 + chance.geometric(1 / 3.4, rows // 5) - 1


def _like_gqa(chance: np.random.Generator, rows: int) -> np.ndarray:
    """200 on average, from 1 to 700, as the unbalanced GQA has them."""
    return np.clip(chance.lognormal(5.1, 0.65, rows // 150), 1, 700).astype(np.int64)


def _mixed(chance: np.random.Generator, count: int) -> np.ndarray:
    return chance.choice(len(TOKENS), count, p=COMMON).astype(np.int8)


def _in_turn(_: np.random.Generator, count: int) -> np.ndarray:
    """The smallest size and the largest, picture after picture: two sources, or two cameras."""
    return np.where(np.arange(count) % 2, len(TOKENS) - 1, 0).astype(np.int8)


def _sorted(chance: np.random.Generator, count: int) -> np.ndarray:
    """The sizes one after another: a table put together from several."""
    return np.sort(_mixed(chance, count))


CASES = (
    Case("14 questions a picture", _even(14), _mixed),
    Case("1 question a picture", _even(1), _mixed),
    Case("as VQAv2, 5.4 a picture", _like_vqa, _mixed),
    Case("as GQA, 200 a picture", _like_gqa, _mixed),
    Case("14, large and small in turn", _even(14), _in_turn),
    Case("14, sorted by size", _even(14), _sorted),
)


def one_launch(pictures: np.ndarray) -> np.ndarray:
    """The rank of each row, all ranks in one launch."""
    return plan.split(pictures, np.ones(len(pictures), bool), RANKS)


def array_tasks(pictures: np.ndarray) -> np.ndarray:
    """The rank of each row where tasks of an array take a slice each, as `share_rows` shares it in its launch."""
    tasks = plan.split(pictures, np.ones(len(pictures), bool), TASKS)
    owner = np.empty(len(pictures), np.int64)
    order = np.argsort(tasks.astype(np.uint8), kind="stable")
    size = RANKS // TASKS
    for task, rows in enumerate(np.split(order, np.cumsum(np.bincount(tasks, minlength=TASKS))[:-1])):
        inside = pictures[rows]
        numbers = np.cumsum(np.diff(inside, prepend=inside[0]) != 0)  # the pictures of these tables come in order
        owner[rows] = task * size + plan.split(numbers, np.ones(len(rows), bool), size)
    return owner


def milliseconds(chance: np.random.Generator, case: Case, pictures: np.ndarray) -> np.ndarray:
    """What each row takes, float32; a picture's own time is its first row's."""
    first = np.diff(pictures, prepend=-1) != 0
    answers = chance.lognormal(0, ANSWER_SPREAD, len(pictures)).astype(np.float32) / np.exp(ANSWER_SPREAD**2 / 2)
    takes = (QUESTION_MS / 2) * (1 + answers)
    takes[first] += (PICTURE_MS / USUAL_TOKENS * TOKENS)[case.sizes(chance, int(first.sum()))]
    return takes


def over_mean(owner: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The share that has most, over the mean share."""
    loads = np.bincount(owner, weights, RANKS)
    return float(loads.max() / loads.mean())


def segments_a_part(owner: np.ndarray) -> float:
    """Into how many segments the rows of a part are spread, on average over some parts."""
    spread = len(owner) // PART_ROWS // PARTS_LOOKED_AT
    order = np.argsort(owner.astype(np.uint16), kind="stable")  # each rank's rows, in the order in which it does them
    begins = np.cumsum(np.bincount(owner, minlength=RANKS)) - np.bincount(owner, minlength=RANKS)
    place = np.empty(len(owner), np.int32)
    place[order] = np.arange(len(owner), dtype=np.int32)
    found = []
    for part in range(PARTS_LOOKED_AT):
        rows = slice(part * spread * PART_ROWS, (part * spread + 1) * PART_ROWS)
        found.append(len(np.unique(owner[rows] * 10**6 + (place[rows] - begins[owner[rows]]) // SEGMENT_ROWS)))
    return float(np.mean(found))


def simulate(case: Case, rows: int) -> Iterator[str]:
    """A line of the table for each way to launch, and one for pictures dealt one by one."""
    chance = np.random.default_rng(0)
    questions = case.questions(chance, rows)
    pictures = np.repeat(np.arange(len(questions)), questions)[:rows]
    takes = milliseconds(chance, case, pictures)
    ways = (("one launch", one_launch), ("128 tasks of 8", array_tasks), ("one by one", one_by_one))
    for name, way in ways:
        owner = way(pictures)
        figures = f"{over_mean(owner):.4f} | {over_mean(owner, takes):.4f} | {segments_a_part(owner):.0f}"
        yield f"| {case.name} | {name} | {takes.mean():.1f} | {figures} |"


def one_by_one(pictures: np.ndarray) -> np.ndarray:
    """As `one_launch` without units: every picture for itself."""
    with patch.object(plan, "UNIT_ROWS", 0):
        return one_launch(pictures)


def arithmetic() -> Iterator[str]:
    """Rates, bytes and files for `ROWS` rows."""
    yield "| GPU, questions a picture | rows/s | hours | segments, GB/s | commits/s | pictures/s | MB/s a node |"
    yield "|---|---|---|---|---|---|---|"
    for name, rate, questions in (("H200, 1", 30, 1), ("H200, 14", 200, 14), ("A100, 1", 10, 1), ("A100, 14", 67, 14)):
        all_ranks = rate * RANKS
        yield (
            f"| {name} | {all_ranks:,} | {ROWS / all_ranks / 3600:.2f} | {all_ranks * SEGMENT_BYTES / 1e9:.1f} "
            f"| {all_ranks / SEGMENT_ROWS:.0f} | {all_ranks / questions:,.0f} | {8 * rate * SEGMENT_BYTES / 1e6:.0f} |"
        )
    entry = {
        "file": NAMES["grouped"].format(prefix=FIRST_FILE_PREFIX, number=99_999),
        "first_row": 1,
        "last_row": ROWS,
        "samples": 1000,
        "sha256": "0" * 64,
    }
    document = json.dumps({"parts": [entry] * 1000}, indent=2)
    files = {
        "segments, TB": ROWS * SEGMENT_BYTES / 1e12,
        "parts, TB": ROWS * PART_BYTES / 1e12,
        "segment files": ROWS / SEGMENT_ROWS,
        "part files, all in one folder": ROWS / PART_ROWS,
        "segments of a rank": ROWS / RANKS / SEGMENT_ROWS,
        "rows.csv, GB": ROWS * CSV_BYTES / 1e9,
        "coverage.json, MB": ROWS / PART_ROWS * len(document) / 1000 / 1e6,
        "flags of the plan, MB": ROWS / 8e6,
    }
    yield from ("", "| | |", "|---|---|", *(f"| {name} | {value:,.1f} |" for name, value in files.items()))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ten million rows, ten times fewer a rank")
    rows = QUICK_ROWS if parser.parse_args().quick else ROWS
    print(*arithmetic(), sep="\n")
    print(f"\n{rows:,} rows, {RANKS} ranks:\n")
    print("| table | launched as | ms a row | rows, slowest/mean | time, slowest/mean | segments a part |")
    print("|---|---|---|---|---|---|", flush=True)
    for case in CASES:
        for line in simulate(case, rows):
            print(line, flush=True)


if __name__ == "__main__":
    main()
