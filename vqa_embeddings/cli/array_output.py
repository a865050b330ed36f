"""The output folder that arguments of `extract_dist.py` name: launch/slurm/submit.sh passes it to the merge.

    python -m vqa_embeddings.cli.array_output <arguments of extract_dist.py>

What no task of an array could accept is refused here, with exit status 2, before anything is submitted.
"""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout

from vqa_embeddings.cli.options import parse_extract


def main() -> int:
    """Print the folder. Help goes to standard error. Returns the exit status."""
    with redirect_stdout(sys.stderr):
        options = parse_extract(None)
    if options.slice is not None:
        index, count = options.slice
        print(f"error: found --slice {index}/{count}; each task's slice is the array's, leave it out", file=sys.stderr)
        return 2
    sys.stdout.buffer.write(os.fsencode(options.output_dir) + b"\n")  # the same bytes, whatever the locale
    return 0


if __name__ == "__main__":
    sys.exit(main())
