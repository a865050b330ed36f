"""What a launch shows: its plan, and a bar, from the main process."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from tqdm import tqdm

from vqa_embeddings.compute import Choice, Device
from vqa_embeddings.launch import Launch
from vqa_embeddings.options import ExtractOptions
from vqa_embeddings.parts import count_part_bytes
from vqa_embeddings.plan import find_shortage
from vqa_embeddings.records import Extracted, Failed
from vqa_embeddings.run import Run
from vqa_embeddings.voice import say
from vqa_embeddings.world import World


class _Errors:
    """Standard error, for a bar. Where nobody can see it, as on a full disk of logs, the work goes on all the same."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


class Progress:
    """A bar over the rows of this rank, shown by the main process."""

    def __init__(self, world: World, rows: int) -> None:
        settings = {"file": _Errors(), "mininterval": 0.5, "smoothing": 0.05}
        self._bar = tqdm(total=rows, unit=" rows", disable=not world.main, **settings)
        self._failed = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, records: Sequence[Extracted | Failed]) -> None:
        """Count the records of one batch."""
        failed = sum(isinstance(record, Failed) for record in records)
        if failed:
            self._failed += failed
            self._bar.set_postfix(failed=self._failed, refresh=False)
        self._bar.update(len(records))


def say_plan(
    world: World, options: ExtractOptions, run: Run, launch: Launch, device: Device, dtype: Choice, attention: Choice
) -> None:
    """What this launch is about to do, and why with these settings."""
    index, count = launch.slice
    share = f", slice {index} of {count} with {launch.slice_rows}" if count > 1 else ""
    say(world, f"rows: {run.rows}{share}; {launch.slice_pending} to do now, {world.size} rank(s)")
    say(world, f"model: {run.model} ({run.layout} layout, vision LoRA {run.lora}), layers {run.layers}")
    say(world, f"device: {device.description}; {dtype.value} ({dtype.reason}); {attention.value} ({attention.reason})")
    free = shutil.disk_usage(options.output_dir).free
    parts = max(0, run.rows * run.row_bytes - count_part_bytes(options.output_dir))
    shortage = find_shortage(free, launch.slice_pending * run.row_bytes, parts)
    if shortage:
        say(world, f"warning: little room in {options.output_dir}: {shortage}; make room")
    if not launch.slice_pending:
        say(
            world,
            f"nothing to do; next: python merge_shards.py --output-dir {shlex.quote(str(options.output_dir))}",
        )
