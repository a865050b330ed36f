"""The model families that there are. No other module imports one."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from vqa_embeddings.errors import InputError, one_line
from vqa_embeddings.models.base import Checkpoint, ModelFamily
from vqa_embeddings.models.checkpoint import CONFIG, locate, read_json, refuse_folder_of_others

# Of each, the module and the attribute in it. The first has the model that is extracted where none is named.
FAMILIES = ["vqa_embeddings.models.phi4mm:FAMILY"]


def families() -> list[ModelFamily]:
    """All of them."""
    return [_import(place) for place in FAMILIES]


def default_family() -> ModelFamily:
    """The family of the model that is extracted where none is named."""
    return _import(FAMILIES[0])


def find_checkpoint(model: str, revision: str | None, cache_dir: Path | None, lora: str = "merged") -> Checkpoint:
    """Find a checkpoint in a local folder or on the hub, and check it without importing torch.

    Args:
        cache_dir: where a hub model lies, or goes to; None: see `hub.choose_cache`.
        lora: what is done with an adapter that the family has.
    Raises:
        InputError: it is not there, not whole, or of no known family.
    """
    there = families()
    known = {model_type: family for family in there for model_type in family.model_types}
    revisions = {family.default_model: family.default_revision for family in there}
    example = default_family().default_model
    unwanted = [pattern for family in there for pattern in family.unused_files]
    folder, revision = locate(model, revision, cache_dir, example, revisions.get(model, "main"), unwanted)
    try:
        if not (folder / CONFIG).exists():
            for family in there:
                family.explain_folder(folder)
            refuse_folder_of_others(folder, known)
        config = read_json(folder / CONFIG)
        return _choose(known, folder, config).inspect(folder, model, revision, config, lora)
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({one_line(error)}); check its permissions and links") from None


def _import(place: str) -> ModelFamily:
    module, _, attribute = place.partition(":")
    family: ModelFamily = getattr(import_module(module), attribute)
    return family


def _choose(known: dict[str, ModelFamily], folder: Path, config: dict[str, Any]) -> ModelFamily:
    found = config.get("model_type")
    if not isinstance(found, str) or found not in known:
        expected = " or ".join(f"{name!r} ({family.model_types[name]})" for name, family in known.items())
        raise InputError(f"{folder} holds a checkpoint of model_type {found!r}; expected {expected}, check --model")
    return known[found]
