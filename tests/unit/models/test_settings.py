"""What a checkpoint's small files say of pictures and of the end of an answer, wherever they say it."""

from __future__ import annotations

import json
from io import StringIO

import pytest

from vqa_embeddings.errors import InputError
from vqa_embeddings.models.phi4mm import settings
from vqa_embeddings.models.phi4mm.settings import HEAD, added_tokens, find_ends, find_picture_settings

AUDIO = {"feature_extractor_type": "Phi4MultimodalFeatureExtractor", "sampling_rate": 16000, "feature_size": 80}
PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
BOTH_TYPES = {"feature_extractor_type": "Phi4MMAudioExtractor", "image_processor_type": "Phi4MMImageProcessor"}


def pictures(preprocessor: dict | None = None, processor: dict | None = None, config: dict | None = None):
    files = {PROCESSOR: processor, PREPROCESSOR: preprocessor}
    return find_picture_settings(
        "model", {name: file for name, file in files.items() if file is not None}, config or {}
    )


@pytest.mark.parametrize(
    ("preprocessor", "processor", "place"),
    [
        ({"dynamic_hd": 16}, None, "preprocessor_config.json"),
        ({"dynamic_hd": 16, **BOTH_TYPES}, {"processor_class": "Phi4MMProcessor"}, "preprocessor_config.json"),
        ({"image_processor": {"dynamic_hd": 16}}, None, "preprocessor_config.json (image_processor)"),
        (AUDIO, {"image_processor": {"dynamic_hd": 16}, "audio_processor": AUDIO}, f"{PROCESSOR} (image_processor)"),
        (AUDIO, {"dynamic_hd": 16}, "processor_config.json"),
        ({**AUDIO, "dynamic_hd": 16}, None, "preprocessor_config.json"),
        (None, {"a": {"b": {"dynamic_hd": 16}}}, "processor_config.json (a.b)"),
        ({"dynamic_hd": 16}, {"image_processor": {"dynamic_hd": 16}}, f"{PROCESSOR} (image_processor)"),
    ],
)
def test_the_number_of_crops_is_taken_from_wherever_it_is_named(preprocessor, processor, place):
    found = pictures(preprocessor, processor)
    assert (found.crops, found.given["dynamic_hd"], found.crops_from) == (16, 16, place)


@pytest.mark.parametrize("files", [(), (AUDIO,), (AUDIO, {"image_processor": {"patch_size": 14}})])
def test_where_no_place_names_a_number_of_crops_the_models_own_is_assumed(files):
    found = pictures(*files)
    assert (found.crops, found.given["dynamic_hd"], found.crops_from) == (36, 36, None)
    assert found.describe() == "crops: 36 a picture at most, assumed: no file of the checkpoint names dynamic_hd"


@pytest.mark.parametrize(
    ("preprocessor", "processor", "config", "saying"),
    [
        ({"dynamic_hd": 16}, {"image_processor": {"dynamic_hd": 36}}, {}, [PREPROCESSOR, "16", PROCESSOR, "36"]),
        ({"dynamic_hd": 16}, {"dynamic_hd": 36}, {}, [PREPROCESSOR, "16", PROCESSOR, "36"]),
        ({"dynamic_hd": 16, "image_processor": {"dynamic_hd": 36}}, None, {}, [f"{PREPROCESSOR} (image_processor)"]),
        ({"image_mean": [0.5] * 3}, {"i": {"image_mean": 0.1}}, {}, ["image_mean [0.5, 0.5, 0.5]", "[0.1, 0.1, 0.1]"]),
        ({"do_rescale": True}, {"do_rescale": False}, {}, [PREPROCESSOR, PROCESSOR, "do_rescale"]),
        ({"size": {"height": 224, "width": 224}}, None, {}, ["size 224", "config.json's vision tower has 448"]),
        ({"size": {"height": 448, "width": 224}}, None, {}, ["size [448, 224]"]),
        (
            {"size": 448},
            None,
            {"vision_config": {"crop_size": 224}},
            ["size 448", "config.json's vision tower has 224"],
        ),
        ({"patch_size": 16}, None, {}, ["patch_size 16", "config.json's vision tower has 14"]),
        ({"crop_size": 336}, None, {}, ["crop_size 336", "the library's image processor has 448"]),
        (None, None, {"embd_layer": {"image_embd_layer": {"crop_size": 336}}}, ["config.json (embd_layer.image_embd"]),
        ({"do_resize": False}, None, {}, ["do_resize False", "the library's image processor has True"]),
        ({"do_center_crop": True}, None, {}, ["do_center_crop True", "the library's image processor has False"]),
        *(({"dynamic_hd": bad}, None, {}, [f"dynamic_hd {bad!r}"]) for bad in (None, 0, -1, True, 36.0, "36")),
    ],
)
def test_what_contradicts_itself_or_the_model_is_refused_and_both_places_are_named(
    preprocessor, processor, config, saying
):
    with pytest.raises(InputError) as refusal:
        pictures(preprocessor, processor, config)
    for part in ("model: ", *saying):
        assert part in str(refusal.value)


