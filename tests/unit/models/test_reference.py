"""The library as a reference of a self-check: it gives what the tests' own reference gives, which shares no code."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.helpers.launching import TOKENS
from tests.helpers.reference import strict_error
from tests.helpers.tables import table_rows
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.errors import InputError, PictureUnreadable, RowError
from vqa_embeddings.models.phi4mm.random_checkpoint import make_checkpoint
from vqa_embeddings.models.phi4mm.reference import LibraryReference
from vqa_embeddings.models.registry import find_checkpoint
from vqa_embeddings.schema import QUERY_TOKEN, VISION_ONLY, VISION_TOKEN

ROWS = table_rows()


def load(folder, lora: str = "merged", dtype: str = "float32") -> LibraryReference:
    return LibraryReference(find_checkpoint(str(folder), None, folder, lora), "cpu", dtype)


def ask(reference, row, layers=(0, 2, 4, 6, 7), tokens=TOKENS, question=None):
    image = Image.open(DATA / row["image_id"]).convert("RGB")
    return reference.extract(image, question or row["question"], layers, tokens)


@pytest.fixture(scope="module", params=["native", "original"])
def library(request, checkpoint, original) -> LibraryReference:
    return load(original if request.param == "original" else checkpoint)


def test_it_gives_what_the_tests_own_reference_gives(library, expected):
    for row in (ROWS[0], ROWS[-1]):
        found, wanted = ask(library, row), expected[row["question_id"]]
        assert found.answer == wanted.answer
        assert strict_error(found.vectors[VISION_ONLY], wanted.vision_only) < 1e-5
        for index, layer in enumerate((0, 2, 4, 6, 7)):
            assert strict_error(found.vectors[VISION_TOKEN][index], wanted.vision_token[layer]) < 1e-5
            assert strict_error(found.vectors[QUERY_TOKEN][index], wanted.query_token[layer]) < 1e-5


@pytest.mark.parametrize("wrong", ["all", "later", "none"])
def test_an_answer_does_not_depend_on_what_the_cache_guesses(library, expected, monkeypatch, wrong):
    guess = library._guess

    def badly(embeddings, most):
        if wrong == "none":
            return []
        tokens = guess(embeddings, most)
        return tokens if wrong == "later" and len(tokens) < 3 else [*tokens[:2], *[7] * len(tokens[2:])]

    monkeypatch.setattr(library, "_guess", badly)
    row = ROWS[0]
    assert ask(library, row, layers=(0,)).answer == expected[row["question_id"]].answer


def test_what_the_two_read_differently_is_no_row_for_it(library):
    with pytest.raises(RowError, match=r"its question holds <\|end\|>, which the library takes for a token"):
        ask(library, ROWS[0], question="What <|end|> is it?")
    with pytest.raises(PictureUnreadable, match="the library's processor does not take it"):
        library.extract(Image.new("RGB", (1, 4000)), "Why?", [0], 2)
    if not library._native:
        with pytest.raises(RowError, match="white space"):
            ask(library, ROWS[0], question=" Why?")


def test_an_adapter_that_the_library_would_leave_out_without_a_word_is_refused(checkpoint, tmp_path):
    """Under other names it would begin with nothing, and the model answer all the same."""
    from safetensors.torch import load_file, save_file

    make_checkpoint(tmp_path / "model")
    path = tmp_path / "model" / "vision-lora" / "adapter_model.safetensors"
    found = find_checkpoint(str(tmp_path / "model"), None, tmp_path)
    save_file({f"another.{name}": tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(InputError, match=r"does not load the vision LoRA of .*; leave out --self-check"):
        LibraryReference(found, "cpu", "float32")


def test_weights_that_hold_the_adapter_are_taken_as_they_are(checkpoint):
    """`--lora none` asks for it; whether they do hold it is looked at where the model is loaded."""
    plain, adapted = (ask(load(checkpoint, lora), ROWS[0], tokens=1) for lora in ("none", "merged"))
    assert strict_error(plain.vectors[QUERY_TOKEN][0], adapted.vectors[QUERY_TOKEN][0]) > 0.1
    assert np.array_equal(plain.vectors[VISION_ONLY], adapted.vectors[VISION_ONLY])


@pytest.mark.parametrize("layer", [0, -3, 3])
def test_a_config_that_reads_pictures_before_or_beyond_the_vision_layers_is_refused(tmp_path, layer):
    make_checkpoint(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    count = config["vision_config"]["num_hidden_layers"]
    config["vision_config"]["feature_layer"] = {0: 0, -3: -count - 1, 3: count + 1}[layer]
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"at feature_layer -?\d+ of vision_config, which is the output of none of"):
        load(tmp_path / "model")
