"""The model room, in this process: company, long prompts, the adapter, and text that looks like a special token."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.normalizers import NFC

from tests.helpers import flash_stand_in
from tests.helpers.asking import TOLERANCE, ask, assert_equals, load
from tests.helpers.massive import make_massive
from tests.helpers.reference import Reference, relative_error, strict_error
from tests.helpers.tables import table_rows
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.data.decode import open_picture
from vqa_embeddings.engine.greedy import choose_tokens
from vqa_embeddings.engine.outcome import checked
from vqa_embeddings.engine.sequence import NOT_FINITE
from vqa_embeddings.errors import PromptTooLong
from vqa_embeddings.layers.kv_cache import Capacity, KVCache, count_blocks
from vqa_embeddings.models.phi4mm.model import LONG, PIXEL_MEAN, SHORT, Phi4, _without_added_tokens
from vqa_embeddings.models.phi4mm.vision import patch_positions
from vqa_embeddings.records import Extracted, Failed
from vqa_embeddings.schema import QUERY_TOKEN, VISION_TOKEN


@pytest.fixture(scope="module")
def model(checkpoint) -> Phi4:
    return load(checkpoint)


def test_a_row_does_not_see_its_company(model):
    """Alone, beside longer questions, and beside shorter ones: the same states and the same answer."""
    picture = open_picture(DATA / "cat.jpg")
    questions = [row["question"] for row in table_rows() if row["image_id"] == "cat.jpg"]
    questions += ["Why?", "Tell me " + "very " * 60 + "much about it."]
    together = ask(model, [(picture, questions)])
    for question, found in zip(questions, together, strict=True):
        [alone] = ask(model, [(picture, [question])])
        assert found.answer == alone.answer
        for index in range(len(model.spec.layers)):
            assert relative_error(found.vectors[QUERY_TOKEN][index], alone.vectors[QUERY_TOKEN][index]) < TOLERANCE
            assert relative_error(found.vectors[VISION_TOKEN][index], alone.vectors[VISION_TOKEN][index]) < TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("lora", ["merged", "adapter"])
def test_attention_and_adapter_kept_or_merged_give_the_same_values(checkpoint, expected, lora, attention):
    """On a picture with masked patches and on one without: there the library's own attention is causal."""
    engine = load(checkpoint, lora, attention)
    for image_id in ("coffee.jpg", "astronaut.jpg"):
        rows = [row for row in table_rows() if row["image_id"] == image_id][:3]
        found_rows = ask(engine, [(open_picture(DATA / image_id), [row["question"] for row in rows])])
        for row, found in zip(rows, found_rows, strict=True):
            assert_equals(engine, found, expected[row["question_id"]])


def test_a_picture_that_fills_its_crops_is_seen_in_both_directions(model, reference):
    picture = Image.effect_noise((448, 448), 90).convert("RGB")
    pixels = model.preprocess(picture)
    assert pixels.mask.all(), "this picture was to have no masked patch"
    wanted = reference.row(picture, "Why?", 1)
    [seen] = model.encode_images([pixels])
    assert relative_error(seen.vision_only.numpy(), wanted.vision_only) < TOLERANCE


@pytest.fixture(scope="module")
def near_the_edge(model) -> Image.Image:
    """A picture whose part of the prompt is just under 4096 tokens."""
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    for width in range(2100, 2240, 14):
        picture = noise.resize((width, 1344))
        if 4040 < model.preprocess(picture).tokens < 4090:
            return picture
    raise AssertionError("no such size")


@pytest.mark.slow
def test_questions_on_either_side_of_4096_tokens_and_an_answer_that_crosses_it(checkpoint, reference, near_the_edge):
    tokens = 4
    model = load(checkpoint, tokens=tokens)
    prefix = 1 + model.preprocess(near_the_edge).tokens
    asked = "Is there a dog in the image? " * 40

    def question(length: int) -> str:
        """Text that makes a prompt of that many tokens."""
        return next(text for end in range(len(asked)) if prefix + len(model.tokenize(text := asked[:end])) == length)

    questions = [question(length) for length in (4096 - 20, 4096 - 2, 4096, 4096 + 1)]
    in_company = ask(model, [(near_the_edge, questions)])
    for text, found in zip(questions, in_company, strict=True):
        [alone] = ask(model, [(near_the_edge, [text])])
        wanted = reference.row(near_the_edge, text, tokens)
        assert wanted.tokens == prefix + len(model.tokenize(text))
        assert_equals(model, found, wanted)
        assert_equals(model, alone, wanted)


