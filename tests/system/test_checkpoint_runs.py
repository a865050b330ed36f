"""Runs on checkpoints as users have them, of both layouts: the same parts, and a refusal in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from tests.helpers.hub_cache import COMMIT, fill_cache
from tests.helpers.launching import arguments_for, command, merge, run
from tests.helpers.original_layout import VISION_PATTERN, edit_json, edit_weights, weights_of
from tests.helpers.tables import table_rows, write_table
from tests.system.test_refusals import ADAPTERS, refused
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.models import checkpoint as checkpoints
from vqa_embeddings.models.phi4mm import MODEL, NATIVE_REVISION
from vqa_embeddings.models.phi4mm.formats import IMAGE_TOKENS

ABSENT = {"image_id": "missing.jpg"}  # so that a run needs no time
PART = "phi4_multimodal_embeddings_part_001.h5"


def contents(part: Path) -> dict[str, tuple]:
    """All of a part but its attributes: names, types, shapes, and the values' bytes."""
    found = {}

    def see(name: str, item: h5py.Group | h5py.Dataset) -> None:
        found[name] = (item.dtype, item.shape, np.asarray(item[()]).tobytes()) if isinstance(item, h5py.Dataset) else ()

    with h5py.File(part) as file:
        file.visititems(see)
    return found


def test_both_layouts_of_a_checkpoint_give_the_same_parts(tmp_path, checkpoint, original):
    for name, folder in (("native", checkpoint), ("original", original)):
        done = run(command(0, *arguments_for(DATA / "vqa.csv", folder), "--output-dir", tmp_path / name))
        assert done.returncode == 0, done.stderr
        assert merge(tmp_path / name).returncode == 0
    parts = [contents(tmp_path / name / PART) for name in ("native", "original")]
    assert len(parts[0]) > 31 * 15
    assert parts[0] == parts[1]
    with h5py.File(tmp_path / "original" / PART) as part:
        assert (part.attrs["layout"], part.attrs["model_name"]) == ("original", str(original))


def test_the_hub_model_is_taken_at_the_revision_with_the_native_layout(tmp_path, checkpoint):
    """From a cache that was filled before, as on a cluster's nodes without a network."""
    fill_cache(tmp_path / "cache", checkpoint)
    rows = [{**row, **ABSENT} for row in table_rows()[:1]]
    inputs = ["--vqa-dataset", write_table(tmp_path / "vqa.csv", rows), "--images-dir", DATA]
    inputs += ["--cache-dir", tmp_path / "cache", "--output-dir", tmp_path / "out"]
    done = run(command(0, *inputs))
    assert done.returncode == 0, done.stderr
    assert "crops: 36 a picture at most, by processor_config.json (image_processor); " in done.stdout
    assert "; end tokens: <|endoftext|> (512), <|end|> (516)\n" in done.stdout
    described = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (described["model"], described["revision"], described["layout"]) == (MODEL, COMMIT, "native")
    held = f"looked in {tmp_path / 'cache'} (which has {NATIVE_REVISION}); --revision takes one"
    refused(*inputs, "--revision", "main", saying=held)


def test_without_cache_dir_the_hubs_own_cache_is_used_and_named_where_it_lacks_the_model(
    tmp_path, checkpoint, monkeypatch
):
    """The real command, on a node without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hugging face"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    hubs = tmp_path / "hugging face" / "hub"
    rows = [{**row, **ABSENT} for row in table_rows()[:1]]
    inputs = ["--vqa-dataset", write_table(tmp_path / "vqa.csv", rows), "--images-dir", DATA]
    fill_cache(hubs, checkpoint, "main", COMMIT[::-1])
    refused(*inputs, saying=f"looked in model_cache and in {hubs} (which has main); --revision takes one")
    fill_cache(hubs, checkpoint)
    done = run(command(0, *inputs, "--plan"))
    assert done.returncode == 0, done.stderr
    assert f"model: {MODEL} (native layout, " in done.stdout
    assert not (tmp_path / "model_cache").exists()


def asked_of(folder: Path) -> list[object]:
    return [*arguments_for(DATA / "vqa.csv", folder), "--output-dir", folder.parent / "out"]


def test_truncated_weights_are_refused(copy):
    weights = weights_of(copy)[-1]
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(*asked_of(copy), saying="not a whole safetensors file")


def test_weights_that_are_not_there_are_refused(copy):
    weights_of(copy)[-1].rename(copy / "pytorch_model.bin")
    refused(*asked_of(copy), saying="(found pytorch_model.bin, which is not read); expected the weights as safetensors")


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
    refused(*asked_of(copy), saying=saying)


def test_weights_in_one_file_beside_an_index_are_refused(original, checkpoint, tmp_path):
    """The library would load the one file, and what was checked is the other."""
    copy = shutil.copytree(original, tmp_path / "model")
    shutil.copy(checkpoint / checkpoints.WEIGHTS, copy)
    refused(*asked_of(copy), saying="holds both model.safetensors and model.safetensors.index.json")


def test_a_folder_in_the_place_of_a_file_is_refused(copy):
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").mkdir()
    refused(*asked_of(copy), saying="holds no tokenizer.json")


def test_an_index_without_metadata_is_refused(original, tmp_path):
    copy = shutil.copytree(original, tmp_path / "model")
    index = json.loads((copy / checkpoints.INDEX).read_text())
    (copy / checkpoints.INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))
    refused(*asked_of(copy), saying='add "metadata": {} to it')


def test_a_tensor_too_few_is_refused(copy):
    edit_weights(copy, lambda tensors: {name: t for name, t in tensors.items() if name != "model.norm.weight"})
    refused(*asked_of(copy), saying="lacks 1 tensors of the model, the first model.norm.weight")


def test_a_tensor_without_a_place_is_refused(copy):
    """As of a model whose projections have biases: without them it would be another one."""
    bias = "model.layers.0.self_attn.o_proj.bias"
    edit_weights(copy, lambda tensors: {**tensors, bias: torch.ones(96)})
    refused(*asked_of(copy), saying=f"no place for, the first {bias}")


def test_quantised_weights_are_refused(copy):
    name = "model.norm.weight"
    edit_weights(copy, lambda t: {**t, name: t[name].to(torch.int8)} if name in t else t)
    refused(*asked_of(copy), saying="is quantised (weights of format I8); expected weights of F16, BF16, F32")


def test_settings_for_quantising_are_refused(copy):
    edit_json(copy / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    refused(*asked_of(copy), saying="is quantised (quantization_config in config.json)")


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
    refused(*asked_of(copy), saying=saying[copy.name])


def test_a_vision_lora_among_the_weights_without_its_settings_is_refused(original, tmp_path):
    copy = shutil.copytree(original, tmp_path / "model")
    edit_json(copy / "config.json", vision_lora={"r": 8})
    refused(*asked_of(copy), saying="gives no vision_lora with r, lora_alpha and layer")


def test_a_vision_lora_of_no_weight_is_refused(copy):
    edit_json(copy / "config.json", vision_lora={"r": 8, "lora_alpha": 0, "layer": VISION_PATTERN})
    if copy.name == "native":
        edit_json(copy / "vision-lora" / "adapter_config.json", lora_alpha=0)
    refused(*asked_of(copy), saying="of no effect in model.layers.0.")


def test_an_adapter_in_the_place_of_a_checkpoint_is_refused(copy):
    """The library would follow it to the base model that it names."""
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing"}')
    refused(*asked_of(copy), saying="holds an adapter_config.json of its own")


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
    refused(*asked_of(copy), saying=saying)
