"""Merge the shards of an extraction into numbered part files, and account for every row of the CSV.

    python merge_shards.py --output-dir OUT
Run it at any time, any number of times: it verifies every segment, writes each part whose rows are all accounted
for, leaves what is right alone, and says what is missing (missing.csv) and what failed (failed.csv).
To look at a run that is under way, from a login node:
    python merge_shards.py --output-dir OUT --check
Where mpi4py is installed, several ranks share the work, of one node or of many:
    mpirun -n 8 python merge_shards.py --output-dir OUT

Exit status: 0 all rows extracted; 3 rows missing; 4 none missing, some failed; 2 refused; 1 error.
"""

from __future__ import annotations

import sys

from vqa_embeddings.cli.options import parse_merge
from vqa_embeddings.cluster.messages import fail, refuse, say
from vqa_embeddings.cluster.world import World, read_ranks
from vqa_embeddings.errors import InputError, StorageError


def main() -> int:
    """Parse, merge or only look, report. Returns the exit status."""
    options = parse_merge(__doc__)
    from vqa_embeddings.app.merge import check, merge

    world = World()
    try:
        world = read_ranks()
        outcome = (check if options.check else merge)(options, world)
    except InputError as refusal:
        return refuse(refusal, world)
    except (StorageError, OSError) as failure:
        return fail(failure, world)
    if outcome is None:  # a rank that has helped
        return 0
    for sentence in outcome.sentences(options):
        say(world, sentence)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