@pytest.mark.slow
def test_a_picture_of_more_than_4096_tokens(checkpoint, reference):
    tokens = 2
    model, picture = load(checkpoint, tokens=tokens), open_picture(DATA / "coffee.jpg").resize((2048, 1536))
    [found] = ask(model, [(picture, ["Is there a cup in the image?"])])
    wanted = reference.row(picture, "Is there a cup in the image?", tokens)
    assert wanted.tokens > 5000
    assert_equals(model, found, wanted)


def test_float32_is_float32_beside_values_that_dwarf_the_rest(checkpoint, tmp_path):
    """As in a trained decoder. An error relative to the largest value would not see one in any other dimension."""
    make_massive(checkpoint, tmp_path / "massive")
    model, reference = load(tmp_path / "massive", tokens=2), Reference(tmp_path / "massive")
    picture, questions = open_picture(DATA / "coffee.jpg"), ["Is there a cup?", "Where?"]
    for question, found in zip(questions, ask(model, [(picture, questions)]), strict=True):
        wanted = reference.row(picture, question, 2)
        assert_equals(model, found, wanted)
        for index, layer in enumerate(model.spec.layers[:-1]):
            expected, moved = wanted.query_token[layer], found.vectors[QUERY_TOKEN][index].copy()
            assert np.abs(expected).max() > 20 * np.sort(np.abs(expected))[-2], "no value dwarfs the rest"
            moved[7] += 0.2
            assert relative_error(moved, expected) < TOLERANCE < strict_error(moved, expected)


def test_the_regime_of_the_rotary_factors_shows_in_the_states(model, near_the_edge):
    """Otherwise the test above would pass with any."""
    [shown] = model.encode_images([model.preprocess(near_the_edge)])
    kv = KVCache(model.spec.kv_groups, Capacity({"self": 80}, slots=1, width=64), torch.float32, torch.device("cpu"))
    blocks = {"self": list(range(count_blocks(shown.prompt_length)))}
    with torch.inference_mode():
        short, long = (model.prefill_image(shown, variant, kv, blocks) for variant in (SHORT, LONG))
    assert relative_error(long[-1].numpy(), short[-1].numpy()) > 0.01


def test_a_prompt_beyond_the_context_is_a_failed_row(model, monkeypatch):
    picture = open_picture(DATA / "cat.jpg")
    fitting, beyond = "Why?", "Why, oh why is that so?"
    prefix = 1 + model.preprocess(picture).tokens
    monkeypatch.setattr(model, "_context", prefix + len(model.tokenize(fitting)) + 1)
    found = ask(model, [(picture, [fitting, beyond, fitting])])
    assert [isinstance(record, Extracted) for record in found] == [True, False, True]
    assert (found[1].error, "context" in found[1].message) == ("PromptTooLong", True)


@pytest.mark.parametrize("text", ["<|end|>", "<|image|>", "<|user|> hi", "a <|endoftext|> b", "<|image_1|>"])
def test_text_that_looks_like_a_special_token_is_text(model, text):
    tokenizer = model._tokenizer
    tokens = model.tokenize(text)[:-2]
    assert not set(tokens) & set(tokenizer.added_tokens_decoder)
    assert tokenizer.decode(tokens) == text


def test_added_tokens_that_are_not_special_are_text_in_a_question_too(model):
    """As a tokenizer's tool tokens may be, which the library's own split_special_tokens leaves whole."""
    backend = Tokenizer.from_str(model._tokenizer.backend_tokenizer.to_str())
    backend.add_tokens([AddedToken("<|tool|>", special=False)])
    assert backend.token_to_id("<|tool|>") in backend.encode("a <|tool|> b").ids
    assert backend.token_to_id("<|tool|>") not in _without_added_tokens(backend).encode("a <|tool|> b").ids


HARD = [
    "",
    " ",
    "<|end|>",
    "a <|tool|> b<|image|> ",
    "<|user|>\n<|endoftext|>",
    "caf\u00e9 cafe\u0301 \u4f60\u597d \U0001f642\u200d",
]
HARD += ["\0\ufffd\u2028\u00a0x", "x" * 5000, "Why? " * 2000, "".join(map(chr, range(0x20, 0xD800, 7)))]


