"""What the scheduler decides, without a model: every row is answered once, whatever happens on the way."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqa_embeddings.engine.capacity import CapacityRequest, find_capacity
from vqa_embeddings.engine.scheduler import (
    USUAL_QUESTION,
    Decode,
    EncodeImages,
    MakeCache,
    Prefill,
    PrefillImage,
    Scheduler,
    TakeImages,
    TakenImage,
)
from vqa_embeddings.engine.sequence import ImageEntry, Sequence
from vqa_embeddings.layers.kv_cache import BLOCK, Capacity, KVGroup, count_blocks
from vqa_embeddings.models.base import EncodedImage

MAX_NEW_TOKENS = 20
GROUPS = ("self", "cross")


@dataclass(frozen=True)
class Row:
    """A row that is to be answered."""

    question: int  # tokens
    answer: int  # tokens, the end token included
    restarts_at: int | None = None  # tokens of the answer after which it begins again under other rotary factors


@dataclass
class Simulation:
    """The engine's part without a model: does what the scheduler decides, and checks that it can be done."""

    images: list[list[Row]]  # by image, its rows
    slots: int = 4
    blocks: int = 12  # of each group
    batch_size: int | None = None
    prefix: int = 2 * BLOCK  # keys of an image
    fails: random.Random | None = None  # where memory runs out, at random
    done: list[Sequence] = field(default_factory=list)
    log: list[object] = field(default_factory=list)
    in_slot: dict[int, tuple[Sequence, int]] = field(default_factory=dict)  # and how many keys lie there

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(MAX_NEW_TOKENS, self.batch_size)
        self.rows = [row for rows in self.images for row in rows]
        numbers = iter(range(len(self.rows)))
        self._to_take = iter([[next(numbers) for _ in rows] for rows in self.images])

    def run(self) -> Simulation:
        while not self.scheduler.is_done:
            self.advance()
        return self

    def advance(self, begin: bool = True) -> object:
        work = self.scheduler.schedule(begin)
        self.log.append(work)
        if self.fails and self.scheduler.can_halve and self.fails.random() < 0.05:
            self.scheduler.on_out_of_memory()
            self.in_slot.clear()
            return work
        {
            MakeCache: self.make_cache,
            TakeImages: self.take_images,
            EncodeImages: self.encode_images,
            PrefillImage: self.prefill_image,
            Prefill: self.prefill,
            Decode: self.decode,
        }[type(work)](work)
        return work

    def make_cache(self, work: MakeCache) -> None:
        assert not self.scheduler.running, "their keys would be lost"
        request = work.request
        fitting = max(1, int(request.share * self.slots))
        slots = min(request.slots or fitting, request.most_slots or fitting)
        blocks = {name: max(self.blocks, count_blocks(request.prefix.get(name, 0))) for name in GROUPS}
        self.scheduler.on_cache(Capacity(blocks, slots, request.width))

    def take_images(self, work: TakeImages) -> None:
        taken: list[TakenImage] = []
        while sum(len(image.rows) for image in taken) < work.rows:
            rows = next(self._to_take, None)
            if rows is None:
                self.scheduler.on_images(taken, more=False)
                return
            taken.append(TakenImage(rows, None))
        self.scheduler.on_images(taken, more=True)

    def encode_images(self, work: EncodeImages) -> None:
        def sequences() -> Iterator[Sequence]:
            for taken in work.images:
                lengths = dict.fromkeys(GROUPS, self.prefix)
                image = EncodedImage(None, self.prefix, lengths, torch.zeros(1), {}, False)
                entry = ImageEntry(image)
                for row in taken.rows:
                    yield Sequence(row, entry, [1] * self.rows[row].question, 0)

        self.scheduler.on_encoded(sequences())

    def prefill_image(self, work: PrefillImage) -> None:
        in_use = {name: set[int]() for name in GROUPS}
        for sequence in (*self.scheduler.running, *self.scheduler.ready):
            for name, prefix in sequence.prefix.items():
                in_use[name].update(prefix.blocks)
        for name, blocks in work.blocks.items():
            assert not in_use[name] & set(blocks), "blocks of two images"
            assert len(blocks) == count_blocks(self.prefix)
        work.entry.states[work.rope_variant] = torch.zeros(1)
        self.scheduler.on_image_prefilled(work)

    def prefill(self, work: Prefill) -> None:
        capacity = self.scheduler.capacity
        assert capacity is not None and work.first_slot + len(work.sequences) <= capacity.slots
        for slot, sequence in enumerate(work.sequences, start=work.first_slot):
            assert sequence.rope_variant in sequence.entry.prefixes, "its image's keys are not there"
            assert slot not in self.in_slot
            sequence.num_keys = sequence.written = sequence.num_tokens
            self.in_slot[slot] = sequence, sequence.num_keys
        self.scheduler.on_prefilled()
        self.take_tokens(work.sequences)

    def decode(self, work: Decode) -> None:
        assert work.sequences
        for sequence in work.sequences:
            sequence.num_keys += 1
            sequence.written = max(sequence.written, sequence.num_keys)
            self.in_slot[sequence.slot] = sequence, sequence.num_keys
        self.take_tokens(list(work.sequences))

    def take_tokens(self, sequences: list[Sequence]) -> None:
        finished, restarting = [], []
        for sequence in sequences:
            row = self.rows[sequence.row]
            sequence.output.append(1)
            if len(sequence.output) == row.answer:
                finished.append(sequence)
                self.done.append(sequence)
            elif len(sequence.output) == row.restarts_at and not sequence.rope_variant:
                finished.append(sequence)
                restarting.append(sequence)
        moves = self.scheduler.on_finished(finished) if finished else []
        for move in moves:
            sequence, keys = self.in_slot.pop(move.source)
            assert sequence not in finished, "it is copied, and leaves"
            assert keys <= move.width, "keys would be left behind"
            self.in_slot[move.target] = sequence, keys
        for sequence in restarting:
            self.scheduler.on_restart(sequence, 1)
        running = self.scheduler.running
        self.in_slot = {slot: held for slot, held in self.in_slot.items() if slot < len(running)}
        for slot, sequence in enumerate(running):
            assert sequence.slot == slot
            assert self.in_slot[slot][0] is sequence, "a slot holds the keys of another row"


