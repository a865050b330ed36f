"""`report.html`: what was extracted, at a glance, in one file that needs no network. Written by the merge.

Of a large run it shows a sample: stretches of neighbouring rows, spread evenly over the table.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqa_embeddings._version import __version__
from vqa_embeddings.base.file_names import to_disk
from vqa_embeddings.base.files import publish_text
from vqa_embeddings.data.table import Table
from vqa_embeddings.errors import one_line
from vqa_embeddings.records import Failed, RowValues
from vqa_embeddings.report.agreement import OTHER, YES_NO, agrees, count_yes_no
from vqa_embeddings.report.charts import draw_norms, draw_states, draw_throughput, project
from vqa_embeddings.report.page import FailureGroup, Page, ShownAnswer, render
from vqa_embeddings.report.thumbnails import make_thumbnails
from vqa_embeddings.schema import find, short_name
from vqa_embeddings.store.catalog import Catalog
from vqa_embeddings.store.coverage import Coverage
from vqa_embeddings.store.heartbeat import Heartbeat
from vqa_embeddings.store.run import Run
from vqa_embeddings.store.self_check import SelfCheck, read_self_check

REPORT_FILE = "report.html"
SAMPLE, STRETCHES = 500, 20  # rows that are looked at, and in how many stretches
SHOWN = 24  # answers that are shown
STRIPES = 200  # of the strip that shows the coverage
EXAMPLES = 3  # of each reason for which rows failed


@dataclass(frozen=True)
class Sample:
    """Some of the extracted rows, and whether each answer agrees with its ground truth (None: there is none)."""

    values: RowValues
    agreement: Sequence[bool | None]


def write_report(
    folder: Path,
    catalog: Catalog,
    coverage: Coverage,
    failures: Mapping[int, Failed],
    summary: Mapping[str, Any],
    heartbeats: Sequence[Heartbeat],
    read: Callable[[np.ndarray], RowValues],
) -> None:
    """Write the report, unless the one that is there was made from the same.

    Args:
        failures: why rows failed, by row.
        summary: the contents of `coverage.json`.
        heartbeats: what the ranks of all launches have said.
        read: reads the values of rows, int64 `[m]`.
    Raises:
        StorageError: it cannot be written.
    """
    check = read_self_check(folder)
    key = _fingerprint(catalog.run, summary, heartbeats, check)
    path = folder / REPORT_FILE
    if not _is_current(path, key):
        page = _collect(catalog, coverage, failures, summary, heartbeats, check, read)
        publish_text(path, render(page, key))


def _collect(
    catalog: Catalog,
    coverage: Coverage,
    failures: Mapping[int, Failed],
    summary: Mapping[str, Any],
    heartbeats: Sequence[Heartbeat],
    check: SelfCheck | None,
    read: Callable[[np.ndarray], RowValues],
) -> Page:
    """Read a sample of the rows, and compute all that the report shows of it and of the run."""
    run, table = catalog.run, catalog.table
    values = read(choose_sample(np.flatnonzero(coverage.extracted)))
    truths = table.truths
    answers = [(answer, truths[row]) for answer, row in zip(values.answers, values.rows.tolist(), strict=True)]
    sample = Sample(values, [agrees(*pair) for pair in answers])
    charts, no_charts = _draw_charts(run, sample, heartbeats)
    counts = count_yes_no(answers)
    return Page(
        run=run,
        summary=summary,
        stripes=count_stripes(coverage),
        sampled=len(values),
        agreement=Counter(sample.agreement),
        yes_no=[[counts[truth, found] for found in (*YES_NO, OTHER)] for truth in YES_NO],
        self_check=check,
        warnings=find_broken(run, sample, table),
        charts=charts,
        no_charts=no_charts,
        failures=group_failures(failures, table),
        answers=_choose_answers(run, sample, table),
    )


def choose_sample(rows: np.ndarray) -> np.ndarray:
    """Of these rows, int64 `[n]` and in order, all, or stretches of neighbours spread evenly: `[m]`, at most SAMPLE."""
    if len(rows) <= SAMPLE:
        return rows
    length = SAMPLE // STRETCHES
    begins = np.linspace(0, len(rows) - length, STRETCHES).astype(np.int64)
    return np.unique(rows[(begins[:, None] + np.arange(length)).ravel()])


def count_stripes(coverage: Coverage) -> list[tuple[float, float, float]]:
    """The shares of rows that are extracted, failed and missing, by stretches of the table that are equally long."""
    pieces = min(STRIPES, len(coverage.extracted))
    if not pieces:
        return []
    columns = (np.array_split(flags, pieces) for flags in (coverage.extracted, coverage.failed, coverage.missing))
    return list(zip(*([float(piece.mean()) for piece in column] for column in columns), strict=True))


def group_failures(failures: Mapping[int, Failed], table: Table) -> list[FailureGroup]:
    """Reasons, the most frequent first, each with some examples of `(id, picture, message)`."""
    by_error: defaultdict[str, list[int]] = defaultdict(list)
    for row in sorted(failures):
        by_error[failures[row].error].append(row)
    most_frequent_first = sorted(by_error.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        FailureGroup(error, len(rows), [(table.ids[i], table.images[i], failures[i].message) for i in rows[:EXAMPLES]])
        for error, rows in most_frequent_first
    ]


def find_broken(run: Run, sample: Sample, table: Table) -> list[str]:
    """Warnings of vectors that cannot be right: the same for different inputs, or all zero."""
    warnings: list[str] = []
    if not len(sample.values):
        return warnings
    rows = sample.values.rows.tolist()
    pictures = len({table.images[row] for row in rows})
    questions = len({(table.images[row], table.questions[row]) for row in rows})
    for column in run.vectors:
        vector = find(column.name)
        several = pictures if vector is None or vector.per_picture else questions
        name = f"the {short_name(column.name)} vectors"
        if column.layer is not None:
            name = f"layer {column.layer}: the {short_name(column.name)} states"
        values = sample.values.matrices[column.path]
        if not values.any():
            warnings.append(f"{name} are all zero")
        elif several > 1 and np.ptp(values, axis=0).max() <= 1e-6 * np.abs(values).max():
            warnings.append(f"{name} of {several} different inputs are all the same")
    return warnings


def _draw_charts(run: Run, sample: Sample, heartbeats: Sequence[Heartbeat]) -> tuple[dict[str, list[str]], str | None]:
    """The charts as SVG by section, and why there are none."""
    charts: dict[str, list[str]] = {}
    try:
        if heartbeats:
            charts["throughput"] = [draw_throughput(heartbeats)]
        if not len(sample.values):
            return charts, None
        norms: defaultdict[str, list[np.ndarray]] = defaultdict(list)
        for column in run.vectors:
            if column.layer is None:
                continue
            states = sample.values.matrices[column.path]
            norms[short_name(column.name)].append(np.linalg.norm(states, axis=1))
            maps = charts.setdefault(column.name, [])
            maps.append(draw_states(project(states), sample.agreement, f"layer {column.layer}"))
        charts["norms"] = [draw_norms(run.layers, {name: np.stack(layers) for name, layers in norms.items()})]
    except Exception as error:  # coverage and answers are worth having without charts
        return {}, f"matplotlib could not draw them ({one_line(error)})"
    return charts, None


def _choose_answers(run: Run, sample: Sample, table: Table) -> list[ShownAnswer]:
    """Some rows of the sample, spread evenly over it, with thumbnails where their pictures can be read here."""
    rows = sample.values.rows.tolist()
    places = sorted({round(place) for place in np.linspace(0, len(rows) - 1, SHOWN) if rows})
    images = {table.images[rows[place]] for place in places}
    thumbnails = make_thumbnails(Path(to_disk(run.images_dir)), images)
    shown = []
    for place in places:
        identity, image, question, truth = table.row(rows[place])
        shown.append(
            ShownAnswer(
                identity=identity,
                image=image,
                question=question,
                truth=truth,
                answer=sample.values.answers[place],
                agreement=sample.agreement[place],
                thumbnail=thumbnails.get(image),
            )
        )
    return shown


def _fingerprint(run: Run, summary: Mapping[str, Any], heartbeats: Sequence[Heartbeat], check: SelfCheck | None) -> str:
    """A digest of what a report is made from."""
    shards = [(shard.shard, len(shard.times), int(shard.done[-1])) for shard in heartbeats]
    parts = [run.key, __version__, summary, shards, check and asdict(check)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _is_current(path: Path, key: str) -> bool:
    """Whether the report that is there was made from the same; its second line has the key."""
    try:
        with open(path, encoding="utf-8") as stream:
            return key in stream.readline() + stream.readline()
    except (OSError, UnicodeDecodeError):
        return False
