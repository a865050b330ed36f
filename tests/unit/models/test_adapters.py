"""Checkpoints with LoRAs as public scripts leave them: in the weights already, with others beside, not whole."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.launching import arguments_for, command, run
from tests.helpers.original_layout import edit_json, edit_weights
from tests.helpers.reference import strict_error
from tests.system.test_refusals import edit_adapter, refused
from vqa_embeddings import open_embeddings
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.errors import InputError
from vqa_embeddings.models.phi4mm.adapters import check_shares
from vqa_embeddings.models.phi4mm.weights import load_model
from vqa_embeddings.models.registry import find_checkpoint

RANK, ALPHA = 8, 16  # of the small checkpoint's vision LoRA
QKV = "model.layers.0.self_attn.qkv_proj"


def load(folder: Path, lora: str = "merged", dtype: str = "float32"):
    found = find_checkpoint(str(folder), None, folder, lora)
    return load_model(found, "cpu", dtype, "sdpa")[0]


def merge_by_hand(folder: Path, lora: Path, scale: Callable[[str], float], dtype=torch.float32) -> None:
    """Add an adapter to the weights, as a user's own script does; the LoRA stays where it is."""
    matrices = load_file(lora / "vision-lora" / "adapter_model.safetensors")

    def added(tensors: dict) -> dict:
        for name, tensor in tensors.items():
            a = matrices.get(name.replace(".base_layer", "").replace("weight", "lora_A.weight"))
            b = matrices.get(name.replace(".base_layer", "").replace("weight", "lora_B.weight"))
            tensors[name] = tensor if a is None else (tensor + (b @ a) * scale(name)).to(dtype)
        return tensors

    edit_weights(folder, added)


def leave_out_lora(folder: Path) -> None:
    shutil.rmtree(folder / "vision-lora", ignore_errors=True)
    edit_weights(folder, lambda tensors: {name: t for name, t in tensors.items() if ".lora_" not in name})


def twice(name: str) -> float:
    return ALPHA / RANK


def assert_same_weights(found, wanted) -> None:
    for (name, one), (other_name, other) in zip(found.state_dict().items(), wanted.state_dict().items(), strict=True):
        assert name == other_name and torch.equal(one, other)


# --- in the weights already ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_weights_that_hold_the_lora_give_its_vectors_once(tmp_path, checkpoint, original):
    """By real runs. Without --lora none it would be added again: refused, and the output folder is not taken."""
    held = shutil.copytree(original, tmp_path / "held")
    merge_by_hand(held, checkpoint, twice)
    apart, out = tmp_path / "apart", tmp_path / "out"
    for folder, *options in ([original, "--output-dir", apart], [held, "--output-dir", out, "--lora", "none"]):
        inputs = [*arguments_for(DATA / "vqa.csv", folder), "--test"]
        if folder == held:
            refused(*inputs, "--output-dir", out, saying=f"the vision LoRA of {held} is in the weights already (1.00")
            assert not (out / "run.json").exists()
        done = run(command(0, *inputs, *options))
        assert done.returncode == 0, done.stderr
    assert "(original layout, vision LoRA none: the weights hold it)" in done.stdout
    assert json.loads((out / "run.json").read_text())["lora"] == "none"
    found, wanted = open_embeddings(out), open_embeddings(apart)
    assert len(found.answers) == 3 and list(found.answers) == list(wanted.answers)
    for name, layer in [
        ("vision_only", ()),
        *((name, (k,)) for name in ("vision_token", "query_token") for k in wanted.layers),
    ]:
        for vector, right in zip(getattr(found, name)(*layer), getattr(wanted, name)(*layer), strict=True):
            assert strict_error(vector, right) < 1e-6


@pytest.mark.parametrize("left", [True, False], ids=["left", "gone"])
def test_weights_that_hold_the_lora_are_loaded_as_they_are_with_none(copy, checkpoint, left):
    wanted = load(checkpoint)
    merge_by_hand(copy, checkpoint, twice)
    if not left:
        leave_out_lora(copy)
    assert_same_weights(load(copy, "none"), wanted)


