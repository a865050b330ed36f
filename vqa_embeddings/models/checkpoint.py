"""Checkpoints of any family: found in a folder or on the hub, their files read without loading them. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from vqa_embeddings.errors import InputError, one_line
from vqa_embeddings.models.hub import download

CONFIG = "config.json"
BELOW = ("*", "snapshots/*", "models--*/snapshots/*")  # where checkpoints lie in a folder of some, or in a hub's cache
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}  # safetensors' names and torch's, by width
LOADED = ("*.json", "*.safetensors", "*.txt", "*.jinja")  # what models are loaded from
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 1 << 16  # of each large file that a fingerprint reads

Tensors = dict[str, tuple[Path, str]]  # by name: the file, and the number format as safetensors names it


def locate(
    model: str,
    revision: str | None,
    cache_dir: Path | None,
    example: str,
    default_revision: str,
    unwanted: Sequence[str],
) -> tuple[Path, str]:
    """The folder of a checkpoint, and its revision.

    Args:
        model: a local folder, or a name on the hub.
        cache_dir: where a hub model lies, or goes to; None: see `hub.choose_cache`.
        example: a name on the hub, for the message.
        default_revision: of a hub model.
        unwanted: patterns of its files that are not downloaded.
    Raises:
        InputError: it is neither there nor to be had.
    """
    if Path(model).is_dir():
        return Path(model), "local"
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(
            f"{model} is not there; expected a checkpoint folder or a hub name such as {example}, check --model"
        )
    return download(model, revision or default_revision, cache_dir, _is_whole, unwanted)


def stored_layers(count: int) -> list[int]:
    """The decoder layers whose states are stored: the first, the quarters and the last of `count`."""
    return sorted({0, count // 4, count // 2, 3 * count // 4, count - 1})


def refuse_folder_of_others(folder: Path, model_types: Collection[str]) -> None:
    """Where a folder without a `config.json` holds checkpoints of known types below, name the newest.

    Raises:
        InputError: it does.
    """
    below = [
        path.parent for pattern in BELOW for path in folder.glob(f"{pattern}/{CONFIG}") if _is_of(path, model_types)
    ]
    if below:
        newest = max(below, key=lambda path: (path / CONFIG).stat().st_mtime_ns)
        others = f", the newest of {len(below)}" if len(below) > 1 else ""
        raise InputError(
            f"{folder} is no checkpoint, but holds some below; expected one: give --model {newest}{others}"
        )


def _is_of(path: Path, model_types: Collection[str]) -> bool:
    try:
        return read_json(path).get("model_type") in model_types
    except (InputError, TypeError):  # a broken one, or a model_type that is no text
        return False


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


def read_those(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The JSON files of these names that are there."""
    return {name: read_json(folder / name) for name in names if (folder / name).exists()}


def find_tensors(folder: Path) -> Tensors:
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
        return bool(find_tensors(folder))
    except InputError:
        return False


def _tensors_of(path: Path) -> Tensors:
    return {name: (path, dtype) for name, dtype in read_header(path).items()}


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


def read_header(path: Path) -> dict[str, str]:
    """Names and number formats of a file's tensors.

    The header also says how long the file must be: a truncated download is found without reading it.
    """
    # `safetensors.safe_open` finds that too, and was measured to be no faster; but it takes a file without tensors for
    # a whole one, reports a number format that it does not know as damage, and imports NumPy.
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


def stored_dtype(where: Path, formats: Iterable[str]) -> str:
    """The widest of the number formats of tensors.

    Raises:
        InputError: one of them is no floating point format that weights are read in.
    """
    found = set(formats)
    others = sorted(found - FLOATS.keys())
    if others:
        raise quantised(where, f"weights of format {others[0]}")
    return FLOATS[max(found, key=list(FLOATS).index, default="F32")]


def quantised(where: Path, how: str) -> InputError:
    """What is raised about weights whose vectors would be others."""
    return InputError(
        f"{where} is quantised ({how}); expected weights of {', '.join(FLOATS)}: the vectors would be others, "
        "use the checkpoint that it was made from"
    )


def fingerprint(folder: Path, further: Iterable[str] = ()) -> str:
    """SHA-256 over the names, the sizes and evenly spaced blocks of all files that the model is loaded from.

    Args:
        further: patterns of files besides LOADED.
    """
    digest = hashlib.sha256()
    patterns = (*LOADED, *further)
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


def machine_errors() -> tuple[type[Exception], ...]:
    """What goes wrong while loading without the checkpoint being at fault: the machine's memory, its GPU, a package."""
    import torch

    return torch.OutOfMemoryError, torch.AcceleratorError, MemoryError, ImportError
