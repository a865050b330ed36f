"""Which rows each rank of a launch is to do. All ranks agree before any begins."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from vqa_embeddings.app.options import ExtractOptions
from vqa_embeddings.cluster.rendezvous import from_rank_zero
from vqa_embeddings.cluster.sharding import pack, share_rows, unpack
from vqa_embeddings.cluster.world import World, choose_slice, new_launch
from vqa_embeddings.data.table import Table
from vqa_embeddings.store.catalog import scan
from vqa_embeddings.store.run import SHARDS_FOLDER, Run


@dataclass(frozen=True)
class WorkState:
    """What an output folder holds of a run, and what is left. All ranks of a launch have to agree on it."""

    launch_name: str
    extracted: int  # rows
    failed: int  # rows
    truncated: int  # rows that were extracted on pictures that are cut off
    pending: np.ndarray  # bool [n], the rows that this and other launches are still to do

    def to_bytes(self) -> bytes:
        """Serialize it for the other ranks."""
        counts = {name: getattr(self, name) for name in ("launch_name", "extracted", "failed", "truncated")}
        return json.dumps(counts).encode() + b"\n" + pack(self.pending)

    @classmethod
    def from_bytes(cls, data: bytes, rows: int) -> WorkState:
        """The inverse of `to_bytes`, of a table of so many rows."""
        counts, _, pending = data.partition(b"\n")
        return cls(**json.loads(counts), pending=unpack(pending, rows))


@dataclass(frozen=True)
class Assignment:
    """What one rank of a launch is to do."""

    state: WorkState
    slice: tuple[int, int]  # index and count
    slice_rows: int  # rows of the table in the slice
    slice_pending: int  # of them, those that this launch is to do
    pictures: np.ndarray  # int64 [n], the picture of each row
    rows: np.ndarray  # int64 [m], the rows of this rank, picture after picture


def assign_rows(options: ExtractOptions, world: World, run: Run, table: Table) -> Assignment:
    """Agree with the other ranks on the launch's name and on what is still to do, and take this rank's share of it.

    Only rank 0 reads what the folder holds: what the others would read a moment later might differ, and with it
    their shares.
    """
    if options.plan:  # one rank alone prints the plan, and nothing is written
        return take_share(options, world, read_work_state(options, run, table), table)
    shards = options.output_dir / SHARDS_FOLDER
    data = from_rank_zero(world, shards, lambda: read_work_state(options, run, table).to_bytes())
    return take_share(options, world, WorkState.from_bytes(data, len(table)), table)


def read_work_state(options: ExtractOptions, run: Run, table: Table) -> WorkState:
    """Scan the output folder for what is done, and derive what is to do."""
    catalog = scan(options.output_dir, run, table)
    coverage = catalog.coverage()
    pending = coverage.pending(options.retry_failed)
    extracted, failed, truncated = (
        int(rows.sum()) for rows in (coverage.extracted, coverage.failed, catalog.truncated(coverage))
    )
    return WorkState(new_launch(), extracted, failed, truncated, pending)


def take_share(options: ExtractOptions, world: World, state: WorkState, table: Table) -> Assignment:
    """The rows of this rank: its share of what its slice of the table still lacks."""
    slice_ = choose_slice(options.slice)
    pictures = table.pictures()
    inside, rows = share_rows(pictures, state.pending, slice_, world.rank, world.size, world.can_agree)
    todo = int(np.count_nonzero(inside & state.pending))
    return Assignment(
        state=state,
        slice=slice_,
        slice_rows=int(np.count_nonzero(inside)),
        slice_pending=todo,
        pictures=pictures,
        rows=rows,
    )
