"""The rows that are answered together: each is seated, goes on token by token, and leaves when it is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vqa_embeddings.engine.cuda_graphs import Step, Steps
from vqa_embeddings.layers.device import free_memory, to_device, to_host
from vqa_embeddings.layers.kv_cache import PAGE, CacheSize, Prefix, arrange
from vqa_embeddings.models.phi4mm.decoder import Decoder

WIDTH_STEP = 64  # how many keys of the seats are read is rounded up to these, so that few shapes of a step occur
SCORES_AT_ONCE = 1 << 27  # of a pass over questions, in float32: half a GiB
MOST_SEATS = {"cuda": 256, "cpu": 64}  # with more, a row's share of a step is hardly less
SEATS_SHARE, PAGES_SHARE = {"cuda": 0.2, "cpu": 0.05}, {"cuda": 0.5, "cpu": 0.15}  # of the free memory
PICTURE_KEYS = 6144  # of the largest picture, about; pages for more than so many keys a seat are not used


def size_cache(
    device: torch.device, key_bytes: int, width: int, keys: int, seats: int | None, share: float = 1.0
) -> CacheSize:
    """How large a cache to make: from the device's free memory, unless the seats are given.

    Args:
        key_bytes: memory of one token's keys and values.
        width: keys of a row's own that a seat must have room for.
        keys: of the largest picture that must fit.
        share: of what is usually taken; less after that was too much.
    """
    free, kind = share * free_memory(device), device.type
    width = -(-width // WIDTH_STEP) * WIDTH_STEP
    fitting = int(free * SEATS_SHARE[kind]) // (width * key_bytes)
    seats = seats or max(1, min(fitting, MOST_SEATS[kind]))
    pages = min(int(free * PAGES_SHARE[kind]) // (PAGE * key_bytes), seats * PICTURE_KEYS // PAGE)
    return CacheSize(pages=max(pages, -(-keys // PAGE)), seats=seats, width=width)


@dataclass(eq=False)
class Seated:
    """A row in the batch."""

    prefix: Prefix
    tokens: list[int]  # that follow the picture: the question, and what was written before the row sat down
    kept: int = 0  # keys in its seat
    reached: int = 0  # how far its seat was written to: behind its keys lies the padding of its question
    newest: int = 0  # the token chosen last, whose keys are not there yet; NOT_FINITE where there was none to choose
    states: np.ndarray = field(default_factory=lambda: np.empty(0))  # float32 [layers, hidden], at the last of `tokens`


class Batch:
    """Rows in seats of one cache, in the order of their seats, without gaps."""

    def __init__(self, decoder: Decoder, size: CacheSize) -> None:
        self.size = size
        self.rows: list[Seated] = []
        self._decoder = decoder
        self._cache = decoder.new_cache(size)
        self._steps = Steps(decoder.device)
        self._step: Step | None = None  # what the next step computes on, None where the rows have changed

    @property
    def free(self) -> int:
        """How many more rows there is room for."""
        return self.size.seats - len(self.rows)

    def read_picture(self, embeddings: Tensor, long: bool) -> tuple[Prefix, Tensor] | None:
        """The prefix of a picture, and the states at its end, float32 [layers, hidden]; None where there is no room."""
        pages = self._cache.take_pages(len(embeddings))
        if pages is None:
            return None
        states = self._decoder.read_picture(embeddings, long, self._cache, pages)
        return Prefix(pages, len(embeddings), long), states

    def forget_picture(self, prefix: Prefix) -> None:
        """Free the pages of a picture that no row is on."""
        self._cache.give_pages(prefix.pages)

    def seat(self, rows: Sequence[Seated], beside: Sequence[Tensor] = ()) -> list[np.ndarray]:
        """Read the rows' questions and choose the first token of each answer; there must be room.

        Args:
            beside: other tensors, float32, that are wanted on the host, so that it waits only once.
        Returns:
            What lies in `beside`.
        """
        first, made = len(self.rows), []
        self._cache.clear_seats(first, len(rows))
        for some in _passes(rows, self._decoder.heads):
            made.append(self._read_questions(some, first))
            first += len(some)
        chosen, states = (torch.cat(tensors) for tensors in zip(*made, strict=True))
        chosen, states, *others = to_host(chosen, states, *beside)
        for row, token, state in zip(rows, chosen.tolist(), states.numpy(), strict=True):
            row.kept, row.newest, row.states = len(row.tokens), token, state
        self.rows += rows
        self._step = None
        return [other.numpy() for other in others]

    def step(self) -> None:
        """Choose the next token of every row."""
        if self._step is None:
            self._step = self._arrange()
        chosen = self._steps.run(self._advance, self._step, self._width(1 + max(row.kept for row in self.rows)))
        for row, token in zip(self.rows, chosen, strict=False):  # what is chosen beyond the rows is padding
            row.kept += 1
            row.reached = max(row.reached, row.kept)
            row.newest = token

    def take_notes(self) -> list[str]:
        """What the user should know of the steps since this was asked last."""
        notes, self._steps.notes = self._steps.notes, []
        return notes

    def leave(self, leaving: Sequence[Seated]) -> None:
        """Let rows go. The last ones take their seats."""
        for row in leaving:
            seat, last = self.rows.index(row), self.rows.pop()
            if last is not row:
                # As far as the one who leaves had come, too: what it left behind need not be finite.
                self._cache.move_seat(len(self.rows), seat, max(last.reached, row.reached))
                self.rows[seat] = last
        self._step = None

    def _read_questions(self, rows: Sequence[Seated], first: int) -> tuple[Tensor, Tensor]:
        """One pass over the questions of rows, or several over parts of it where one question is very long.

        Returns:
            What `Decoder.read_rows` gives at the end of the questions.
        """
        device = self._decoder.device
        company, pages = arrange([row.prefix for row in rows])
        company, where = company.to(device), to_device(torch.tensor(pages), device)
        longest = max(len(row.tokens) for row in rows)
        limit = longest if len(rows) > 1 else max(1, SCORES_AT_ONCE // _scores(rows, self._decoder.heads, 1))
        for row in rows:
            row.reached = longest
        for start in range(0, longest, limit):
            part = [row.tokens[start : start + limit] for row in rows]
            length = max(map(len, part))
            tokens = to_device(torch.tensor([tokens + [0] * (length - len(tokens)) for tokens in part]), device)
            starts = torch.full((len(rows),), start, device=device)
            ends = to_device(torch.tensor([len(tokens) - 1 for tokens in part]), device)
            width = self._width(start + length)
            made = self._decoder.read_rows(self._cache, company, where, first, tokens, starts, ends, width)
        return made

    def _arrange(self) -> Step:
        """What a step computes on, from the rows as they sit now."""
        grown: Callable[[int], int] = _power_of_two if self._steps.captures else int
        used = 1 + max(page for row in self.rows for page in row.prefix.pages)
        step = max(1, grown(used) // 8) if self._steps.captures else 1  # finer: all these pages are read at every step
        pages = min(-(-used // step) * step, self.size.pages)
        count = min(grown(len(self.rows)), self.size.seats)
        company, _ = arrange([row.prefix for row in self.rows], pages, count, grown)
        state = torch.zeros(2, count, dtype=torch.int64)
        for seat, row in enumerate(self.rows):
            state[0, seat], state[1, seat] = row.newest, row.kept
        return Step(company, *state).to(self._decoder.device)

    def _advance(self, step: Step, width: int) -> None:
        """Read the newest token of every row, and choose the next, in place."""
        pages, first = len(step.company.unseen), torch.zeros_like(step.kept)
        chosen, _ = self._decoder.read_rows(
            self._cache, step.company, pages, 0, step.newest[:, None], step.kept, first, width
        )
        step.newest.copy_(chosen)
        step.kept.add_(1)

    def _width(self, keys: int) -> int:
        return min(-(-keys // WIDTH_STEP) * WIDTH_STEP, self.size.width)


def _passes(rows: Sequence[Seated], heads: int) -> Iterator[Sequence[Seated]]:
    """Split rows into passes whose scores, padding included, fit into memory; a row alone may not."""
    first = 0
    for last in range(1, len(rows)):
        if _scores(rows[first : last + 1], heads) > SCORES_AT_ONCE:
            yield rows[first:last]
            first = last
    yield rows[first:]


def _scores(rows: Sequence[Seated], heads: int, length: int | None = None) -> int:
    """How many scores a pass over the rows' questions makes at once: rows and pictures are padded to the largest."""
    on_each = Counter(id(row.prefix) for row in rows)
    length = length or max(len(row.tokens) for row in rows)
    queries = heads * length * len(on_each) * max(on_each.values())
    return queries * max(row.prefix.length + len(row.tokens) for row in rows)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
