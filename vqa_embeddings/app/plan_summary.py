"""What a launch is about to do, in words, before it begins: is it what was meant, and is there room for it?"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from itertools import islice

import numpy as np

from vqa_embeddings.app.assignment import Assignment
from vqa_embeddings.app.launch import LaunchSetup
from vqa_embeddings.base.commands import with_names
from vqa_embeddings.cluster.world import World
from vqa_embeddings.data.picture_folder import PictureFolder
from vqa_embeddings.data.table import Table
from vqa_embeddings.data.table_warnings import find_warnings
from vqa_embeddings.errors import quoted
from vqa_embeddings.layers.device import Device, count_processes
from vqa_embeddings.store.parts import count_part_bytes
from vqa_embeddings.store.run import nearest

GIB = 1 << 30
LOOKED_FOR = 20  # pictures that are looked up beforehand: a wrong folder lacks them all


def summarize_plan(setup: LaunchSetup, assignment: Assignment, world: World) -> Iterator[str]:
    """The plan, one sentence a line. It ends with warnings of what looks wrong."""
    options, run = setup.options, setup.run
    state, pending = assignment.state, assignment.slice_pending
    device, dtype, attention = setup.device, setup.dtype, setup.attention
    yield f"rows: {run.rows} on {describe_pictures(assignment.pictures)}"
    yield f"columns: {setup.table.columns.describe()}"
    again = ", tried again now" if options.retry_failed else ""
    yield f"done before: {state.extracted} rows extracted, {state.failed} failed{again}"
    if state.truncated:
        yield f"{state.truncated} rows done before on pictures that are cut off"
    index, count = assignment.slice
    slice_ = f", slice {index} of {count} with {assignment.slice_rows} rows" if count > 1 else ""
    slice_ += ", from the Slurm array: --slice 0/1 takes the whole table" if count > 1 and not options.slice else ""
    yield f"this launch: {pending} rows to do now, {describe_ranks(world, pending)}{slice_}"
    free = shutil.disk_usage(nearest(options.output_dir)).free
    to_write, in_parts = pending * run.row_bytes, count_part_bytes(options.output_dir, run)
    parts = max(0, run.rows * run.row_bytes - in_parts)
    yield (
        f"vectors: {len(run.layers)} layers, {run.row_bytes / 1e3:.0f} kB a row: {format_size(to_write)} to write now, "
        f"{format_size(parts)} for the parts later; {format_size(free)} free in {options.output_dir}"
    )
    form = setup.checkpoint.family.describe_form(setup.checkpoint)
    yield f"model: {run.model} ({form}), layers {', '.join(map(str, run.layers))}"
    yield setup.checkpoint.family.describe_settings(setup.checkpoint)
    yield f"device: {device.description}{describe_devices(device)}"
    if device.memory:
        yield f"memory: {describe_memory(device.memory, count_processes(device.name))}"
    yield f"numbers: {dtype.value} ({dtype.reason}); attention: {attention.value} ({attention.reason})"
    if options.self_check:
        reference = setup.checkpoint.family.describe_reference(setup.checkpoint)
        several = "before rank 0 commits its first row; other ranks do not wait"
        before = several if world.size > 1 else "before the first row is committed"
        yield f"self-check: {options.self_check} rows against {reference}, {before}"
    shortage = find_shortage(free, to_write, parts)
    if shortage:
        yield f"warning: little room in {options.output_dir}: {shortage}; make room"
    absent = find_absent(setup.folder, setup.table, assignment)
    if absent:
        yield f"warning: {absent}; check --images-dir"
    yield from (f"warning: {oddity}" for oddity in find_warnings(setup.table))
    if not pending:
        merge = with_names("python merge_shards.py")
        yield f"nothing to do; next: {merge} --output-dir {shlex.quote(str(options.output_dir))}"


def describe_pictures(pictures: np.ndarray) -> str:
    """How many pictures a table has, and how many questions each; `pictures` has the picture of each row, int `[n]`."""
    counts = np.bincount(pictures)
    if not len(counts):
        return "0 pictures"
    fewest, most = int(counts.min()), int(counts.max())
    each = f"{fewest}" if fewest == most else f"{fewest} to {most} ({counts.mean():.1f} on average)"
    questions = "question" if most == 1 else "questions"
    return f"{len(counts)} picture{'s' * (len(counts) > 1)}, {each} {questions} a picture"


def describe_ranks(world: World, pending: int) -> str:
    """How many ranks share the rows."""
    if world.size == 1:
        return "1 rank"
    return f"{world.size} ranks (by {world.launcher}), about {round(pending / world.size)} rows each"


def describe_devices(device: Device) -> str:
    """How the ranks of a node find their GPUs."""
    if device.kind == "cpu":
        return ""
    return f" as {device.name}; {device.count} here, each rank of a node takes the next"


def describe_memory(total: int, processes: int) -> str:
    """How much of a GPU's memory, bytes, each of the processes on it may take."""
    each = f", {total / processes / GIB:.1f} for each of {processes} processes on it" if processes > 1 else ""
    return f"{total / GIB:.1f} GiB on the GPU{each}"


def find_absent(folder: PictureFolder, table: Table, assignment: Assignment) -> str | None:
    """A warning where none of the first pictures of this rank is there, else None."""
    names = dict.fromkeys(table.images[int(row)] for row in islice(assignment.rows, 50 * LOOKED_FOR))
    tried = list(islice(names, LOOKED_FOR))
    if not tried or any(map(folder.find, tried)):
        return None
    hint = folder.hint(tried[0])
    absent = f"none of the first {len(tried)} pictures is in {folder.path}, not even {quoted(tried[0])}"
    return f"{absent}, but {hint}" if hint else absent


def find_shortage(free: int, segments: int, parts: int) -> str | None:
    """A sentence on what the disk has no room for; None where all fits.

    Args:
        free: bytes that are free now.
        segments: bytes that this launch is to write.
        parts: bytes of the parts that are not there yet, which the merge writes beside the segments.
    """
    if segments > free:
        needed = f"it needs about {format_size(segments)} and {format_size(free)} are free"
        return f"{needed}: the run will end when the disk is full"
    if segments + parts > free:
        left = format_size(free - segments)
        return f"the merge needs about {format_size(parts)} more, and {left} will be left for it"
    return None


def format_size(count: int) -> str:
    """A number of bytes for people, in MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
