"""The extraction against the published algorithm, in one process and one run, and where its time goes."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.inputs import FULL, HUNDREDTH, Noting, load, questions, write_checkpoint, write_pictures
from tests.benchmarks.published import Published
from tests.benchmarks.work import Work, matrix_rate, synchronise, work_of
from vqa_embeddings.app.extract import extract
from vqa_embeddings.base.timings import Timings
from vqa_embeddings.data.decode import open_picture
from vqa_embeddings.data.picture_folder import PictureFolder
from vqa_embeddings.data.table import Table
from vqa_embeddings.layers.device import WORKERS, find_device
from vqa_embeddings.records import Extracted

NEW_TOKENS = 32
PUBLISHED_ROWS = 2  # timed a round, each by itself


@dataclass(frozen=True)
class Case:
    """One kind of table."""

    questions: int  # a picture
    size: tuple[int, int]  # of the pictures, pixels
    pictures: int  # of the smaller of the two runs whose difference counts; the larger has three times as many
    mixed: bool = False  # answers of mixed length; otherwise all have NEW_TOKENS


@dataclass(frozen=True)
class Plan:
    """What is measured on a kind of machine."""

    cases: list[Case]
    rounds: int


CASES = [
    Case(1, (640, 480), 16),
    Case(5, (640, 480), 6),
    Case(14, (640, 480), 3),
    Case(14, (640, 480), 3, mixed=True),
    Case(14, (448, 448), 4),
    Case(5, (1000, 1000), 4),
]
ON_CPU, ON_CPU_QUICK = Plan(CASES, 3), Plan([Case(1, (640, 480), 6), Case(14, (640, 480), 1)], 1)
ON_GPU = Plan(
    [
        Case(1, (640, 480), 256),
        Case(5, (640, 480), 64),
        Case(14, (640, 480), 32),
        Case(14, (640, 480), 32, mixed=True),
        Case(14, (448, 448), 32),
        Case(5, (1536, 2048), 32),
    ],
    3,
)
ON_GPU_QUICK = Plan([Case(1, (640, 480), 128), Case(14, (640, 480), 16)], 1)


def measure(scratch: Path, quick: bool) -> dict[str, object]:
    """Every case in rounds: some rows as published, a small and a large extraction; medians over the rounds.

    The time of an extraction's row is the marginal one, the difference of the two runs over the difference of their
    rows; so the beginning and the end, when the batch is not full, do not count. The published algorithm has neither.
    """
    device = find_device(0)
    on_gpu = device.kind != "cpu"
    dtype = "bfloat16" if on_gpu else "float32"
    plan = (ON_GPU_QUICK if quick else ON_GPU) if on_gpu else (ON_CPU_QUICK if quick else ON_CPU)
    rate = matrix_rate(device.name, dtype)
    found: list[dict[str, object]] = []
    for mixed in (False, True):
        cases = [case for case in plan.cases if case.mixed == mixed]
        if cases:
            checkpoint = scratch / f"checkpoint-{mixed}"
            write_checkpoint(checkpoint, FULL if on_gpu else HUNDREDTH, mixed, device.name, dtype)
            published = Published(*load(checkpoint, device.name, dtype), NEW_TOKENS)
            engine = Noting(*load(checkpoint, device.name, dtype), NEW_TOKENS)
            found += [_measure(published, engine, case, plan.rounds, rate, scratch) for case in cases]
            parameters = sum(weight.numel() for layer in published.model.model.layers for weight in layer.parameters())
            del published, engine
    return {
        "device": device.description,
        "dtype": dtype,
        "decoder_parameters": parameters,
        "new_tokens": NEW_TOKENS,
        "matrix_rate": rate,
        "cases": found,
    }


def table(result: dict[str, Any]) -> str:
    """The figures of `measure` in Markdown."""
    lines = [
        f"{result['decoder_parameters'] / 1e6:.0f} M parameters in the decoder's layers, {result['dtype']}, "
        f"{result['device']}, {result['matrix_rate'] / 1e9:.0f} GFLOP/s of matrix products, "
        f"{result['new_tokens']} new tokens (mixed: at most)",
        "",
        "| questions a picture | picture | answers | published s/row | this s/row | ratio | of the floor | "
        "outside the model | vision, prefix, questions, decoding |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        stages = case["stages"]
        total = sum(stages.values())
        shares = ", ".join(f"{stages[name] / total:.0%}" for name in ("vision", "prefix", "questions", "decoding"))
        kind = f"{case['questions']} | {case['size'][0]}x{case['size'][1]} | {'mixed' if case['mixed'] else 'all'}"
        times = f"{case['published_seconds']:.3f} | {case['seconds']:.4f} | **{case['ratio']:.1f}**"
        lines.append(f"| {kind} | {times} | {case['floor']:.0%} | {case['outside']:.1%} | {shares} |")
    return "\n".join(lines)


def _measure(
    published: Published, engine: Noting, case: Case, rounds: int, rate: float, scratch: Path
) -> dict[str, object]:
    names = write_pictures(scratch / "pictures", 3 * case.pictures, case.size)
    small, large = (_table(names[:count], case.questions) for count in (case.pictures, 3 * case.pictures))
    folder, device = scratch / "pictures", str(engine.spec.device)
    published.row(folder / names[0], small.questions[0])  # what is set up once
    as_published, as_here, ratios = [], [], []
    for number in range(rounds):
        rows = range(number * PUBLISHED_ROWS, (number + 1) * PUBLISHED_ROWS)
        each = [_seconds(lambda row=row: _row(published, large, row, folder), device) for row in rows]
        seconds, _ = _extraction(engine, small, folder)
        more_seconds, stages = _extraction(engine, large, folder)
        as_published.append(statistics.median(each))
        as_here.append((more_seconds - seconds) / (len(large) - len(small)))
        ratios.append(as_published[-1] / as_here[-1])
        print(f"{case}: {ratios[-1]:.1f} times as fast as published", file=sys.stderr, flush=True)
    work = _work(engine, published.model.config, large, folder)
    per_row = work.total / len(large)
    return {
        **asdict(case),
        "rows": len(large),
        "published_seconds": statistics.median(as_published),
        "seconds": statistics.median(as_here),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "work": asdict(work),
        "floor": per_row / rate / statistics.median(as_here),
        "stages": stages.seconds,
        "outside": stages.outside(),
    }


def _table(names: Sequence[str], count: int) -> Table:
    images = [name for name in names for _ in range(count)]
    ids = [str(number) for number in range(len(images))]
    return Table(ids, images, questions(len(images)), [""] * len(images))


def _row(published: Published, table: Table, row: int, folder: Path) -> None:
    published.row(folder / table.images[row % len(table)], table.questions[row % len(table)])


def _extraction(engine: Noting, table: Table, folder: Path) -> tuple[float, Timings]:
    records: list[Any] = []
    stages, workers = Timings(), WORKERS[engine.spec.device.type]
    engine.written.clear()

    def run() -> None:
        for finished in extract(
            engine, table, range(len(table)), PictureFolder(folder), batch_size=None, workers=workers, timings=stages
        ):
            records.extend(finished)

    seconds = _seconds(run, str(engine.spec.device))
    assert len(records) == len(table) and all(isinstance(record, Extracted) for record in records)
    return seconds, stages


def _seconds(work: Any, device: str) -> float:
    synchronise(device)
    begun = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - begun


def _work(engine: Noting, config: Any, table: Table, folder: Path) -> Work:
    """The useful work of all rows, with answers of the length that they had on average."""
    length = round(statistics.mean(map(len, engine.written)))
    total = np.zeros(4)
    for name in dict.fromkeys(table.images):
        asked = [engine.tokenize(table.questions[row]) for row in range(len(table)) if table.images[row] == name]
        tokens = [len(question) for question in asked]
        pixels = engine.preprocess(open_picture(folder / name))
        work = work_of(config, pixels, tokens, [length] * len(tokens), len(engine.vision._layers))
        total += list(asdict(work).values())
    return Work(*total.tolist())
