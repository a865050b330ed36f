"""Stage `profile`: where the time of one decoding step goes, kernel by kernel, by a captured graph and eagerly."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from tests.benchmarks.inputs import questions, write_pictures
from tests.gpu.answers import Counts, Noting, captures, counted
from tests.gpu.report import Report, say
from tests.gpu.scene import Scene
from vqa_embeddings.base.timings import Timings
from vqa_embeddings.data.decode import open_picture
from vqa_embeddings.engine.core import Engine

ROWS, PICTURES, SIZE = 256, 19, (640, 480)
ROWS_ON_CPU, PICTURES_ON_CPU = 24, 3
TOKENS = 64  # of an answer, more than the steps that are taken here; the slots of 256 rows then fit into 40 GiB
TIMED_STEPS = 8
MOST_TRIES = 16  # of a step that is to be taken by a graph
SHOWN, NAME = 20, 110  # kernels, characters of their names
NAMESPACES = re.compile(r"void |\bat::(native::|cuda::)?|\(anonymous namespace\)::|binary_internal::|detail::")


@dataclass(frozen=True)
class Kernel:
    """One kernel of a step."""

    name: str
    calls: int
    seconds: float


def profile(scene: Scene, report: Report) -> str:
    """The checkpoint of full size in bfloat16; with `--quick` the small one, on a CPU with fewer rows.

    A step of all rows by a graph, and eagerly.
    """
    model = scene.load(scene.small, "bfloat16") if scene.quick else scene.full_model
    on_cpu = model.spec.device.type == "cpu"
    rows, pictures = (ROWS_ON_CPU, PICTURES_ON_CPU) if on_cpu else (ROWS, PICTURES)
    _kernels(model, lambda: None)  # the profiler is there before a graph is captured
    model.spec = replace(model.spec, max_new_tokens=TOKENS)
    with mock.patch.object(model, "_ends", frozenset()), counted() as counts:  # no answer ends
        engine = _filled(scene, model, rows, pictures)
        running, capacity = len(engine.scheduler.running), engine._runner.capacity
        say(f"     {running} rows in {capacity.slots} slots on {pictures} pictures, {capacity.blocks} blocks")
        report.check(running == rows, f"{running} rows run; expected {rows}")
        figures = []
        for how in ["by a graph", "eagerly"] if captures(model) else ["eagerly"]:
            engine._runner._graphs.captures = how == "by a graph"  # the shapes stay: no row leaves
            figures.append(_step(scene, engine, model, counts, how, report))
    return "; ".join(figures)


def _filled(scene: Scene, model: Noting, rows: int, pictures: int) -> Engine:
    """Rows that are all in the batch, and no step taken."""
    names = write_pictures(scene.scratch / "pictures", pictures, SIZE)
    images = [names[row * pictures // rows] for row in range(rows)]
    groups = groupby(range(rows), images.__getitem__)
    shown = ((list(group), model.preprocess(open_picture(scene.scratch / "pictures" / name))) for name, group in groups)
    engine = Engine(model, questions(rows), shown, rows, Timings())
    begun = time.monotonic()
    while len(engine.scheduler.running) < rows:
        engine.advance()
    say(f"     pictures read and rows prefilled: {time.monotonic() - begun:.1f} s")
    return engine


def _step(scene: Scene, engine: Engine, model: Noting, counts: Counts, how: str, report: Report) -> str:
    """One step, timed by itself and then under the profiler."""
    seconds = []
    for _ in range(MOST_TRIES):
        begun = time.perf_counter()
        engine.advance()
        if counts.last == how:
            seconds.append(time.perf_counter() - begun)
        if len(seconds) > TIMED_STEPS:
            break
    report.check(bool(seconds), f"{len(seconds)} steps taken {how}; expected {TIMED_STEPS + 1}; {counts}")
    found: list[Kernel] = []
    for _ in range(MOST_TRIES):
        found = _kernels(model, engine.advance)
        if counts.last == how:
            break
    wall, all_of_them = statistics.median(seconds or [0.0]), sum(kernel.seconds for kernel in found)
    calls = sum(kernel.calls for kernel in found)
    told = f"a step {how}: {1e3 * wall:.2f} ms, {calls} kernels of {1e3 * all_of_them:.2f} ms in all"
    report.check(bool(found) and counts.last == how, f"{told}; profiled {counts.last}")
    table = [f"| kernel, {how} | calls | ms | share |", "|---|---|---|---|"]
    for kernel in found[:SHOWN]:
        share, name = kernel.seconds / all_of_them, NAMESPACES.sub("", kernel.name)[:NAME]
        table.append(f"| {name} | {kernel.calls} | {1e3 * kernel.seconds:.3f} | {share:.1%} |")
    for line in table:
        say(f"     {line}")
    scene.closing = scene.closing or table  # the first, by a graph where there are any
    return told


def _kernels(model: Noting, work: Callable[[], Any]) -> list[Kernel]:
    """The kernels of some work, the costliest first; on a CPU, torch's operations."""
    on_gpu = model.spec.device.type == "cuda"
    with profiler(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        work()
        if on_gpu:
            torch.cuda.synchronize()
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    kernels = []
    for event in seen.key_averages():
        if event.device_type == wanted:
            micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            kernels.append(Kernel(event.key, event.count, 1e-6 * micros))
    return sorted(kernels, key=lambda kernel: -kernel.seconds)