lengths = st.integers(1, MAX_NEW_TOKENS)
rows = st.builds(
    Row, question=st.sampled_from([3, 10, USUAL_QUESTION, USUAL_QUESTION + 1, 700]), answer=lengths, restarts_at=lengths
)


@given(
    images=st.lists(st.lists(rows, max_size=7), max_size=8),
    slots=st.integers(1, 9),
    blocks=st.integers(2, 12),
    batch_size=st.none() | st.integers(1, 9),
    fails=st.none() | st.integers(0, 1 << 16).map(random.Random),
)
def test_every_row_is_answered_once_whatever_the_sizes_the_questions_and_the_memory(
    images, slots, blocks, batch_size, fails
):
    simulation = Simulation(images, slots, blocks, batch_size, fails=fails).run()
    assert sorted(sequence.row for sequence in simulation.done) == list(range(len(simulation.rows)))
    assert not any(entry.prefixes or +entry.users for entry in {id(s.entry): s.entry for s in simulation.done}.values())


def test_a_batch_is_refilled_once_a_quarter_of_it_is_free_and_then_until_it_is_full():
    simulation = Simulation([[Row(3, answer) for answer in (2, 4, 6, 8, 20, 20, 20, 20)], [Row(3, 20)] * 8], slots=8)
    simulation.run()
    prefills = [len(work.sequences) for work in simulation.log if isinstance(work, Prefill)]
    assert prefills[:3] == [8, 2, 2], "two of eight slots were to be free before rows enter"


def test_rows_on_one_image_share_its_keys_which_leave_the_cache_with_the_last_of_them():
    simulation = Simulation([[Row(3, 5)] * 6], slots=2).run()
    assert sum(isinstance(work, PrefillImage) for work in simulation.log) == 1
    assert simulation.scheduler._pools["self"].has(simulation.blocks), "all blocks are free again"


def test_an_image_waits_for_blocks_until_rows_on_another_have_finished():
    simulation = Simulation([[Row(3, 10)], [Row(3, 10)]], slots=4, blocks=3).run()
    kinds = [type(work) for work in simulation.log]
    second = [place for place, kind in enumerate(kinds) if kind is PrefillImage][1]
    assert kinds[:second].count(Decode) == 9, "one image of two blocks fits"


def test_a_long_question_gets_a_batch_of_its_own_kind_and_the_rows_after_it_a_usual_one():
    simulation = Simulation([[Row(3, 5), Row(700, 5), Row(3, 5)]]).run()
    widths = [work.request.width for work in simulation.log if isinstance(work, MakeCache)]
    assert widths == [USUAL_QUESTION + MAX_NEW_TOKENS, 700 + MAX_NEW_TOKENS, USUAL_QUESTION + MAX_NEW_TOKENS]


def test_an_answer_that_needs_other_rotary_factors_begins_again_before_the_rows_that_wait():
    simulation = Simulation([[Row(3, 9, restarts_at=4), *[Row(3, 9)] * 3]], slots=1).run()
    assert [sequence.row for sequence in simulation.done] == [0, 1, 2, 3]
    [again] = [work for work in simulation.log if isinstance(work, PrefillImage) and work.rope_variant == 1]
    assert again.entry.image.prefix_lengths == dict.fromkeys(GROUPS, simulation.prefix)


