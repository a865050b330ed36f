"""The published command: merge what was extracted into part files, and account for every row.

    python merge_shards.py --help

`vqa_embeddings/cli/merge.py` is the index of the work; its docstring is the usage, of this script as of the installed
command `vqa-merge`.
"""

from __future__ import annotations

import sys

from vqa_embeddings.cli.merge import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
