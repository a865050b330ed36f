"""From rows to records: pictures once each, their questions in full batches whatever their picture."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from vqa_embeddings.base.timings import Timings
from vqa_embeddings.data.decode import open_picture
from vqa_embeddings.data.decode_options import DecodeOptions
from vqa_embeddings.data.decode_pool import DecodePool
from vqa_embeddings.data.picture_folder import PictureFolder
from vqa_embeddings.data.read_ahead import read_ahead
from vqa_embeddings.data.table import Table
from vqa_embeddings.engine.runner import Batch, Seated, size_cache
from vqa_embeddings.errors import NonFiniteValues, QuestionEmpty, RowError, StorageError
from vqa_embeddings.layers.device import is_out_of_memory
from vqa_embeddings.layers.kv_cache import CacheSize, Prefix
from vqa_embeddings.models.phi4mm.decoder import NOT_FINITE
from vqa_embeddings.models.phi4mm.model import Phi4, Picture
from vqa_embeddings.models.phi4mm.vision import PATCHES_AT_ONCE, Pixels
from vqa_embeddings.records import Extracted, Failed

Record = Extracted | Failed

GRACE_SECONDS = 10.0  # for the rows under way, after a request to stop; schedulers mostly kill after 30 or 60
OTHER_FORMAT = "try --dtype bfloat16 or float32 in another --output-dir"
OTHER_WEIGHTS = "check the weights of --model"  # where it was not float16: the other formats reach equally far
NO_QUESTION = (
    "the row has no question, or only white space; expected text, leave the row out, or write its question and "
    "extract into another --output-dir"
)
USUAL_QUESTION = 256  # tokens of a row's own that its seat has room for beside the answer; longer ones are rare


def extract(
    model: Phi4,
    table: Table,
    rows: Sequence[int] | np.ndarray,
    folder: PictureFolder,
    batch_size: int | None,
    workers: int,
    stopping: Callable[[], bool] = lambda: False,
    stages: Timings | None = None,
    decode_options: DecodeOptions | None = None,
) -> Iterator[list[Record]]:
    """The records of `rows`, some at a time. What a row comes to does not depend on its company.

    Args:
        rows: positions in the table, the questions on one picture one after another.
        batch_size: how many rows are answered together; None leaves it to the free memory.
        workers: how many threads read pictures ahead of the model.
        stopping: once it is true, no row is begun any more, and those under way have GRACE_SECONDS to end; what would
            have to begin again, for want of memory or under the long rotary factors, is left to another run.
        stages: takes the time of what is done.
        decode_options: what is taken for a picture.
    Yields:
        The records that one unit of work has finished, often none.
    Raises:
        StorageError: the pictures have gone; after the records of those that had been read.
    """
    open_ = DecodePool(decode_options) if workers else partial(open_picture, decode_options=decode_options)

    def prepare(group: tuple[str | None, list[int]]) -> Pixels:
        if group[0] is None:
            raise QuestionEmpty(NO_QUESTION)
        return model.pixels(folder.read(group[0], open_))

    failures: list[StorageError] = []

    def read() -> Iterator[tuple[list[int], Pixels | RowError]]:
        try:
            for group, found in read_ahead(_by_picture(table, rows), prepare, workers, stopping):
                yield group[1], found
        except StorageError as failure:  # there are no more pictures; those that were read are worked off first
            failures.append(failure)

    flight = Flight(model, table.questions, read(), batch_size, stages or Timings())
    deadline: float | None = None
    while not flight.over:
        if stopping():
            deadline = deadline or time.monotonic() + GRACE_SECONDS
            if not flight.under_way or time.monotonic() > deadline:
                return
        yield flight.advance(begin=deadline is None)
    if failures:
        raise failures[0]


@dataclass(eq=False)
class _Shown:
    """A picture whose rows are not all done; dictionaries by whether under the long rotary factors."""

    picture: Picture
    left: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})  # rows that are not done
    cached: dict[bool, tuple[Prefix, Tensor]] = field(default_factory=dict)  # with the states at its last token
    # On the host, from when its first rows sit down:
    vision_token: dict[bool, np.ndarray] = field(default_factory=dict)  # those states, float32 [layers, hidden]
    vision_only: np.ndarray | None = None  # float32 [vision]


@dataclass(eq=False)
class _Row:
    """A row under way."""

    row: int
    shown: _Shown
    question: list[int]
    long: bool
    written: list[int] = field(default_factory=list)
    seat: Seated | None = None
    vision_token: np.ndarray | None = None  # float32 [layers, hidden], of its picture under its prompt's factors
    query_token: np.ndarray | None = None  # float32 [layers, hidden]


class Flight:
    """The rows under way, from the picture to the record, in units of work between which a run can stop.

    Args:
        questions: of the table, by row.
        pictures: for each picture its rows, and its pixels or why there are none.
        batch_size: rows in the batch; None leaves it to the free memory.
    """

    def __init__(
        self,
        model: Phi4,
        questions: Sequence[str],
        pictures: Iterator[tuple[list[int], Pixels | RowError]],
        batch_size: int | None,
        stages: Timings,
    ) -> None:
        self._model = model
        self._questions = questions
        self._pictures: Iterator[tuple[list[int], Pixels | RowError]] | None = pictures
        # The most rows in the batch, by whether it is one for wide rows; None leaves it to the memory.
        self._most: dict[bool, int | None] = {False: batch_size, True: batch_size}
        self._share = {False: 1.0, True: 1.0}  # of the memory that such a batch usually takes
        self._stages = stages
        self._taken: list[tuple[list[int], Pixels]] = []  # that the vision tower is to see next
        self._waiting: deque[_Row] = deque()  # their pictures seen, in the order in which they sit down
        self._ready: list[_Row] = []  # the first of them, their pictures in the cache too
        self._seated: list[_Row] = []
        self._filling = True
        self._wide = False  # whether the batch is one for wide rows
        self._size = self._find_size()  # of the batch
        self._made: Batch | None = None  # the batch; none at first, and while its memory is to be found

    @property
    def under_way(self) -> bool:
        """Whether rows are seated."""
        return bool(self._seated)

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do."""
        return not (self._seated or self._to_come)

    @property
    def _to_come(self) -> bool:
        return bool(self._ready or self._waiting or self._taken or self._pictures)

    @torch.inference_mode()
    def advance(self, begin: bool = True) -> list[Record]:
        """Do one unit of work: take pictures, see them, read one into the cache, seat rows, or take one step with all.

        Args:
            begin: whether further rows may be begun.
        Returns:
            The records of the rows that it finished.
        """
        try:
            if self._made is None:
                self._made = Batch(self._model.decoder, self._size)
                return []
            return self._refill() if begin and self._wants_rows() else self._step()
        except RuntimeError as error:
            if not is_out_of_memory(error) or self._size.seats == 1:
                raise
        self._halve()  # here, where the error no longer holds on to the memory
        return []

    @property
    def _batch(self) -> Batch:
        assert self._made is not None
        return self._made

    def _wants_rows(self) -> bool:
        """Rows sit down many at a time: a GPU takes as long for a few questions as for many."""
        if not self._to_come:
            return False
        free, seats = self._batch.free, self._size.seats
        self._filling = not self._seated or (free > 0 if self._filling else free >= max(1, seats // 4))
        return self._filling

    def _refill(self) -> list[Record]:
        """The next unit of work on the way to a full batch."""
        free = self._batch.free - len(self._ready)
        if self._taken:
            return self._see()
        if free and not self._waiting and self._pictures:
            return self._take_pictures(free)
        if free and self._waiting and self._make_ready(self._waiting[0]):
            self._ready.append(self._waiting.popleft())
            return []
        if self._ready:
            return self._sit_down()
        if self._seated:  # the next row has to wait until others have left
            self._filling = False
            return self._step()
        self._resize()
        return []

    def _take_pictures(self, free: int) -> list[Record]:
        """Take the next pictures, as many as the free seats and one pass of the vision tower have room for."""
        assert self._pictures is not None
        records: list[Record] = []
        limit = PATCHES_AT_ONCE[self._model.decoder.device.type]
        patches = 0
        while sum(len(rows) for rows, _ in self._taken) < free and patches < limit:
            with self._stages("waiting for pictures"):
                found = next(self._pictures, None)
            if found is None:
                self._pictures = None
                break
            rows, pixels = found
            if isinstance(pixels, RowError):
                records += [_failed(row, pixels) for row in rows]
            else:
                self._taken.append((rows, pixels))
                patches += pixels.patches
        return records

    def _see(self) -> list[Record]:
        """Run the vision tower over the pictures that were taken. Returns the rows whose prompt is too long."""
        with self._stages("vision"):
            pictures = self._model.pictures([pixels for _, pixels in self._taken])
        records: list[Record] = []
        with self._stages("records"):
            for (rows, _), picture in zip(self._taken, pictures, strict=True):
                records += self._expect(rows, _Shown(picture))
        self._taken = []
        return records

    def _expect(self, rows: Sequence[int], shown: _Shown) -> list[Record]:
        """Put the rows of a picture among those that wait. Returns those whose prompt is too long."""
        records: list[Record] = []
        for row in rows:
            question = self._model.question(self._questions[row])
            try:
                long = self._model.is_long(shown.picture, question)
            except RowError as failure:
                records.append(_failed(row, failure))
                continue
            shown.left[long] += 1
            self._waiting.append(_Row(row, shown, question, long))
        return records

    def _make_ready(self, row: _Row) -> bool:
        """See to it that the row's picture is in the cache. False where the row, or its picture, has no room now."""
        width = self._width(row)
        if width > self._size.width or (width > self._usual_width) != self._wide:
            return False  # few rows fit into a wide batch, which is for wide ones alone
        if row.long not in row.shown.cached:
            with self._stages("prefix"):
                cached = self._batch.read_picture(row.shown.picture.embeddings, row.long)
            if cached is None:
                return False
            row.shown.cached[row.long] = cached
        return True

    def _sit_down(self) -> list[Record]:
        """Seat the rows that are ready: their states at the last prompt token, and the first token of each answer."""
        rows, self._ready = self._ready, []
        for row in rows:
            row.seat = Seated(row.shown.cached[row.long][0], [*row.question, *row.written])
        self._seated += rows
        with self._stages("questions"):
            self._read_questions(rows, [row.seat for row in rows if row.seat])
        for row in rows:
            if row.query_token is None and row.seat:  # not of a row that begins anew: its prompt had ended before
                row.query_token, row.vision_token = row.seat.states, row.shown.vision_token[row.long]
        return self._take_tokens(rows)

    def _read_questions(self, rows: Sequence[_Row], seats: Sequence[Seated]) -> None:
        """Read the questions, and bring to the host what is stored of the pictures that rows sit down on first."""
        new = {(id(row.shown), row.long): row.shown for row in rows if row.long not in row.shown.vision_token}
        stored = [(shown.cached[long][1], shown.picture.vision_only) for (_, long), shown in new.items()]
        found = iter(self._batch.seat(seats, [tensor for pair in stored for tensor in pair]))
        for (_, long), shown in new.items():
            shown.vision_token[long], shown.vision_only = next(found), next(found)

    def _step(self) -> list[Record]:
        """Choose the next token of every seated row."""
        with self._stages("decoding"):
            self._batch.step()
            self._stages.notes.update(self._batch.take_notes())
        return self._take_tokens(self._seated)

    def _take_tokens(self, rows: Sequence[_Row]) -> list[Record]:
        """Write down what was chosen, and let the rows go whose answers are over."""
        records, leaving = [], []
        with self._stages("records"):
            for row in rows:
                assert row.seat is not None
                row.written.append(row.seat.newest)
                if self._goes_on(row):
                    continue
                leaving.append(row)
                if not self._begins_anew(row):
                    records.append(self._record(row))
            if leaving:
                self._let_go(leaving)
        return records

    def _let_go(self, leaving: Sequence[_Row]) -> None:
        self._batch.leave([row.seat for row in leaving if row.seat])
        gone = set(map(id, leaving))
        self._seated = [row for row in self._seated if id(row) not in gone]
        for row in leaving:
            row.seat, shown = None, row.shown
            shown.left[row.long] -= 1
            if not shown.left[row.long]:
                self._batch.forget_picture(shown.cached.pop(row.long)[0])
            if self._begins_anew(row):
                row.long = True
                shown.left[True] += 1
                self._waiting.appendleft(row)

    def _goes_on(self, row: _Row) -> bool:
        assert row.seat is not None
        prompt = row.seat.prefix.length + len(row.question)
        return row.written[-1] != NOT_FINITE and not self._model.is_over(prompt, row.written, row.long)

    def _begins_anew(self, row: _Row) -> bool:
        return row.written[-1] != NOT_FINITE and self._model.must_begin_anew(row.written, row.long)

    def _record(self, row: _Row) -> Record:
        vision_only = row.shown.vision_only
        assert vision_only is not None and row.vision_token is not None and row.query_token is not None
        written = [token for token in row.written if token != NOT_FINITE]  # which only the last can be
        vectors = vision_only, row.vision_token, row.query_token, row.shown.picture.pixel_mean
        text, truncated = self._model.text(written), row.shown.picture.truncated
        remedy = OTHER_FORMAT if self._model.decoder.dtype == torch.float16 else OTHER_WEIGHTS
        record = checked(Extracted(row.row, *vectors, text, truncated), self._model.layers, remedy)
        if isinstance(record, Failed) or len(written) == len(row.written):
            return record
        return _failed(
            row.row,
            NonFiniteValues(
                f"the logits of token {len(row.written)} of the answer are NaN or infinite; expected finite ones, "
                f"{remedy}"
            ),
        )

    def _width(self, row: _Row) -> int:
        """Keys that a row needs a seat for."""
        return len(row.question) + self._model.max_new_tokens

    @property
    def _usual_width(self) -> int:
        return USUAL_QUESTION + self._model.max_new_tokens

    def _find_size(self) -> CacheSize:
        """The size of a batch whose seats take the next row, where one waits, and whose pages take its picture."""
        decoder, width, keys = self._model.decoder, self._usual_width, 0
        if self._waiting:
            row = self._waiting[0]
            width, keys = max(width, self._width(row)), len(row.shown.picture.embeddings)
        self._wide = width > self._usual_width
        most = self._most[self._wide]
        seats = None if self._wide else most  # of wide rows, as many as the memory takes
        size = size_cache(decoder.device, decoder.key_bytes, width, keys, seats, self._share[self._wide])
        return replace(size, seats=min(size.seats, most or size.seats))

    def _halve(self) -> None:
        """After running out of memory: half the batch, and those who sat begin again where they are."""
        most = self._most[self._wide] = self._size.seats // 2
        self._share[self._wide] /= 2
        rows = "rows with long questions" if self._wide else "rows"
        self._stages.notes[f"memory ran out: {most} {rows} at most are answered together from then on"] += 1
        self._waiting.extendleft(reversed(self._seated + self._ready))
        self._seated, self._ready = [], []
        self._resize()

    def _resize(self) -> None:
        """Forget the batch, whose memory is free afterwards; the next one has room for the next row and its picture."""
        for row in self._waiting:
            row.seat = None
            row.shown.cached.clear()
        self._made = None
        self._size = self._find_size()


def checked(record: Extracted, layers: Sequence[int], remedy: str = OTHER_WEIGHTS) -> Record:
    """The record, or why it is none: values that are NaN or infinite are never stored.

    Args:
        remedy: what to do about them, as the reason has it.
    """
    try:
        _check_finite("vision_only_representation", record.vision_only, remedy)
        for index, layer in enumerate(layers):
            _check_finite(f"vision_token_representation/layer_{layer}", record.vision_token[index], remedy)
            _check_finite(f"query_token_representation/layer_{layer}", record.query_token[index], remedy)
    except NonFiniteValues as failure:
        return _failed(record.row, failure)
    return record


def _check_finite(name: str, vector: np.ndarray, remedy: str) -> None:
    finite = np.isfinite(vector)
    if not finite.all():
        raise NonFiniteValues(
            f"{name} holds {int((~finite).sum())} values that are NaN or infinite, of {vector.size}; expected none, "
            f"{remedy}"
        )


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


def _failed(row: int, failure: RowError) -> Failed:
    return Failed(row, type(failure).__name__, str(failure))
