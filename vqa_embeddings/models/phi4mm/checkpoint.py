"""What the files of a Phi-4-multimodal checkpoint say, without loading it. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqa_embeddings.errors import InputError
from vqa_embeddings.models.base import Checkpoint, ModelFamily
from vqa_embeddings.models.checkpoint import (
    CONFIG,
    Tensors,
    find_tensors,
    fingerprint,
    quantised,
    read_header,
    read_json,
    read_those,
    stored_dtype,
    stored_layers,
)
from vqa_embeddings.models.phi4mm.adapters import (
    check_patterns,
    lora_among,
    lora_in_folder,
    settings_among,
    settings_in_folder,
)
from vqa_embeddings.models.phi4mm.formats import LAYOUTS, PROCESSOR_FILES, TOKENIZER_FILES, is_read, refuse_wrapped
from vqa_embeddings.models.phi4mm.settings import PictureSettings, added_tokens, find_ends, find_picture_settings

PICTURE_FILES = ("processor_config.json", "preprocessor_config.json")
ADAPTER_FOLDER = "vision-lora"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PIXEL_MEAN = "pixel_mean_representation"  # what the published script stored as vision_only


@dataclass(frozen=True)
class Adapter:
    """The vision LoRA, in its folder or among the weights."""

    where: Path
    settings: dict[str, Any]  # as peft's `adapter_config.json` has them
    tensors: dict[str, tuple[Path, str]]  # by the name that the library's model has: the file, and the name in it
    copies: dict[str, tuple[Path, str]] = field(default_factory=dict)  # in the folder too, of one among the weights


@dataclass(frozen=True)
class Phi4Checkpoint(Checkpoint):
    """A checkpoint of this family."""

    adapter: Adapter | None = field(repr=False)  # None only where `--lora none` needs none
    pictures: PictureSettings = field(repr=False)
    ends: dict[int, str] = field(repr=False)  # the tokens that end an answer, by their ids: what each is called


def inspect(
    family: ModelFamily, folder: Path, name: str, revision: str, config: dict[str, Any], lora: str
) -> Phi4Checkpoint:
    """See `ModelFamily.inspect`.

    Args:
        lora: what is done with the vision adapter; "none" where the weights hold it, and no other has to be there.
    """
    layout = LAYOUTS[config["model_type"]]
    _check_tokenizer(folder, layout)
    tensors = find_tensors(folder)
    refuse_wrapped(str(folder), tensors)
    layers, hidden_size, vision_size = _sizes(folder, config)
    if config.get("quantization_config"):
        raise quantised(folder, "quantization_config in config.json")
    dtype = _stored_dtype(folder, {name: stored for name, (_, stored) in tensors.items()})
    adapter = _find_adapter(folder, config, tensors, lora)
    pictures = _find_pictures(folder, config, layout)
    return Phi4Checkpoint(
        family=family,
        name=name,
        folder=folder,
        revision=revision,
        layout=layout,
        lora=lora,
        layers=layers,
        hidden_size=hidden_size,
        vision_size=vision_size,
        extra_vectors={},
        optional_vectors={"--pixel-mean": {PIXEL_MEAN: pictures.given["size"]}},
        dtype=dtype,
        fingerprint=fingerprint(folder, (f"{ADAPTER_FOLDER}/*.json", f"{ADAPTER_FOLDER}/*.safetensors")),
        config=config,
        adapter=adapter,
        pictures=pictures,
        ends=_find_ends(folder, config, layout),
    )


def refuse_adapter_alone(folder: Path) -> None:
    """Where a folder without a `config.json` holds an adapter, say what to do with it.

    Raises:
        InputError: it does.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "it does not say which"
        raise InputError(
            f"{folder} holds an adapter alone ({ADAPTER_CONFIG} without {CONFIG}); expected a whole model: where it is "
            f"the vision LoRA, put it into {ADAPTER_FOLDER}/ of the model that it was trained from ({base}); where it "
            "came on top of that, merge it into the model (PEFT's merge_and_unload) and give what that saves"
        )


def _check_tokenizer(folder: Path, layout: str) -> None:
    lacking = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    if lacking:
        raise InputError(
            f"{folder} holds no {lacking[0]}; expected the tokenizer and the processor beside the weights: copy "
            f"{', '.join(TOKENIZER_FILES)} and {PROCESSOR_FILES[layout]} from the model that it was trained from"
        )


def _stored_dtype(where: Path, tensors: dict[str, str]) -> str:
    """The widest number format among tensors, of those that are read."""
    return stored_dtype(where, (stored for name, stored in tensors.items() if is_read(name) or ".lora_" in name))


def _find_adapter(folder: Path, config: dict[str, Any], tensors: Tensors, lora: str) -> Adapter | None:
    """The vision LoRA: the one among the weights, which the original code would use, or the one in its folder."""
    of_its_own = next((name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if (folder / name).exists()), None)
    if of_its_own:  # the library would load it by itself, with the base model that it names, or nothing would read it
        raise InputError(
            f"{folder} holds an {of_its_own} of its own; expected a whole checkpoint with its vision LoRA in "
            f"{ADAPTER_FOLDER}, check --model"
        )
    among = lora_among(str(folder), tensors)
    where = folder / ADAPTER_FOLDER
    header = read_header(where / ADAPTER_WEIGHTS) if (where / ADAPTER_WEIGHTS).is_file() else {}
    _stored_dtype(where, header)
    stored = lora_in_folder(str(where / ADAPTER_WEIGHTS), header)
    in_folder = {name: (where / ADAPTER_WEIGHTS, stored[name]) for name in stored}
    if among:
        settings = settings_among(str(folder), config)
        return Adapter(folder, settings, {name: (tensors[among[name]][0], among[name]) for name in among}, in_folder)
    lacking = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (where / name).is_file()]
    if len(lacking) == 2 and lora == "none":
        return None
    if lacking:
        raise InputError(
            f"Vision adapter not found: expected {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} in {where}, or lora_A.vision "
            "tensors among the weights; without it the model answers, but wrongly; download the whole checkpoint, or "
            "use --lora none where it has been merged into the weights"
        )
    settings = settings_in_folder(str(where / ADAPTER_CONFIG), read_json(where / ADAPTER_CONFIG))
    check_patterns(str(where / ADAPTER_CONFIG), settings, in_folder)
    return Adapter(where, settings, in_folder)


def _sizes(folder: Path, config: dict[str, Any]) -> tuple[list[int], int, int]:
    vision = config.get("vision_config") or {}
    try:
        layers = stored_layers(int(config.get("num_hidden_layers", 32)))
        return layers, int(config.get("hidden_size", 3072)), int(vision.get("hidden_size", 1152))
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise InputError(f"{folder / CONFIG} gives no sizes of the model; download the checkpoint again") from None


def _find_pictures(folder: Path, config: dict[str, Any], layout: str) -> PictureSettings:
    files = read_those(folder, PICTURE_FILES)
    if layout == "native" and not files:  # the original layout has its settings in code
        raise InputError(f"{folder} holds neither {' nor '.join(PICTURE_FILES)}; download the whole checkpoint")
    return find_picture_settings(str(folder), files, config)


def _find_ends(folder: Path, config: dict[str, Any], layout: str) -> dict[int, str]:
    with open(folder / "tokenizer.json", encoding="utf-8", errors="replace") as stream:
        names = added_tokens(stream, read_those(folder, ["tokenizer_config.json"]).get("tokenizer_config.json", {}))
    files = {"config.json": config, **read_those(folder, ["generation_config.json"])}
    return find_ends(str(folder), files, layout == "native", names)
