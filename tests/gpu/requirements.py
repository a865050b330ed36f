"""What the check needs, looked at before anything is computed: each lack is one sentence. Imports no torch itself."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROJECT = Path(__file__).parent.parent.parent / "pyproject.toml"
REQUIREMENT = re.compile(r'"([A-Za-z0-9_-]+)>=([\d.]+)(?:,<([\d.]+))?"')
FULL_DISK, SMALL_DISK = 30, 1  # GB below TMPDIR
FULL_GPU = 40  # GiB


def lacks_before_torch(full: bool) -> list[str]:
    """What lacks of Python, packages and disk.

    Args:
        full: whether the checkpoint of full size will be made.
    """
    project = PROJECT.read_text(encoding="utf-8")
    return [*_of_python(project), *_of_packages(project), *_of_disk(FULL_DISK if full else SMALL_DISK)]


def lacks_of_gpu(full: bool) -> list[str]:
    """What lacks of the GPU, for all but `--quick`."""
    import torch

    where = "use a machine that has one, or --quick, which needs none"
    if not torch.cuda.is_available():
        return [f"found no CUDA GPU (torch {torch.__version__}, for CUDA {torch.version.cuda}); expected one; {where}"]
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(0))
    if full and free < FULL_GPU:
        return [
            f"found {free:.1f} GiB free of the {total:.1f} GiB of {torch.cuda.get_device_name(0)}; expected {FULL_GPU} "
            "GiB for the checkpoint of full size; end what else runs on it, use a larger one, or --quick"
        ]
    return []


def _of_python(project: str) -> list[str]:
    wanted = re.search(r'requires-python = ">=([\d.]+)"', project)
    assert wanted, f"{PROJECT} names no lowest Python"
    found = ".".join(map(str, sys.version_info[:3]))
    if _numbers(found) >= _numbers(wanted[1]):
        return []
    return [f"found Python {found}; expected {wanted[1]} or later; name another with PYTHON="]


def _of_packages(project: str) -> list[str]:
    section = project.partition("\ndependencies = [")[2].partition("\n]")[0]
    wanted = REQUIREMENT.findall(section)
    assert len(wanted) == section.count('"') // 2, f"{PROJECT} has a requirement without a lowest version"
    lacks = []
    for name, lowest, beyond in wanted:
        try:
            found = version(name)
        except PackageNotFoundError:
            found = ""
        fits = found and _numbers(found) >= _numbers(lowest) and (not beyond or _numbers(found) < _numbers(beyond))
        if not fits:
            bounds = f">={lowest}" + (f",<{beyond}" if beyond else "")
            lacks.append(f"found {name} {found or 'nowhere'}; expected {bounds}; pip install '{name}{bounds}'")
    return lacks


def _of_disk(wanted: int) -> list[str]:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free / 1e9
    if free >= wanted:
        return []
    smaller = ", or use --quick" if wanted == FULL_DISK else ""
    return [f"found {free:.1f} GB free below {folder}; expected {wanted} GB; set TMPDIR to a larger disk{smaller}"]


def _numbers(text: str) -> tuple[int, ...]:
    """A version's numbers: what follows a plus, and the likes of "rc1", are left out; 2.11 is before 2.11.0."""
    return tuple(int(part) for part in re.match(r"[\d.]*", text)[0].split(".") if part)  # type: ignore[index]
