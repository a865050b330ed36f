"""All figures of this program's speed and precision, in one command; a table and a JSON file.

    python -m tests.benchmarks [--quick] [--output-dir DIR] [--only NAME ...]

On a machine with a CUDA GPU the extraction is measured at full size with random weights, otherwise at a hundredth.
On a CPU, set OMP_NUM_THREADS=1: that is how ranks share one.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

from tests.benchmarks import extraction, merging, planning, precision, ranks, reading
from vqa_embeddings.layers.device import versions

PARTS = {
    "extraction": ("Extraction against the published algorithm", extraction),
    "ranks": ("Ranks and memory", ranks),
    "merging": ("Merge", merging),
    "reading": ("Reading", reading),
    "planning": ("Planning and coverage", planning),
    "precision": ("Precision of the number formats", precision),
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, a few minutes")
    parser.add_argument("--output-dir", type=Path, default="benchmark_output", help="where the files go (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts (all)")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.processor() or platform.machine(), **versions()}
    results: dict[str, object] = {"about": about, "quick": options.quick}
    lines = ["# Benchmarks", "", ", ".join(f"{name} {value}" for name, value in about.items())]
    for name in options.only:
        title, part = PARTS[name]
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            found = part.measure(Path(scratch), options.quick)
        results[name] = found
        lines += ["", f"## {title}", "", part.table(found)]
        print(f"\n## {title} ({time.monotonic() - begun:.0f} s)\n\n{part.table(found)}", flush=True)
        (options.output_dir / "results.json").write_text(json.dumps(results, indent=2, default=str) + "\n")
        (options.output_dir / "results.md").write_text("\n".join(lines) + "\n")
    print(f"\nwritten: {options.output_dir}/results.md and results.json")


if __name__ == "__main__":
    main()
