"""The command lines of extractions and merges, and their processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from subprocess import DEVNULL
from typing import IO

import psutil

from vqa_embeddings.app.demo import DATA

ROOT = Path(__file__).parents[2]
TOKENS = 12  # of an answer, in all tests that compare answers
TERMS = int(os.environ.get("TERMS", "4"))  # to a launch, at random moments
COPIES = max(20, 5 * TERMS)  # of each of the 31 questions, so that a run outlasts what is done to it


def arguments_for(table: Path, checkpoint: Path, images: Path = DATA) -> list[object]:
    inputs = ["--vqa-dataset", table, "--images-dir", images, "--model", checkpoint]
    return [*inputs, "--max-new-tokens", TOKENS, "--dtype", "float32"]


def command(ranks: int, *arguments: object) -> list[str]:
    """`accelerate launch` of the extraction; `ranks=0` runs it alone, without a launcher."""
    script = [str(ROOT / "extract_dist.py"), *map(str, arguments)]
    if ranks == 0:
        return [sys.executable, *script]
    several = ["--multi_gpu"] if ranks > 1 else []
    settings = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(ranks), *settings]
    return launcher + script


def settings_for_runs(environment: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}


def begin(
    arguments: list[str],
    stdout: int | IO[bytes] = DEVNULL,
    stderr: int | IO[bytes] | None = DEVNULL,
    **environment: str,
) -> subprocess.Popen:
    return subprocess.Popen(arguments, stdout=stdout, stderr=stderr, env=settings_for_runs(environment))


def run(arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    settings = settings_for_runs(environment)
    return subprocess.run(arguments, capture_output=True, text=True, env=settings, timeout=600)


def merge(out: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, str(ROOT / "merge_shards.py"), "--output-dir", str(out), *map(str, arguments)])


def processes(launch: subprocess.Popen) -> list[psutil.Process]:
    """The launcher and all that it started; torchrun's ranks lead sessions of their own."""
    try:
        return [psutil.Process(launch.pid), *psutil.Process(launch.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(victims: list[psutil.Process]) -> None:
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()


def segments(out: Path) -> list[Path]:
    return sorted(out.glob("shards/*/*.h5"))


def of_copies(expected: dict[str, object], rows: Iterable[str]) -> dict[str, object]:
    """What the reference expects of rows of `many_rows`."""
    return {key: expected[key.rpartition("-")[0]] for key in rows}
