"""The rows that are answered together: whatever the batch, the order and the memory, each is what it is alone."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.asking import TOLERANCE, ask, assert_equals, load
from tests.helpers.launching import TOKENS
from tests.helpers.reference import strict_error
from tests.helpers.tables import table_rows
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.base.timings import Timings
from vqa_embeddings.data.decode import open_picture
from vqa_embeddings.engine import capacity, core, scheduler
from vqa_embeddings.engine.capacity import CapacityRequest, find_capacity, round_width
from vqa_embeddings.engine.core import Engine
from vqa_embeddings.engine.runner import Runner, _power_of_two
from vqa_embeddings.layers.attention import Partial, attend_partially, merge_partials, merge_two
from vqa_embeddings.layers.kv_cache import BLOCK, Capacity, KVGroup, Prefix, count_blocks
from vqa_embeddings.layers.prefix_sharing import share_first_blocks, share_named_blocks
from vqa_embeddings.models.phi4mm.checkpoint import PIXEL_MEAN
from vqa_embeddings.models.phi4mm.decoder import LONGEST_PREFIX
from vqa_embeddings.models.phi4mm.model import Phi4
from vqa_embeddings.models.phi4mm.vision import PATCHES_AT_ONCE, needed_patches
from vqa_embeddings.records import Extracted
from vqa_embeddings.schema import QUERY_TOKEN, VISION_ONLY, VISION_TOKEN

BLOCKS_OF_A_SMALLER_ONE = 3


@pytest.fixture(scope="module")
def model(checkpoint) -> Phi4:
    return load(checkpoint)


@pytest.fixture(scope="module")
def by_picture() -> dict[str, list[dict[str, str]]]:
    groups: dict[str, list[dict[str, str]]] = {}
    for row in table_rows():
        groups.setdefault(row["image_id"], []).append(row)
    return groups


def ask_rows(model: Phi4, groups: list[tuple[str, list[dict[str, str]]]], batch_size: int | None):
    """The records of rows of the shipped table, each with its row."""
    asked = [(open_picture(DATA / name), [row["question"] for row in rows]) for name, rows in groups]
    return zip([row for _, rows in groups for row in rows], ask(model, asked, batch_size), strict=True)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8, 13, 31, 64, None])
def test_every_row_equals_the_reference_at_every_batch_size_and_in_any_order(model, by_picture, expected, batch_size):
    chance = random.Random(batch_size)
    groups = [(name, chance.sample(rows, len(rows))) for name, rows in by_picture.items()]
    chance.shuffle(groups)
    for row, found in ask_rows(model, groups, batch_size):
        assert_equals(model, found, expected[row["question_id"]])


def test_rows_share_a_batch_whatever_their_picture_and_a_slot_is_taken_again(model, by_picture, monkeypatch):
    """One question a picture: the pictures are read once each, and the steps are far fewer than the tokens."""
    steps, read = [], []
    decode, prefill = Runner.decode, Runner.prefill_image

    def noting(self, rows):
        steps.append(len({id(row.prefix) for row in rows}))
        return decode(self, rows)

    monkeypatch.setattr(Runner, "decode", noting)
    monkeypatch.setattr(Runner, "prefill_image", lambda self, work: (read.append(1), prefill(self, work))[1])
    list(ask_rows(model, [(name, rows[:2]) for name, rows in by_picture.items()], batch_size=4))
    assert len(read) == len(by_picture)
    assert max(steps) >= 2, "no step was for rows of several pictures"
    assert len(steps) < len(by_picture) * 2 * (TOKENS - 1) / 2


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_running_out_of_memory_halves_the_batch_and_loses_nothing(model, by_picture, expected, monkeypatch, error):
    """As a GPU would: while seeing a picture, and wherever more than three rows are computed together."""
    failures = []
    forward = model.forward

    def too_many(kv, inputs):
        if len(inputs.tokens) > 3 and (inputs.tokens.shape[1] == 1 or len(failures) > 1):
            failures.append(len(inputs.tokens))
            raise error
        return forward(kv, inputs)

    seen = model.encode_images

    def too_many_seen(pixels):
        if not failures:
            failures.append(0)
            raise error
        return seen(pixels)

    monkeypatch.setattr(model, "forward", too_many)
    monkeypatch.setattr(model, "encode_images", too_many_seen)
    for row, found in ask_rows(model, list(by_picture.items()), 32):
        assert_equals(model, found, expected[row["question_id"]])
    assert len(failures) >= 3


def test_running_out_of_memory_with_one_row_ends_the_run(model, by_picture, monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", never)
    with pytest.raises(torch.OutOfMemoryError):
        list(ask_rows(model, list(by_picture.items()), 4))


def test_a_row_whose_values_are_not_finite_harms_no_row_beside_it_or_after_it(model, by_picture, expected, monkeypatch):
    """NaN in its keys and values, in its slot and in its picture's blocks, all of which others use after it."""
    pictures, broken = model.encode_images, []

    def break_the_first(pixels):
        made = pictures(pixels)
        if not broken:
            broken.append(1)
            made[0].inputs[5:] = torch.nan
        return made

    monkeypatch.setattr(model, "encode_images", break_the_first)
    groups = list(by_picture.items())
    for index, (row, found) in enumerate(ask_rows(model, groups, 4)):
        if index < len(groups[0][1]):
            assert found.error == "NonFiniteValues"
        else:
            assert_equals(model, found, expected[row["question_id"]])