@pytest.mark.parametrize("normalizer", [None, NFC()])
def test_plain_text_is_split_as_by_the_same_tokenizer_written_out_without_its_added_tokens(model, normalizer):
    backend = Tokenizer.from_str(model._tokenizer.backend_tokenizer.to_str())
    backend.add_tokens([AddedToken("<|tool|>", special=False)])
    if normalizer is not None:
        backend.normalizer = normalizer
    description = json.loads(backend.to_str())
    written_out = Tokenizer.from_str(json.dumps({**description, "added_tokens": [], "post_processor": None}))
    shared = _without_added_tokens(backend)
    for text in HARD:
        assert shared.encode(text).ids == written_out.encode(text).ids
    assert backend.to_str() == json.dumps(description, separators=(",", ":"), ensure_ascii=False), "it was changed"


@pytest.mark.parametrize("text", ["Why?", "  Why?", "Why? ", "\n\tWhy?\u00a0", "", " ", "caf\u00e9 \u4f60\u597d"])
def test_an_ordinary_question_has_the_tokens_of_the_whole_prompt(model, text):
    tokenizer = model._tokenizer
    whole = tokenizer(f"<|user|>{tokenizer.image_token}{text}<|end|><|assistant|>")["input_ids"]
    assert whole == model._head + model.tokenize(text)


def test_image_and_audio_tokens_are_never_chosen(model, monkeypatch):
    picture = open_picture(DATA / "cat.jpg")
    [found] = ask(model, [(picture, ["Why?"])])
    written: list[list[int]] = []
    monkeypatch.setattr(model, "detokenize", lambda tokens: str(written.append(list(tokens))))
    weight, image_token = model.decoder._head.weight.data, model._image_token
    before = weight[image_token].clone()
    try:
        weight[image_token] = 10 * torch.from_numpy(
            found.vectors[QUERY_TOKEN][-1]
        )  # it would win the first step by far
        ask(model, [(picture, ["Why?"])])
        monkeypatch.setattr(model, "spec", replace(model.spec, suppressed_tokens=[]))
        ask(model, [(picture, ["Why?"])])
    finally:
        weight[image_token] = before
    assert image_token in written[1]
    assert not set(written[0]) & {image_token, model._tokenizer.audio_token_id}


def test_a_state_that_is_not_finite_fails_its_row_and_names_the_layer(model):
    [found] = ask(model, [(open_picture(DATA / "cat.jpg"), ["Why?"])])
    found.vectors[QUERY_TOKEN][2, 5] = np.inf
    record = checked(found, model.spec.layers)
    assert isinstance(record, Failed)
    assert (record.row, record.error) == (found.row, "NonFiniteValues")
    assert "query_token_representation/layer_4" in record.message


def test_a_further_vector_that_is_not_finite_fails_its_row_too(model):
    [found] = ask(model, [(open_picture(DATA / "cat.jpg"), ["Why?"])])
    assert isinstance(checked(found, model.spec.layers), Extracted)
    found.vectors[PIXEL_MEAN][3] = np.nan
    record = checked(found, model.spec.layers)
    assert isinstance(record, Failed) and f"{PIXEL_MEAN} holds 1 values" in record.message


