"""What a launch is about to do, said before it begins: is it what was meant, and is there room for it?"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from vqa_embeddings.app.launch import Launch
from vqa_embeddings.app.options import ExtractOptions
from vqa_embeddings.cluster.messages import say
from vqa_embeddings.cluster.world import World
from vqa_embeddings.data.picture_folder import PictureFolder
from vqa_embeddings.data.table import Table
from vqa_embeddings.data.table_warnings import find_warnings
from vqa_embeddings.errors import quoted
from vqa_embeddings.layers.device import Choice, Device, count_processes
from vqa_embeddings.models.checkpoint import Checkpoint
from vqa_embeddings.models.phi4mm.settings import CROPS, PictureSettings
from vqa_embeddings.store.parts import count_part_bytes
from vqa_embeddings.store.run import Run, nearest

GIB = 1 << 30
LOOKED_FOR = 20  # pictures that are looked for beforehand: a wrong folder lacks them all


def say_plan(world: World, *facts: Any) -> None:
    """Say, once for all ranks, what `brief` has to say."""
    if world.main:
        for sentence in brief(world, *facts):
            say(world, sentence)


def brief(
    world: World,
    options: ExtractOptions,
    run: Run,
    launch: Launch,
    table: Table,
    folder: PictureFolder,
    device: Device,
    dtype: Choice,
    attention: Choice,
    checkpoint: Checkpoint,
) -> Iterator[str]:
    """The plan, a sentence a line."""
    stock, pending = launch.stock, launch.slice_pending
    yield f"rows: {run.rows} on {describe_pictures(launch.pictures)}"
    yield f"columns: {table.columns.describe()}"
    again = ", tried again now" if options.retry_failed else ""
    yield f"done before: {stock.extracted} rows extracted, {stock.failed} failed{again}"
    if stock.truncated:
        yield f"{stock.truncated} rows done before on pictures that are cut off"
    index, count = launch.slice
    share = f", slice {index} of {count} with {launch.slice_rows} rows" if count > 1 else ""
    share += ", from the Slurm array: --slice 0/1 takes the whole table" if count > 1 and not options.slice else ""
    yield f"this launch: {pending} rows to do now, {describe_ranks(world, pending)}{share}"
    free = shutil.disk_usage(nearest(options.output_dir)).free
    to_write, parts = pending * run.row_bytes, max(0, run.rows * run.row_bytes - count_part_bytes(options.output_dir))
    yield (
        f"vectors: {len(run.layers)} layers, {run.row_bytes / 1e3:.0f} kB a row: {size(to_write)} to write now, "
        f"{size(parts)} for the parts later; {size(free)} free in {options.output_dir}"
    )
    lora = "none: the weights hold it" if run.lora == "none" else run.lora
    yield f"model: {run.model} ({run.layout} layout, vision LoRA {lora}), layers {', '.join(map(str, run.layers))}"
    yield f"{describe_crops(checkpoint.pictures)}; end tokens: {', '.join(checkpoint.ends.values())}"
    yield f"device: {device.description}{describe_devices(device)}"
    if device.memory:
        yield f"memory: {describe_memory(device.memory, count_processes(device.name))}"
    yield f"numbers: {dtype.value} ({dtype.reason}); attention: {attention.value} ({attention.reason})"
    shortage = find_shortage(free, to_write, parts)
    if shortage:
        yield f"warning: little room in {options.output_dir}: {shortage}; make room"
    absent = find_absent(folder, table, launch)
    if absent:
        yield f"warning: {absent}; check --images-dir"
    yield from (f"warning: {oddity}" for oddity in find_warnings(table))
    if not pending:
        yield f"nothing to do; next: python merge_shards.py --output-dir {shlex.quote(str(options.output_dir))}"


def describe_pictures(pictures: np.ndarray) -> str:
    """How many pictures a table has, and how many questions each; `pictures` has the picture of each row, int `[n]`."""
    counts = np.bincount(pictures)
    if not len(counts):
        return "0 pictures"
    fewest, most = int(counts.min()), int(counts.max())
    each = f"{fewest}" if fewest == most else f"{fewest} to {most} ({counts.mean():.1f} on average)"
    questions = "question" if most == 1 else "questions"
    return f"{len(counts)} picture{'s' * (len(counts) > 1)}, {each} {questions} a picture"


def describe_crops(pictures: PictureSettings) -> str:
    """How finely pictures are seen, and who says so."""
    source = f"by {pictures.crops_from}" if pictures.crops_from else f"assumed: no file of the checkpoint names {CROPS}"
    return f"crops: {pictures.crops} a picture at most, {source}"


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


def find_absent(folder: PictureFolder, table: Table, launch: Launch) -> str | None:
    """Says so where none of the first pictures to come is there."""
    names = dict.fromkeys(table.images[int(row)] for row in islice(launch.rows, 50 * LOOKED_FOR))
    tried = list(islice(names, LOOKED_FOR))
    if not tried or any(map(folder.find, tried)):
        return None
    hint = folder.hint(tried[0])
    absent = f"none of the first {len(tried)} pictures is in {folder.path}, not even {quoted(tried[0])}"
    return f"{absent}, but {hint}" if hint else absent


def find_shortage(free: int, segments: int, parts: int) -> str | None:
    """What the disk has no room for, as a sentence; None where it has.

    Args:
        free: bytes that are free now.
        segments: bytes that this launch is to write.
        parts: bytes of the parts that are not there yet, which the merge writes beside the segments.
    """
    if segments > free:
        return f"it needs about {size(segments)} and {size(free)} are free: the run will end when the disk is full"
    if segments + parts > free:
        return f"the merge needs about {size(parts)} more, and {size(free - segments)} will be left for it"
    return None


def size(count: int) -> str:
    """Bytes as a person says them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
