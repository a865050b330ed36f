"""The model families that there are. No other module imports one."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from vqa_embeddings.errors import InputError, one_line
from vqa_embeddings.models.base import Checkpoint, ModelFamily
from vqa_embeddings.models.checkpoint import CONFIG, locate, read_json, refuse_folder_of_others

# By the `model_type` of config.json: the module and the attribute in it that is the family.
FAMILIES = {
    "phi4_multimodal": "vqa_embeddings.models.phi4mm:FAMILY",
    "phi4mm": "vqa_embeddings.models.phi4mm:FAMILY",
}
DEFAULT = "phi4_multimodal"


def find_family(model_type: str) -> ModelFamily:
    """The family of a known `model_type`."""
    module, _, attribute = FAMILIES[model_type].partition(":")
    family: ModelFamily = getattr(import_module(module), attribute)
    return family


def default_family() -> ModelFamily:
    """The family of the model that is extracted where none is named."""
    return find_family(DEFAULT)


def find_checkpoint(model: str, revision: str | None, cache_dir: Path | None, lora: str = "merged") -> Checkpoint:
    """Find a checkpoint in a local folder or on the hub, and check it without importing torch.

    Args:
        cache_dir: where a hub model lies, or goes to; None: see `hub.choose_cache`.
        lora: what is done with an adapter that the family has.
    Raises:
        InputError: it is not there, not whole, or of no known family.
    """
    families = _all_families()
    revisions = {family.default_model: family.default_revision for family in families}
    example = default_family().default_model
    folder, revision = locate(model, revision, cache_dir, example, revisions.get(model, "main"))
    try:
        if not (folder / CONFIG).exists():
            for family in families:
                family.explain_folder(folder)
            refuse_folder_of_others(folder, FAMILIES)
        config = read_json(folder / CONFIG)
        return _family_of(folder, config).inspect(folder, model, revision, config, lora)
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({one_line(error)}); check its permissions and links") from None


def _all_families() -> list[ModelFamily]:
    return list({id(family): family for family in map(find_family, FAMILIES)}.values())


def _family_of(folder: Path, config: dict[str, Any]) -> ModelFamily:
    found = config.get("model_type")
    if not isinstance(found, str) or found not in FAMILIES:
        types = {name: told for family in _all_families() for name, told in family.model_types.items()}
        known = " or ".join(f"{name!r} ({told})" for name, told in types.items())
        raise InputError(f"{folder} holds a checkpoint of model_type {found!r}; expected {known}, check --model")
    return find_family(found)
