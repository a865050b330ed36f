"""A small Phi-4-multimodal checkpoint with random weights, for the demo and for tests.

It is the real thing but for its size and its weights: made by the library's own classes, with the real special tokens
and a `vision-lora/`, and loaded by the same code as a downloaded one. Its answers are noise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vqa_embeddings.base.file_names import for_libraries
from vqa_embeddings.models.phi4mm.checkpoint import ADAPTER_CONFIG, ADAPTER_FOLDER, ADAPTER_WEIGHTS
from vqa_embeddings.models.phi4mm.formats import IMAGE_RSTRIP
from vqa_embeddings.models.phi4mm.weights import quiet_library

if TYPE_CHECKING:
    import torch

TEXTS = Path(__file__).parents[2] / "demo_data" / "vqa.csv"  # what the tokenizer is trained on
# The model's own, and whether white space after them is swallowed.
SPECIAL_TOKENS = {
    "<|endoftext|>": False,
    "<|image|>": IMAGE_RSTRIP,
    "<|audio|>": IMAGE_RSTRIP,
    "<|assistant|>": True,
    "<|end|>": True,
    "<|user|>": True,
    "<|system|>": True,
}
TARGETS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
# Over random weights of unit gain: attention that tells questions apart, and is not so sharp that rounding decides it.
QUERY_KEY_GAIN, VALUE_GAIN, EMBEDDING_GAIN, END_GAIN = 1.5, 10.0, 0.15, 1.3
LORA_SCALE = 2  # alpha over rank, the real adapter's


@dataclass(frozen=True)
class Sizes:
    """How large a random checkpoint is, as the library's configs name it; `rank` is the adapter's."""

    decoder: dict[str, int]
    vision: dict[str, int]
    audio: dict[str, int]
    rank: int


SMALL = Sizes(
    decoder={
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    vision={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2},
    audio={
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_blocks": 1,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 16,
        "depthwise_separable_out_channel": 16,
        "nemo_conv_channels": 16,
    },
    rank=8,
)


def make_checkpoint(
    folder: Path, seed: int = 0, sizes: Sizes = SMALL, device: str = "cpu", dtype: str = "float32"
) -> None:
    """Write a Phi-4-multimodal checkpoint with random weights in the native layout; the small one has 3 MB.

    The same seed gives the same bytes on the same kind of device, so that ranks on different nodes make the same model.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

    quiet_library()
    folder.mkdir(parents=True)
    tokens, unreadable, count = _save_processor(for_libraries(folder))
    config = Phi4MultimodalConfig(**_config(sizes, tokens, count))
    stored = getattr(torch, dtype)
    with torch.device(device):
        model = Phi4MultimodalForCausalLM._from_config(config, dtype=stored)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        parameter.data = _random(name, parameter.shape, generator).to(stored)
    embeddings = model.get_input_embeddings().weight.data
    embeddings *= EMBEDDING_GAIN * config.hidden_size**0.5
    for layer in model.model.layers:
        weight = layer.self_attn.qkv_proj.weight.data
        values = len(weight) - config.num_key_value_heads * layer.self_attn.head_dim
        weight[:values] *= QUERY_KEY_GAIN
        weight[values:] *= VALUE_GAIN
    # Noise that can be read: only tokens of the vocabulary win, bytes outside ASCII hardly ever, and the end token
    # often enough.
    embeddings[unreadable] *= 0.01
    embeddings[count:] *= 0.01
    embeddings[tokens["<|end|>"]] *= END_GAIN
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(folder)

    adapter = folder / ADAPTER_FOLDER
    adapter.mkdir()
    targets = [target.partition(".")[2] for target in TARGETS]
    lora = {"peft_type": "LORA", "r": sizes.rank, "lora_alpha": LORA_SCALE * sizes.rank, "target_modules": targets}
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(lora, indent=2))
    weights = {}
    for layer in range(config.num_hidden_layers):
        for target in TARGETS:
            rows, columns = model.get_submodule(f"model.layers.{layer}.{target}").weight.shape
            name = f"model.layers.{layer}.{target}"
            for key, shape in (("lora_A.weight", (sizes.rank, columns)), ("lora_B.weight", (rows, sizes.rank))):
                weights[f"{name}.{key}"] = (0.5 * _random(key, shape, generator)).to(stored)
    save_file(weights, adapter / ADAPTER_WEIGHTS)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal values that keep the size of what flows through: 1/sqrt(inputs) for matrices, near 1 for norms."""
    import torch

    values = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    if name.endswith("bias"):
        return 0.1 * values
    return 1 + 0.1 * values if len(shape) == 1 else values / values[0].numel() ** 0.5


def _config(sizes: Sizes, tokens: dict[str, int], count: int) -> dict[str, object]:
    heads = sizes.decoder["num_attention_heads"]
    angles = int(sizes.decoder["hidden_size"] // heads * 0.75) // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0] * angles,
        "long_factor": [1.0 + 0.5 * index for index in range(angles)],
    }
    return {
        "vocab_size": count,
        **sizes.decoder,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_parameters": rope,
        "tie_word_embeddings": True,
        "bos_token_id": tokens["<|endoftext|>"],
        "pad_token_id": tokens["<|endoftext|>"],
        "eos_token_id": [tokens["<|endoftext|>"], tokens["<|end|>"]],
        "vision_config": {**sizes.vision, "image_token_id": tokens["<|image|>"]},
        "audio_config": {**sizes.audio, "audio_token_id": tokens["<|audio|>"]},
    }


def _save_processor(folder: Path) -> tuple[dict[str, int], list[int], int]:
    """Write tokenizer and processor; return the special tokens' ids, the unreadable ids, and the vocabulary's size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        Phi4MultimodalFeatureExtractor,
        Phi4MultimodalImageProcessor,
        Phi4MultimodalProcessor,
        PreTrainedTokenizerFast,
    )

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator((TEXTS).read_text(encoding="utf-8").splitlines(), trainer)
    backend.add_special_tokens(
        [AddedToken(text, rstrip=rstrip, normalized=False, special=True) for text, rstrip in SPECIAL_TOKENS.items()]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image|>", "audio_token": "<|audio|>"},
        clean_up_tokenization_spaces=False,
    )
    Phi4MultimodalProcessor(
        image_processor=Phi4MultimodalImageProcessor(),
        audio_processor=Phi4MultimodalFeatureExtractor(),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    vocabulary = backend.get_vocab()
    unreadable = [index for index in vocabulary.values() if not _readable(backend.decode([index]))]
    return {text: vocabulary[text] for text in SPECIAL_TOKENS}, unreadable, len(vocabulary)


def _readable(text: str) -> bool:
    return text.isascii() and text.isprintable()
