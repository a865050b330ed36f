"""Start a launch, pass signals on to it, and report afterwards which rows are left. The files of launch/ call it:

    python -m vqa_embeddings.cli.supervise accelerate launch extract_dist.py -- <arguments of extract_dist.py>

A launcher's own exit status says little: `accelerate launch` reports a signal as a failure of its own, and `srun` may
report a lost node as success. What the output folder holds decides. A Slurm job with rows of its own slice left, whose
launch has not failed, is put back into the queue, until two runs in a row have committed nothing.

Exit status: the launch's where it failed; else 0 where every row of the slice is accounted for, a signal stopped the
launch, or the Slurm job runs again; 1 where rows are left for another reason, or the job could not run again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vqa_embeddings.app.supervise import supervise
from vqa_embeddings.cli.options import parse_extract
from vqa_embeddings.cluster.messages import REFUSED


def main(argv: Sequence[str]) -> int:
    """Run the launch that the arguments name, and report what it left. Returns the exit status."""
    if "--" not in argv:
        print("error: expected LAUNCHER... -- ARGUMENTS of extract_dist.py; found no --", file=sys.stderr)
        return REFUSED
    launcher, arguments = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    options = parse_extract(None, arguments)
    return supervise([*launcher, *arguments], options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
