"""The small checkpoint in the layout that the model's own code wrote, with the traps that such folders have.

Written from the facts about that layout, sharing no table with the program: LoRAs of vision and of speech among the
weights, in two files with an index; the old config, without sizes beyond `vision_config`, naming code to download; the
old placeholder; a tokenizer class that would split text in another way.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
VISION_PATTERN = r"layers.*((self_attn\.(qkv_proj|o_proj))|(mlp\.(gate_up|down)_proj))"
CODE = {"AutoConfig": "configuration_phi4mm.Phi4MMConfig", "AutoModelForCausalLM": "modeling_phi4mm.Phi4MMForCausalLM"}


def write_original(native: Path, folder: Path) -> Path:
    """Write the checkpoint of `native` to `folder`, in the original layout."""
    folder.mkdir()
    config = json.loads((native / "config.json").read_text())
    _write_weights(native, folder)
    _write_config(config, folder)
    _write_tokenizer(native, folder)
    shutil.copy(native / "generation_config.json", folder)
    (folder / "modeling_phi4mm.py").write_text("raise SystemExit('downloaded code was run')\n")
    processor = {"auto_map": {"AutoProcessor": "modeling_phi4mm.Phi4MMProcessor"}, "dynamic_hd": 36}
    processor |= {"image_processor_type": "Phi4MMImageProcessor", "feature_extractor_type": "Phi4MMAudioExtractor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def _write_weights(native: Path, folder: Path) -> None:
    tensors = {}
    for name, tensor in load_file(native / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        if module.rpartition(".")[2] in PROJECTIONS and name.startswith("model.layers."):
            name = f"{module}.base_layer.{kind}"
        elif ".image_embed." in name:
            for new, old in (
                ("img_projection_up", "img_projection.0"),
                ("img_projection_down", "img_projection.2"),
                ("global_img_feature_extensor", "glb_GN"),
                ("sub_img_feature_extensor", "sub_GN"),
            ):
                name = name.replace(new, old)
        elif ".audio_embed." in name:
            for new, old in (
                ("_in.gate_up_proj", "_in.net.0.linear"),
                ("_out.gate_up_proj", "_out.net.0.linear"),
                ("_in.down_proj", "_in.net.2"),
                ("_out.down_proj", "_out.net.2"),
                ("q_proj", "linear_q"),
                ("k_proj", "linear_k"),
                ("v_proj", "linear_v"),
                ("o_proj", "linear_out"),
                ("up_proj_for_speech", "audio_projection.speech.0"),
                ("down_proj_for_speech", "audio_projection.speech.2"),
                ("up_proj_for_vision_speech", "audio_projection.vision.0"),
                ("down_proj_for_vision_speech", "audio_projection.vision.2"),
            ):
                name = name.replace(new, old)
        tensors[name] = tensor
    for name, tensor in load_file(native / "vision-lora" / "adapter_model.safetensors").items():
        tensors[name.replace(".weight", ".vision.weight")] = tensor
        tensors[name.replace(".weight", ".speech.weight")] = torch.ones_like(tensor)
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in halves.items():
        save_file({name: tensors[name].contiguous() for name in members}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, members in halves.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_config(config: dict, folder: Path) -> None:
    rope = config["rope_parameters"]
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "hidden_act", "max_position_embeddings", "original_max_position_embeddings")
    kept += ("rms_norm_eps", "tie_word_embeddings", "bos_token_id", "pad_token_id")
    vision = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    original = {
        **{name: config[name] for name in kept},
        "model_type": "phi4mm",
        "architectures": ["Phi4MMForCausalLM"],
        "auto_map": CODE,
        "eos_token_id": config["bos_token_id"],
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "rope_scaling": {"type": "longrope", **{name: rope[name] for name in ("short_factor", "long_factor")}},
        "sliding_window": 262144,
        "attention_bias": False,
        "mlp_bias": False,
        "lm_head_bias": False,
        "full_attn_mod": 1,
        "embd_layer": {"embedding_cls": "image_audio", "image_embd_layer": {"crop_size": 448}},
        "audio_processor": {"config": {"attention_dim": 16, "num_blocks": 1}, "name": "cascades"},
        "vision_config": {name: config["vision_config"][name] for name in vision},
        "vision_lora": {"r": 8, "lora_alpha": 16, "layer": VISION_PATTERN, "dp": 0.0},
        "speech_lora": {"r": 8, "lora_alpha": 16, "layer": VISION_PATTERN, "dp": 0.01},
        "torch_dtype": "float32",
        "transformers_version": "4.46.1",
    }
    (folder / "config.json").write_text(json.dumps(original))


def _write_tokenizer(native: Path, folder: Path) -> None:
    tokenizer = (native / "tokenizer.json").read_text()
    tokenizer = tokenizer.replace("<|image|>", "<|endoftext10|>").replace("<|audio|>", "<|endoftext11|>")
    (folder / "tokenizer.json").write_text(tokenizer)
    model = json.loads(tokenizer)["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("".join(f"{' '.join(pair)}\n" for pair in model["merges"]))
    settings = {"tokenizer_class": "GPT2TokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def weights_of(folder: Path) -> list[Path]:
    """The files of a checkpoint's weights, in either layout."""
    return sorted(folder.glob("model*.safetensors"))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Write each file's tensors anew, as `change` makes them, and the index where there is one."""
    index = {}
    for path in weights_of(folder):
        tensors = change(load_file(path))
        save_file(tensors, path)
        index.update(dict.fromkeys(tensors, path.name))
    if (folder / "model.safetensors.index.json").exists():
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
