"""Stage `not-finite`: a NaN in one row in the middle of its answer, inside the step; the others must not notice.

What the decoder reads of the row's last token but one is made NaN on the device, without waiting, in the step itself,
captured or not: so are the row's keys and values from there on, and the logits of its last token. The row leaves when
it would have left anyway, so that the others have the same company throughout, and must come to the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from unittest import mock

import torch
from torch import Tensor

from tests.gpu.answers import Answers, Noting, answer_all, captures, counted, difference
from tests.gpu.report import Report, say
from tests.gpu.scene import Scene
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.data.decode import open_picture
from vqa_embeddings.data.table_reader import read_table
from vqa_embeddings.errors import NonFiniteValues
from vqa_embeddings.layers.kv_cache import KVCache
from vqa_embeddings.models.base import ForwardInputs
from vqa_embeddings.models.phi4mm.decoder import GROUP, Decoder
from vqa_embeddings.records import Failed

BATCH_SIZE, TOKENS = 5, 60
SHORTEST = 8  # tokens of the row's answer: the steps before are for a graph to be captured
MOST_TRIES = 6  # until the NaN comes up in a step by a graph

Mark = tuple[int, int, int]  # what tells a step of a row: keys of its picture, keys in its slot, the token that is read


def not_finite(scene: Scene, report: Report) -> str:
    """The small checkpoint in both number formats."""
    return "; ".join(_try(scene.load(scene.small, dtype), dtype, report) for dtype in ("bfloat16", "float32"))


def _try(model: Noting, dtype: str, report: Report) -> str:
    expected = answer_all(model, BATCH_SIZE, TOKENS)
    choices = list(islice(_choices(model, expected), MOST_TRIES))
    assert choices, f"no row's last step differs from all others; expected one of {len(expected)}, take another seed"
    for row, mark in choices:
        with _poisoned(model.decoder, mark), counted() as counts:
            found = answer_all(model, BATCH_SIZE, TOKENS)
        number = len(expected[row].tokens)
        where = f"{dtype}: row {row}, NaN at token {number} of {number}, found {counts.not_finite or 'nowhere'}"
        if counts.not_finite == "by a graph" or not captures(model):
            break
        say(f"     {where}: another row is tried")
    record = found[row].record
    failed = isinstance(record, Failed) and record.error == NonFiniteValues.__name__
    named = failed and f"logits of token {number} of" in record.message
    report.check(named, f"{where}: {f'{record.error}: {record.message}' if failed else record}")
    if captures(model):
        report.check(counts.not_finite == "by a graph", f"{where}; expected by a graph; {counts}")
    apart = difference(found, expected, [other for other in sorted(expected) if other != row])
    report.check(apart.none and not apart.error, f"{dtype}: the other rows: {apart}")
    return f"{dtype}: row {row} {'failed' if failed else 'did not fail'}, others: {apart}"


def _choices(model: Noting, answers: Answers) -> Iterator[tuple[int, Mark]]:
    """Rows and the mark of their last step, which no other step has; those that finish first come first."""
    marks = _marks(model, answers)
    times = Counter(mark for row in marks.values() for mark in row)
    for row, answer in answers.items():
        if len(answer.tokens) >= SHORTEST and times[marks[row][-1]] == 1:
            yield row, marks[row][-1]


def _marks(model: Noting, answers: Answers) -> dict[int, list[Mark]]:
    """The marks of every row's steps."""
    table, marks = read_table(DATA / "vqa.csv"), {}
    lengths = {name: _picture_keys(model, name) for name in dict.fromkeys(table.images)}
    for row, answer in answers.items():
        keys = enumerate(answer.tokens[:-1], len(model.tokenize(table.questions[row])))
        marks[row] = [(lengths[table.images[row]], kept, token) for kept, token in keys]
    return marks


def _picture_keys(model: Noting, name: str) -> int:
    """How many keys a picture's part of the prompt has: one placeholder stands for all its tokens."""
    return len(model._head) - 1 + model.preprocess(open_picture(DATA / name)).tokens


@contextmanager
def _poisoned(decoder: Decoder, mark: Mark) -> Iterator[None]:
    """Let the row of this mark read NaN in place of its token."""
    forward, embed = decoder.forward, decoder.embed
    hit: list[Tensor] = []  # bool [rows], while rows are read

    def marking(kv: KVCache, inputs: ForwardInputs) -> tuple[Tensor, Tensor]:
        length, kept, token = mark
        on_picture = inputs.sharing[GROUP].length == length
        hit.append(on_picture & (inputs.starts == kept) & (inputs.tokens[:, 0] == token))
        try:
            return forward(kv, inputs)
        finally:
            hit.pop()

    def poisoning(tokens: Tensor) -> Tensor:
        read = embed(tokens)
        return read.masked_fill(hit[-1][:, None, None], torch.nan) if hit else read

    with mock.patch.object(decoder, "forward", marking), mock.patch.object(decoder, "embed", poisoning):
        yield
