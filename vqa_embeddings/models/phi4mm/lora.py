"""The vision LoRA on a loaded model: whether the weights hold it already, and whether it is whole; merged, or kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqa_embeddings.base.file_names import for_libraries
from vqa_embeddings.errors import InputError, one_line
from vqa_embeddings.models.checkpoint import machine_errors
from vqa_embeddings.models.phi4mm.adapters import check_shares
from vqa_embeddings.models.phi4mm.checkpoint import Adapter

if TYPE_CHECKING:
    import torch

# The library's loader reports false losses for adapters named "vision": its test is a substring of the key.
ADAPTER_NAME = "lora_of_vision"
ROUNDING = 2**-8  # of a number in bfloat16


def settle_adapter(model: Any, adapter: Adapter, lora: str, dtype: torch.dtype) -> None:
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
    except machine_errors():
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
    fault = next(_find_faults(layers, count, missing_keys), None)
    if fault is not None:
        raise InputError(
            f"Vision adapter not found: the one of {where} is {fault}; expected trained weights for each projection "
            "that it targets, in every layer; use the adapter of the same checkpoint"
        )


def _find_faults(layers: dict[str, Any], count: int, missing_keys: Iterable[str]) -> Iterator[str]:
    """What an adapter on a decoder of so many layers is, other than whole, as a sentence says it."""
    yield from (f"without {key}" for key in missing_keys if ".lora_" in key)
    for name, layer in layers.items():
        if not all(matrix.isfinite().all() for matrix in _matrices(layer)):
            yield f"not finite in {name}"
    yield from (f"of no effect in {name}" for name, layer in layers.items() if not _acts(layer))
    targets = {name.split(".", 3)[3] for name in layers if name.startswith("model.layers.")}
    wanted = [f"model.layers.{index}.{target}" for index in range(count) for target in sorted(targets)]
    yield from (f"not on {name}" for name in wanted if name not in layers)
    if not wanted:
        yield "on no decoder layer"


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
