"""Checkpoints: found in a folder or on the hub, and inspected before anything slow. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqa_embeddings.errors import InputError, one_line
from vqa_embeddings.models.hub import MODEL, download
from vqa_embeddings.models.phi4mm.adapters import (
    check_patterns,
    lora_among,
    lora_in_folder,
    settings_among,
    settings_in_folder,
)
from vqa_embeddings.models.phi4mm.formats import (
    LAYOUTS,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    find_layout,
    is_read,
    refuse_wrapped,
)
from vqa_embeddings.models.phi4mm.settings import PictureSettings, added_tokens, find_ends, find_picture_settings

CONFIG = "config.json"
BELOW = ("*", "snapshots/*", "models--*/snapshots/*")  # where checkpoints lie in a folder of some, or in a hub's cache
PICTURE_FILES = ("processor_config.json", "preprocessor_config.json")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_FOLDER = "vision-lora"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}  # safetensors' names and torch's, by width
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 1 << 16  # of each large file that a fingerprint reads


@dataclass(frozen=True)
class Adapter:
    """The vision LoRA, in its folder or among the weights."""

    where: Path
    settings: dict[str, Any]  # as peft's `adapter_config.json` has them
    tensors: dict[str, tuple[Path, str]]  # by the name that the library's model has: the file, and the name in it
    copies: dict[str, tuple[Path, str]] = field(default_factory=dict)  # in the folder too, of one among the weights


@dataclass(frozen=True)
class Checkpoint:
    """A folder that can be loaded, and what its files say without loading it."""

    name: str  # as the user gave it
    folder: Path
    revision: str
    layout: str
    layers: list[int]
    hidden_size: int
    vision_size: int
    dtype: str  # of the weights as they are stored
    fingerprint: str
    config: dict[str, Any] = field(repr=False)
    adapter: Adapter | None = field(repr=False)  # None only where `--lora none` needs none
    pictures: PictureSettings = field(repr=False)
    ends: dict[int, str] = field(repr=False)  # the tokens that end an answer, by their ids: what each is called


def find_checkpoint(model: str, revision: str | None, cache_dir: Path | None, lora: str = "merged") -> Checkpoint:
    """Find a checkpoint in a local folder or on the hub, and check it without importing torch.

    Args:
        cache_dir: where a hub model lies, or goes to; None: see `hub.choose_cache`.
        lora: what becomes of the vision adapter; "none" where the weights hold it, and no other has to be there.
    Raises:
        InputError: it is not there, not whole, of an unknown layout, or without a vision adapter.
    """
    if Path(model).is_dir():
        folder, revision = Path(model), "local"
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(
            f"{model} is not there; expected a checkpoint folder or a hub name such as {MODEL}, check --model"
        )
    else:
        folder, revision = download(model, revision, cache_dir, _is_whole)
    try:
        if not (folder / CONFIG).exists():
            _refuse_other_folders(folder)
        config = read_json(folder / CONFIG)
        layout = find_layout(str(folder), config)
        _check_tokenizer(folder, layout)
        tensors = _find_tensors(folder)
        refuse_wrapped(str(folder), tensors)
        sizes = _sizes(folder, config)
        if config.get("quantization_config"):
            raise _quantised(folder, "quantization_config in config.json")
        dtype = _stored_dtype(folder, {name: stored for name, (_, stored) in tensors.items()})
        adapter = _find_adapter(folder, config, tensors, lora)
        told = _find_pictures(folder, config, layout), _find_ends(folder, config, layout)
        return Checkpoint(model, folder, revision, layout, *sizes, dtype, _fingerprint(folder), config, adapter, *told)
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({one_line(error)}); check its permissions and links") from None


def kept_layers(count: int) -> list[int]:
    """The decoder layers whose states are kept: the first, the quarters and the last of `count`."""
    return sorted({0, count // 4, count // 2, 3 * count // 4, count - 1})


def _refuse_other_folders(folder: Path) -> None:
    """Say what a folder without a `config.json` is instead, where that can be seen."""
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "it does not say which"
        raise InputError(
            f"{folder} holds an adapter alone ({ADAPTER_CONFIG} without {CONFIG}); expected a whole model: where it is "
            f"the vision LoRA, put it into {ADAPTER_FOLDER}/ of the model that it was trained from ({base}); where it "
            "came on top of that, merge it into the model (PEFT's merge_and_unload) and give what that saves"
        )
    below = [path.parent for pattern in BELOW for path in folder.glob(f"{pattern}/{CONFIG}") if _is_phi4(path)]
    if below:
        newest = max(below, key=lambda path: (path / CONFIG).stat().st_mtime_ns)
        others = f", the newest of {len(below)}" if len(below) > 1 else ""
        raise InputError(
            f"{folder} is no checkpoint, but holds some below; expected one: give --model {newest}{others}"
        )


def _is_phi4(path: Path) -> bool:
    try:
        return read_json(path).get("model_type") in LAYOUTS
    except (InputError, TypeError):  # a broken one, or a model_type that is no text
        return False


def _check_tokenizer(folder: Path, layout: str) -> None:
    lacking = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    if lacking:
        raise InputError(
            f"{folder} holds no {lacking[0]}; expected the tokenizer and the processor beside the weights: copy "
            f"{', '.join(TOKENIZER_FILES)} and {PROCESSOR_FILES[layout]} from the model that it was trained from"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        InputError: the file is not there, or is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} holds no {path.name}; expected a checkpoint folder, check --model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}); download the checkpoint again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object; download the checkpoint again")
    return value


def _find_tensors(folder: Path) -> dict[str, tuple[Path, str]]:
    """File and number format of every tensor of the model, whose files are all there and whole."""
    if not (folder / INDEX).exists():
        return _tensors_of(_weights_file(folder, WEIGHTS))
    if (folder / WEIGHTS).exists():  # the library would load the one, and what is checked here is the other
        raise InputError(f"{folder} holds both {WEIGHTS} and {INDEX}; expected one, remove what is not the model's")
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise InputError(f"{folder / INDEX} maps no tensors to files; download the checkpoint again")
    if "metadata" not in index:
        raise InputError(f'{folder / INDEX} has no "metadata", which the library asks for; add "metadata": {{}} to it')
    tensors = {}
    for file in sorted(set(weight_map.values())):
        tensors.update(_tensors_of(_weights_file(folder, file)))
    absent = next((name for name, file in weight_map.items() if tensors.get(name, (None,))[0] != folder / file), None)
    if absent is not None:
        raise InputError(
            f"{folder / weight_map[absent]} lacks {absent}, which {INDEX} says it holds; download the checkpoint again"
        )
    return tensors


def _is_whole(folder: Path) -> bool:
    """Whether all of the weights are there, which a download that was cut off lacks."""
    try:
        return bool(_find_tensors(folder))
    except InputError:
        return False


def _tensors_of(path: Path) -> dict[str, tuple[Path, str]]:
    return {name: (path, dtype) for name, dtype in _safetensors_header(path).items()}


def _weights_file(folder: Path, name: str) -> Path:
    if Path(name).name != name or name in ("", ".."):
        raise InputError(
            f"{folder / INDEX} names {name!r}; expected file names beside it, download the checkpoint again"
        )
    if not (folder / name).is_file():
        others = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt*"), *folder.glob("*.gguf")))
        found = f" (found {others[0]}, which is not read)" if others else ""
        raise InputError(
            f"{folder} holds no {name}{found}; expected the weights as safetensors, download the checkpoint again"
        )
    return folder / name


def _safetensors_header(path: Path) -> dict[str, str]:
    """Names and number formats of a file's tensors.

    The header also says how long the file must be: a truncated download is found without reading it.
    """
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        size = path.stat().st_size
        try:
            header = json.loads(stream.read(length)) if length < size else {}
            header.pop("__metadata__", None)
            ends = [entry["data_offsets"][1] for entry in header.values()]
            tensors = {name: str(entry["dtype"]) for name, entry in header.items()}
            whole = 8 + length + max(ends) == size
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            whole = False
    if not whole:
        raise InputError(f"{path} is not a whole safetensors file ({size} bytes); download the checkpoint again")
    return tensors


def _stored_dtype(where: Path, tensors: dict[str, str]) -> str:
    """The widest number format among tensors, of those that are read."""
    found = {stored for name, stored in tensors.items() if is_read(name) or ".lora_" in name}
    others = sorted(found - FLOATS.keys())
    if others:
        raise _quantised(where, f"weights of format {others[0]}")
    return FLOATS[max(found, key=list(FLOATS).index, default="F32")]


def _quantised(where: Path, how: str) -> InputError:
    return InputError(
        f"{where} is quantised ({how}); expected weights of {', '.join(FLOATS)}: the vectors would be others, "
        "use the checkpoint that it was made from"
    )


def _find_adapter(
    folder: Path, config: dict[str, Any], tensors: dict[str, tuple[Path, str]], lora: str
) -> Adapter | None:
    """The vision LoRA: the one among the weights, which the original code would use, or the one in its folder."""
    of_its_own = next((name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if (folder / name).exists()), None)
    if of_its_own:  # the library would load it by itself, with the base model that it names, or nothing would read it
        raise InputError(
            f"{folder} holds an {of_its_own} of its own; expected a whole checkpoint with its vision LoRA in "
            f"{ADAPTER_FOLDER}, check --model"
        )
    among = lora_among(str(folder), tensors)
    where = folder / ADAPTER_FOLDER
    header = _safetensors_header(where / ADAPTER_WEIGHTS) if (where / ADAPTER_WEIGHTS).is_file() else {}
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
        layers = kept_layers(int(config.get("num_hidden_layers", 32)))
        return layers, int(config.get("hidden_size", 3072)), int(vision.get("hidden_size", 1152))
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise InputError(f"{folder / CONFIG} gives no sizes of the model; download the checkpoint again") from None


def _find_pictures(folder: Path, config: dict[str, Any], layout: str) -> PictureSettings:
    files = _read_those(folder, PICTURE_FILES)
    if layout == "native" and not files:  # the original layout has its settings in code
        raise InputError(f"{folder} holds neither {' nor '.join(PICTURE_FILES)}; download the whole checkpoint")
    return find_picture_settings(str(folder), files, config)


def _find_ends(folder: Path, config: dict[str, Any], layout: str) -> dict[int, str]:
    with open(folder / "tokenizer.json", encoding="utf-8", errors="replace") as stream:
        names = added_tokens(stream, _read_those(folder, ["tokenizer_config.json"]).get("tokenizer_config.json", {}))
    files = {"config.json": config, **_read_those(folder, ["generation_config.json"])}
    return find_ends(str(folder), files, layout == "native", names)


def _read_those(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The JSON files of these names that are there."""
    return {name: read_json(folder / name) for name in names if (folder / name).exists()}


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
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        size = path.stat().st_size
        digest.update(b"%s\0%d\0" % (os.fsencode(path.relative_to(folder)), size))
        with open(path, "rb") as stream:
            if size <= SAMPLED_BLOCKS * BLOCK_BYTES:
                digest.update(stream.read())
                continue
            for block in range(SAMPLED_BLOCKS):
                stream.seek((size - BLOCK_BYTES) * block // (SAMPLED_BLOCKS - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()