def test_a_question_of_which_no_prompt_can_be_made_fails_its_row_alone(model, monkeypatch):
    tokenize = model.tokenize

    def refuse(question):
        if question == "How?":
            raise PromptTooLong("no prompt")
        return tokenize(question)

    monkeypatch.setattr(model, "tokenize", refuse)
    why, how, where = ask(model, [(open_picture(DATA / "cat.jpg"), ["Why?", "How?", "Where?"])])
    assert (type(why), how, type(where)) == (Extracted, Failed(1, "PromptTooLong", "no prompt"), Extracted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_token_is_chosen_where_a_logit_is_not_finite(model, dtype, value):
    """Wherever it is, also at a token that is never chosen; the rows beside it have theirs."""
    logits = torch.randn(4, model.decoder.embed.num_embeddings).to(dtype)
    suppressed = torch.tensor(model.spec.suppressed_tokens)
    wanted = logits.index_fill(1, suppressed, -torch.inf).argmax(dim=-1)
    for place in (0, 17, int(suppressed[0])):
        broken = logits.clone()
        broken[2, place] = value
        found = choose_tokens(broken, suppressed)
        assert found.tolist() == [*wanted[:2].tolist(), NOT_FINITE, int(wanted[3])]


def test_logits_that_are_not_finite_fail_their_row_at_that_token_and_no_other(model, monkeypatch):
    """One row alone writes a token that is read as NaN; the others have the same bits as without."""
    pictures = [open_picture(DATA / name) for name in ("cat.jpg", "rocket.jpg")]
    asked = [(picture, ["Why?", "Where is it?", "How many are there?"]) for picture in pictures]
    written: dict[int, list[int]] = {}
    text, embed = model.detokenize, model.decoder.embed

    def keep(tokens):
        written[len(written)] = list(tokens)
        return text(tokens)

    monkeypatch.setattr(
        model, "detokenize", lambda tokens: (written.setdefault(len(written), list(tokens)), text(tokens))[1]
    )
    sound = ask(model, asked)
    answers = {text(tokens): tokens for tokens in written.values()}
    row, token = next(
        (record.row, token)
        for record in sound
        for token in answers[record.answer][1:-1]
        if sum(token in answers[other.answer] for other in sound) == 1
    )
    place = answers[sound[row].answer].index(token)

    def not_finite(tokens):
        return embed(tokens).masked_fill((tokens == token)[..., None], torch.nan)

    monkeypatch.setattr(model.decoder, "embed", not_finite)
    for found, wanted in zip(ask(model, asked), sound, strict=True):
        if found.row == row:
            assert (type(found), found.error) == (Failed, "NonFiniteValues")
            assert f"the logits of token {place + 2} of the answer" in found.message
        else:
            assert found.answer == wanted.answer
            for name, vectors in wanted.vectors.items():
                assert np.array_equal(found.vectors[name], vectors)


def test_a_patch_has_the_position_that_the_library_gives_it_in_float32():
    """Of crops of every height and width. In bfloat16 transformers 5.17 rounds some of them into the wrong place."""
    from transformers.models.phi4_multimodal.modeling_phi4_multimodal import (
        Phi4MultimodalVisionConfig,
        Phi4MultimodalVisionEmbeddings,
    )

    config = Phi4MultimodalVisionConfig(hidden_size=2, intermediate_size=2, num_attention_heads=1)
    library, side, seen = Phi4MultimodalVisionEmbeddings(config), 32, []
    library.position_embedding.register_forward_hook(lambda module, given, made: seen.append(given[0]))
    heights, widths = torch.meshgrid(torch.arange(1, side + 1), torch.arange(1, side + 1), indexing="ij")
    rows = torch.arange(side)[None] < heights.reshape(-1, 1)
    columns = torch.arange(side)[None] < widths.reshape(-1, 1)
    masks = rows[:, :, None] & columns[:, None]
    for some in masks.split(128):
        with torch.inference_mode():
            library(torch.zeros(len(some), 3, config.crop_size, config.crop_size), some)
        assert torch.equal(patch_positions(some), seen.pop())


@pytest.mark.parametrize("size", [(640, 426), (448, 448), (300, 290)])
def test_a_picture_is_seen_alike_in_every_number_format(model, checkpoint, size):
    """Its crops show 19 or 29 rows of patches, among others: a wrong position is an error of another size."""
    picture = Image.effect_noise(size, 90).convert("RGB")
    [wanted] = model.encode_images([model.preprocess(picture)])
    narrow = load(checkpoint, dtype="bfloat16")
    pixels = narrow.preprocess(picture)
    assert pixels.crops.dtype == torch.bfloat16
    [seen] = narrow.encode_images([pixels])
    assert relative_error(seen.vision_only.numpy(), wanted.vision_only.numpy()) < 0.02


def test_flash_attention_is_told_what_it_must_not_see(checkpoint, expected, monkeypatch):
    """Through its interface in plain torch; the kernels themselves run in tests/gpu/check.sh."""
    flash_stand_in.install(monkeypatch)
    engine = load(checkpoint)
    for layer in (engine.decoder._layers[0], engine.vision._layers[0]):
        monkeypatch.setattr(layer.self_attn.config, "_attn_implementation", "flash_attention_2")
    for image_id in ("coffee.jpg", "astronaut.jpg"):
        rows = [row for row in table_rows() if row["image_id"] == image_id][:3]
        found = ask(engine, [(open_picture(DATA / image_id), [row["question"] for row in rows])])
        for row, answer in zip(rows, found, strict=True):
            assert_equals(engine, answer, expected[row["question_id"]])
    assert {True, False} == set(flash_stand_in.calls)
