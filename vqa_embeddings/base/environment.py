"""Environment variables. They are read here and, those of launchers, in `cluster.world`: nowhere else."""

from __future__ import annotations

import os
from collections.abc import Mapping

HUB_CACHE = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME")  # where the hub library keeps its cache


def working_folder(environment: Mapping[str, str] = os.environ) -> str:
    """The shell's working folder, with the links that led there unresolved. It may be outdated, or empty."""
    return environment.get("PWD", "")


def names_hub_cache(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment says where the hub library keeps its cache."""
    return any(environment.get(name) for name in HUB_CACHE)
