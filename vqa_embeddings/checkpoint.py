"""Checkpoints: found, inspected before anything slow, and loaded with the vision LoRA provably on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqa_embeddings.errors import Refused
from vqa_embeddings.options import MODEL

if TYPE_CHECKING:
    import torch

NATIVE_REVISION = "refs/pr/70"  # of MODEL on the hub: the revision that the library's own tests use
NATIVE_TYPE = "phi4_multimodal"
ADAPTER_FOLDER = "vision-lora"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# The library's loader reports false losses for adapters named "vision": its test is a substring of the key.
ADAPTER_NAME = "lora_of_vision"
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 1 << 16  # of each large file that a fingerprint reads


@dataclass(frozen=True)
class Checkpoint:
    """A folder that can be loaded, and what its config says without loading it."""

    name: str  # as the user gave it
    folder: Path
    revision: str
    layout: str
    layers: list[int]
    hidden_size: int
    vision_size: int
    fingerprint: str


def find_checkpoint(model: str, revision: str | None, cache_dir: Path) -> Checkpoint:
    """Find a checkpoint in a local folder or on the hub, and check it without importing torch.

    Raises:
        Refused: it is not there, not whole, of an unknown layout, or without a vision adapter.
    """
    if Path(model).is_dir():
        folder, revision = Path(model), "local"
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise Refused(
            f"{model} is not there; expected a checkpoint folder or a hub name such as {MODEL}, check --model"
        )
    else:
        folder, revision = _download(model, revision, cache_dir)
    config = _read_json(folder / "config.json")
    if config.get("model_type") != NATIVE_TYPE:
        raise Refused(
            f"{folder} holds a checkpoint of model_type {config.get('model_type')!r}; expected the native layout, "
            f"{NATIVE_TYPE!r}; use revision {NATIVE_REVISION} of {MODEL}"
        )
    _check_weights(folder)
    _check_adapter(folder / ADAPTER_FOLDER)
    sizes = _sizes(folder, config)
    return Checkpoint(model, folder, revision, "native", *sizes, _fingerprint(folder))


def quiet_library() -> None:
    """Keep the library's reports and bars out of ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def kept_layers(count: int) -> list[int]:
    """The decoder layers whose states are kept: the first, the quarters and the last of `count`."""
    return sorted({0, count // 4, count // 2, 3 * count // 4, count - 1})


def load_model(checkpoint: Checkpoint, device: str, dtype: str, attention: str, lora: str) -> tuple[Any, Any]:
    """Load the model with its vision LoRA, and the processor, through the library's own classes.

    The audio tower is dropped: no picture reaches it, and the names of its layers would catch the adapter.

    Args:
        lora: "merged" adds the adapter to the weights in float32 and rounds once; "adapter" keeps peft's layers.
    Returns:
        The `Phi4MultimodalForCausalLM`, on the device and ready to infer, and the `Phi4MultimodalProcessor`.
    Raises:
        Refused: a file is damaged, a tensor is missing or of another size, or the adapter does not cover the model.
    """
    import torch
    import transformers

    quiet_library()  # what it reports as a fault is checked, and refused, here
    try:
        processor = transformers.Phi4MultimodalProcessor.from_pretrained(checkpoint.folder, local_files_only=True)
        model, loading = transformers.Phi4MultimodalForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            device_map={"": device} if device != "cpu" else None,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
        )
        _check_loaded(checkpoint, model, processor, loading["missing_keys"])
        model.model.embed_tokens_extend.audio_embed = None
        _add_adapter(model, checkpoint.folder / ADAPTER_FOLDER, lora)
    except (Refused, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the libraries raise nearly every kind of error on files that do not fit together
        raise Refused(
            f"{checkpoint.folder} cannot be loaded: {_one_line(error)}; download the checkpoint again"
        ) from error
    return model.eval().requires_grad_(False), processor


def _check_loaded(checkpoint: Checkpoint, model: Any, processor: Any, missing: Iterable[str]) -> None:
    lacking = sorted(key for key in missing if ".audio_embed." not in key)
    if lacking:
        raise Refused(
            f"{checkpoint.folder} lacks {len(lacking)} tensors of the model, the first {lacking[0]}; "
            "expected a whole checkpoint, download it again"
        )
    expected, found = model.config.vision_config.image_token_id, processor.image_token_id
    if expected != found:
        raise Refused(
            f"{checkpoint.folder}: the tokenizer's image token is {found}, the config's is {expected}; "
            "expected them to be the same, download the tokenizer and the config of one revision"
        )


def _download(model: str, revision: str | None, cache_dir: Path) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    revision = revision or (NATIVE_REVISION if model == MODEL else "main")
    wanted, unwanted = ["*.json", "*.safetensors", "*.txt", "*.jinja"], ["speech-lora/*"]
    try:
        path = snapshot_download(
            model, revision=revision, cache_dir=cache_dir, allow_patterns=wanted, ignore_patterns=unwanted
        )
    except Exception as error:  # no network, no such model, no access: the hub has many ways to say no
        raise Refused(
            f"{model} (revision {revision}) is neither a folder nor to be had from the hub: {_one_line(error)}; "
            "check --model and the network, or give the folder of a downloaded checkpoint"
        ) from None
    return Path(path), Path(path).name  # a snapshot's folder is named after its commit


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refused(f"{path.parent} holds no {path.name}; expected a checkpoint folder, check --model") from None
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read ({_one_line(error)}); download the checkpoint again") from None
    if not isinstance(value, dict):
        raise Refused(f"{path} holds no JSON object; download the checkpoint again")
    return value


def _check_weights(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    weight_map = _read_json(index).get("weight_map") if index.exists() else {"": "model.safetensors"}
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise Refused(f"{index} maps no tensors to files; download the checkpoint again")
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise Refused(
                f"{folder} holds no {name}; expected the weights as safetensors, download the checkpoint again"
            )
        _check_safetensors(folder / name)


def _check_safetensors(path: Path) -> None:
    """A file's own header says how long it must be: a truncated download is found without reading it."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        size = path.stat().st_size
        try:
            header = json.loads(stream.read(length)) if length < size else {}
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            ends = []
    if not ends or 8 + length + max(ends) != size:
        raise Refused(f"{path} is not a whole safetensors file ({size} bytes); download the checkpoint again")


def _check_adapter(folder: Path) -> None:
    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        raise Refused(
            f"Vision adapter not found: expected {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} in {folder}; without it the "
            "model answers, but wrongly; download the checkpoint with its vision-lora folder"
        )
    _check_safetensors(folder / ADAPTER_WEIGHTS)
    config = _read_json(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise Refused(f"{folder / ADAPTER_CONFIG} is of peft_type {config.get('peft_type')!r}; expected LORA")


def _sizes(folder: Path, config: dict[str, Any]) -> tuple[list[int], int, int]:
    vision = config.get("vision_config") or {}
    try:
        layers = kept_layers(int(config.get("num_hidden_layers", 32)))
        return layers, int(config.get("hidden_size", 3072)), int(vision.get("hidden_size", 1152))
    except (TypeError, ValueError, AttributeError):
        raise Refused(f"{folder / 'config.json'} gives no sizes of the model; download the checkpoint again") from None


def _fingerprint(folder: Path) -> str:
    """SHA-256 over the names, the sizes and evenly spaced blocks of all files that the model is loaded from."""
    digest = hashlib.sha256()
    patterns = (
        "*.json",
        "*.safetensors",
        "*.txt",
        "*.jinja",
        f"{ADAPTER_FOLDER}/*.json",
        f"{ADAPTER_FOLDER}/*.safetensors",
    )
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with open(path, "rb") as stream:
            if size <= SAMPLED_BLOCKS * BLOCK_BYTES:
                digest.update(stream.read())
                continue
            for block in range(SAMPLED_BLOCKS):
                stream.seek((size - BLOCK_BYTES) * block // (SAMPLED_BLOCKS - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def _add_adapter(model: Any, folder: Path, lora: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = True
    tensors = _adapter_tensors(folder / ADAPTER_WEIGHTS)
    try:
        inject_adapter_in_model(config, model, ADAPTER_NAME)
        layers = _adapter_layers(model)
        for layer in layers.values():  # float32 whatever the model's format, so that merging rounds once
            layer.lora_A[ADAPTER_NAME].float()
            layer.lora_B[ADAPTER_NAME].float()
        loaded = set_peft_model_state_dict(model, tensors, ADAPTER_NAME)
    except (ValueError, RuntimeError) as error:
        raise Refused(
            f"{folder} does not fit the model: {_one_line(error)}; use the adapter of the same checkpoint"
        ) from None
    if loaded.unexpected_keys:
        raise Refused(
            f"{folder} holds {loaded.unexpected_keys[0]}, which the model has no place for; "
            "use the adapter of the same checkpoint"
        )
    _check_adapter_layers(folder, layers, model.config.num_hidden_layers, loaded.missing_keys)
    if lora == "merged":
        _merge(model, layers)


def _check_adapter_layers(folder: Path, layers: dict[str, Any], count: int, missing_keys: Iterable[str]) -> None:
    """Every projection that the adapter targets is covered in every decoder layer, by weights that do something."""
    missing = [key for key in missing_keys if ".lora_" in key]
    silent = [name for name, layer in layers.items() if not layer.lora_B[ADAPTER_NAME].weight.any()]
    targets = {name.split(".", 3)[3] for name in layers if name.startswith("model.layers.")}
    wanted = [f"model.layers.{index}.{target}" for index in range(count) for target in sorted(targets)]
    absent = [name for name in wanted if name not in layers]
    if missing or silent or absent or not wanted:
        where = (
            f"without {missing[0]}" if missing
            else f"all zero in {silent[0]}" if silent
            else f"not on {absent[0]}" if absent
            else "on no decoder layer"
        )  # fmt: skip
        raise Refused(
            f"Vision adapter not found: {folder} is {where}; expected trained weights for each projection that it "
            "targets, in every layer; use the adapter of the same checkpoint"
        )


def _adapter_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The adapter in float32, its keys without the prefix that peft writes and the hub's checkpoint does not."""
    from safetensors.torch import load_file

    return {key.removeprefix("base_model.model."): tensor.float() for key, tensor in load_file(path).items()}


def _adapter_layers(model: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _merge(model: Any, layers: dict[str, Any]) -> None:
    """Add the adapter to each weight in float32, round once to the weight's format, and take peft's layers away."""
    for name, layer in layers.items():
        base = layer.get_base_layer()
        dtype = base.weight.dtype
        base.weight.data = base.weight.data.float()
        layer.merge(safe_merge=True)
        base.weight.data = base.weight.data.to(dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