def test_running_out_of_memory_halves_the_batch_and_its_rows_go_on_where_they_are():
    simulation = Simulation([[Row(3, 20)] * 8], slots=8)
    while not simulation.scheduler.running or len(simulation.scheduler.running[0].output) < 5:
        simulation.advance()
    sequences = list(simulation.scheduler.running)
    assert (
        simulation.scheduler.on_out_of_memory() == "memory ran out: 4 rows at most are answered together from then on"
    )
    simulation.in_slot.clear()
    assert list(simulation.scheduler.waiting) == sequences, "in their order, before all others"
    [work] = [simulation.advance()]
    assert isinstance(work, MakeCache) and (work.request.most_slots, work.request.share) == (4, 0.5)
    while not simulation.scheduler.running:
        simulation.advance()
    assert simulation.scheduler.running == sequences[:4]
    assert [len(sequence.output) for sequence in sequences] == [6] * 4 + [5] * 4
    simulation.run()
    assert len(simulation.done) == 8


def test_rows_that_begin_again_after_a_lack_of_memory_do_so_in_the_order_in_which_they_came():
    """Also where one has moved into the slot of another, or rows on a picture would no longer follow each other."""
    simulation = Simulation([[Row(3, 2), Row(3, 20)], [Row(3, 20), Row(3, 20)], [Row(3, 20)] * 4], slots=4)
    while len(simulation.done) < 1:
        simulation.advance()
    assert [sequence.row for sequence in simulation.scheduler.running] == [3, 1, 2]
    simulation.scheduler.on_out_of_memory()
    assert [sequence.row for sequence in simulation.scheduler.waiting][:3] == [1, 2, 3]


def test_one_row_alone_cannot_be_halved():
    simulation = Simulation([[Row(3, 5)]], slots=1)
    assert not simulation.scheduler.can_halve, "there is no cache yet"
    simulation.advance()
    assert not simulation.scheduler.can_halve


def test_a_run_that_is_to_stop_begins_no_row():
    simulation = Simulation([[Row(3, answer) for answer in (2, 4, 6, 8, 20, 20)]], slots=4)
    while not simulation.scheduler.running:
        simulation.advance()
    while simulation.scheduler.running:
        assert isinstance(simulation.advance(begin=False), Decode), "one row has finished, and others wait"
    assert len(simulation.done) == 4 and not simulation.scheduler.is_done


GROUP = KVGroup("self", 2, 2, 8, per_row=True, longest_prefix=4 * BLOCK)
REQUEST = CapacityRequest(width=100, prefix={}, slots=None, most_slots=None, share=1.0)


def test_groups_of_layers_share_the_memory_by_what_their_pictures_take():
    cross = KVGroup("cross", 1, 2, 8, per_row=False, longest_prefix=12 * BLOCK)
    memory = 1 << 28
    alone, both = (find_capacity(REQUEST, groups, torch.float32, "cpu", memory) for groups in ([GROUP], [GROUP, cross]))
    assert both.slots == alone.slots, "rows have keys of their own in one group only"
    assert both.blocks["cross"] == pytest.approx(3 * both.blocks["self"], rel=0.01)
    taken = sum(BLOCK * group.key_bytes(torch.float32) * both.blocks[group.name] for group in (GROUP, cross))
    assert taken <= 0.15 * memory


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_group_whose_pictures_take_a_fraction_of_a_block_has_blocks_for_as_many_pictures(kind):
    """As where only the tokens before a picture are in self-attention, and the picture itself in cross-attention."""
    own = KVGroup("self", 32, 8, 128, per_row=True, longest_prefix=7)
    cross = KVGroup("cross", 8, 8, 128, per_row=False, longest_prefix=6404)
    capacity = find_capacity(REQUEST, [own, cross], torch.bfloat16, kind, 50 << 30)
    pictures = {group.name: capacity.blocks[group.name] // count_blocks(group.longest_prefix) for group in (own, cross)}
    assert pictures["self"] == pytest.approx(pictures["cross"], abs=1)
    assert pictures["cross"] > capacity.slots // 4


def test_a_share_of_the_memory_gives_that_share_of_the_slots_and_blocks():
    whole, half = (
        find_capacity(replace(REQUEST, share=share), [GROUP], torch.float32, "cpu", 1 << 24) for share in (1.0, 0.5)
    )
    assert whole.slots // 2 == half.slots and whole.blocks["self"] // 2 == half.blocks["self"]
