"""Real launches: how even the ranks are, and whether memory grows with the number of rows."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.inputs import questions, write_pictures
from vqa_embeddings.models.phi4mm.random_checkpoint import make_checkpoint

ROOT = Path(__file__).parent.parent.parent
RANKS = 2
SIZES = ((448, 448), (640, 480), (900, 300), (300, 200))


def measure(scratch: Path, quick: bool) -> dict[str, object]:
    """With the demo's checkpoint: two ranks on pictures of several sizes, and one rank on few and on many rows."""
    make_checkpoint(scratch / "small")
    names = [name for size in SIZES for name in write_pictures(scratch / "images", 8 if quick else 24, size)]
    uneven = [name for number, name in enumerate(names) for _ in range(1 + number * 7 % 9)]
    seconds = _extract(scratch, "balance", uneven, RANKS)[0]
    counts = (100, 500) if quick else (1000, 10_000)
    [name] = write_pictures(scratch / "images", 1, (300, 200))
    peaks = []
    for count in counts:
        pictures = [f"{number // 10}.jpg" for number in range(count)]
        for picture in dict.fromkeys(pictures):
            if not (scratch / "images" / picture).exists():
                (scratch / "images" / picture).hardlink_to(scratch / "images" / name)
        peaks.append(_extract(scratch, f"memory-{count}", pictures, 1)[1])
    return {
        "ranks": RANKS,
        "balance_rows": len(uneven),
        "rank_seconds": seconds,
        "slowest_over_mean": max(seconds) * len(seconds) / sum(seconds),
        "memory_rows": counts,
        "peak_gib": peaks,
        "growth": peaks[1] / peaks[0],
    }


def table(result: dict[str, Any]) -> str:
    """The figures of `measure` in Markdown."""
    few, many = result["memory_rows"]
    return "\n".join(
        [
            "| | |",
            "|---|---|",
            f"| slowest of {result['ranks']} ranks over their mean, {result['balance_rows']} rows on pictures of "
            f"{len(SIZES)} sizes | {result['slowest_over_mean']:.3f} |",
            f"| peak memory with {few} rows | {result['peak_gib'][0]:.3f} GiB |",
            f"| with {many} rows | {result['peak_gib'][1]:.3f} GiB, {result['growth'] - 1:+.1%} |",
        ]
    )


def _extract(scratch: Path, name: str, pictures: list[str], ranks: int) -> tuple[list[float], float]:
    """Extract a table of these pictures. Returns the seconds of each rank, and the peak memory of the largest, GiB."""
    path = scratch / f"{name}.csv"
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["question_id", "image_id", "question", "answer"])
        asked = enumerate(zip(pictures, questions(len(pictures)), strict=True))
        writer.writerows((number, picture, question, "yes") for number, (picture, question) in asked)
    arguments = ["--vqa-dataset", path, "--images-dir", scratch / "images", "--model", scratch / "small"]
    arguments += ["--output-dir", scratch / name, "--max-new-tokens", 8, "--dtype", "float32"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks] if ranks > 1 else []
    command = [sys.executable, *map(str, [*launcher, ROOT / "extract_dist.py", *arguments])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, said
    seconds = [float(found) for found in re.findall(r"in ([\d.]+) s", said)]
    return seconds, usage.ru_maxrss / 2**20
