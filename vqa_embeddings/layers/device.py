"""The device, the number format and the attention kernels, each chosen with its reason."""

from __future__ import annotations

import gc
import os
import re
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from vqa_embeddings._version import __version__
from vqa_embeddings.errors import InputError, one_line
from vqa_embeddings.layers.gpu_claims import Claim, claims_folder

if TYPE_CHECKING:
    import torch


WORKERS = {"cuda": 4, "cpu": 2}  # a GPU sees a picture in the time that one of them prepares it

_claims: dict[str, Claim] = {}  # this process's, by the GPU's name here; it has them as it has a current device


@dataclass(frozen=True)
class Device:
    """What this rank computes on, and what that can do."""

    name: str  # as torch names it: "cpu", "cuda:3"
    description: str
    bfloat16: bool
    no_flash: str  # why flash-attn cannot run on it; empty where it can
    count: int = 0  # GPUs that this process sees
    memory: int = 0  # bytes of the GPU; 0 where it does not say

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
    """The GPU of this rank, shared where there are fewer than ranks on this node, or the CPU.

    The GPU becomes this process's current device before anything happens on one: what names no device, such as the
    stream of a graph's capture, is on the current one, and would else be on the first GPU of the node.

    Raises:
        InputError: torch has no binaries for the GPU.
    """
    import torch

    if not torch.cuda.is_available():
        return Device("cpu", "CPU", bfloat16=True, no_flash="flash-attn needs a GPU")
    index = local_rank % torch.cuda.device_count()
    torch.cuda.set_device(torch.device("cuda", index))
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    if lacks_binaries(capability, built := torch.cuda.get_arch_list()):
        raise InputError(
            f"{name} has compute capability {capability[0]}.{capability[1]}, torch {torch.__version__} is built for "
            f"{', '.join(built)}; install a torch that is built for it, or choose another GPU (CUDA_VISIBLE_DEVICES)"
        )
    memory = _claim(index)
    recent = capability >= (8, 0)
    no_flash = "" if recent else f"flash-attn needs compute capability 8.0, {name} has {capability[0]}.{capability[1]}"
    no_flash = no_flash or _no_flash_package()
    return Device(f"cuda:{index}", name, recent, no_flash, torch.cuda.device_count(), memory)


def lacks_binaries(capability: tuple[int, int], built: Sequence[str]) -> bool:
    """Whether nothing of torch runs on a GPU of this compute capability: every kernel would end in an error of CUDA's.

    Args:
        built: what torch is built for. `sm_80` runs on 8.0 to 8.9, `compute_80` on all from 8.0 up; where no such names
            are among them, they tell nothing.
    """
    names = filter(None, (re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name) for name in built))
    versions = [(found[1], (int(found[2]), int(found[3]))) for found in names]
    return bool(versions) and not any(
        version <= capability and (kind == "compute" or version[0] == capability[0]) for kind, version in versions
    )


def _claim(index: int) -> int:
    """Let the other processes on a GPU know of this one, for as long as it lives. Where that fails, none is known.

    Returns:
        The memory of the GPU, bytes.
    """
    import torch

    name, memory = f"cuda:{index}", 0
    with suppress(OSError, RuntimeError, AttributeError):  # no room for a file; a driver or torch without these names
        properties = torch.cuda.get_device_properties(index)
        memory = int(properties.total_memory)
        if name not in _claims:
            _claims[name] = Claim(claims_folder(), str(properties.uuid))
    return memory