@pytest.mark.parametrize("lora", ["merged", "adapter"])
def test_a_lora_that_is_in_the_weights_is_not_added_again(copy, checkpoint, lora):
    merge_by_hand(copy, checkpoint, twice)
    with pytest.raises(InputError, match=r"in the weights already \(1\.00 of it .*\); .* use --lora none"):
        load(copy, lora)


def test_a_lora_that_is_not_in_the_weights_is_not_left_out(copy):
    with pytest.raises(InputError, match=r"is not in the weights \(-?0\.0\d of it .*\); .* use --lora merged"):
        load(copy, "none")


def test_a_checkpoint_without_any_lora_is_refused_unless_its_weights_hold_it(copy):
    leave_out_lora(copy)
    with pytest.raises(
        InputError, match=r"^Vision adapter not found: .* use --lora none where it has been merged into"
    ):
        find_checkpoint(str(copy), None, copy)
    assert find_checkpoint(str(copy), None, copy, "none").adapter is None
    (copy / "vision-lora").mkdir()
    (copy / "vision-lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match=r"^Vision adapter not found: "):  # half of one may be what the weights lack
        find_checkpoint(str(copy), None, copy, "none")


def one_of_four_stronger(name: str) -> float:
    return 4 * ALPHA / RANK if "qkv_proj" in name else ALPHA / RANK


# How a checkpoint may have been trained: the settings, what a projection's delta is multiplied with, the format.
KINDS = {
    "bfloat16": ({}, twice, torch.bfloat16),
    "rslora": ({"use_rslora": True}, lambda name: ALPHA / math.sqrt(RANK), torch.float32),
    "a small alpha": ({"lora_alpha": 1}, lambda name: 1 / RANK, torch.float32),
    "a small alpha in bfloat16": ({"lora_alpha": 1}, lambda name: 1 / RANK, torch.bfloat16),
    "an alpha of some": ({"alpha_pattern": {"qkv_proj": 4 * ALPHA}}, one_of_four_stronger, torch.float32),
    "ranks of some": ({"r": 4, "lora_alpha": 8, "rank_pattern": {".*": RANK}}, lambda name: 8 / RANK, torch.float32),
}


@pytest.mark.parametrize("kind", KINDS)
def test_whether_the_weights_hold_a_lora_is_seen_however_it_was_trained(tmp_path, checkpoint, kind):
    settings, scale, dtype = KINDS[kind]
    apart = shutil.copytree(checkpoint, tmp_path / "apart")
    edit_json(apart / "vision-lora" / "adapter_config.json", **settings)
    edit_weights(apart, lambda tensors: {name: t.to(dtype) for name, t in tensors.items()})
    held = shutil.copytree(apart, tmp_path / "held")
    merge_by_hand(held, checkpoint, scale, dtype)
    with pytest.raises(InputError, match=r"is not in the weights \(-?0\."):
        load(apart, "none")
    with pytest.raises(InputError, match=r"is in the weights already \((0\.9|1\.0)"):
        load(held)
    if dtype == torch.float32:  # in a narrow format merging here rounds once, and merging by hand twice
        assert_same_weights(load(held, "none"), load(apart))


def test_the_median_decides_and_not_a_projection_that_was_moved_far():
    apart, held = [0.0, 0.01, -0.1, 0.24, 40.0], [1.0, 0.9, 1.2, 1.0, -40.0]
    for lora in ("merged", "adapter"):
        check_shares("x", apart, lora)
        with pytest.raises(InputError, match="in the weights already"):
            check_shares("x", held, lora)
    check_shares("x", held, "none")
    check_shares("x", [math.nan, *held], "none")
    check_shares("x", [math.nan], "none")  # an adapter of zeros, as a merge may leave it, tells nothing
    with pytest.raises(InputError, match="is not in the weights"):
        check_shares("x", apart, "none")


def test_a_lora_of_zeros_that_a_merge_has_left_is_no_hindrance_to_none(tmp_path, checkpoint):
    merged = shutil.copytree(checkpoint, tmp_path / "model")
    merge_by_hand(merged, checkpoint, twice)
    edit_adapter(merged, lambda tensors: {name: 0 * t if "lora_B" in name else t for name, t in tensors.items()})
    assert_same_weights(load(merged, "none"), load(checkpoint))


# --- tensors and settings that nothing would read -------------------------------------------------------------------

STRANGE = {
    "a third adapter": (".lora_A.domain.weight", "merge it into the weights with the code that trained it"),
    "DoRA": (".lora_magnitude_vector.vision.weight", "it is DoRA's: merge it into the weights with the code"),
    "PEFT's own name": (".lora_B.default.weight", "write .vision. for .default. in the names"),
    "without a name": (".lora_A.weight", "expected the LoRA called vision, beside that of speech"),
    "a bias": (".lora_B.vision.bias", "expected the LoRA called vision"),
    "a whole module": (".modules_to_save.vision.weight", "that the model has no place for, the first"),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("lora", ["merged", "none"])
def test_a_tensor_among_the_weights_that_nothing_reads_is_refused_by_name(original, tmp_path, kind, lora):
    name, saying = STRANGE[kind]
    copy = shutil.copytree(original, tmp_path / "model")
    edit_weights(copy, lambda t: {**t, QKV + name: torch.ones(8, 96)} if "model.norm.weight" in t else t)
    with pytest.raises(InputError) as refusal:
        load(copy, lora)
    assert QKV + name in str(refusal.value) and saying in str(refusal.value)


@pytest.mark.parametrize(
    "name",
    [
        f"{QKV}.lora_magnitude_vector",
        f"{QKV}.lora_A.domain.weight",
        f"{QKV}.lora_A.default.weight",
        f"{QKV}.lora_B.bias",
        "base_model.model.lm_head.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
    ],
)
def test_a_tensor_in_the_adapters_folder_that_nothing_reads_is_refused_by_name(tmp_path, checkpoint, original, name):
    """lm_head would be loaded, unasked, into the model; and beside a LoRA among the weights none of them would."""
    for folder in (checkpoint, original):
        copy = shutil.copytree(folder, tmp_path / folder.parent.name)
        shutil.copytree(checkpoint / "vision-lora", copy / "vision-lora", dirs_exist_ok=True)
        edit_adapter(copy, lambda tensors: {**tensors, name: torch.ones(519, 96)})
        with pytest.raises(InputError, match=f"1 tensors of an adapter that nothing reads, the first {name};"):
            find_checkpoint(str(copy), None, copy)


def test_a_matrix_that_the_folder_has_under_two_names_is_refused(tmp_path, checkpoint):
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    name = f"{QKV}.lora_A.weight"
    edit_adapter(copy, lambda tensors: {**tensors, f"base_model.model.{name}": tensors[name] * 2})
    with pytest.raises(InputError, match=f"holds {name} twice"):
        find_checkpoint(str(copy), None, copy)


SETTINGS = {
    "use_dora": True,
    "bias": "all",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "layer_replication": [[0, 4], [2, 8]],
    "init_lora_weights": "pissa",
    "modules_to_save": ["lm_head"],
    "target_parameters": ["mlp.down_proj.weight"],
    "trainable_token_indices": [1, 2],
    "use_qalora": True,
    "a_setting_of_tomorrow": 3,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_would_not_be_applied_is_refused_by_name(tmp_path, checkpoint, original, name):
    """peft applies some of them, and drops others without a word; the original code reads three settings only."""
    copy = shutil.copytree(checkpoint, tmp_path / "native")
    edit_json(copy / "vision-lora" / "adapter_config.json", **{name: SETTINGS[name]})
    other = shutil.copytree(original, tmp_path / "original")
    lora = json.loads((other / "config.json").read_text())["vision_lora"]
    edit_json(other / "config.json", vision_lora={**lora, name: SETTINGS[name]})
    for folder in (copy, other):
        with pytest.raises(InputError, match=f"has {name} .*; expected a LoRA without it"):
            find_checkpoint(str(folder), None, folder)


def test_the_settings_that_peft_writes_are_taken(tmp_path, checkpoint):
    from peft import LoraConfig

    copy = shutil.copytree(checkpoint, tmp_path / "model")
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, lora_dropout=0.1, task_type="CAUSAL_LM")
    config.save_pretrained(copy / "vision-lora")
    assert_same_weights(load(copy), load(checkpoint))


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_an_exception_for_a_projection_that_is_not_there_is_refused(tmp_path, checkpoint, setting):
    """As of names from the original layout's level, which peft compares with the model's and drops."""
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    edit_json(copy / "vision-lora" / "adapter_config.json", **{setting: {"^layers.0.self_attn.qkv_proj": 64}})
    with pytest.raises(InputError, match=rf"{setting} names \^layers\.0\.self_attn\.qkv_proj, which none of"):
        find_checkpoint(str(copy), None, copy)


def test_a_lora_among_the_weights_and_another_in_the_folder_is_refused(tmp_path, checkpoint, original):
    copy = shutil.copytree(original, tmp_path / "model")
    shutil.copytree(checkpoint / "vision-lora", copy / "vision-lora")
    edit_adapter(copy, lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    assert_same_weights(load(copy), load(checkpoint))  # the same, rounded: as the hub's folder has it
    edit_adapter(copy, lambda tensors: {name: t * 1.01 if name.startswith(QKV) else t for name, t in tensors.items()})
    with pytest.raises(InputError, match=rf"holds two vision LoRAs, .* differ at {QKV}\.lora_A\.weight; expected one"):
        load(copy)


# --- what is no checkpoint, or not a whole one -----------------------------------------------------------------------


def test_an_adapter_alone_is_refused_with_the_model_that_it_belongs_to(tmp_path, checkpoint):
    alone = shutil.copytree(checkpoint / "vision-lora", tmp_path / "alone")
    edit_json(alone / "adapter_config.json", base_model_name_or_path="some/model")
    saying = r"holds an adapter alone .* put it into vision-lora/ of the model that it was trained from \(some/model\)"
    with pytest.raises(InputError, match=saying):
        find_checkpoint(str(alone), None, tmp_path)


def test_a_folder_of_checkpoints_is_refused_with_the_one_to_give(tmp_path, checkpoint):
    """The hub's cache, what a model is named in it, its snapshots; a trainer's output folder."""
    snapshots = tmp_path / "hub" / "models--microsoft--Phi-4-multimodal-instruct" / "snapshots"
    shutil.copytree(checkpoint, snapshots / "0123")
    other = tmp_path / "hub" / "models--nobody--other" / "snapshots" / "4567"
    other.mkdir(parents=True)
    (other / "config.json").write_text('{"model_type": "phi3"}')
    for folder in (snapshots, snapshots.parent, snapshots.parent.parent):
        with pytest.raises(
            InputError, match=f"is no checkpoint, but holds some below; .* give --model {snapshots}/0123$"
        ):
            find_checkpoint(str(folder), None, tmp_path)
    shutil.copytree(checkpoint, tmp_path / "trainer" / "checkpoint-500")
    with pytest.raises(InputError, match=f"give --model {tmp_path}/trainer/checkpoint-500$"):
        find_checkpoint(str(tmp_path / "trainer"), None, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefix", "command"),
    [
        ("base_model.model.", "model.merge_and_unload().save_pretrained(…)"),
        ("module.", "model.module.save_pretrained(…)"),
        ("_orig_mod.", "model._orig_mod.save_pretrained(…)"),
    ],
)
def test_weights_that_were_saved_inside_of_something_are_refused_with_what_saves_them(copy, prefix, command):
    edit_weights(copy, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    with pytest.raises(InputError) as refusal:
        find_checkpoint(str(copy), None, copy)
    assert f"holds {prefix}model." in str(refusal.value) and command in str(refusal.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_checkpoint_without_its_tokenizer_is_refused_with_the_files_to_copy(copy, name):
    (copy / name).unlink()
    third = {"native": r"processor_config.json \(or preprocessor_config.json", "original": "preprocessor_config.json"}
    saying = f"holds no {name}; .* copy tokenizer.json, tokenizer_config.json and {third[copy.name]}.* from the model"
    with pytest.raises(InputError, match=saying):
        find_checkpoint(str(copy), None, copy)
