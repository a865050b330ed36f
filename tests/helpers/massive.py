"""A checkpoint with massive activations, as trained decoders have them: one dimension dwarfs all others.

At every token it holds thousands from the start, and at the first token a neuron of an early layer adds ten thousands
(Sun et al., *Massive Activations in Large Language Models*, 2024). The norms have learned to live with that: they turn
this dimension down and the others up, so that the rest of the decoder reads what it read before.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vqa_embeddings.models.phi4mm.checkpoint import ADAPTER_FOLDER, ADAPTER_WEIGHTS
from vqa_embeddings.models.phi4mm.random_checkpoint import EMBEDDING_GAIN
from vqa_embeddings.models.phi4mm.weights import load_model
from vqa_embeddings.models.registry import find_checkpoint

DIMENSION, EVERYWHERE, AT_THE_FIRST = 40, 3000.0, 20000.0
LAYER, NEURON, SHARPNESS = 1, 0, 10.0  # of the neuron that finds the first token: the sharper, the fewer others
TURNED_DOWN = 0.02  # the dimension, by the norms
PROJECTOR = "model.embed_tokens_extend.image_embed.img_projection_down"


def make_massive(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint of the native layout once more, with such a dimension."""
    shutil.copytree(checkpoint, folder)
    model, tokenizer, _ = load_model(find_checkpoint(str(checkpoint), None, checkpoint), "cpu", "float32", "sdpa")
    norms = {name: part for name, part in model.model.named_modules() if type(part).__name__.endswith("RMSNorm")}
    read, normed = _watch(norms), f"layers.{LAYER}.post_attention_layernorm"
    with torch.inference_mode():
        ids = tokenizer("<|user|>Is there a cat in the image?<|end|>", return_tensors="pt")["input_ids"]
        model.model(input_ids=ids, use_cache=False)
    weights, half = load_file(folder / "model.safetensors"), model.config.intermediate_size
    for name in ("weight", "bias"):  # a picture's tokens at the size of a word's, for which the norms are set
        weights[f"{PROJECTOR}.{name}"] *= EMBEDDING_GAIN
    weights["model.embed_tokens.weight"][:, DIMENSION] = EVERYWHERE
    weights[f"{PROJECTOR}.bias"][DIMENSION] = EVERYWHERE
    for name, given in read.items():
        mean = given.square().mean()
        weights[f"model.{name}.weight"] *= (1 + EVERYWHERE**2 / given.shape[-1] / mean).sqrt()
        weights[f"model.{name}.weight"][DIMENSION] = TURNED_DOWN
    mlp = f"model.layers.{LAYER}.mlp"
    finds = norms[normed](read[normed][0])
    finds[DIMENSION] = 0
    finds /= finds.square().sum()  # 1 at the first token
    weights[f"{mlp}.gate_up_proj.weight"][NEURON] = SHARPNESS * finds
    weights[f"{mlp}.gate_up_proj.weight"][half + NEURON] = finds
    weights[f"{mlp}.down_proj.weight"][:, NEURON] = 0
    weights[f"{mlp}.down_proj.weight"][DIMENSION, NEURON] = AT_THE_FIRST / SHARPNESS
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    adapter = load_file(folder / ADAPTER_FOLDER / ADAPTER_WEIGHTS)
    adapter[f"{mlp}.gate_up_proj.lora_B.weight"][[NEURON, half + NEURON]] = 0
    adapter[f"{mlp}.down_proj.lora_A.weight"][:, NEURON] = 0
    save_file(adapter, folder / ADAPTER_FOLDER / ADAPTER_WEIGHTS)


def _watch(norms: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What each of them will read, [length, hidden]."""
    read: dict[str, torch.Tensor] = {}

    def keep(name: str, module: Any, given: tuple[torch.Tensor]) -> None:
        read[name] = given[0][0]

    for name, norm in norms.items():
        norm.register_forward_pre_hook(partial(keep, name))
    return read
