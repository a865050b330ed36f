"""Extractions in this process: every row's tokens and vectors, how the steps were taken, and how two of them differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.benchmarks.inputs import Noting
from tests.helpers.reference import relative_error
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.app.extract import extract
from vqa_embeddings.data.picture_folder import PictureFolder
from vqa_embeddings.data.table import Table
from vqa_embeddings.data.table_reader import read_table
from vqa_embeddings.engine.core import Engine
from vqa_embeddings.engine.cuda_graphs import CapturedGraph, CudaGraphRunner
from vqa_embeddings.engine.sequence import NOT_FINITE
from vqa_embeddings.records import Extracted, Failed
from vqa_embeddings.schema import QUERY_TOKEN, VISION_ONLY, VISION_TOKEN

NEVER = 1 << 60  # passes before a capture


@dataclass(frozen=True)
class Answer:
    """What a row came to."""

    record: Extracted | Failed
    tokens: list[int]


Answers = dict[int, Answer]  # by row


def answer_all(
    model: Noting, batch_size: int | None, tokens: int, table: Table | None = None, folder: Path = DATA
) -> Answers:
    """Extract the shipped rows, or those of another table. Rows finish with their answers, at `tokens` at latest."""
    model.spec = replace(model.spec, max_new_tokens=tokens)
    model.written.clear()
    table = table or read_table(DATA / "vqa.csv")
    order = sorted(range(len(table)), key=table.images.__getitem__)  # the questions on a picture one after another
    records: list[Extracted | Failed] = []
    for finished in extract(model, table, order, PictureFolder(folder), batch_size=batch_size, workers=0):
        records += finished
    # An answer's text is made with its record, so both are in the same order.
    found = {record.row: Answer(record, written) for record, written in zip(records, model.written, strict=True)}
    assert len(found) == len(table), f"{len(found)} rows of {len(table)} have come to something"
    return found


@dataclass(frozen=True)
class Difference:
    """How some answers differ from others."""

    rows: int
    same: int  # rows of the same tokens, none of which has failed
    error: float  # the largest difference of their vectors, relative to the vector's largest value
    first: str  # the first row that differs, and where

    @property
    def none(self) -> bool:
        """Whether all tokens are the same. The vectors are judged elsewhere: what reads pictures has no graph."""
        return self.same == self.rows

    def __str__(self) -> str:
        vectors = "vectors bit for bit" if not self.error else f"vectors within {self.error:.1e}"
        return f"{self.same} of {self.rows} answers token for token, {vectors}{self.first}"


def difference(found: Answers, expected: Answers, rows: Sequence[int] | None = None) -> Difference:
    """How answers differ from those expected, over all rows or some."""
    errors, same, first = [0.0], 0, ""
    rows = sorted(expected) if rows is None else rows
    for row in rows:
        one, other = found[row], expected[row]
        if _failed(one) or _failed(other):
            first = first or f"; row {row}: {[answer.record for answer in (one, other) if _failed(answer)]}"
            continue
        errors += [_error(*pair) for pair in zip(_vectors(one.record), _vectors(other.record), strict=True)]
        same += one.tokens == other.tokens
        if one.tokens != other.tokens:
            first = first or f"; row {row} differs from token {_parting(one.tokens, other.tokens)} on"
    return Difference(len(rows), same, max(errors), first)


def _failed(answer: Answer) -> bool:
    return isinstance(answer.record, Failed)


def _vectors(record: Extracted) -> list[np.ndarray]:
    return [record.vectors[VISION_ONLY], *record.vectors[VISION_TOKEN], *record.vectors[QUERY_TOKEN]]


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    return 0.0 if np.array_equal(found, expected) else relative_error(found, expected)


def _parting(found: Sequence[int], expected: Sequence[int]) -> int:
    """The first token that is not the same, from 1."""
    pairs = enumerate(zip(found, expected, strict=False), 1)
    return next((number for number, (one, other) in pairs if one != other), 1 + min(len(found), len(expected)))


@dataclass
class Counts:
    """How the steps of extractions were taken."""

    steps: int = 0
    replays: int = 0  # of them by a graph
    graphs: int = 0
    failed: int = 0  # captures
    astray: int = 0  # of those, after which the current stream was not the default one
    last: str = ""  # how the last step was taken
    not_finite: str = ""  # how the first step was taken that found logits not to be finite
    halved: Counter[str] = field(default_factory=Counter)  # batches that ran out of memory, by what was being done

    def __str__(self) -> str:
        taken = f"{self.graphs} graphs, {self.replays} replays of {self.steps} steps"
        return f"{taken}, {self.failed} captures failed"


@contextmanager
def counted() -> Iterator[Counts]:
    """Count what happens meanwhile."""
    counts = Counts()
    run, capture, replay, halve = CudaGraphRunner.run, CudaGraphRunner._capture, CapturedGraph.run, Engine._halve

    def counting_run(self: CudaGraphRunner, *given: Any) -> list[int]:
        before = counts.replays
        chosen = run(self, *given)
        counts.steps += 1
        counts.last = "by a graph" if counts.replays > before else "eagerly"
        if NOT_FINITE in chosen:
            counts.not_finite = counts.not_finite or counts.last
        return chosen

    def counting_capture(self: CudaGraphRunner, *given: Any) -> CapturedGraph | None:
        graph = capture(self, *given)
        counts.graphs += graph is not None
        counts.failed += graph is None
        counts.astray += graph is None and is_astray()
        return graph

    def counting_replay(self: CapturedGraph, *given: Any) -> None:
        counts.replays += 1
        replay(self, *given)

    def counting_halve(self: Engine) -> None:
        counts.halved["work" if self._cached else "the cache"] += 1
        halve(self)

    with (
        mock.patch.object(CudaGraphRunner, "run", counting_run),
        mock.patch.object(CudaGraphRunner, "_capture", counting_capture),
        mock.patch.object(CapturedGraph, "run", counting_replay),
        mock.patch.object(Engine, "_halve", counting_halve),
    ):
        yield counts


def is_astray() -> bool:
    """Whether this process computes on another stream than the usual one."""
    return torch.cuda.is_available() and torch.cuda.current_stream() != torch.cuda.default_stream()


def eagerly() -> AbstractContextManager[object]:
    """Take every step without a graph, on the same shapes."""
    return mock.patch("vqa_embeddings.engine.cuda_graphs.PASSES_BEFORE_CAPTURE", NEVER)


def captures(model: Noting) -> bool:
    """Whether steps are captured on the model's device."""
    return CudaGraphRunner(model.spec.device).captures