def test_one_value_in_several_forms_is_no_contradiction():
    found = pictures(
        {"size": {"height": 448, "width": 448}, "crop_size": [448, 448], "image_mean": 0.5, "do_resize": None},
        {"image_processor": {"size": 448, "crop_size": 448, "image_mean": [0.5, 0.5, 0.5], "do_rescale": False}},
        {"embd_layer": {"image_embd_layer": {"crop_size": 448}}, "vision_config": None},
    )
    assert found.given == {
        **{"size": 448, "patch_size": 14, "dynamic_hd": 36},
        **{"image_mean": [0.5, 0.5, 0.5], "do_rescale": False},
    }


def test_what_the_audio_extractor_says_is_not_taken_for_pictures():
    sound = {**AUDIO, "do_normalize": False, "size": 80}
    assert pictures(sound, {"audio_processor": sound}).given == pictures().given


NAMES = {512: "<|endoftext|>", 516: "<|end|>"}


def ends(config: object, generation: object = "absent", native: bool = True) -> dict[int, str]:
    files = {"config.json": {"vocab_size": 519, "eos_token_id": config}}
    if generation != "absent":
        files["generation_config.json"] = {"eos_token_id": generation}
    return find_ends("model", files, native, NAMES)


def test_an_answer_ends_at_all_tokens_that_either_file_names_and_at_the_end_token():
    assert ends([512, 516], [512, 516]) == {512: "<|endoftext|> (512)", 516: "<|end|> (516)"}
    assert set(ends(512, 7)) == set(ends([7], [512])) == {7, 512, 516}
    assert set(ends(512)) == set(ends(512, None)) == {512, 516}
    assert set(ends(None, native=False)) == {516}
    assert ends([7])[7] == "token 7"
    assert ends([7, 519], [-1])[519] == "token 519, which is not in the vocabulary"
    assert ends(512, [-1])[-1] == "token -1, which is not in the vocabulary"


def test_where_a_native_config_names_no_end_the_librarys_two_are_meant():
    assert set(find_ends("model", {"config.json": {}}, True, {})) == {199999, 200020}


@pytest.mark.parametrize("bad", ["<|end|>", 1.0, True, {"id": 1}, ["a"], [None]])
def test_an_end_token_that_is_no_number_is_refused(bad):
    with pytest.raises(InputError, match=r"model: generation_config\.json has eos_token_id .*; expected numbers of"):
        ends(512, bad)


@pytest.mark.parametrize("head", [HEAD, 60, 1])
def test_the_added_tokens_are_found_wherever_they_stand_in_the_tokenizers_file(monkeypatch, head):
    monkeypatch.setattr(settings, "HEAD", head)
    added = [{"id": 1, "content": "<|end|>"}, {"id": 2, "content": '"added_tokens": []'}]
    vocabulary = {"model": {"vocab": {"added_tokens": 0}}}
    expected = {1: "<|end|>", 2: '"added_tokens": []'}
    for indent in (None, 2):
        for order in ({"added_tokens": added, **vocabulary}, {**vocabulary, "added_tokens": added}):
            assert added_tokens(StringIO(json.dumps(order, indent=indent)), {}) == expected
    decoder = {"added_tokens_decoder": {"1": {"content": "other"}, "3": {"content": "<|tool|>"}, "x": 1}}
    assert added_tokens(StringIO(json.dumps({"added_tokens": added})), decoder) == {**expected, 3: "<|tool|>"}
    for broken in ("", "{}", '{"added_tokens": [1', '{"added_tokens": [{"id": 1}]}'):
        assert added_tokens(StringIO(broken), {}) == {}


def test_only_the_head_of_a_large_tokenizers_file_is_read():
    file = StringIO(json.dumps({"added_tokens": [{"id": 1, "content": "<|end|>"}], "model": "x" * (2 * HEAD)}))
    assert added_tokens(file, {}) == {1: "<|end|>"}
    assert file.tell() == HEAD
