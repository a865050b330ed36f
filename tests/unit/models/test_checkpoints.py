"""Checkpoints as users have them: both layouts, the hub's cache, every number format; and those that are refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.asking import ask, load
from tests.helpers.hub_cache import fill_cache
from tests.helpers.launching import TOKENS
from tests.helpers.original_layout import VISION_PATTERN, edit_json, edit_weights, weights_of
from tests.helpers.reference import cosine
from tests.helpers.tables import table_rows
from tests.system.test_refusals import ADAPTERS
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.data.decode import open_picture
from vqa_embeddings.errors import InputError
from vqa_embeddings.models import checkpoint as checkpoints
from vqa_embeddings.models.phi4mm import MODEL
from vqa_embeddings.models.phi4mm.formats import IMAGE_TOKENS
from vqa_embeddings.models.phi4mm.weights import _load_image_processor, load_model
from vqa_embeddings.models.registry import find_checkpoint
from vqa_embeddings.schema import QUERY_TOKEN, VISION_ONLY, VISION_TOKEN


def test_both_layouts_have_the_same_weights_and_settings(checkpoint, original):
    models = [load_model(find_checkpoint(str(p), None, p), "cpu", "float32", "sdpa") for p in (checkpoint, original)]
    (native, *_), (renamed, tokenizer, image_processor) = models
    for (name, tensor), (other_name, other) in zip(
        native.state_dict().items(), renamed.state_dict().items(), strict=True
    ):
        assert name == other_name and torch.equal(tensor, other)
    assert renamed.config.vision_config.image_token_id == tokenizer.convert_tokens_to_ids("<|endoftext10|>")
    assert image_processor.dynamic_hd == 36


def overwrite_preprocessor(folder: Path, **settings: object) -> None:
    """As fine-tunes are saved: the audio extractor's settings over the pictures', which stand in the other file."""
    audio = {"feature_extractor_type": "Phi4MultimodalFeatureExtractor", "sampling_rate": 16000, "do_normalize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(audio))
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings, "audio_processor": audio}))


def test_pictures_are_prepared_as_the_checkpoint_says_in_both_layouts(copy):
    from transformers import Phi4MultimodalImageProcessor

    settings = {"dynamic_hd": 4, "image_mean": [0.1, 0.2, 0.3], "image_std": 0.25, "do_rescale": True}
    overwrite_preprocessor(copy, **settings)
    found = find_checkpoint(str(copy), None, copy)
    assert (found.pictures.crops, found.pictures.crops_from) == (4, "processor_config.json (image_processor)")
    picture = [open_picture(DATA / "cat.jpg").resize((1000, 1000))]
    made = _load_image_processor(found)(images=picture, return_tensors="pt")
    wanted = Phi4MultimodalImageProcessor(**{**settings, "image_std": [0.25] * 3})(images=picture, return_tensors="pt")
    assert made["image_pixel_values"].shape[1] == 5  # nine without the setting, and the global view
    for name in wanted:
        assert torch.equal(torch.as_tensor(made[name]), torch.as_tensor(wanted[name]))


def test_settings_of_pictures_that_no_picture_can_have_are_refused_before_any_row(copy):
    overwrite_preprocessor(copy, image_mean=[0.5, 0.5])
    with pytest.raises(InputError, match="cannot be loaded: "):
        load(copy)


def test_an_answer_ends_where_either_file_of_the_checkpoint_says(copy):
    """One of them used to be asked, and the other one only where that said nothing."""
    asked = [(open_picture(DATA / "cat.jpg"), ["Why?"])]
    whole = load(copy)
    written = []
    whole.detokenize = lambda tokens: str(written.append(list(tokens)))
    ask(whole, asked)
    end, *more = written[0]
    assert more, "this answer shows nothing"
    for file in ("config.json", "generation_config.json"):
        before = (copy / file).read_text()
        edit_json(copy / file, eos_token_id=end)
        engine = load(copy)
        assert engine._ends >= {end, engine._tokenizer.convert_tokens_to_ids("<|end|>")}
        [found] = ask(engine, asked)
        assert found.answer == engine.detokenize([end])
        (copy / file).write_text(before)


def reverse_flags(folder: Path, tokens: list[str], *flags: str) -> None:
    path = folder / "tokenizer.json"
    description = json.loads(path.read_text())
    for token in description["added_tokens"]:
        if token["content"] in tokens:
            token.update({flag: not token[flag] for flag in flags})
    path.write_text(json.dumps(description))


SPACED = ["Why?", "  Why?", "Why? ", "\n\tWhy?\u00a0 ", " "]


def test_white_space_around_a_question_is_what_the_native_layout_makes_of_it(checkpoint, original, tmp_path):
    """Whatever the flags of the original layout's tokens are: the same tokens, the same vectors and answers."""
    copy = shutil.copytree(original, tmp_path / "model")
    tokens = [IMAGE_TOKENS["original"], "<|user|>", "<|end|>", "<|assistant|>"]
    reverse_flags(copy, tokens, "rstrip", "lstrip", "normalized", "single_word")
    native, other = load(checkpoint), load(copy)
    assert [other.tokenize(text) for text in SPACED] == [native.tokenize(text) for text in SPACED]
    assert len({tuple(native.tokenize(text)) for text in SPACED}) == len(SPACED), "otherwise this shows nothing"
    asked = [(open_picture(DATA / "cat.jpg"), SPACED)]
    for found, wanted in zip(ask(other, asked), ask(native, asked), strict=True):
        assert found.answer == wanted.answer
        for name, vectors in wanted.vectors.items():
            assert np.array_equal(found.vectors[name], vectors)


