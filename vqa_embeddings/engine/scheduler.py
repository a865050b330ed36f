"""Decides what is done next: which pictures are taken, which rows enter the batch, when it is full, what to do when
memory runs out. It computes nothing and holds no tensor of its own; the `Engine` does what it decides, and tells it.

    waiting -> ready (its picture's keys are in the cache) -> running (in a slot of the batch) -> finished
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from typing import Any, NamedTuple

from vqa_embeddings.engine.capacity import CapacityRequest
from vqa_embeddings.engine.sequence import ImageEntry, Sequence
from vqa_embeddings.layers.kv_cache import BlockPool, Capacity, Prefix, count_blocks

USUAL_QUESTION = 256  # tokens of a row's own that its slot has room for beside the answer; longer ones are rare


@dataclass(frozen=True)
class MakeCache:
    """Free the cache that there is, and make another one."""

    request: CapacityRequest


@dataclass(frozen=True)
class TakeImages:
    """Take the next pictures, until they have so many rows, or so many patches together."""

    rows: int


@dataclass(frozen=True)
class EncodeImages:
    """Run the vision tower over pictures that were taken."""

    images: Listed[TakenImage]


@dataclass(frozen=True)
class PrefillImage:
    """Put the keys and values of a picture into blocks of the cache."""

    entry: ImageEntry
    rope_variant: int
    blocks: Mapping[str, list[int]]


@dataclass(frozen=True)
class Prefill:
    """Read the questions of rows, from this slot on, and choose the first token of each answer."""

    sequences: Listed[Sequence]
    first_slot: int


@dataclass(frozen=True)
class Decode:
    """Choose the next token of every running row."""

    sequences: Listed[Sequence]


Work = MakeCache | TakeImages | EncodeImages | PrefillImage | Prefill | Decode


class TakenImage(NamedTuple):
    """A picture, and the rows that are about it."""

    rows: list[int]
    pixels: Any


class Move(NamedTuple):
    """A row moves to another slot, with so many keys."""

    source: int
    target: int
    width: int


class Scheduler:
    """The rows under way, and what is to be done about them.

    Args:
        max_new_tokens: of an answer.
        batch_size: rows in the batch; None leaves it to the free memory.
    """

    def __init__(self, max_new_tokens: int, batch_size: int | None) -> None:
        self.taken: list[TakenImage] = []  # that the vision tower is to see next
        self.waiting: deque[Sequence] = deque()  # in the order in which they enter the batch
        self.ready: list[Sequence] = []  # the first of them, their pictures in the cache
        self.running: list[Sequence] = []  # by slot, without gaps
        self.capacity: Capacity | None = None  # of the cache; None where there is none
        self._images_to_come = True
        self._max_new_tokens = max_new_tokens
        self._pools: dict[str, BlockPool] = {}
        self._filling = True
        self._count = 0  # of the rows that have come
        # By whether the batch is one for rows with long questions: the most rows in it, and the share of the memory
        # that it takes, of what is usually taken.
        self._most = {False: batch_size, True: batch_size}
        self._share = {False: 1.0, True: 1.0}
        self._is_wide = False  # whether this batch is one of those

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do."""
        return not (self.running or self._has_more)

    @property
    def can_halve(self) -> bool:
        """Whether a lack of memory can be met by fewer rows at a time."""
        return self.capacity is not None and self.capacity.slots > 1

    @property
    def _has_more(self) -> bool:
        return bool(self.ready or self.waiting or self.taken or self._images_to_come)

    def schedule(self, begin: bool = True) -> Work:
        """The next unit of work. There must be something left to do.

        Args:
            begin: whether further rows may be begun.
        """
        if self.capacity is None:
            return MakeCache(self._request())
        if not (begin and self._wants_rows()):
            return Decode(self.running)
        if self.taken:
            return EncodeImages(self.taken)
        while free := self._free_slots - len(self.ready):
            if not self.waiting and self._images_to_come:
                return TakeImages(free)
            if not self.waiting or not self._fits(self.waiting[0]):
                break
            sequence = self.waiting[0]
            if sequence.rope_variant not in sequence.entry.prefixes:
                blocks = self._allocate(sequence.entry.image.prefix_lengths)
                if blocks is None:
                    break
                return PrefillImage(sequence.entry, sequence.rope_variant, blocks)
            self.ready.append(self.waiting.popleft())
        if self.ready:
            return Prefill(self.ready, len(self.running))
        if self.running:  # the next row has to wait until others have finished
            self._filling = False
            return Decode(self.running)
        self._drop_cache()
        return MakeCache(self._request())

    # What has been done ---------------------------------------------------------------------------------------------

    def on_cache(self, capacity: Capacity) -> None:
        """A cache is about to be made."""
        self.capacity = capacity
        self._pools = {name: BlockPool(count) for name, count in capacity.blocks.items()}

    def on_images(self, taken: Iterable[TakenImage], more: bool) -> None:
        """Pictures were taken; whether there may be more."""
        self.taken += taken
        self._images_to_come = more

    def on_encoded(self, sequences: Iterable[Sequence]) -> None:
        """The pictures that were taken are encoded, and these rows ask about them."""
        self.taken = []
        for sequence in sequences:
            sequence.number = self._count
            self._count += 1
            sequence.entry.users[sequence.rope_variant] += 1
            self.waiting.append(sequence)

    def on_image_prefilled(self, work: PrefillImage) -> None:
        """A picture's keys are in the cache."""
        work.entry.prefixes[work.rope_variant] = {
            name: Prefix(blocks, work.entry.image.prefix_lengths[name], work.rope_variant)
            for name, blocks in work.blocks.items()
        }

    def on_prefilled(self) -> None:
        """The rows that were ready are in the batch."""
        for slot, sequence in enumerate(self.ready, start=len(self.running)):
            sequence.slot = slot
        self.running += self.ready
        self.ready = []

    def on_finished(self, finished: Listed[Sequence]) -> list[Move]:
        """Running rows have finished.

        Returns:
            The moves, one after another, by which the last rows of the batch take the slots that became free.
        """
        moves = []
        # From the last slot on: then no row moves that is about to leave itself.
        for sequence in sorted(finished, key=lambda one: one.slot or 0, reverse=True):
            slot, last = sequence.slot, self.running.pop()
            assert slot is not None
            if last is not sequence:
                # As far as the finished row had come, too: what it left behind need not be finite.
                moves.append(Move(len(self.running), slot, max(last.written, sequence.written)))
                self.running[slot], last.slot = last, slot
            sequence.slot = None
            self._release(sequence.entry, sequence.rope_variant)
        return moves

    def on_restart(self, sequence: Sequence, rope_variant: int) -> None:
        """A row that has finished under its rotary factors begins again under others, before all that wait."""
        sequence.rope_variant = rope_variant
        sequence.entry.users[rope_variant] += 1
        self.waiting.appendleft(sequence)

    def on_out_of_memory(self) -> str:
        """Halve the batch; the rows in it begin again in the order in which they came, with the answers that they have.

        Returns:
            What the user should know.
        """
        assert self.capacity is not None
        most = self._most[self._is_wide] = self.capacity.slots // 2
        self._share[self._is_wide] /= 2
        again = sorted(self.running + self.ready, key=lambda sequence: sequence.number)
        self.waiting.extendleft(reversed(again))
        self.running, self.ready = [], []
        self._drop_cache()
        rows = "rows with long questions" if self._is_wide else "rows"
        return f"memory ran out: {most} {rows} at most are answered together from then on"

    # Decisions ------------------------------------------------------------------------------------------------------

    @property
    def _free_slots(self) -> int:
        assert self.capacity is not None
        return self.capacity.slots - len(self.running)

    def _wants_rows(self) -> bool:
        """Rows enter many at a time: a GPU takes as long for a few questions as for many."""
        assert self.capacity is not None
        if not self._has_more:
            return False
        enough = 1 if self._filling else max(1, self.capacity.slots // 4)
        self._filling = not self.running or self._free_slots >= enough
        return self._filling

    def _fits(self, sequence: Sequence) -> bool:
        """Whether a row belongs into this batch: few rows fit into a wide one, which is for wide rows alone."""
        assert self.capacity is not None
        width = self._width(sequence)
        return width <= self.capacity.width and (width > self._usual_width) == self._is_wide

    def _width(self, sequence: Sequence) -> int:
        """Keys that a row needs a slot for."""
        return len(sequence.question) + self._max_new_tokens

    @property
    def _usual_width(self) -> int:
        return USUAL_QUESTION + self._max_new_tokens

    def _request(self) -> CapacityRequest:
        """A batch whose slots take the next row, where one waits, and whose blocks take its picture."""
        width, prefix = self._usual_width, {}
        if self.waiting:
            width = max(width, self._width(self.waiting[0]))
            prefix = dict(self.waiting[0].entry.image.prefix_lengths)
        self._is_wide = width > self._usual_width
        most = self._most[self._is_wide]
        slots = None if self._is_wide else most  # of wide rows, as many as the memory takes
        return CapacityRequest(width, prefix, slots, most, self._share[self._is_wide])

    def _allocate(self, lengths: Mapping[str, int]) -> dict[str, list[int]] | None:
        """Blocks for so many keys by group; None where there are not enough of them."""
        counts = {name: count_blocks(length) for name, length in lengths.items()}
        if not all(self._pools[name].has(count) for name, count in counts.items()):
            return None
        return {name: self._pools[name].allocate(count) for name, count in counts.items()}

    def _release(self, entry: ImageEntry, variant: int) -> None:
        """One row less reads an image's keys; those that none reads any more leave the cache."""
        entry.users[variant] -= 1
        if not entry.users[variant]:
            del entry.states[variant]
            for name, prefix in entry.prefixes.pop(variant).items():
                self._pools[name].free(prefix.blocks)

    def _drop_cache(self) -> None:
        """Forget the cache, and with it every picture's keys. All rows wait."""
        self.capacity = None
        for sequence in self.waiting:
            sequence.slot = None
            sequence.entry.prefixes.clear()
            sequence.entry.states.clear()
