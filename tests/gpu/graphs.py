"""Timings `graphs` and `full-graphs`: captured steps against eager ones, and large batches against small ones."""

from __future__ import annotations

import time

import torch

from tests.gpu.answers import Answers, Counts, Noting, answer_all, captures, counted, difference, eagerly
from tests.gpu.report import Report, say
from tests.gpu.scene import Scene

TOKENS = 200
BATCH_SIZES = (5, None)
REPLAYS_A_GRAPH = 10  # at least
# Of the answers of 200 tokens, in float32: another batch is other sums, and a tie may fall to the other side.
SAME_IN_ANY_BATCH = 0.9


def graphs(scene: Scene, report: Report) -> str:
    """The small checkpoint in both number formats."""
    found = []
    for dtype in ("bfloat16", "float32"):
        model = scene.load(scene.small, dtype)
        found.append(compare(model, report, f"small, {dtype}"))
        del model
        scene.release()
    return "; ".join(found)


def full_graphs(scene: Scene, report: Report) -> str:
    """The checkpoint of full size in bfloat16."""
    return compare(scene.full_model, report, "full size, bfloat16")


def compare(model: Noting, report: Report, what: str) -> str:
    """Every batch size by graphs and eagerly, then the batch sizes with one another. Returns the figures."""
    if not captures(model):
        say("  no captures on a CPU: graphs are skipped, and batch sizes compared")
    total, by_size = Counts(), []
    for batch_size in BATCH_SIZES:
        found, counts, told = _extract(model, batch_size)
        say(f"     {what}, batch {batch_size or 'auto'}: {_length(found)}; {told}")
        by_size.append(found)
        total.graphs, total.replays = total.graphs + counts.graphs, total.replays + counts.replays
        total.steps, total.failed = total.steps + counts.steps, total.failed + counts.failed
        if captures(model):
            _compare_eager(model, batch_size, found, report, what)
    apart = difference(by_size[1], by_size[0])
    exact = model.spec.dtype == torch.float32
    limit = SAME_IN_ANY_BATCH if exact else 0
    report.check(apart.same >= limit * apart.rows, f"{what}, batch auto against batch {BATCH_SIZES[0]}: {apart}")
    if not captures(model):
        return f"{what}: batch sizes: {apart.same} of {apart.rows} answers the same"
    enough = 1 <= total.graphs < total.replays / REPLAYS_A_GRAPH and not total.failed
    report.check(enough, f"{what}: {total}; expected 1 graph or more, {REPLAYS_A_GRAPH} replays a graph, none failed")
    return f"{what}: {total}"


def _compare_eager(model: Noting, batch_size: int | None, found: Answers, report: Report, what: str) -> None:
    with eagerly():
        expected, counts, told = _extract(model, batch_size)
    apart = difference(found, expected)
    right = apart.none and not counts.replays
    report.check(right, f"{what}, batch {batch_size or 'auto'}, graphs against eager: {apart}; eagerly {told}")


def _extract(model: Noting, batch_size: int | None) -> tuple[Answers, Counts, str]:
    """All rows, how the steps were taken, and how long and how much memory it took."""
    on_gpu = model.spec.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begun = time.monotonic()
    with counted() as counts:
        found = answer_all(model, batch_size, TOKENS)
    told = f"{counts}, {time.monotonic() - begun:.1f} s"
    if on_gpu:
        peaks = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
        told += f", at most {peaks[0]:.1f} GiB live, {peaks[1]:.1f} GiB reserved"
    if counts.halved:
        told += f", batch halved: {dict(counts.halved)}"
    return found, counts, told


def _length(found: Answers) -> str:
    lengths = sorted(len(answer.tokens) for answer in found.values())
    return f"{len(found)} answers of {lengths[0]} to {lengths[-1]} tokens, {len(set(lengths))} lengths"