def test_a_native_tokenizer_with_other_flags_is_followed_as_the_library_follows_it(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    reverse_flags(copy, [IMAGE_TOKENS["native"]], "rstrip")
    reverse_flags(copy, ["<|end|>"], "lstrip")
    model = load(copy)
    for text in SPACED:
        whole = model._tokenizer(f"<|user|><|image|>{text}<|end|><|assistant|>")["input_ids"]
        assert whole == model._head + model.tokenize(text)
    assert model.tokenize("  Why? ") == model.tokenize("Why?")


def test_an_original_config_without_sizes_for_the_vision_tower_means_siglip(original, tmp_path):
    copy = shutil.copytree(original, tmp_path / "model")
    edit_json(copy / "config.json", vision_config=None)
    found = find_checkpoint(str(copy), None, copy)
    assert found.vision_size == 1152
    with pytest.raises(InputError, match=r"extensor is of size \[1, 1, 32\], its config.json asks for \[1, 1, 1152\]"):
        load_model(found, "cpu", "float32", "sdpa")


def test_a_tokenizer_splits_text_as_its_file_says_whatever_class_is_named(copy):
    path = copy / "tokenizer.json"
    description = json.loads(path.read_text())
    one_by_one = {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Isolated", "invert": False}
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [one_by_one, description["pre_tokenizer"]]}
    path.write_text(json.dumps(description))
    edit_json(copy / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    _, tokenizer, _ = load_model(find_checkpoint(str(copy), None, copy), "cpu", "float32", "sdpa")
    assert json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] == description["pre_tokenizer"]


@pytest.fixture
def two_caches(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """This program's own cache and the hub library's, without a network."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "model_cache", tmp_path / "hub"


def test_a_model_that_an_earlier_run_downloaded_is_not_downloaded_again(two_caches, checkpoint, monkeypatch):
    own, _ = two_caches
    monkeypatch.setenv("HF_HOME", str(own.parent))
    snapshot = fill_cache(own, checkpoint)
    assert find_checkpoint(MODEL, None, None).folder.resolve() == snapshot


@pytest.mark.parametrize("named", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", None])
def test_a_new_model_goes_to_the_hubs_cache_where_the_environment_names_one(two_caches, monkeypatch, named):
    own, hubs = two_caches
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    if named:
        monkeypatch.setenv(named, str(hubs))
    asked = []

    def snapshot_download(model: str, **how: Any) -> None:
        asked.append(how)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(InputError, match="no network; looked in model_cache and in "):
        find_checkpoint(MODEL, None, None)
    assert asked[-1]["cache_dir"].resolve() == (hubs if named else own)
    assert [how["local_files_only"] for how in asked] == [True, True, False]


@pytest.mark.parametrize("lacking", ["model.safetensors", None])
def test_a_download_that_was_cut_off_does_not_hide_a_whole_one(two_caches, checkpoint, lacking):
    own, hubs = two_caches
    first, second = fill_cache(own, checkpoint), fill_cache(hubs, checkpoint)
    if lacking:
        (first / lacking).unlink()
    assert find_checkpoint(MODEL, None, None).folder.resolve() == (second if lacking else first)


COSINE = 0.999


@pytest.mark.parametrize("lora", ["merged", "adapter"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_formats_stay_close_to_the_reference_at_every_layer(checkpoint, expected, dtype, lora):
    engine = load(checkpoint, lora, dtype=dtype, tokens=1)
    for image_id in ("coffee.jpg", "astronaut.jpg"):
        rows = [row for row in table_rows() if row["image_id"] == image_id]
        found = ask(engine, [(open_picture(DATA / image_id), [row["question"] for row in rows])])
        for row, answer in zip(rows, found, strict=True):
            wanted = expected[row["question_id"]]
            assert cosine(answer.vectors[VISION_ONLY], wanted.vision_only) > COSINE
            for index, layer in enumerate(engine.spec.layers):
                assert cosine(answer.vectors[QUERY_TOKEN][index], wanted.query_token[layer]) > COSINE
                assert cosine(answer.vectors[VISION_TOKEN][index], wanted.vision_token[layer]) > COSINE


def test_merging_rounds_once(checkpoint):
    from safetensors.torch import load_file

    weights = load_file(checkpoint / "model.safetensors")
    lora = load_file(checkpoint / "vision-lora" / "adapter_model.safetensors")
    found = find_checkpoint(str(checkpoint), None, checkpoint)
    model, *_ = load_model(found, "cpu", "bfloat16", "sdpa")
    twice_differs = False
    for name, parameter in model.named_parameters():
        exact = weights[name]
        assert parameter.dtype == torch.bfloat16
        if name.replace("weight", "lora_A.weight") in lora:
            a, b = (lora[name.replace("weight", f"lora_{matrix}.weight")] for matrix in "AB")
            twice_differs |= not torch.equal((exact.bfloat16().float() + 2 * (b @ a)).bfloat16(), parameter)
            exact = exact + 2 * (b @ a)
        # The product's own summation order may move a value over a rounding edge; a second rounding moves many.
        assert (parameter == exact.bfloat16()).float().mean() > 0.999
    assert twice_differs, "otherwise this shows nothing"


def test_a_file_without_permission_is_refused(copy, monkeypatch):
    """In this process, since tests may run as root, who may read everything."""
    weights, really_open = weights_of(copy)[0], open

    def forbidden(path: object, *arguments: object) -> object:
        if path == weights:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return really_open(path, *arguments)

    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(InputError, match=r"cannot be read \(.*Permission denied.*\); check its permissions and links"):
        find_checkpoint(str(copy), None, copy)


def test_an_end_token_that_only_the_tokenizers_settings_name_is_refused(copy):
    """The library would give it a new id, which no answer ends with."""
    path = copy / "tokenizer.json"
    path.write_text(path.read_text().replace("<|end|>", "<|other|>"))
    edit_json(copy / "tokenizer_config.json", extra_special_tokens=["<|end|>"])
    with pytest.raises(InputError, match=r"has no special token <\|end\|>"):
        load(copy)


def test_an_original_checkpoint_with_its_vision_lora_in_a_folder_only_is_loaded(checkpoint, original, tmp_path):
    """Its settings are written one level lower than in the native layout, and its names have peft's prefix."""
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(original, tmp_path / "model")
    edit_weights(copy, lambda tensors: {name: t for name, t in tensors.items() if ".lora_" not in name})
    adapter = shutil.copytree(checkpoint / "vision-lora", copy / "vision-lora")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": VISION_PATTERN}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(adapter / "adapter_model.safetensors")
    prefixed = {name.replace("model.layers", "base_model.model.layers"): t for name, t in tensors.items()}
    save_file(prefixed, adapter / "adapter_model.safetensors")
    picture, question = open_picture(DATA / "cat.jpg"), ["Why?"]
    [[found], [wanted]] = (ask(load(folder, tokens=TOKENS), [(picture, question)]) for folder in (copy, checkpoint))
    assert found.answer == wanted.answer
    assert np.array_equal(found.vectors[QUERY_TOKEN], wanted.vectors[QUERY_TOKEN])


# --- refused, in both layouts --------------------------------------------------------------------------------------


def refused(folder: Path, saying: str) -> None:
    with pytest.raises(InputError) as refusal:
        load(folder)
    assert saying in str(refusal.value)


def test_weights_that_are_not_there_are_refused(copy):
    weights_of(copy)[-1].rename(copy / "pytorch_model.bin")
    refused(copy, saying="(found pytorch_model.bin, which is not read); expected the weights as safetensors")


@pytest.mark.parametrize(
    ("name", "file", "saying"),
    [
        ("model.norm.weight", "model-00003-of-00002.safetensors", "holds no model-00003-of-00002.safetensors"),
        ("model.norm.weight", "../checkpoint/model-00001-of-00002.safetensors", "expected file names beside it"),
        ("model.more.weight", "model-00001-of-00002.safetensors", "lacks model.more.weight, which"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(original, tmp_path, name, file, saying):
    copy = shutil.copytree(original, tmp_path / "model")
    index = json.loads((copy / checkpoints.INDEX).read_text())
    index["weight_map"][name] = file
    (copy / checkpoints.INDEX).write_text(json.dumps(index))
    refused(copy, saying=saying)


def test_weights_in_one_file_beside_an_index_are_refused(original, checkpoint, tmp_path):
    """The library would load the one file, and what was checked is the other."""
    copy = shutil.copytree(original, tmp_path / "model")
    shutil.copy(checkpoint / checkpoints.WEIGHTS, copy)
    refused(copy, saying="holds both model.safetensors and model.safetensors.index.json")


def test_a_folder_in_the_place_of_a_file_is_refused(copy):
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").mkdir()
    refused(copy, saying="holds no tokenizer.json")


def test_an_index_without_metadata_is_refused(original, tmp_path):
    copy = shutil.copytree(original, tmp_path / "model")
    index = json.loads((copy / checkpoints.INDEX).read_text())
    (copy / checkpoints.INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))
    refused(copy, saying='add "metadata": {} to it')


def test_a_tensor_without_a_place_is_refused(copy):
    """As of a model whose projections have biases: without them it would be another one."""
    bias = "model.layers.0.self_attn.o_proj.bias"
    edit_weights(copy, lambda tensors: {**tensors, bias: torch.ones(96)})
    refused(copy, saying=f"no place for, the first {bias}")


def test_quantised_weights_are_refused(copy):
    name = "model.norm.weight"
    edit_weights(copy, lambda t: {**t, name: t[name].to(torch.int8)} if name in t else t)
    refused(copy, saying="is quantised (weights of format I8); expected weights of F16, BF16, F32")


def test_settings_for_quantising_are_refused(copy):
    edit_json(copy / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    refused(copy, saying="is quantised (quantization_config in config.json)")


@pytest.mark.parametrize(
    ("token", "saying"),
    [
        ("<|end|>", {"native": "has no special token <|end|>", "original": "has no special token <|end|>"}),
        (
            "image",
            {"native": "image token is 519, the config's is 513", "original": "no special token <|endoftext10|>"},
        ),
    ],
)
def test_a_tokenizer_without_the_prompts_tokens_is_refused(copy, token, saying):
    if token == "image":
        token = IMAGE_TOKENS[copy.name]
    path = copy / "tokenizer.json"
    path.write_text(path.read_text().replace(token, "<|other|>"))
    refused(copy, saying=saying[copy.name])


def test_a_vision_lora_among_the_weights_without_its_settings_is_refused(original, tmp_path):
    copy = shutil.copytree(original, tmp_path / "model")
    edit_json(copy / "config.json", vision_lora={"r": 8})
    refused(copy, saying="gives no vision_lora with r, lora_alpha and layer")


def test_a_vision_lora_of_no_weight_is_refused(copy):
    edit_json(copy / "config.json", vision_lora={"r": 8, "lora_alpha": 0, "layer": VISION_PATTERN})
    if copy.name == "native":
        edit_json(copy / "vision-lora" / "adapter_config.json", lora_alpha=0)
    refused(copy, saying="of no effect in model.layers.0.")


def test_an_adapter_in_the_place_of_a_checkpoint_is_refused(copy):
    """The library would follow it to the base model that it names."""
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing"}')
    refused(copy, saying="holds an adapter_config.json of its own")


@pytest.mark.parametrize("kind", ["one layer silent", "one tensor missing", "another size", "not finite"])
def test_a_vision_lora_among_the_weights_that_does_not_fit_is_refused(original, tmp_path, kind):
    change, saying = ADAPTERS[kind]
    copy = shutil.copytree(original, tmp_path / "model")

    def of_vision(tensors: dict) -> dict:
        ours = {name for name in tensors if ".lora_" in name and ".vision." in name}
        lora = {name.replace(".vision.", "."): tensors[name] for name in sorted(ours)}
        rest = {name: t for name, t in tensors.items() if name not in ours}
        return rest | {name.replace(".weight", ".vision.weight"): t for name, t in change(lora).items()}

    edit_weights(copy, of_vision)
    refused(copy, saying=saying)
