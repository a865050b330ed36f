"""How fast one layer of all rows becomes a matrix: `open_embeddings` beside a loop over the groups with h5py.

In turns, in one run, from files that the machine has in memory; medians are told. Opening is told apart: it reads the
table, and which rows each file holds.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy as np

from tests.benchmarks.merging import ROOT, make_output
from vqa_embeddings import open_embeddings
from vqa_embeddings.store.parts import NAMES

ROUNDS = 3
LAYER = 16
SOURCES = {"a part in the published layout": "grouped", "segments": None, "a columnar part": "columnar"}


def measure(scratch: Path, quick: bool) -> dict[str, object]:
    """Measure in `scratch`, which needs 6 GB (quick: 700 MB). Returns the rows, and seconds by what was read."""
    rows = 1000 if quick else 10_000
    outs = {}
    segments = make_output(scratch / "segments", rows)
    for name, layout in SOURCES.items():
        if layout is None:
            outs[name] = segments
            continue
        outs[name] = shutil.copytree(segments, scratch / layout)
        script = [sys.executable, str(ROOT / "merge_shards.py"), "--output-dir", str(outs[name]), "--prune"]
        subprocess.run([*script, "--layout", layout], check=True, capture_output=True)
    seconds: dict[str, list[float]] = defaultdict(list)
    loop = "loop over groups with h5py"
    for _ in range(ROUNDS):
        expected = _timed(seconds[loop], lambda: _loop(outs["a part in the published layout"]))
        for name, out in outs.items():
            e = _timed(seconds[f"open, {name}"], lambda out=out: open_embeddings(out))
            found = _timed(seconds[name], lambda e=e: e.query_token(LAYER))
            assert np.array_equal(found, np.stack([expected[identity] for identity in e.ids])), name
    medians = {name: median(times) for name, times in seconds.items()}
    times = {name: medians[loop] / medians[name] for name in medians}
    return {"rows": rows, "seconds": medians, "times_the_loop": times}


def table(result: dict[str, Any]) -> str:
    """What `measure` returned as a small markdown table."""
    lines = [f"| one layer of {result['rows']} rows | s | times the loop |", "|---|---|---|"]
    for name, seconds in result["seconds"].items():
        lines.append(f"| {name} | {seconds:.3f} | {result['times_the_loop'][name]:.1f} |")
    return "\n".join(lines)


def _loop(out: Path) -> dict[str, np.ndarray]:
    vectors = {}
    for path in sorted(out.glob(NAMES["grouped"].format(prefix="*", number="*"))):
        with h5py.File(path) as file:
            for identity, group in file.items():
                vectors[identity] = group[f"query_token_representation/layer_{LAYER}"][:]
    return vectors


def _timed(into: list[float], work: Callable[[], Any]) -> Any:
    begun = time.perf_counter()
    result = work()
    into.append(time.perf_counter() - begun)
    return result
