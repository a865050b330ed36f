"""The two layouts that Phi-4-multimodal checkpoints come in, as data: tensor names, settings, tokens. Needs no torch.

native: what the library's own classes write; the vision LoRA lies beside the weights, in `vision-lora/`.
original: what the model's own code wrote, and most copies hold; the LoRAs lie among the weights, the placeholder for a
picture is `<|endoftext10|>`, and the sizes of the vision tower are in that code. Its names are those that the
library's converter for this model knows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vqa_embeddings.errors import Refused

LAYOUTS = {"phi4_multimodal": "native", "phi4mm": "original"}  # by the model_type of config.json
IMAGE_TOKENS = {"native": "<|image|>", "original": "<|endoftext10|>"}
ORIGINAL_AUDIO_TOKEN = "<|endoftext11|>"

# Patterns of tensor names in the original layout, and what the library's model calls them. They match no native name.
# No picture reaches the audio tower, so that its names need none.
TENSOR_NAMES = {
    r"\.base_layer\.": ".",
    r"\.image_embed\.img_projection\.0\.": ".image_embed.img_projection_up.",
    r"\.image_embed\.img_projection\.2\.": ".image_embed.img_projection_down.",
    r"\.image_embed\.glb_GN": ".image_embed.global_img_feature_extensor",
    r"\.image_embed\.sub_GN": ".image_embed.sub_img_feature_extensor",
}
# Parts of the names of tensors that nothing reads: no harm where one is missing, no sign of another model where one is
# left over. Position numbers are stored by some savers and computed by the library.
UNREAD = (".audio_embed.", ".lora_", ".img_processor.head.", ".img_processor.post_layernorm.", ".position_ids")
# Settings of the original layout that the library's config knows by the same name.
SHARED_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "rms_norm_eps",
    "sliding_window",
    "bos_token_id",
    "pad_token_id",
)


def find_layout(where: str, config: dict[str, Any]) -> str:
    """The layout of a checkpoint, by its `config.json`.

    Raises:
        Refused: it is neither of the two.
    """
    found = config.get("model_type")
    if not isinstance(found, str) or found not in LAYOUTS:
        known = " or ".join(f"{model_type!r} (the {layout} layout)" for model_type, layout in LAYOUTS.items())
        raise Refused(f"{where} holds a checkpoint of model_type {found!r}; expected {known}, check --model")
    return LAYOUTS[found]


def native_settings(original: dict[str, Any], image_token: int, audio_token: int, end_token: int) -> dict[str, Any]:
    """The settings of an original checkpoint, as the library's `Phi4MultimodalConfig` takes them.

    Args:
        original: its `config.json`.
        image_token: the placeholder's id in its tokenizer; so `audio_token`, `end_token`.
    """
    ends = original.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return {
        **{name: original[name] for name in SHARED_SETTINGS if name in original},
        "tie_word_embeddings": original.get("tie_word_embeddings", True),
        "eos_token_id": sorted({*ends, end_token}),
        "vision_config": {**(original.get("vision_config") or {}), "image_token_id": image_token},
        "audio_config": {"audio_token_id": audio_token},
    }


def is_read(name: str) -> bool:
    """Whether the vectors depend on a tensor of the model proper, by its name in either layout."""
    return not any(part in name for part in UNREAD)


def lora_among(names: Iterable[str]) -> dict[str, str]:
    """The vision LoRA among a checkpoint's tensors: their names there, by the names that the library's model has."""
    lora = [name for name in names if ".lora_A.vision." in name or ".lora_B.vision." in name]
    return {name.replace(".vision.", "."): name for name in lora}


def lora_settings(where: str, config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a vision LoRA that lies among the weights, as peft's `LoraConfig` takes them.

    Raises:
        Refused: `config.json` does not give them.
    """
    lora = config.get("vision_lora")
    try:
        if not isinstance(lora, dict):
            raise TypeError
        return {"r": int(lora["r"]), "lora_alpha": float(lora["lora_alpha"]), "target_modules": from_top(lora["layer"])}
    except (KeyError, TypeError, ValueError, OverflowError):
        raise Refused(
            f"Vision adapter not found: {where} holds LoRA tensors, but its config.json gives no vision_lora with r, "
            "lora_alpha and layer; use the config.json of the same checkpoint"
        ) from None


def from_top(targets: Any) -> Any:
    """An adapter's targets as from the model's top: patterns of the original layout begin one level below.

    A list of names, and peft's word "all-linear", mean the same at any level.
    """
    return rf"(model\.)?({targets})" if isinstance(targets, str) and targets != "all-linear" else targets