def test_what_a_row_leaves_behind_in_its_slot_does_not_reach_the_one_who_takes_it(model, monkeypatch):
    """A row full of NaN with a long question leaves early, and a row with a short one moves into its slot."""
    pictures = model.encode_images

    def break_the_first(pixels):
        made = pictures(pixels)
        if made[0].extra[PIXEL_MEAN] is broken.mean:
            made[0].inputs[5:] = torch.nan
        return made

    monkeypatch.setattr(model, "_ends", {*model._ends, 0})  # what is chosen where all is NaN
    monkeypatch.setattr(model, "encode_images", break_the_first)
    broken, picture = model.preprocess(open_picture(DATA / "rocket.jpg")), open_picture(DATA / "cat.jpg")
    questions = ["Is there " + "really " * 15 + "a cat?", "Why?", "Where?", "Is it?"]
    asked = iter([([0], broken), ([1, 2, 3], model.preprocess(picture))])
    engine, records = Engine(model, questions, asked, 4, Timings()), {}
    while not engine.is_done:
        records.update({record.row: record for record in engine.advance()})
    assert records[0].error == "NonFiniteValues"
    for row in (1, 2, 3):
        [alone] = ask(model, [(picture, [questions[row]])])
        assert records[row].answer == alone.answer
        assert relative_difference(records[row], alone) < TOLERANCE


@pytest.mark.slow
def test_a_question_too_wide_for_the_slots_and_one_of_many_passes(model, monkeypatch):
    picture = open_picture(DATA / "cat.jpg")
    wide = "Tell me " + "very " * 700 + "much about it."
    questions = ["Why?", wide, "Is there a cat in the image?", wide[:900], "Why?"]
    alone = [ask(model, [(picture, [question])])[0] for question in questions]
    assert len(model.tokenize(wide)) > capacity.WIDTH_STEP + scheduler.USUAL_QUESTION + TOKENS
    monkeypatch.setattr(capacity, "SCORES_AT_ONCE", 1 << 18)
    widths: list[int] = []
    begin = Runner.__init__
    monkeypatch.setattr(
        Runner,
        "__init__",
        lambda self, *given: widths.append(given[1].width) or begin(self, *given),
    )
    for found, wanted in zip(ask(model, [(picture, questions)], 3), alone, strict=True):
        assert found.answer == wanted.answer
        assert relative_difference(found, wanted) < TOLERANCE
    assert widths[0] == widths[-1] < max(widths), "the rows after the wide one were to have a usual batch again"


