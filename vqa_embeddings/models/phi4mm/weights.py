"""The model, loaded through the library's own classes from either layout, with the vision LoRA provably on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vqa_embeddings.base.file_names import for_libraries
from vqa_embeddings.errors import InputError, one_line
from vqa_embeddings.layers.device import keep_float32
from vqa_embeddings.models.phi4mm.adapters import check_shares
from vqa_embeddings.models.phi4mm.checkpoint import Adapter, Phi4Checkpoint
from vqa_embeddings.models.phi4mm.formats import (
    IMAGE_TOKENS,
    ORIGINAL_AUDIO_TOKEN,
    TENSOR_NAMES,
    is_read,
    native_settings,
)

if TYPE_CHECKING:
    import torch

# The library's loader reports false losses for adapters named "vision": its test is a substring of the key.
ADAPTER_NAME = "lora_of_vision"
ROUNDING = 2**-8  # of a number in bfloat16
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
            _settle_adapter(model, checkpoint.adapter, lora, getattr(torch, dtype))
    except InputError:
        raise
    except _not_the_files():
        raise
    except Exception as error:  # the libraries raise nearly every kind of error on files that do not fit together
        raise InputError(
            f"{checkpoint.folder} cannot be loaded: {one_line(error)}; download the checkpoint again"
        ) from error
    return model.eval().requires_grad_(False), tokenizer, image_processor


def _not_the_files() -> tuple[type[Exception], ...]:
    """What goes wrong while loading without the checkpoint being at fault: the machine's memory, its GPU, a package."""
    import torch

    return torch.OutOfMemoryError, torch.AcceleratorError, MemoryError, ImportError


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


def _settle_adapter(model: Any, adapter: Adapter, lora: str, dtype: torch.dtype) -> None:
    """Put the adapter on the decoder, see whether the weights hold it already, and do with it what was asked for."""
    _check_copies(adapter)
    layers, missing_keys = _inject(model, adapter)
    if lora != "none":  # what is left of an adapter that was merged need not be whole
        _check_adapter_layers(adapter.where, layers, model.config.num_hidden_layers, missing_keys)
    shares = _merge(layers, dtype) if lora == "merged" else [_share(*_weight_and_delta(x)) for x in layers.values()]
    check_shares(str(adapter.where), shares, lora)
    if lora != "adapter":
        _take_off(model, layers)
    if lora == "merged":
        for parameter in model.parameters():  # not the buffers: rotary frequencies are not to be rounded
            parameter.data = parameter.data.to(dtype)


def _check_copies(adapter: Adapter) -> None:
    """An adapter in two places is the same in both, but for a rounding. The first row of each matrix tells."""
    rows = _read({name: adapter.tensors[name] for name in adapter.copies if name in adapter.tensors}, slice(1))
    for name, copy in _read(adapter.copies, slice(1)).items():
        row = rows.get(name)
        if row is None or row.shape != copy.shape or (row - copy).norm() > ROUNDING * row.norm():
            path, stored = adapter.copies[name]
            raise InputError(
                f"{adapter.where} holds two vision LoRAs, one among the weights and one in {path.parent.name}, which "
                f"differ at {stored}; expected one, remove the other ({path.parent.name}, or the .lora_ tensors)"
            )


def _inject(model: Any, adapter: Adapter) -> tuple[dict[str, Any], list[str]]:
    """Put peft's layers on the model.

    Returns:
        These layers by their names, and the names of the tensors that the adapter lacks.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    config = LoraConfig.from_peft_type(**adapter.settings)
    config.inference_mode = True
    try:
        inject_adapter_in_model(config, model, ADAPTER_NAME)
        layers = _adapter_layers(model)
        for layer in layers.values():  # float32 whatever the model's format, so that merging rounds once
            layer.lora_A[ADAPTER_NAME].float()
            layer.lora_B[ADAPTER_NAME].float()
        loaded = set_peft_model_state_dict(model, _read(adapter.tensors), ADAPTER_NAME)
    except _not_the_files():
        raise
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"{adapter.where} holds a vision LoRA that does not fit the model: {one_line(error)}; "
            "use the adapter of the same checkpoint"
        ) from None
    if loaded.unexpected_keys:
        raise InputError(
            f"{adapter.where} holds {loaded.unexpected_keys[0]}, which the model has no place for; "
            "use the adapter of the same checkpoint"
        )
    return layers, loaded.missing_keys


def _check_adapter_layers(where: Path, layers: dict[str, Any], count: int, missing_keys: Iterable[str]) -> None:
    """Every projection that the adapter targets is covered in every decoder layer, by weights that do something."""
    missing = [key for key in missing_keys if ".lora_" in key]
    silent = [name for name, layer in layers.items() if not missing and not _acts(layer)]
    broken = [name for name, layer in layers.items() if not all(m.isfinite().all() for m in _matrices(layer))]
    targets = {name.split(".", 3)[3] for name in layers if name.startswith("model.layers.")}
    wanted = [f"model.layers.{index}.{target}" for index in range(count) for target in sorted(targets)]
    absent = [name for name in wanted if name not in layers]
    if missing or broken or silent or absent or not wanted:
        what = (
            f"without {missing[0]}" if missing
            else f"not finite in {broken[0]}" if broken
            else f"of no effect in {silent[0]}" if silent
            else f"not on {absent[0]}" if absent
            else "on no decoder layer"
        )  # fmt: skip
        raise InputError(
            f"Vision adapter not found: the one of {where} is {what}; expected trained weights for each projection "
            "that it targets, in every layer; use the adapter of the same checkpoint"
        )


def _matrices(layer: Any) -> tuple[Any, Any]:
    return layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight


def _acts(layer: Any) -> bool:
    return bool(layer.scaling[ADAPTER_NAME]) and all(matrix.any() for matrix in _matrices(layer))


def _read(tensors: dict[str, tuple[Path, str]], rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    """An adapter's tensors, or some rows of them, in float32, by the names that the library's model has."""
    from safetensors import safe_open

    by_file: dict[Path, dict[str, str]] = defaultdict(dict)
    for name, (path, stored) in tensors.items():
        by_file[path][name] = stored
    found = {}
    for path, names in by_file.items():
        with safe_open(for_libraries(path.parent) / path.name, framework="pt") as file:
            found.update({name: file.get_slice(stored)[rows].float() for name, stored in names.items()})
    return found


def _adapter_layers(model: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _merge(layers: dict[str, Any], dtype: torch.dtype) -> list[float]:
    """Add the adapter to the weights in float32, and round the sum once, to `dtype`.

    Returns:
        Its share in the weights of each layer before.
    """
    shares = []
    for name, layer in layers.items():
        weight, delta = _weight_and_delta(layer)
        shares.append(_share(weight, delta))
        delta += weight
        if not delta.isfinite().all():
            raise InputError(f"{name} with its vision LoRA is not finite; download the checkpoint again")
        layer.get_base_layer().weight.data = delta.to(dtype)
    return shares


def _weight_and_delta(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A projection's weights, and what its adapter adds to them; both float32, and as large."""
    return layer.get_base_layer().weight.data.float(), layer.get_delta_weight(ADAPTER_NAME)


def _share(weight: torch.Tensor, delta: torch.Tensor) -> float:
    """How much of `delta` is in `weight`, <weight, delta> / <delta, delta>. NaN where there is nothing of it."""
    weight, delta = weight.flatten(), delta.flatten()
    return (weight.dot(delta) / delta.dot(delta)).item()


def _take_off(model: Any, layers: dict[str, Any]) -> None:
    """Put the projections themselves where peft's layers are."""
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
