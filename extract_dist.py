"""The published command: extract the vectors and answers of every row of a VQA table.

    python extract_dist.py --help

`vqa_embeddings/cli/extract.py` is the index of the work; its docstring is the usage, of this script as of the installed
command `vqa-extract`.
"""

from __future__ import annotations

from vqa_embeddings.cli.extract import main, run

__all__ = ["main"]

if __name__ == "__main__":
    run()