@pytest.mark.slow
def test_a_lack_of_memory_for_long_questions_takes_nothing_from_the_others(model, monkeypatch):
    """It shows where the cache for them is made, and again with half of it."""
    picture = open_picture(DATA / "cat.jpg")
    wide = "Tell me " + "very " * 700 + "much about it."
    questions = ["Why?", wide, wide, wide, "Where is it?"]
    wanted = ask(model, [(picture, questions)])
    sizes, make = [], Runner

    def scant(model, size):
        sizes.append(size)
        if size.width > 1000 and size.slots > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(model, size)

    monkeypatch.setattr(core, "Runner", scant)
    stages = Timings()
    engine = Engine(model, questions, iter([(list(range(5)), model.preprocess(picture))]), None, stages)
    found = []
    while not engine.is_done:
        found += engine.advance()
    for one, two in zip(sorted(found, key=lambda record: record.row), wanted, strict=True):
        assert one.answer == two.answer
    usual, wide_ones = ([size for size in sizes if (size.width > 1000) == wide] for wide in (False, True))
    assert len(usual) == 2 and usual[0].slots == usual[1].slots, "before and after the long ones, of the same size"
    slots, blocks = [size.slots for size in wide_ones], [size.blocks["self"] for size in wide_ones]
    assert slots[-1] <= 8 < slots[0] and slots == sorted(slots, reverse=True)
    assert blocks[-1] < blocks[0]
    assert any(f"{slots[-1]} rows with long questions at most" in note for note in stages.notes)


def test_pictures_wait_for_blocks_and_a_picture_larger_than_the_cache_gets_a_larger_one(
    model, by_picture, expected, monkeypatch
):
    """Blocks for one picture at a time, of the smaller ones."""
    sizes = []

    def scant(request, *_):
        blocks = max(BLOCKS_OF_A_SMALLER_ONE, count_blocks(request.prefix.get("self", 0)))
        sizes.append(Capacity({"self": blocks}, 8, round_width(request.width)))
        return sizes[-1]

    monkeypatch.setattr(core, "find_capacity", scant)
    for row, found in ask_rows(model, list(by_picture.items()), 8):
        assert_equals(model, found, expected[row["question_id"]])
    assert len({size.blocks["self"] for size in sizes}) > 1


def test_a_run_that_is_to_stop_finishes_the_rows_under_way_and_begins_none(model, by_picture):
    name, rows = max(by_picture.items(), key=lambda group: len(group[1]))
    pixels = model.preprocess(open_picture(DATA / name))
    pictures = iter([(list(range(len(rows))), pixels)])
    engine = Engine(model, [row["question"] for row in rows], pictures, 4, Timings())
    records = []
    while not engine.is_running:
        records += engine.advance()
    while engine.is_running:
        records += engine.advance(begin=False)
    assert len(records) == 4
    assert not engine.is_done


def test_pictures_of_several_sizes_are_seen_together_as_alone(model, monkeypatch):
    """Crops with and without padding, of odd and even numbers of patches, in one pass of the vision tower."""
    monkeypatch.setitem(PATCHES_AT_ONCE, "cpu", 1 << 20)
    noise = Image.effect_noise((900, 700), 90).convert("RGB")
    sizes = [(448, 448), (640, 480), (470, 333), (1000, 123), (60, 900), (448, 450)]
    pixels = [model.preprocess(noise.resize(size)) for size in sizes]
    odd = [int(mask[:, 0].sum()) % 2 or int(mask[0].sum()) % 2 for one in pixels for mask in one.mask]
    assert any(odd)
    for together, one in zip(model.encode_images(pixels), pixels, strict=True):
        [alone] = model.encode_images([one])
        assert torch.allclose(together.inputs, alone.inputs, rtol=1e-4, atol=1e-5)
        assert torch.allclose(together.vision_only, alone.vision_only, rtol=1e-4, atol=1e-5)


def test_what_the_vision_tower_leaves_out_nobody_reads(model, reference):
    """Pictures whose crops end within a pooled cell, and such as have little else than padding."""
    noise = Image.effect_noise((900, 700), 90).convert("RGB")
    for size in ((470, 333), (640, 480), (1000, 123), (60, 900), (455, 448)):
        picture = noise.resize(size)
        wanted = reference.row(picture, "Why?", 2)
        assert int(needed_patches(model.preprocess(picture).mask.bool()).sum()) < model.preprocess(picture).mask.numel()
        [found] = ask(model, [(picture, ["Why?"])])
        assert isinstance(found, Extracted)
        assert relative_error_of(found, wanted, model.spec.layers) < TOLERANCE


def relative_difference(found: Extracted, wanted: Extracted) -> float:
    pairs = ((found.vectors[name], wanted.vectors[name]) for name in (VISION_TOKEN, QUERY_TOKEN))
    return max(strict_error(*by_layer) for pair in pairs for by_layer in zip(*pair, strict=True))


