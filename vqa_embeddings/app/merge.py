"""From segments to parts: verify, account for every row, write what is complete, report. Needs no torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vqa_embeddings.app.merge_findings import Findings, find
from vqa_embeddings.app.merge_outcome import Outcome
from vqa_embeddings.app.merge_record import describe_part, write_record
from vqa_embeddings.app.options import MergeOptions
from vqa_embeddings.base.files import set_aside, sha256
from vqa_embeddings.base.process_pool import ProcessPool, start_pool
from vqa_embeddings.cluster.rank_pool import gather_ranks
from vqa_embeddings.cluster.world import World
from vqa_embeddings.data.table import select
from vqa_embeddings.report.build import write_report
from vqa_embeddings.store.catalog import Catalog, scan
from vqa_embeddings.store.coverage import KEEP, WRITE, Coverage, PartPlan
from vqa_embeddings.store.device_figures import sum_up_devices
from vqa_embeddings.store.hash_ledger import withdraw
from vqa_embeddings.store.heartbeat import describe_shards, read_heartbeats
from vqa_embeddings.store.part_writer import PartJob, write_part
from vqa_embeddings.store.parts import Part, part_path
from vqa_embeddings.store.row_sources import VerifiedReader, find_sources
from vqa_embeddings.store.run import read_run, read_run_rows
from vqa_embeddings.store.segments import Corrupt, checksum_path, find_damage

ALONE = World()


def merge(options: MergeOptions, world: World = ALONE) -> Outcome | None:
    """Write every part whose rows are all accounted for, and account for every row.

    The ranks of an `mpirun`, or of an `srun` with MPI, share the work.

    Returns:
        What rank 0 has found and done; `None` at the others.
    Raises:
        InputError: the folder holds no run, or parts of another size.
    """
    with _start_workers(options, world) as workers:
        if workers is None:
            return None
        findings = find(options, workers)
        _set_damaged_aside(options.output_dir, findings.catalog.corrupt)
        outcome, parts = _write_parts(options, findings, workers)
        if not options.prune:
            return outcome
        return replace(outcome, pruned=_prune(findings.catalog, parts, outcome.parts, workers))


def check(options: MergeOptions, world: World = ALONE) -> Outcome | None:
    """Say what is there and what is missing; nothing is written.

    With `verify` it is what a merge with these options would find, by the hash of every file, and the ranks share the
    work as they do there. Otherwise rank 0 looks alone, at names and row numbers.

    Returns:
        What rank 0 has found; `None` at the others.
    Raises:
        InputError: the folder holds no run; with `verify` also as `merge`.
    """
    folder = options.output_dir
    if not options.verify:
        if not world.main:
            return None
        run = read_run(folder)
        return _look_only(folder, scan(folder, run, read_run_rows(folder, run)))
    with _start_workers(options, world) as workers:
        if workers is None:
            return None
        findings = find(options, workers)
    hashed = f"{len(findings.catalog.segments)} segments and {len(findings.found)} parts were hashed"
    return _look_only(folder, findings.catalog, f"{hashed}; a merge would write {len(findings.to_write)} parts")


def _look_only(folder: Path, catalog: Catalog, *verified: str) -> Outcome:
    committed: dict[str, tuple[int, int]] = {}
    for segment in catalog.segments:
        extracted, failed = committed.get(segment.path.parent.name, (0, 0))
        committed[segment.path.parent.name] = extracted + len(segment.rows), failed + len(segment.failed)
    shards = [*describe_shards(committed, read_heartbeats(folder), time.time()), *verified]
    coverage = catalog.coverage()
    truncated = int(catalog.truncated(coverage).sum())
    return Outcome(catalog.run, coverage, [], catalog.corrupt, 0, 0, truncated, shards)


def _start_workers(options: MergeOptions, world: World) -> AbstractContextManager[ProcessPool | None]:
    return start_pool(options.jobs) if world.size == 1 else gather_ranks(world, options.jobs)


def _set_damaged_aside(folder: Path, corrupt: Sequence[Corrupt]) -> None:
    """Rename damaged segments and parts. A whole segment of another run stays where it is."""
    for damaged in corrupt:
        if damaged.path.parent == folder:
            set_aside(damaged.path)
        elif find_damage(damaged.path):
            set_aside(damaged.path)
            set_aside(checksum_path(damaged.path))


def _write_parts(options: MergeOptions, findings: Findings, workers: ProcessPool) -> tuple[Outcome, list[Part]]:
    """Write the parts, then the record, then the report. Returns also the parts that are there now."""
    folder, catalog, coverage = options.output_dir, findings.catalog, findings.coverage
    jobs = (_job(options, catalog, coverage, plan) for plan in findings.to_write)
    written = {path.name: digest for path, digest in workers(write_part, jobs)}
    verified = findings.found | written
    # A part that may have several hashes has been hashed (`merge_findings._in_doubt`), and so is among the verified.
    hashes = {name: next(iter(some)) for name, some in findings.known.items()} | verified
    parts = _parts_now(options, catalog, coverage, findings.plans)
    entries = [describe_part(part, hashes.get(part.path.name)) for part in parts]
    truncated, failures = int(catalog.truncated(coverage).sum()), catalog.failures(coverage.failed)
    heartbeats = read_heartbeats(folder)
    devices = sum_up_devices(heartbeats)
    summary = write_record(folder, coverage, truncated, catalog.corrupt, entries, failures, devices)
    withdraw([part.path for part in parts], entries)
    recorded = {entry["file"]: entry["sha256"] for entry in entries}
    read = VerifiedReader(catalog, coverage, parts, recorded, set(verified))
    write_report(folder, catalog, coverage, failures, summary, heartbeats, read)
    return Outcome(catalog.run, coverage, entries, catalog.corrupt, len(written), 0, truncated), parts


def _parts_now(options: MergeOptions, catalog: Catalog, coverage: Coverage, plans: Sequence[PartPlan]) -> list[Part]:
    """The parts that are there after the merge: those that were planned, and those that wait or are of another layout.

    All of them stay in the record: rows that a part alone holds go on into the one that replaces it, and into other
    layouts, and a hash that was forgotten could not show that it was damaged in between.
    """
    planned = [
        Part(
            part_path(options.output_dir, catalog.run, options.layout, plan.number),
            options.layout,
            plan.number,
            plan.first,
            plan.last,
            options.part_size,
            plan.first + np.flatnonzero(coverage.extracted[plan.first : plan.last]),
        )
        for plan in plans
        if plan.action in (KEEP, WRITE)
    ]
    paths = {part.path for part in planned}
    return planned + [part for part in catalog.parts if part.path not in paths]


def _job(options: MergeOptions, catalog: Catalog, coverage: Coverage, plan: PartPlan) -> PartJob:
    rows = plan.first + np.flatnonzero(coverage.extracted[plan.first : plan.last])
    parts = [part for part in catalog.parts if part.number == plan.number]
    return PartJob(
        path=part_path(options.output_dir, catalog.run, options.layout, plan.number),
        layout=options.layout,
        number=plan.number,
        first=plan.first,
        last=plan.last,
        size=options.part_size,
        table=select(catalog.table, range(plan.first, plan.last)),
        rows=rows,
        sources=find_sources(catalog.segments, parts, coverage, rows),
        run=catalog.run,
        compression=options.compression,
    )


def _prune(catalog: Catalog, parts: Sequence[Part], entries: Sequence[dict[str, Any]], workers: ProcessPool) -> int:
    """Remove the segments all of whose rows lie in parts whose hash holds at this moment."""
    safe = np.zeros(len(catalog.table), bool)
    hashes = workers(sha256, [part.path for part in parts])
    for part, entry, found in zip(parts, entries, hashes, strict=True):
        if found == entry["sha256"]:
            safe[part.rows] = True
    pruned = 0
    for segment in catalog.segments:
        if safe[segment.rows].all() and safe[segment.failed].all():
            segment.path.unlink()
            checksum_path(segment.path).unlink(missing_ok=True)
            pruned += 1
    return pruned
