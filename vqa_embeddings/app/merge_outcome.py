"""What a merge, or a look at the folder, found and did; and what a user is told of it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vqa_embeddings.app.merge_record import FAILED_FILE
from vqa_embeddings.app.options import MergeOptions
from vqa_embeddings.base.commands import with_names
from vqa_embeddings.store.coverage import Coverage
from vqa_embeddings.store.run import COVERAGE_FILE, Run
from vqa_embeddings.store.segments import Corrupt
from vqa_embeddings.store.self_check import read_self_check

COMPLETE, INCOMPLETE, SOME_FAILED = 0, 3, 4  # exit statuses


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
        check = read_self_check(options.output_dir)
        if check and not check.passed:
            yield f"warning: the last self-check has failed: {check.fault}"
        if self.truncated:
            yield f"{self.truncated} of the extracted rows are on pictures that are cut off (--truncated-pictures show)"
        if not options.check:
            yield f"parts: {len(self.parts)} whole, {self.written} written now; {folder}/{COVERAGE_FILE} says which"
        if self.pruned:
            yield f"pruned: {self.pruned} segments, all of whose rows lie in verified parts"
        if missing:
            same = with_names("the same extract_dist.py command continues")
            yield f"the missing rows come with the next extraction: {same}"
        if failed and options.check:
            merge = with_names("python merge_shards.py")
            yield f"{merge} --output-dir {folder} writes {FAILED_FILE}, which says why rows failed"
        elif failed:
            retry = with_names("extract_dist.py --retry-failed")
            yield f"{folder}/{FAILED_FILE} says why rows failed; {retry} tries them again"
