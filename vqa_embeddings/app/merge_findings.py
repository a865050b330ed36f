"""What a merge finds before it changes anything: which files hold, and what is to be written from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vqa_embeddings.app.options import MergeOptions
from vqa_embeddings.base.files import sha256
from vqa_embeddings.base.process_pool import ProcessPool
from vqa_embeddings.errors import InputError
from vqa_embeddings.store.catalog import Catalog, scan
from vqa_embeddings.store.coverage import WRITE, Coverage, PartPlan, plan_parts
from vqa_embeddings.store.hash_ledger import possible_hashes
from vqa_embeddings.store.parts import Part
from vqa_embeddings.store.run import read_run, read_run_rows
from vqa_embeddings.store.segments import Corrupt


@dataclass(frozen=True)
class Findings:
    """What is there, and what is to be done.

    Attributes:
        catalog: the damaged files are not among its segments and parts; it names them.
        plans: what is to be done about each part.
        known: the SHA-256 that each part may have, by file name.
        found: the SHA-256 of the parts that were hashed, by file name.
    """

    catalog: Catalog
    coverage: Coverage
    plans: list[PartPlan]
    known: dict[str, set[str]]
    found: dict[str, str]

    @property
    def to_write(self) -> list[PartPlan]:
        """The parts that are to be written."""
        return [plan for plan in self.plans if plan.action == WRITE]


def find(options: MergeOptions, workers: ProcessPool) -> Findings:
    """Verify the segments, and of the parts those in doubt, or with `verify` all. Nothing is written.

    Raises:
        InputError: the folder holds no run, or parts of another size.
    """
    folder = options.output_dir
    run = read_run(folder)
    catalog = scan(folder, run, read_run_rows(folder, run), verify=workers)
    _check_part_size(catalog.parts, options.part_size)
    known = possible_hashes(folder)
    catalog = _without_unrecorded(catalog, known)
    coverage, plans = _plan(catalog, options)
    suspects = catalog.parts if options.verify else _in_doubt(catalog.parts, plans, known)
    found = _hash(suspects, known, workers)
    damaged = _find_damaged(suspects, known, found)
    if damaged:
        catalog = _without(catalog, damaged)
        coverage, plans = _plan(catalog, options)
    return Findings(catalog, coverage, plans, known, found)


def _without_unrecorded(catalog: Catalog, known: dict[str, set[str]]) -> Catalog:
    """Without the parts that no merge has recorded, where the segments hold all of their rows."""
    in_segments = np.zeros(len(catalog.table), bool)
    for segment in catalog.segments:
        in_segments[segment.rows] = True
    kept = [part for part in catalog.parts if part.path.name in known or not in_segments[part.rows].all()]
    return replace(catalog, parts=kept)


def _plan(catalog: Catalog, options: MergeOptions) -> tuple[Coverage, list[PartPlan]]:
    coverage = catalog.coverage()
    there = {part.number: part.rows for part in catalog.parts if part.layout == options.layout}
    return coverage, plan_parts(coverage, options.part_size, there)


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
