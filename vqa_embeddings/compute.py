"""The device, the number format and the attention kernels, each chosen with its reason."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from vqa_embeddings import __version__
from vqa_embeddings.errors import Refused, one_line

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """What this rank computes on, and what that can do."""

    name: str  # as torch names it: "cpu", "cuda:3"
    description: str
    bfloat16: bool
    no_flash: str  # why flash-attn cannot run on it; empty where it can
    count: int = 0  # GPUs that this process sees

    @property
    def kind(self) -> str:
        """ "cpu" or "cuda", without the number."""
        return self.name.partition(":")[0]


@dataclass(frozen=True)
class Choice:
    """A setting, and why it is what it is."""

    value: str
    reason: str


def find_device(local_rank: int) -> Device:
    """The GPU of this rank, shared where there are fewer than ranks on this node, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return Device("cpu", "CPU", bfloat16=True, no_flash="flash-attn needs a GPU")
    index = local_rank % torch.cuda.device_count()
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    recent = capability >= (8, 0)
    no_flash = "" if recent else f"flash-attn needs compute capability 8.0, {name} has {capability[0]}.{capability[1]}"
    no_flash = no_flash or _no_flash_package()
    return Device(f"cuda:{index}", name, recent, no_flash, torch.cuda.device_count())


def _no_flash_package() -> str:
    """Why flash-attn cannot be used: a build for another torch or CUDA is as common as none."""
    try:
        from flash_attn import flash_attn_func  # noqa: F401
        from transformers.utils import is_flash_attn_2_available
    except ModuleNotFoundError:
        return "flash-attn is not installed"
    except Exception as error:  # whatever a library of another build raises
        return f"flash-attn is installed but cannot be imported ({one_line(error)})"
    return "" if is_flash_attn_2_available() else "transformers does not take this flash-attn for version 2"


def choose_dtype(asked: str, device: Device) -> Choice:
    """The number format of the weights and activations.

    Raises:
        Refused: the device cannot compute in the format that was asked for.
    """
    if asked != "auto":
        if asked == "bfloat16" and not device.bfloat16:
            raise Refused(f"--dtype bfloat16 was asked for, and {device.description} has none; use float16 or float32")
        return Choice(asked, "asked for")
    if device.kind == "cpu":
        return Choice("float32", "no GPU found, and float32 is what a CPU computes well")
    if device.bfloat16:
        return Choice("bfloat16", f"{device.description} computes in bfloat16, the model's own format")
    return Choice("float16", f"{device.description} has no bfloat16")


def choose_attention(asked: str, dtype: str, device: Device) -> Choice:
    """The attention kernels.

    Raises:
        Refused: flash-attn was asked for where it cannot run.
    """
    lacking = device.no_flash
    if not lacking and dtype == "float32":
        lacking = "flash-attn computes in float16 or bfloat16 only"
    if asked == "flash_attention_2" and lacking:
        raise Refused(f"--attn-implementation flash_attention_2 was asked for, but {lacking}; use sdpa")
    if asked != "auto":
        return Choice(asked, "asked for")
    return Choice("sdpa", lacking) if lacking else Choice("flash_attention_2", "flash-attn is installed")


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device, without waiting for what that is doing. On the CPU it is the tensor itself."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def free_memory(device: torch.device) -> int:
    """Memory that is free for this process on its device, bytes."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()  # what was freed and is still held counts as free
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def versions() -> dict[str, str]:
    """The versions that a run was made with."""
    found = {"vqa_embeddings": __version__}
    for package in ("torch", "torchvision", "transformers", "peft", "tokenizers", "h5py", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
