"""From rows of the table to records: pictures are read ahead, each once, and their questions answered together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby

import numpy as np

from vqa_embeddings.base.timings import Timings
from vqa_embeddings.data.decode import open_picture
from vqa_embeddings.data.decode_options import DecodeOptions
from vqa_embeddings.data.decode_pool import DecodePool
from vqa_embeddings.data.picture_folder import PictureFolder
from vqa_embeddings.data.read_ahead import read_ahead
from vqa_embeddings.data.table import Table
from vqa_embeddings.engine.core import Engine
from vqa_embeddings.errors import QuestionEmpty, RowError, StorageError
from vqa_embeddings.models.base import Pixels, VisionLanguageModel
from vqa_embeddings.records import Extracted, Failed

GRACE_SECONDS = 10.0  # for the rows under way, after a request to stop; schedulers mostly kill after 30 or 60
NO_QUESTION = (
    "the row has no question, or only white space; expected text, leave the row out, or write its question and "
    "extract into another --output-dir"
)


def extract(
    model: VisionLanguageModel,
    table: Table,
    rows: Sequence[int] | np.ndarray,
    folder: PictureFolder,
    *,
    batch_size: int | None,
    workers: int,
    stopping: Callable[[], bool] = lambda: False,
    timings: Timings | None = None,
    decode_options: DecodeOptions | None = None,
) -> Iterator[list[Extracted | Failed]]:
    """The records of `rows`, some at a time. A row's values do not depend on the rows beside it.

    Args:
        rows: positions in the table, the questions on one picture one after another.
        batch_size: how many rows are answered together; None leaves it to the free memory.
        workers: how many threads read pictures ahead of the model.
        stopping: once it is true, no row is begun any more, and those under way have GRACE_SECONDS to end; what would
            have to begin again, for want of memory or under other rotary factors, is left to another run.
        timings: take the time of what is done.
        decode_options: what is taken for a picture.
    Yields:
        The records that one unit of work has finished, often none.
    Raises:
        StorageError: the pictures can no longer be read; after the records of those that had been read.
    """
    open_ = DecodePool(decode_options) if workers else partial(open_picture, decode_options=decode_options)

    def prepare(group: tuple[str | None, list[int]]) -> Pixels:
        if group[0] is None:
            raise QuestionEmpty(NO_QUESTION)
        return model.preprocess(folder.read(group[0], open_))

    failures: list[StorageError] = []

    def read() -> Iterator[tuple[list[int], Pixels | RowError]]:
        try:
            for group, found in read_ahead(_by_picture(table, rows), prepare, workers, stopping):
                yield group[1], found
        except StorageError as failure:  # there are no more pictures; the rows of those that were read come first
            failures.append(failure)

    engine = Engine(model, table.questions, read(), batch_size, timings or Timings())
    deadline: float | None = None
    while not engine.is_done:
        if stopping():
            deadline = deadline or time.monotonic() + GRACE_SECONDS
            if not engine.is_running or time.monotonic() > deadline:
                return
        yield engine.advance(begin=deadline is None)
    if failures:
        raise failures[0]


def _by_picture(table: Table, rows: Iterable[int]) -> Iterator[tuple[str | None, list[int]]]:
    """Each picture with its rows, made as they are asked for: a rank may have a million.

    Rows without a question come before the others of their picture, and with none.
    """
    for name, group in groupby(map(int, rows), table.images.__getitem__):
        empty: list[int] = []
        asked: list[int] = []
        for row in group:
            (asked if table.questions[row].strip() else empty).append(row)
        if empty:
            yield None, empty
        if asked:
            yield name, asked
