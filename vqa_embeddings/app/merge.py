"""From segments to parts: verify, account for every row, write what is whole, report. Needs no torch."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from vqa_embeddings.app.options import MergeOptions
from vqa_embeddings.base.file_names import from_disk
from vqa_embeddings.base.files import new_csv, publish, publish_json, set_aside, sha256
from vqa_embeddings.base.process_pool import ProcessPool, start_pool
from vqa_embeddings.cluster.rank_pool import gather_ranks
from vqa_embeddings.cluster.world import World
from vqa_embeddings.data.table import select
from vqa_embeddings.data.table_reader import read_rows
from vqa_embeddings.errors import InputError
from vqa_embeddings.records import Extracted, Failed
from vqa_embeddings.report.build import write_report
from vqa_embeddings.store.catalog import Catalog, scan
from vqa_embeddings.store.coverage import KEEP, NOBODY, WRITE, Coverage, PartPlan, plan_parts
from vqa_embeddings.store.heartbeat import describe_shards, read_heartbeats
from vqa_embeddings.store.parts import (
    OldRows,
    Part,
    PartJob,
    Source,
    announced_path,
    part_path,
    read_source,
    recorded_hashes,
    write_part,
)
from vqa_embeddings.store.run import COVERAGE_FILE, ROWS_FILE, Run, read_run, read_run_rows
from vqa_embeddings.store.segments import Corrupt, Segment, checksum_path, find_damage

MISSING_FILE = "missing.csv"
FAILED_FILE = "failed.csv"
COMPLETE, INCOMPLETE, SOME_FAILED = 0, 3, 4  # exit statuses
ALONE = World()


@dataclass(frozen=True)
class Outcome:
    """What a merge, or a look at the folder, found and did."""

    run: Run
    coverage: Coverage
    parts: list[dict[str, Any]]
    corrupt: list[Corrupt]
    written: int
    pruned: int
    truncated: int = 0  # rows whose picture is cut off
    shards: Sequence[str] = ()  # what there is to say of them

    @property
    def status(self) -> int:
        """The exit status of `merge_shards.py`."""
        if self.coverage.missing.any():
            return INCOMPLETE
        return SOME_FAILED if self.coverage.failed.any() else COMPLETE

    def sentences(self, options: MergeOptions) -> Iterator[str]:
        """What a user is told."""
        folder = shlex.quote(str(options.output_dir))
        for damaged in self.corrupt:
            yield f"not used: {damaged.path}: {damaged.reason}"
        extracted, failed, missing = (
            int(flags.sum()) for flags in (self.coverage.extracted, self.coverage.failed, self.coverage.missing)
        )
        yield from self.shards
        yield f"rows: {self.run.rows}; extracted: {extracted}; failed: {failed}; missing: {missing}"
        if self.truncated:
            yield f"{self.truncated} of the extracted rows are on pictures that are cut off (--truncated-pictures show)"
        if not options.check:
            yield f"parts: {len(self.parts)} whole, {self.written} written now; {folder}/{COVERAGE_FILE} says which"
        if self.pruned:
            yield f"pruned: {self.pruned} segments, all of whose rows lie in verified parts"
        if missing:
            yield "the missing rows come with the next extraction: the same extract_dist.py command continues"
        if failed and options.check:
            yield f"python merge_shards.py --output-dir {folder} writes {FAILED_FILE}, which says why rows failed"
        elif failed:
            yield f"{folder}/{FAILED_FILE} says why rows failed; extract_dist.py --retry-failed tries them again"


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
    with _crew(options, world) as workers:
        if workers is None:
            return None
        findings = _find(options, workers)
    to_write = sum(plan.action == WRITE for plan in findings.plans)
    hashed = f"{len(findings.catalog.segments)} segments and {len(findings.found)} parts were hashed"
    return _look_only(folder, findings.catalog, f"{hashed}; a merge would write {to_write} parts")


def _look_only(folder: Path, catalog: Catalog, *verified: str) -> Outcome:
    committed: dict[str, tuple[int, int]] = {}
    for segment in catalog.segments:
        extracted, failed = committed.get(segment.path.parent.name, (0, 0))
        committed[segment.path.parent.name] = extracted + len(segment.rows), failed + len(segment.failed)
    shards = [*describe_shards(committed, read_heartbeats(folder), time.time()), *verified]
    coverage = catalog.coverage()
    truncated = int(catalog.truncated(coverage).sum())
    return Outcome(catalog.run, coverage, [], catalog.corrupt, 0, 0, truncated, shards)


def merge(options: MergeOptions, world: World = ALONE) -> Outcome | None:
    """Write every part whose rows are all accounted for, and say what has become of each row.

    The ranks of an `mpirun`, or of an `srun` with MPI, share the work.

    Returns:
        What rank 0 has found and done; `None` at the others.
    Raises:
        InputError: the folder holds no run, or parts of another size.
    """
    with _crew(options, world) as workers:
        return None if workers is None else _merge(options, _find(options, workers), workers)


def _crew(options: MergeOptions, world: World) -> AbstractContextManager[ProcessPool | None]:
    return start_pool(options.jobs) if world.size == 1 else gather_ranks(world, options.jobs)


@dataclass(frozen=True)
class _Findings:
    """What a merge finds before it changes anything.

    Attributes:
        catalog: without what is damaged, and with its names.
        known: the SHA-256 that each part may have, by file name.
        found: the SHA-256 of the parts that were hashed, by file name.
    """

    catalog: Catalog
    coverage: Coverage
    plans: list[PartPlan]
    known: dict[str, set[str]]
    found: dict[str, str]


def _find(options: MergeOptions, workers: ProcessPool) -> _Findings:
    """Verify the segments, and of the parts those in doubt, or with `verify` all. Nothing is written."""
    folder = options.output_dir
    run = read_run(folder)
    catalog = scan(folder, run, read_run_rows(folder, run), verify=workers)
    _check_part_size(catalog.parts, options.part_size)
    known = recorded_hashes(folder)
    catalog = _recorded(catalog, known)
    coverage, plans = _plan(catalog, options)
    suspects = catalog.parts if options.verify else _in_doubt(catalog.parts, plans, known)
    found = _hash(suspects, known, workers)
    damaged = _find_damaged(suspects, known, found)
    if damaged:
        catalog = _without(catalog, damaged)
        coverage, plans = _plan(catalog, options)
    return _Findings(catalog, coverage, plans, known, found)


def _merge(options: MergeOptions, findings: _Findings, workers: ProcessPool) -> Outcome:
    folder, catalog, coverage = options.output_dir, findings.catalog, findings.coverage
    _set_damaged_aside(folder, catalog.corrupt)
    to_write = [plan for plan in findings.plans if plan.action == WRITE]
    jobs = (_job(options, catalog, coverage, plan) for plan in to_write)
    found = findings.found | {path.name: digest for path, digest in workers(write_part, jobs)}
    parts = _parts_now(options, catalog, coverage, findings.plans)
    known = {name: next(iter(one)) for name, one in findings.known.items()}  # of several, the one that was found
    hashes = known | found
    entries = [_entry(part, hashes.get(part.path.name)) for part in parts]
    truncated = int(catalog.truncated(coverage).sum())
    outcome = Outcome(catalog.run, coverage, entries, catalog.corrupt, len(to_write), 0, truncated)
    summary, failures = _report(folder, catalog, outcome)
    _withdraw(parts, entries)
    read = _Reader(catalog, coverage, parts, {entry["file"]: entry["sha256"] for entry in entries}, set(found))
    write_report(folder, catalog, coverage, failures, summary, read)
    return replace(outcome, pruned=_prune(catalog, parts, entries, workers)) if options.prune else outcome


def _plan(catalog: Catalog, options: MergeOptions) -> tuple[Coverage, list[PartPlan]]:
    coverage = catalog.coverage()
    there = {part.number: part.rows for part in catalog.parts if part.layout == options.layout}
    return coverage, plan_parts(coverage, options.part_size, there)


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


def _in_doubt(parts: Sequence[Part], plans: Sequence[PartPlan], known: dict[str, set[str]]) -> list[Part]:
    """The parts to be hashed: those that a merge was ended over, and those from which rows may be taken.

    Rows that no segment holds come from the parts that are to be replaced, and must not bring damage along.
    """
    numbers = {plan.number for plan in plans if plan.action == WRITE}
    return [part for part in parts if part.number in numbers or len(known.get(part.path.name, ())) > 1]


def _hash(parts: Sequence[Part], known: dict[str, set[str]], workers: ProcessPool) -> dict[str, str]:
    """The SHA-256 of those parts that have one to be compared with, by file name."""
    paths = [part.path for part in parts if part.path.name in known]
    return {path.name: digest for path, digest in zip(paths, workers(sha256, paths), strict=True)}


def _find_damaged(parts: Sequence[Part], known: dict[str, set[str]], found: dict[str, str]) -> list[Corrupt]:
    suspects = (part.path for part in parts if part.path.name in found)
    damaged = (path for path in suspects if found[path.name] not in known[path.name])
    return [Corrupt(path, "its SHA-256 is not the one that coverage.json recorded") for path in damaged]


def _without(catalog: Catalog, damaged: Sequence[Corrupt]) -> Catalog:
    paths = {corrupt.path for corrupt in damaged}
    kept = [part for part in catalog.parts if part.path not in paths]
    return replace(catalog, parts=kept, corrupt=[*catalog.corrupt, *damaged])


def _check_part_size(parts: Sequence[Part], size: int) -> None:
    other = next((part for part in parts if part.size != size), None)
    if other is not None:
        raise InputError(
            f"{other.path} was made with --part-size {other.size}, found --part-size {size} now; "
            f"use {other.size} again, or move the parts away"
        )


def _withdraw(parts: Sequence[Part], entries: Sequence[dict[str, Any]]) -> None:
    """Remove the hashes that were announced before the parts were written, and are now recorded."""
    for part, entry in zip(parts, entries, strict=True):
        announced = announced_path(part.path)
        with suppress(OSError):
            if announced.read_bytes().startswith(entry["sha256"].encode()):
                announced.unlink()


def _set_damaged_aside(folder: Path, corrupt: Sequence[Corrupt]) -> None:
    """Rename damaged segments and parts. A whole segment of another run stays where it is."""
    for damaged in corrupt:
        if damaged.path.parent == folder:
            set_aside(damaged.path)
        elif find_damage(damaged.path):
            set_aside(damaged.path)
            set_aside(checksum_path(damaged.path))


def _recorded(catalog: Catalog, known: dict[str, set[str]]) -> Catalog:
    """Without the parts that no merge has recorded, where the segments can make them anew."""
    in_segments = np.zeros(len(catalog.table), bool)
    for segment in catalog.segments:
        in_segments[segment.rows] = True
    kept = [part for part in catalog.parts if part.path.name in known or not in_segments[part.rows].all()]
    return replace(catalog, parts=kept)


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
        rows=select(catalog.table, range(plan.first, plan.last)),
        sources=_find_sources(catalog.segments, parts, coverage, rows),
        run=catalog.run,
        compression=options.compression,
    )


def _find_sources(
    segments: Sequence[Segment], parts: Sequence[Part], coverage: Coverage, rows: np.ndarray
) -> list[Source | OldRows]:
    """Where the values of rows are to be read: in segments, and in `parts` those that no segment holds."""
    holders = coverage.holder[rows]
    sources: list[Source | OldRows] = [
        Source(segments[holder].path, coverage.position[rows[holders == holder]].tolist())
        for holder in np.unique(holders[holders != NOBODY])
    ]
    old = rows[holders == NOBODY]
    for part in parts:
        if not len(old):
            break
        if part.last <= old[0] or old[-1] < part.first:
            continue
        taken = np.intersect1d(old, part.rows)
        if len(taken):
            sources.append(OldRows(part.path, part.layout, taken.tolist()))
            old = np.setdiff1d(old, taken)
    return sources


def _entry(part: Part, digest: str | None) -> dict[str, Any]:
    return {
        "file": part.path.name,
        "first_row": part.first + 1,
        "last_row": part.last,
        "samples": len(part.rows),
        "sha256": digest or sha256(part.path),
    }


def _report(folder: Path, catalog: Catalog, outcome: Outcome) -> tuple[dict[str, Any], dict[int, Failed]]:
    """Write the lists and `coverage.json`. Returns what that says, and why rows failed."""
    coverage = outcome.coverage
    failures = catalog.failures(coverage.failed)
    _list_rows(folder, coverage, failures)
    summary = {
        "rows": len(coverage.extracted),
        "extracted": int(coverage.extracted.sum()),
        "failed": int(coverage.failed.sum()),
        "missing": int(coverage.missing.sum()),
        "duplicates": coverage.duplicates,
        "truncated_pictures": outcome.truncated,
        "corrupt_segments": [
            {"path": from_disk(damaged.path.relative_to(folder)), "reason": damaged.reason}
            for damaged in outcome.corrupt
        ],
        "parts": outcome.parts,
    }
    publish_json(folder / COVERAGE_FILE, summary)
    return summary, failures


@dataclass(frozen=True)
class _Reader:
    """Reads rows for the report, from what is verified: damage could keep HDF5 busy for ever.

    Attributes:
        recorded: SHA-256 of each part by its file name.
        verified: the names of those whose hash was seen by this merge; a part that has another one is passed over.
    """

    catalog: Catalog
    coverage: Coverage
    parts: Sequence[Part]
    recorded: dict[str, str]
    verified: set[str]

    def __call__(self, rows: np.ndarray) -> list[Extracted]:
        table, run = self.catalog.table, self.catalog.run
        stretches = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        segments = self.catalog.segments
        sources = (s for some in stretches for s in _find_sources(segments, self.parts, self.coverage, some))
        return [record for s in sources if self._is_whole(s) for record in read_source(s, table, 0, run)]

    def _is_whole(self, source: Source | OldRows) -> bool:
        name = source.path.name
        if isinstance(source, OldRows) and name not in self.verified:
            if sha256(source.path) != self.recorded[name]:
                return False
            self.verified.add(name)
        return True


def _list_rows(folder: Path, coverage: Coverage, reasons: Mapping[int, Failed]) -> None:
    """The rows without values, as `rows.csv` has them, which is gone through once, and not at all where all have."""
    left = ~coverage.extracted
    header, every_row = read_rows(folder / ROWS_FILE)
    rows = compress(every_row, left.tobytes()) if left.any() else iter(())

    def write(missing: Path, failed: Path) -> None:
        with new_csv(missing, header) as add_missing, new_csv(failed, [*header, "error", "message"]) as add_failed:
            for position, row in zip(np.flatnonzero(left).tolist(), rows, strict=True):
                if coverage.failed[position]:
                    add_failed([*row, reasons[position].error, reasons[position].message])
                else:
                    add_missing(row)

    publish(folder / MISSING_FILE, lambda missing: publish(folder / FAILED_FILE, lambda failed: write(missing, failed)))


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
