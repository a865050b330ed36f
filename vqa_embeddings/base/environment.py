"""What the environment says to rooms below `cluster`, which reads what launchers say there. Nobody else reads it."""

from __future__ import annotations

import os
from collections.abc import Mapping

HUB_CACHE = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME")  # where the hub library has its cache


def working_folder(environment: Mapping[str, str] = os.environ) -> str:
    """The folder that the shell believes to be in, by the links that led there; it may be another one, or none."""
    return environment.get("PWD", "")


def names_hub_cache(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment says where the hub library has its cache."""
    return any(environment.get(name) for name in HUB_CACHE)