def relative_error_of(found: Extracted, wanted, layers: list[int]) -> float:
    pairs = [(found.vectors[VISION_ONLY], wanted.vision_only)]
    for index, layer in enumerate(layers):
        pairs += [(found.vectors[VISION_TOKEN][index], wanted.vision_token[layer])]
        pairs += [(found.vectors[QUERY_TOKEN][index], wanted.query_token[layer])]
    return max(strict_error(*pair) for pair in pairs)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 2**16), st.floats(0, 40))
def test_attention_over_parts_of_the_keys_joins_to_attention_over_all(parts, more, seed, sharpness):
    """Also where one part's scores are far above the other's."""
    generator = torch.Generator().manual_seed(seed)
    queries = sharpness * torch.randn(1, 2, 3, 8, generator=generator)
    keys, values = torch.randn(2, 1, 2, sum(parts) + more, 8, generator=generator)
    wanted = (queries @ keys.transpose(2, 3)).softmax(-1) @ values
    most = max(parts)
    blocks = torch.zeros(2, len(parts), 2, most, 8)
    unseen = torch.ones(len(parts), 1, 1, most, dtype=torch.bool)
    start = 0
    for index, count in enumerate(parts):
        blocks[:, index, :, :count] = torch.stack([keys, values])[:, 0, :, start : start + count]
        unseen[index, :, :, :count] = False
        start += count
    each = attend_partially(queries.expand(len(parts), -1, -1, -1), blocks[0], blocks[1], unseen, 1.0)
    index = torch.arange(len(parts))[None]
    first = merge_partials(
        each, torch.cat([index, index], dim=1), torch.tensor([[True] * len(parts) + [False] * len(parts)])
    )
    own = keys[:, :, start:], values[:, :, start:]
    second = attend_partially(queries, *own, torch.zeros(1, 1, 1, more, dtype=torch.bool), 1.0)
    assert torch.allclose(merge_two(Partial(*first), second), wanted, atol=1e-4)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(0, 2**16), st.booleans())
def test_every_row_finds_its_picture_and_every_block_its_rows(pictures, seed, padded):
    chance = random.Random(seed)
    free = list(range(40))
    chance.shuffle(free)
    prefixes = []
    for _ in range(5):
        length = chance.randint(1, 4 * BLOCK)
        prefixes.append(Prefix([free.pop() for _ in range(-(-length // BLOCK))], length, chance.randrange(2)))
    rows = [prefixes[number] for number in pictures]
    if padded:
        sharing, blocks = share_first_blocks(rows, 40, _power_of_two(len(rows)), _power_of_two), list(range(40))
    else:
        sharing, blocks = share_named_blocks(rows)
    for row, prefix in enumerate(rows):
        picture = int(sharing.image[row])
        assert int(sharing.rows[picture, sharing.place[row]]) == row
        found = sharing.blocks[picture][sharing.is_block[picture]]
        assert [blocks[index] for index in found] == prefix.blocks
        assert (sharing.image_of_block[found] == picture).all()
        assert int((~sharing.masked[found]).sum()) == prefix.length == int(sharing.length[row])
        assert int(sharing.rope_variant[row]) == prefix.rope_variant


@given(
    st.integers(0, 1 << 38),
    st.integers(1 << 7, 1 << 15).map(lambda layers: 8 * layers),
    st.integers(1, 10_000),
    st.integers(0, 10_000),
)
def test_a_cache_found_from_the_free_memory_fits_into_it_and_takes_what_must_fit(free, key_bytes, width, keys):
    group = KVGroup("self", key_bytes // 8, 1, 1, per_row=True, longest_prefix=LONGEST_PREFIX)
    assert group.key_bytes(torch.float32) == key_bytes
    request = CapacityRequest(width, {"self": keys}, slots=None, most_slots=None, share=1.0)
    size = find_capacity(request, [group], torch.float32, "cpu", free)
    blocks = size.blocks["self"]
    assert size.width >= width and blocks * BLOCK >= keys and size.slots >= 1
    least = size.slots == 1 or blocks == -(-keys // BLOCK)
    assert least or key_bytes * (size.slots * size.width + blocks * BLOCK) <= free
