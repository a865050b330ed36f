"""The two layouts that Phi-4-multimodal checkpoints come in, as data: tensor names, settings, tokens. Needs no torch.

native: what the library's own classes write; the vision LoRA lies beside the weights, in `vision-lora/`.
original: what the model's own code wrote, and most copies hold; the LoRAs lie among the weights, the placeholder for a
picture is `<|endoftext10|>`, and the sizes of the vision tower are in that code. Its names are those that the
library's converter for this model knows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vqa_embeddings.errors import InputError
from vqa_embeddings.models.phi4mm.adapters import AMONG

LAYOUTS = {"phi4_multimodal": "native", "phi4mm": "original"}  # by the model_type of config.json
IMAGE_TOKENS = {"native": "<|image|>", "original": "<|endoftext10|>"}
ORIGINAL_AUDIO_TOKEN = "<|endoftext11|>"
# What has to lie beside the weights. The flags of the added tokens may stand in either of the tokenizer's two files.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
PROCESSOR_FILES = {
    "native": "processor_config.json (or preprocessor_config.json, where it has that)",
    "original": "preprocessor_config.json",
}
# Whether white space beside them belongs to the native layout's placeholder and end token. The library's converter made
# that placeholder from the model's own added token by renaming it; of the model's tokens only those of roles and tools
# swallow white space, and that after them.
IMAGE_RSTRIP, END_LSTRIP = False, False

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
UNREAD = (".audio_embed.", ".img_processor.head.", ".img_processor.post_layernorm.", ".position_ids")
# What a name begins with where the model was saved inside of something: what that is, and what saves the model itself.
WRAPPERS = {
    "base_model.model.": ("PEFT", "model.merge_and_unload().save_pretrained(…)"),
    "module.": ("DistributedDataParallel", "model.module.save_pretrained(…)"),
    "_orig_mod.": ("torch.compile", "model._orig_mod.save_pretrained(…)"),
    "_fsdp_wrapped_module.": ("FullyShardedDataParallel", "model.module.save_pretrained(…)"),
}
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


def native_settings(original: dict[str, Any], image_token: int, audio_token: int) -> dict[str, Any]:
    """The settings of an original checkpoint, as the library's `Phi4MultimodalConfig` takes them.

    Args:
        original: its `config.json`.
        image_token: the placeholder's id in its tokenizer; so `audio_token`.
    """
    return {
        **{name: original[name] for name in SHARED_SETTINGS if name in original},
        "tie_word_embeddings": original.get("tie_word_embeddings", True),
        "vision_config": {**(original.get("vision_config") or {}), "image_token_id": image_token},
        "audio_config": {"audio_token_id": audio_token},
    }


def refuse_wrapped(where: str, names: Iterable[str]) -> None:
    """Refuse tensors whose names begin with what a wrapper puts before them."""
    for name in sorted(names):
        for prefix, (wrapper, command) in WRAPPERS.items():
            if name.startswith(prefix):
                raise InputError(
                    f"{where} holds {name}, as a model is saved inside of {wrapper}; expected names without {prefix}: "
                    f"save the model itself with {command}"
                )


def is_read(name: str) -> bool:
    """Whether the vectors depend on a tensor of the model proper, by its name in either layout."""
    return not any(part in name for part in UNREAD) and not AMONG.search(name)
