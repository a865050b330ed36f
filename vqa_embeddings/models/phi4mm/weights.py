"""The model, loaded through the library's own classes from either layout, with the vision LoRA provably on."""

from __future__ import annotations

from typing import Any

from PIL import Image

from vqa_embeddings.base.file_names import for_libraries
from vqa_embeddings.errors import InputError, one_line
from vqa_embeddings.layers.device import keep_float32
from vqa_embeddings.models.checkpoint import machine_errors
from vqa_embeddings.models.phi4mm.checkpoint import Phi4Checkpoint
from vqa_embeddings.models.phi4mm.formats import (
    IMAGE_TOKENS,
    ORIGINAL_AUDIO_TOKEN,
    TENSOR_NAMES,
    is_read,
    native_settings,
)
from vqa_embeddings.models.phi4mm.lora import settle_adapter

PROMPT_TOKENS = ("<|user|>", "<|end|>", "<|assistant|>")


def quiet_library() -> None:
    """Keep the library's reports and bars out of ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load_model(checkpoint: Phi4Checkpoint, device: str, dtype: str, attention: str) -> tuple[Any, Any, Any]:
    """Load the model with its vision LoRA, and what prepares its input.

    The checkpoint's `lora` says what is done with it: "merged" adds the adapter to the weights in float32 and rounds
    once; "adapter" keeps peft's layers; "none" leaves weights as they are that hold the adapter already.

    Returns:
        The `Phi4MultimodalForCausalLM`, on the device and ready to infer; the tokenizer; the image processor.
    Raises:
        InputError: a file is damaged, a tensor is missing or of another size, the tokenizer is of another model, or the
            adapter does not cover the decoder, is in the weights already, or with "none" is not.
    """
    import torch

    lora = checkpoint.lora
    assert checkpoint.adapter is not None or lora == "none"  # find_checkpoint sees to it
    keep_float32()
    quiet_library()  # what it reports as a fault is checked, and refused, here
    # What is to be rounded once, after the LoRA is in, must not be rounded here.
    loaded_dtype = checkpoint.dtype if lora == "merged" and dtype != "float32" else dtype
    try:
        tokenizer = _load_tokenizer(checkpoint)
        image_processor = _load_image_processor(checkpoint)
        config = _load_config(checkpoint, tokenizer)
        model, loading = _model_without_audio().from_pretrained(
            for_libraries(checkpoint.folder),
            config=config,
            key_mapping=TENSOR_NAMES,
            dtype=getattr(torch, loaded_dtype),
            attn_implementation=attention,
            device_map={"": device} if device != "cpu" else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            local_files_only=True,
            use_safetensors=True,
        )
        _check_tensors(checkpoint, loading)
        model.generation_config.eos_token_id = list(checkpoint.ends)
        if checkpoint.adapter is not None:
            settle_adapter(model, checkpoint.adapter, lora, getattr(torch, dtype))
    except InputError:
        raise
    except machine_errors():
        raise
    except Exception as error:  # the libraries raise nearly every kind of error on files that do not fit together
        raise InputError(
            f"{checkpoint.folder} cannot be loaded: {one_line(error)}; download the checkpoint again"
        ) from error
    return model.eval().requires_grad_(False), tokenizer, image_processor


def _load_tokenizer(checkpoint: Phi4Checkpoint) -> Any:
    """The tokenizer that splits text as `tokenizer.json` says; added tokens have the flags of `tokenizer_config.json`.

    The class that a checkpoint names (GPT2Tokenizer) would split text its own way from transformers 5 on, silently.
    """
    from transformers import PreTrainedTokenizerFast

    path = checkpoint.folder / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(for_libraries(checkpoint.folder), local_files_only=True)
    known = tokenizer.get_added_vocab()
    for token in (_image_token(checkpoint, tokenizer), *PROMPT_TOKENS):
        if token not in known or (token == "<|end|>" and known[token] not in checkpoint.ends):
            raise InputError(
                f"{path} has no special token {token}; expected the prompt's own tokens, "
                "download the tokenizer of the same checkpoint"
            )
    return tokenizer


def _image_token(checkpoint: Phi4Checkpoint, tokenizer: Any) -> str:
    return getattr(tokenizer, "image_token", None) or IMAGE_TOKENS[checkpoint.layout]


def _load_image_processor(checkpoint: Phi4Checkpoint) -> Any:
    """The library's own in either layout, given what the checkpoint says.

    By itself it reads one of the places where that may stand, and takes its own values where it finds none there.
    """
    from transformers import Phi4MultimodalImageProcessor

    processor = Phi4MultimodalImageProcessor(**checkpoint.pictures.given)
    processor(images=[Image.new("RGB", (28, 28))], return_tensors="pt")  # what cannot be would fail every row
    return processor


def _load_config(checkpoint: Phi4Checkpoint, tokenizer: Any) -> Any:
    """The library's config, from either layout."""
    from transformers import Phi4MultimodalConfig

    known = tokenizer.get_added_vocab()
    image_token = known[_image_token(checkpoint, tokenizer)]
    if checkpoint.layout == "original":
        audio_token = known.get(ORIGINAL_AUDIO_TOKEN, image_token)
        return Phi4MultimodalConfig(**native_settings(checkpoint.config, image_token, audio_token))
    config = Phi4MultimodalConfig.from_pretrained(for_libraries(checkpoint.folder), local_files_only=True)
    if config.vision_config.image_token_id != image_token:
        raise InputError(
            f"{checkpoint.folder}: the tokenizer's image token is {image_token}, the config's is "
            f"{config.vision_config.image_token_id}; expected them to be the same, download the tokenizer and the "
            "config of one revision"
        )
    return config


def _model_without_audio() -> Any:
    """The library's class less the audio tower, which no picture reaches and whose layers would catch the adapter."""
    from transformers import Phi4MultimodalForCausalLM

    class WithoutAudio(Phi4MultimodalForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.embed_tokens_extend.audio_embed = None

    return WithoutAudio


def _check_tensors(checkpoint: Phi4Checkpoint, loading: dict[str, Any]) -> None:
    """Every tensor that is read is there, of the right size, and every one that is there has its place."""
    if loading["mismatched_keys"]:
        name, found, expected = min(loading["mismatched_keys"])
        raise InputError(
            f"{checkpoint.folder}: {name} is of size {list(found)}, its config.json asks for {list(expected)}; "
            "expected the weights and the config of one checkpoint, download them again"
        )
    lacking = sorted(name for name in loading["missing_keys"] if is_read(name))
    strange = sorted(name for name in loading["unexpected_keys"] if is_read(name))
    if lacking:
        raise InputError(
            f"{checkpoint.folder} lacks {len(lacking)} tensors of the model, the first {lacking[0]}; "
            "expected a whole checkpoint, download it again"
        )
    if strange:
        raise InputError(
            f"{checkpoint.folder} holds {len(strange)} tensors that the model has no place for, the first "
            f"{strange[0]}; expected a checkpoint of Phi-4-multimodal, check --model"
        )
