"""How fast segments become parts: the merge with one and two processes, beside the published way to write the files.

All is measured in one run, in turns, so that a busy machine is busy for all of them; medians are told.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import h5py
import numpy as np

from tests.helpers.runs import random_run
from vqa_embeddings.app import merge
from vqa_embeddings.cli.options import parse_merge
from vqa_embeddings.data.table import Table
from vqa_embeddings.data.table_reader import read_table
from vqa_embeddings.records import Extracted
from vqa_embeddings.schema import QUERY_TOKEN, VISION_ONLY, VISION_TOKEN
from vqa_embeddings.store import part_writer
from vqa_embeddings.store import segments as shards
from vqa_embeddings.store.run import COVERAGE_FILE, check_run, claim_run, keep_rows, read_run, read_run_rows
from vqa_embeddings.store.segments import ShardWriter

ROOT = Path(__file__).parents[2]
LAYERS, HIDDEN, VISION = [0, 8, 16, 24, 31], 3072, 1152  # of the real model
QUESTIONS_PER_PICTURE = 10
RANKS = 4
ROUNDS = 3
JOBS = (1, 2)
PUBLISHED = "published writer"

Cost = tuple[float, float]  # seconds, CPU seconds


def measure(scratch: Path, quick: bool) -> dict[str, object]:
    """Measure in `scratch`, which needs 3 GB (quick: 300 MB) and is left as it was.

    The merge is measured as the command that a user types, on two output folders of different size: the rows that
    one has more, over the time that it takes longer, leave the start of the processes out. That start, the time of
    the command less that of its rows, is told as well.

    Returns:
        Rows per second, CPU seconds per 1000 rows (which a busy machine changes less), seconds of the start, ratios,
        and seconds of each stage per 1000 rows of one process.
    """
    large, part_size = (600, 75) if quick else (6000, 1000)
    small = 2 * part_size  # two parts: something to do for two processes
    with _folder(scratch / "merging") as folder:
        outs = {rows: make_output(folder / str(rows), rows) for rows in (small, large)}
        published = _published_input(outs[small], small // 2)
        costs: dict[str, list[Cost]] = defaultdict(list)
        stages: list[dict[str, float]] = []
        for _ in range(ROUNDS):
            costs["published"].append(_cost(_write_published, folder / "published.h5", *published))
            for jobs, (rows, out) in product(JOBS, outs.items()):
                _remove_parts(out)
                costs[f"{jobs} {rows}"].append(_cost(_merge_command, out, part_size, jobs))
            _remove_parts(outs[large])
            stages.append(_stages(outs[large], part_size))
    return _figures(costs, stages, small, large)


def table(result: dict[str, Any]) -> str:
    """What `measure` returned as two small markdown tables."""
    speed, cpu, start = (result[name] for name in ("rows_per_second", "cpu_seconds_per_1000_rows", "start_seconds"))
    lines = ["| | rows/s | times the published writer | CPU s per 1000 rows | start, s |", "|---|---|---|---|---|"]
    for name, rate in speed.items():
        cells = [f"{rate:.0f}", f"{rate / speed[PUBLISHED]:.1f}", _cell(cpu.get(name)), _cell(start.get(name))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    stages = result["stages_seconds_per_1000_rows"]
    lines += ["", f"| seconds per 1000 rows, one process | {' | '.join(stages)} |", "|---" * (len(stages) + 1) + "|"]
    lines.append(f"| | {' | '.join(map(_cell, stages.values()))} |")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _figures(
    costs: dict[str, list[Cost]], stages: Sequence[dict[str, float]], small: int, large: int
) -> dict[str, object]:
    middle = {
        name: (median(cost[0] for cost in taken), median(cost[1] for cost in taken)) for name, taken in costs.items()
    }
    stage = {name: median(taken[name] for taken in stages) * 1000 / large for name in stages[0]}
    seconds, cpu = middle["published"]
    speed, work, start = {PUBLISHED: small // 2 / seconds}, {PUBLISHED: cpu * 1000 / (small // 2)}, {}
    for jobs in JOBS:
        name, few, many = f"merge, --jobs {jobs}", middle[f"{jobs} {small}"], middle[f"{jobs} {large}"]
        speed[name] = (large - small) / (many[0] - few[0])
        work[name] = (many[1] - few[1]) * 1000 / (large - small)
        start[name] = few[0] - small / speed[name]
    one, two = (speed[f"merge, --jobs {jobs}"] for jobs in JOBS)
    return {
        "rows": {"small": small, "large": large, "published": small // 2},
        "rounds": ROUNDS,
        "rows_per_second": {**speed, "its writer alone, --jobs 1": 1000 / stage["write"]},
        "cpu_seconds_per_1000_rows": work,
        "start_seconds": start,
        "merge_over_published": one / speed[PUBLISHED],
        "two_jobs_over_one": two / one,
        "stages_seconds_per_1000_rows": stage,
        "seconds_and_cpu_seconds": costs,
    }


def make_output(folder: Path, rows: int) -> Path:
    """An output folder whose rows are all committed, its pictures dealt to `RANKS` ranks, and none is merged."""
    out, source = folder / "out", folder / "vqa.csv"
    folder.mkdir()
    lines = [
        f"question_comb_{row},image_{row // QUESTIONS_PER_PICTURE}.jpg,How many are there in picture {row}?,{row}"
        for row in range(rows)
    ]
    source.write_text("\n".join(["question_id,image_id,question,answer", *lines]) + "\n")
    table_of_rows = read_table(source)
    run = random_run(len(table_of_rows), table_of_rows.fingerprint(), LAYERS, HIDDEN, VISION)
    check_run(out, run)
    claim_run(out, run)
    keep_rows(out, lambda target: shutil.copy(source, target))
    run = read_run(out)
    content = read_run_rows(out, run)
    random = np.random.default_rng(rows)
    for rank in range(RANKS):
        mine = (row for row in range(rows) if row // QUESTIONS_PER_PICTURE % RANKS == rank)
        with ShardWriter(out, "benchmark", rank, run, content, 1000) as shard:
            shard.add(_record(random, row) for row in mine)
    return out


def _record(random: np.random.Generator, row: int) -> Extracted:
    vision_only = random.standard_normal(VISION, np.float32)
    states = random.standard_normal((2, len(LAYERS), HIDDEN), np.float32)
    answer = f"There are {row} of them, as far as one can see."
    return Extracted(row, {VISION_ONLY: vision_only, VISION_TOKEN: states[0], QUERY_TOKEN: states[1]}, answer)


def _published_input(out: Path, rows: int) -> tuple[Table, list[Extracted]]:
    random = np.random.default_rng(0)
    return read_run_rows(out, read_run(out)), [_record(random, row) for row in range(rows)]


def _write_published(path: Path, content: Table, records: Sequence[Extracted]) -> None:
    """What the published script does, with values that are in memory: nothing read, verified, hashed or synced."""
    with h5py.File(path, "w") as file:
        for record in records:
            group = file.create_group(content.ids[record.row])
            group.create_dataset("image_id", data=content.images[record.row])
            group.create_dataset("question", data=content.questions[record.row])
            group.create_dataset("ground_truth_answer", data=content.truths[record.row])
            group.create_dataset("answer", data=record.answer)
            group.create_dataset("vision_only_representation", data=record.vectors[VISION_ONLY], compression="gzip")
            for name in (VISION_TOKEN, QUERY_TOKEN):
                layers = group.create_group(name)
                for layer, vector in zip(LAYERS, record.vectors[name], strict=True):
                    layers.create_dataset(f"layer_{layer}", data=vector, compression="gzip")


def _merge_command(out: Path, part_size: int, jobs: int) -> None:
    script = [sys.executable, str(ROOT / "merge_shards.py"), "--output-dir", str(out)]
    subprocess.run([*script, "--part-size", str(part_size), "--jobs", str(jobs)], check=True, capture_output=True)


def _stages(out: Path, part_size: int) -> dict[str, float]:
    """Seconds that one process spends in each stage of a merge, and in all."""
    spent: Counter[str] = Counter()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                spent[name] += time.perf_counter() - began

        return call

    stages = {
        "verify": (shards, "find_damage"),
        "read": (part_writer, "read_values"),
        "write": (part_writer, "_write"),
        "hash and fsync": (part_writer, "sync_and_hash"),
    }
    with ExitStack() as stack:
        for name, (module, function) in stages.items():
            stack.enter_context(mock.patch.object(module, function, timed(name, getattr(module, function))))
        timed("all", merge.merge)(parse_merge(None, ["--output-dir", str(out), "--part-size", str(part_size)]))
    return {name: spent[name] for name in (*stages, "all")}


def _cost(function: Callable[..., object], *arguments: object) -> Cost:
    """What a call takes, the processes that it starts and waits for included."""
    os.sync()  # what others wrote before is not this one's to wait for
    began, cpu = time.perf_counter(), _cpu_seconds()
    function(*arguments)
    return time.perf_counter() - began, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _remove_parts(out: Path) -> None:
    for path in [*out.glob("*.h5"), out / COVERAGE_FILE]:
        path.unlink(missing_ok=True)


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path)
