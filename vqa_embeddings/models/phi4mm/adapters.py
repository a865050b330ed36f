"""The vision LoRA as data: its tensors and settings, and whether the weights hold it already. Needs no torch.

Nothing of an adapter may go unread without a word: what is neither read nor known to make no difference is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from vqa_embeddings.errors import InputError

AMONG = re.compile(r"\.lora_[AB]\.(vision|speech)\.weight$")  # among the weights; no picture needs the speech LoRA's
IN_FOLDER = re.compile(r"\.lora_[AB]\.weight$")
# Settings of peft's `LoraConfig` that it applies as they were trained.
APPLIED = (
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)
# Those that the values of a trained adapter do not depend on. Each other one must be off.
IDLE = (
    "peft_type",
    "peft_version",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "runtime_config",
    "eva_config",
    "megatron_core",
    "qalora_group_size",
)
OFF: tuple[Any, ...] = (None, False, "none", [], {})
PLAIN_STARTS = (True, "gaussian", "orthogonal", "eva", *OFF)  # other init_lora_weights change the model's weights too
MERGE = "merge it into the weights with the code that trained it"
SHARE = 0.5  # of an adapter in the weights: near 0 where it is not in them, near 1 where it is


def lora_among(where: str, names: Iterable[str]) -> dict[str, str]:
    """The vision LoRA among a checkpoint's tensors: their names there, by the names that the library's model has.

    Raises:
        InputError: there are tensors of another adapter, or of another kind.
    """
    lora = [name for name in names if ".lora_" in name and ".audio_embed." not in name]
    _refuse_unread(where, lora, AMONG, "the LoRA called vision, beside that of speech")
    return {name.replace(".vision.", "."): name for name in lora if ".vision." in name}


def lora_in_folder(where: str, names: Iterable[str]) -> dict[str, str]:
    """The tensors of an adapter's own file: their names there, by the names that the library's model has.

    peft writes a prefix, and the original layout begins one level below the top.

    Raises:
        InputError: there is more than the matrices of a LoRA, or one of them twice.
    """
    names = list(names)
    _refuse_unread(where, names, IN_FOLDER, "the matrices lora_A and lora_B of one LoRA")
    found: dict[str, str] = {}
    for stored in names:
        bare = stored.removeprefix("base_model.model.")
        name = f"model.{bare}" if bare.startswith("layers.") else bare
        if name in found:
            raise InputError(
                f"{where} holds {name} twice, as {found[name]} and as {stored}; expected one, remove the other"
            )
        found[name] = stored
    return found


def _refuse_unread(where: str, names: Iterable[str], read: re.Pattern[str], expected: str) -> None:
    strange = sorted(name for name in names if not read.search(name))
    if not strange:
        return
    advice = MERGE
    if ".lora_magnitude_vector" in strange[0]:
        advice = f"it is DoRA's: {MERGE}, and use --lora none"
    elif ".default." in strange[0] and read is IN_FOLDER:
        advice = "where it is the vision LoRA, leave PEFT's own name .default out of the names"
    elif ".default." in strange[0]:
        advice = (
            "it has PEFT's own name: where it is the vision LoRA, write .vision. for .default. in the names, and its "
            f"r, lora_alpha and layer as vision_lora into config.json; where it is another, {MERGE}"
        )
    raise InputError(
        f"{where} holds {len(strange)} tensors of an adapter that nothing reads, the first {strange[0]}; "
        f"expected {expected}; {advice}"
    )


def settings_among(where: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a vision LoRA that lies among the weights, as peft's `LoraConfig` takes them.

    Raises:
        InputError: `config.json` does not give them, or gives others.
    """
    lora = config.get("vision_lora")
    try:
        if not isinstance(lora, dict):
            raise TypeError
        found: dict[str, Any] = {"r": int(lora["r"]), "lora_alpha": float(lora["lora_alpha"])}
        found["target_modules"] = from_top(lora["layer"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise InputError(
            f"Vision adapter not found: {where} holds LoRA tensors, but its config.json gives no vision_lora with r, "
            "lora_alpha and layer; use the config.json of the same checkpoint"
        ) from None
    _refuse_settings(f"vision_lora in the config.json of {where}", lora, ("r", "lora_alpha", "layer", "dp"))
    return {"peft_type": "LORA", **found}


def settings_in_folder(where: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of an adapter's own settings that its values depend on.

    Raises:
        InputError: it is no LoRA, or one with something that would not be applied.
    """
    if settings.get("peft_type") != "LORA":
        kind = f"peft_type {settings.get('peft_type')!r}"
        raise InputError(f"{where} is of {kind}; expected LORA, use the adapter of the same checkpoint")
    _refuse_settings(where, settings, (*APPLIED, *IDLE))
    found = {name: settings[name] for name in APPLIED if name in settings}
    return {"peft_type": "LORA", **found, "target_modules": from_top(settings.get("target_modules"))}


def _refuse_settings(where: str, settings: Mapping[str, Any], known: Collection[str]) -> None:
    for name, value in sorted(settings.items()):
        if name not in known and value not in (PLAIN_STARTS if name == "init_lora_weights" else OFF):
            raise InputError(
                f"{where} has {name} {value!r}, with which the adapter is more than its matrices; expected a LoRA "
                f"without it; {MERGE}, and use --lora none"
            )


def check_patterns(where: str, settings: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Every exception that the settings make is one for a projection, as peft looks for it: it drops the others.

    Args:
        tensors: of the adapter, by the names that the library's model has.
    Raises:
        InputError: one is for something else.
    """
    projections = sorted({name.rpartition(".lora_")[0] for name in tensors})
    for setting in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(setting) or {}
        for pattern in patterns if isinstance(patterns, dict) else [patterns]:
            if not any(_matches(str(pattern), name) for name in projections):
                raise InputError(
                    f"{where}: {setting} names {pattern}, which none of the adapter's projections is called; expected "
                    f"names such as {projections[0]}; correct {setting}"
                )


def _matches(pattern: str, name: str) -> bool:
    """Whether peft applies an exception to a projection."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error:
        return False


def check_shares(where: str, shares: Sequence[float], lora: str) -> None:
    """Refuse an adapter that would be in the weights twice, or not at all.

    Args:
        shares: of the adapter, in the weights of each projection before anything is added; what is not finite tells
            nothing. A fine-tune moves some of them far, their median little.
        lora: what was asked for: "none" where the weights hold the adapter already.
    Raises:
        InputError: the weights say otherwise.
    """
    known = [share for share in shares if math.isfinite(share)]
    if not known or (median(known) > SHARE) == (lora == "none"):
        return
    found = f"{median(known):.2f} of it by the median of {len(known)} projections"
    if lora == "none":
        raise InputError(
            f"the vision LoRA of {where} is not in the weights ({found}); expected near 1 with --lora none: without it "
            "the vectors would be others, use --lora merged"
        )
    raise InputError(
        f"the vision LoRA of {where} is in the weights already ({found}); expected near 0 with --lora {lora}: with it "
        "twice the vectors would be others, use --lora none"
    )


def from_top(targets: Any) -> Any:
    """An adapter's targets as from the model's top: patterns of the original layout begin one level below.

    A list of names, and peft's word "all-linear", mean the same at any level.
    """
    return rf"(model\.)?({targets})" if isinstance(targets, str) and targets != "all-linear" else targets