def count_processes(name: str) -> int:
    """How many processes are known to compute on the GPU of this name here, this one included."""
    with suppress(OSError):  # a folder that cannot be listed tells of no process
        if name in _claims:
            return _claims[name].count()
    return 1


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
        InputError: the device cannot compute in the format that was asked for.
    """
    if asked != "auto":
        if asked == "bfloat16" and not device.bfloat16:
            raise InputError(
                f"--dtype bfloat16 was asked for, and {device.description} has none; use float16 or float32"
            )
        return Choice(asked, "asked for")
    if device.kind == "cpu":
        return Choice("float32", "no GPU found, and float32 is what a CPU computes well")
    if device.bfloat16:
        return Choice("bfloat16", f"{device.description} computes in bfloat16, the model's own format")
    return Choice("float16", f"{device.description} has no bfloat16")


def choose_attention(asked: str, dtype: str, device: Device) -> Choice:
    """The attention kernels.

    Raises:
        InputError: flash-attn was asked for where it cannot run.
    """
    lacking = device.no_flash
    if not lacking and dtype == "float32":
        lacking = "flash-attn computes in float16 or bfloat16 only"
    if asked == "flash_attention_2" and lacking:
        raise InputError(f"--attn-implementation flash_attention_2 was asked for, but {lacking}; use sdpa")
    if asked != "auto":
        return Choice(asked, "asked for")
    return Choice("sdpa", lacking) if lacking else Choice("flash_attention_2", "flash-attn is installed")


def choose_workers(asked: int | None, device: Device) -> int:
    """How many pictures are opened at a time: as many as keep the device from waiting for them."""
    return asked if asked is not None else WORKERS[device.kind]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device, without waiting for what that is doing. On the CPU it is the tensor itself."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copy tensors of one device to the host, for which it waits once. On the CPU they are themselves.

    Args:
        tensors: those of the widest numbers first, so that each lies where its numbers may begin.
    """
    return list(tensors) if tensors[0].device.type == "cpu" else in_one_piece(tensors)


def in_one_piece(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of tensors on the host, parts of one piece of memory."""
    import torch

    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
    pieces = torch.cat(flat).cpu().split([len(piece) for piece in flat])
    return [piece.view(tensor.dtype).view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device's memory lacks: CUDA and its libraries say so by other classes than torch."""
    import torch

    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "_ALLOC_FAILED" in said


def leave_capture(device: torch.device) -> None:
    """Compute on the device's usual stream again: a capture that fails leaves the process on the stream of its own."""
    import torch

    with suppress(RuntimeError):  # where even that fails, so will the next step, which says why
        torch.cuda.set_stream(torch.cuda.default_stream(device))


def keep_float32() -> None:
    """Let float32 be float32 in products and convolutions on a GPU, whatever the environment says of TF32.

    TF32 has 10 bits of a number's 23, and containers switch it on: TORCH_ALLOW_TF32_CUBLAS_OVERRIDE.
    """
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def free_memory(device: torch.device) -> int:
    """Memory that this process may still take on its device, bytes: of a GPU its share, where several compute there."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_allocated(device)
        # What torch keeps in reserve it can use again: after a capture that failed it gives nothing back any more.
        free += max(0, torch.cuda.memory_reserved(device) - used)
        return fair_share(free, total, used, count_processes(str(device)))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def release_memory(name: str) -> None:
    """Give back what nothing refers to any more, and count the peak of a GPU's memory from here on.

    Args:
        name: of the device, as torch names it.
    """
    import torch

    gc.collect()  # models and caches are parts of cycles
    if name.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(name)


def peak_memory(name: str) -> int:
    """The most memory that this process has used so far, bytes: of its GPU by tensors, or without one of the machine.

    Args:
        name: of the device, as torch names it.
    """
    import torch

    if name.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(name))
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # only Linux counts in KiB


def fair_share(free: int, total: int, held: int, processes: int) -> int:
    """What a process may take of a GPU's memory, bytes, without taking what others on it are about to.

    Args:
        free, total: memory of the GPU.
        held: what this process has taken already, for the weights.
        processes: on this GPU, this one included; alone, it may take all that is free.
    """
    return max(0, min(free, total // processes - held))


def versions() -> dict[str, str]:
    """The versions that a run was made with."""
    found = {"vqa_embeddings": __version__}
    for package in ("torch", "torchvision", "transformers", "peft", "tokenizers", "h5py", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
