"""From rows to records: picture after picture, its questions in batches on one prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vqa_embeddings.errors import NonFiniteValues, RowFailed
from vqa_embeddings.images import locate, open_picture, read_ahead
from vqa_embeddings.phi4 import Answer, Phi4, Picture, Pixels
from vqa_embeddings.records import Extracted, Failed
from vqa_embeddings.table import Table

Record = Extracted | Failed


def extract(
    model: Phi4, table: Table, rows: Sequence[int], images_dir: Path, batch_size: int, workers: int
) -> Iterator[list[Record]]:
    """The records of `rows`, a batch at a time. What a row comes to does not depend on its batch.

    Args:
        rows: positions in the table, the questions on one picture one after another.
        workers: how many threads read pictures ahead of the model.
    Yields:
        The records of one batch: the safe points of the run lie between them.
    """
    groups = _by_picture(table, rows)

    def prepare(name: str) -> Pixels:
        return model.pixels(open_picture(locate(images_dir, name)))

    for name, pixels in read_ahead(list(groups), prepare, workers):
        if isinstance(pixels, RowFailed):
            yield [_failed(row, pixels) for row in groups[name]]
        else:
            yield from _ask(model, model.picture(pixels), table, groups[name], batch_size)


def _by_picture(table: Table, rows: Sequence[int]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault(table.images[row], []).append(row)
    return groups


def _ask(model: Phi4, picture: Picture, table: Table, rows: list[int], batch_size: int) -> Iterator[list[Record]]:
    """Ask all questions on a picture: those with short prompts on one prefix, those with long ones on another."""
    questions = {row: model.question(table.questions[row]) for row in rows}
    regimes: dict[bool, list[int]] = {False: [], True: []}
    refused: list[Record] = []
    for row in rows:
        try:
            regimes[model.is_long(picture, questions[row])].append(row)
        except RowFailed as failure:
            refused.append(_failed(row, failure))
    if refused:
        yield refused
    for long, members in regimes.items():
        if not members:
            continue
        prefix = model.prefix(picture, long)
        for start in range(0, len(members), batch_size):
            batch = members[start : start + batch_size]
            answers = model.answer(picture, prefix, [questions[row] for row in batch])
            yield [_record(row, picture, answer, model.layers) for row, answer in zip(batch, answers, strict=True)]


def _record(row: int, picture: Picture, answer: Answer, layers: Sequence[int]) -> Record:
    try:
        _check_finite("vision_only_representation", picture.vision_only)
        for index, layer in enumerate(layers):
            _check_finite(f"vision_token_representation/layer_{layer}", answer.vision_token[index])
            _check_finite(f"query_token_representation/layer_{layer}", answer.query_token[index])
    except NonFiniteValues as failure:
        return _failed(row, failure)
    return Extracted(row, picture.vision_only, answer.vision_token, answer.query_token, picture.pixel_mean, answer.text)


def _check_finite(name: str, vector: np.ndarray) -> None:
    finite = np.isfinite(vector)
    if not finite.all():
        raise NonFiniteValues(f"{name} holds {int((~finite).sum())} values that are NaN or infinite, of {vector.size}")


def _failed(row: int, failure: RowFailed) -> Failed:
    return Failed(row, type(failure).__name__, str(failure))
