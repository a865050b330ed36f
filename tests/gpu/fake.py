"""The real extraction on a device without values: what a GPU would be asked to do, on a machine that has none.

    python -m tests.gpu.fake [--rank N] [--full] [--json]

Prints captures, replays, copies and waits; operators, bytes and the least time of each stage; and the peak of the
memory. Exit status 1 where the program does what it must not: a wait that is not meant, a capture on another device
than its tensors', a tensor of the host beside one of the device, a step that never becomes a graph, more memory than
is planned. Later work on speed is judged by these figures: they are the same on every machine.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM
from transformers.initialization import no_init_weights

from tests.benchmarks.inputs import FULL, load, questions, write_pictures
from tests.gpu.fake_device import FakeDevice, Operator
from vqa_embeddings.app.extract import extract
from vqa_embeddings.base.timings import Timings
from vqa_embeddings.data.picture_folder import PictureFolder
from vqa_embeddings.data.table import Table
from vqa_embeddings.engine.runner import Runner
from vqa_embeddings.layers import device as devices
from vqa_embeddings.layers.gpu_claims import Claim
from vqa_embeddings.models.phi4mm import random_checkpoint
from vqa_embeddings.models.phi4mm.model import Phi4
from vqa_embeddings.models.phi4mm.weights import quiet_library
from vqa_embeddings.records import Failed

GIB = 2**30
CACHE = "cache"  # what happens outside the stages of the work: a cache is allocated
CAPTURE = "capture"
MOST_GRAPHS = 24  # of one cache: shapes are rounded up to powers of two, and widths to 64
ROOM = 0.95  # of the memory that a process may take: the rest is the allocator's rounding and the libraries' workspaces


@dataclass(frozen=True)
class Scene:
    """One extraction."""

    rank: int = 0
    full: bool = False
    dtype: str = "bfloat16"
    pictures: tuple[tuple[int, int], ...] = ((640, 480), (448, 448), (1000, 700), (640, 426), (300, 900), (640, 480))
    questions: int = 14
    new_tokens: int = 32
    ends: float = 0.03  # the share of the chosen tokens that end an answer
    batch_size: int | None = None
    memory: float = 78.0  # of the GPU, GiB
    processes: int = 1  # on the GPU
    # When memory lacks: in a stage, in a capture or as a cache is allocated, and at the how manieth operator there.
    lacks: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Cost:
    """What a stage costs at the least on an H100."""

    operators: int
    gigabytes: float
    teraflop: float
    milliseconds: float


@dataclass
class Report:
    """What an extraction asked of the device."""

    scene: Scene
    records: int = 0
    failed: list[str] = field(default_factory=list)
    weights: float = 0.0  # GiB, as are the following
    peak: float = 0.0
    planned: float = 0.0  # that the process may take
    left: float = 0.0  # live beyond the weights when all is done
    before_caches: list[float] = field(default_factory=list)  # live as each cache is allocated, the weights included
    peak_at: str = ""
    graphs: list[int] = field(default_factory=list)  # captured, of each cache
    replays: int = 0
    steps: int = 0
    lacks: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)  # of each stage
    costliest: dict[str, Cost] = field(default_factory=dict)  # call of each stage
    total: dict[str, Cost] = field(default_factory=dict)
    lines: dict[str, list[tuple[str, Cost]]] = field(default_factory=dict, repr=False)  # of the costliest, by line

    def wrong(self) -> list[str]:
        """What must not be, a sentence each."""
        found = [f"{count} times: {what}" for what, count in self.faults.items()]
        if not self.replays:
            found.append("no step was a replayed graph")
        if max(self.graphs, default=0) > MOST_GRAPHS:
            found.append(f"{max(self.graphs)} graphs of one cache; expected {MOST_GRAPHS} at most")
        if self.peak > ROOM * self.planned:
            found.append(f"a peak of {self.peak:.2f} GiB at {self.peak_at}; planned are {self.planned:.2f}")
        if self.left > 0:
            found.append(f"{self.left:.3f} GiB are alive after the last row")
        return found


class Lacks:
    """Raises what torch raises for want of memory, at chosen operators."""

    def __init__(self, moments: Sequence[tuple[str, int]]) -> None:
        self._left = list(moments)
        self._seen: Counter[str] = Counter()

    def __call__(self, device: FakeDevice) -> None:
        where = CAPTURE if device.capturing is not None else device.stage or CACHE
        self._seen[where] += 1
        if self._left and self._left[0][0] == where and self._seen[where] >= self._left[0][1]:
            self._left.pop(0)
            self._seen.clear()
            device.lacks += 1
            raise torch.OutOfMemoryError("CUDA out of memory, as was wished")


class StagesOn(Timings):
    """Tells the device which stage its work belongs to, and keeps what the costliest call of each asks of it."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.costliest: dict[str, list[Operator]] = {}
        self._device = device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before, self._device.stage = self._device.stage, name
        begun = len(self._device.costs.get(name, ()))
        self.calls[name] += 1
        try:
            with super().__call__(name):
                yield
        finally:
            self._device.stage = before
            done = self._device.costs.get(name, [])[begun:]
            if _seconds(done) > _seconds(self.costliest.get(name, [])):
                self.costliest[name] = done


def run(scene: Scene) -> Report:
    """Extract, and report. The files that it needs are made in a folder of its own, and removed."""
    quiet_library()
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        small, tokenizer, processor = _load_small()
        config = _config(scene, small, tokenizer)
        end = config.eos_token_id[-1]

        def tokens(count: int) -> list[int]:
            return [end if chance.random() < scene.ends else 0 for _ in range(count)]

        device = FakeDevice(scene.rank, int(scene.memory * GIB), tokens, scene.processes)
        table = _table(scene, scratch / "pictures")
        report = Report(scene)
        model = _model(scene, device, config)
        claims = mock.patch.object(devices, "claims_folder", lambda: scratch / "claims")
        with claims, mock.patch.dict(devices._claims, clear=True), _without_collector(), device.installed():
            found = devices.find_device(scene.rank)
            assert found.name == str(device.device)
            others = [Claim(scratch / "claims", f"fake-{scene.rank}") for _ in range(scene.processes - 1)]
            for tensor in [*model.parameters(), *model.buffers()]:
                device.memory.see(tensor)
            engine = Phi4(model, tokenizer, processor, scene.new_tokens)
            device.lack = Lacks(scene.lacks)
            _extract(engine, device, table, PictureFolder(scratch / "pictures"), report)
            for claim in [*others, *devices._claims.values()]:
                claim.withdraw()
    return report


def _extract(engine: Phi4, device: FakeDevice, table: Table, folder: PictureFolder, report: Report) -> None:
    scene, stages, memory = report.scene, StagesOn(device), device.memory
    weights = memory.live
    begin = Runner.__init__

    def watched(runner: Runner, *given: Any) -> None:
        report.before_caches.append(memory.live / GIB)
        report.graphs.append(0)
        begin(runner, *given)

    with mock.patch.object(Runner, "__init__", watched):
        for finished in extract(
            engine, table, range(len(table)), folder, batch_size=scene.batch_size, workers=0, timings=stages
        ):
            report.records += len(finished)
            report.failed += [record.message for record in finished if isinstance(record, Failed)]
            report.graphs[-1:] = [len(device.graphs) - sum(report.graphs[:-1])]
    report.weights, report.peak, report.peak_at = weights / GIB, memory.peak / GIB, memory.peak_at
    report.planned, report.left = device.total / scene.processes / GIB, (memory.live - weights) / GIB
    report.replays, report.lacks = device.replays, device.lacks
    report.steps = stages.calls["decoding"]
    report.notes, report.faults = dict(sorted(device.notes.items())), dict(sorted(device.faults.items()))
    report.calls = dict(stages.calls)
    report.costliest = {name: _cost(operators) for name, operators in stages.costliest.items() if operators}
    report.total = {name: _cost(operators) for name, operators in device.costs.items() if name}
    report.lines = {name: _by_line(operators) for name, operators in stages.costliest.items()}


@contextmanager
def _without_collector() -> Iterator[None]:
    """What only the collector of cycles would free stays, as it may for a long time where memory lacks."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@functools.cache
def _load_small() -> tuple[Any, Any, Any]:
    """Config, tokenizer and image processor of the small checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        random_checkpoint.make_checkpoint(folder)
        model, tokenizer, processor = load(folder, "cpu", "float32")
    return model.config, tokenizer, processor


def _config(scene: Scene, small: Any, tokenizer: Any) -> Any:
    if not scene.full:
        return small
    sizes = random_checkpoint.Sizes(FULL.decoder, FULL.vision, random_checkpoint.SMALL.audio, FULL.rank)
    config = Phi4MultimodalConfig(
        **random_checkpoint._config(sizes, tokenizer.get_added_vocab(), FULL.decoder["vocab_size"])
    )
    config._attn_implementation = small._attn_implementation
    return config


def _model(scene: Scene, device: FakeDevice, config: Any) -> Any:
    """The library's model on the device, without values."""
    with device.mode, torch.device(device.device), no_init_weights():
        model = Phi4MultimodalForCausalLM._from_config(config, dtype=getattr(torch, scene.dtype))
    model.model.embed_tokens_extend.audio_embed = None
    model.generation_config.eos_token_id = config.eos_token_id
    return model.eval().requires_grad_(False)


def _table(scene: Scene, folder: Path) -> Table:
    made = {size: iter(write_pictures(folder, scene.pictures.count(size), size)) for size in scene.pictures}
    names = [next(made[size]) for size in scene.pictures]
    images = [name for name in names for _ in range(scene.questions)]
    return Table([str(row) for row in range(len(images))], images, questions(len(images)), [""] * len(images))


def _seconds(operators: Sequence[Operator]) -> float:
    return sum(operator.seconds for operator in operators)


def _cost(operators: Sequence[Operator]) -> Cost:
    gigabytes = sum(operator.bytes for operator in operators) / 1e9
    teraflop = sum(operator.operations for operator in operators) / 1e12
    return Cost(len(operators), gigabytes, teraflop, 1e3 * _seconds(operators))


def _by_line(operators: Sequence[Operator]) -> list[tuple[str, Cost]]:
    lines: dict[str, list[Operator]] = {}
    for operator in operators:
        lines.setdefault(str(operator.place), []).append(operator)
    return sorted(((line, _cost(some)) for line, some in lines.items()), key=lambda pair: -pair[1].milliseconds)


def show(report: Report, lines: int) -> Iterator[str]:
    """The report for a person, a line each."""
    yield f"{report.scene}"
    yield f"{report.records} records, {len(report.failed)} failed; {report.lacks} lacks of memory"
    yield (
        f"memory: weights {report.weights:.2f} GiB, peak {report.peak:.2f} of {report.planned:.2f} planned, "
        f"at {report.peak_at}; {report.left:.3f} left beyond the weights"
    )
    before = ", ".join(f"{live:.2f}" for live in report.before_caches)
    yield f"caches: {len(report.graphs)}, at {before} GiB live; graphs captured: {report.graphs}"
    yield f"steps: {report.steps}, of them {report.replays} by replays of graphs"
    yield from (f"note: {count} {what}" for what, count in report.notes.items())
    yield "| stage | calls | operators of the costliest call | GB | TFLOP | ms at the least | of all calls, ms |"
    yield "|---|---|---|---|---|---|---|"
    for name, cost in report.costliest.items():
        figures = f"{cost.operators} | {cost.gigabytes:.2f} | {cost.teraflop:.3f} | {cost.milliseconds:.2f}"
        yield f"| {name} | {report.calls[name]} | {figures} | {report.total[name].milliseconds:.1f} |"
    for name in report.costliest if lines else ():
        for line, cost in report.lines[name][:lines]:
            yield f"{name}: {cost.milliseconds:8.2f} ms {cost.gigabytes:8.2f} GB {cost.operators:5d} operators  {line}"
    yield from (f"WRONG: {sentence}" for sentence in report.wrong())


def main() -> int:
    """Run one scene. Returns the exit status: 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rank", type=int, default=0, help="rank on the node, and so number of the GPU (%(default)s)")
    add("--full", action="store_true", help="the real model's size; 256 rows on 19 pictures")
    add("--json", action="store_true", help="the report as JSON")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--questions", type=int, help="questions a picture")
    add("--pictures", type=int, help="pictures")
    add("--size", type=int, nargs=2, default=(640, 480), help="of the pictures (%(default)s)")
    add("--memory", type=float, default=78.0, help="of the GPU, GiB (%(default)s)")
    add("--processes", type=int, default=1, help="on the GPU (%(default)s)")
    add("--lines", type=int, default=0, help="costliest lines shown of each stage")
    options = parser.parse_args()
    scene = Scene(options.rank, options.full, options.dtype, memory=options.memory, processes=options.processes)
    changed: dict[str, Any] = {"pictures": (tuple(options.size),) * 19, "ends": 0.0} if options.full else {}
    if options.pictures:
        changed["pictures"] = (tuple(options.size),) * options.pictures
    if options.questions:
        changed["questions"] = options.questions
    report = run(Scene(**{**vars(scene), **changed}))
    if options.json:
        described = {key: value for key, value in asdict(report).items() if key != "lines"}
        print(json.dumps({**described, "wrong": report.wrong()}, indent=1))
    else:
        print(*show(report, options.lines), sep="\n")
    return 1 if report.wrong() else 0


if __name__ == "__main__":
    sys.exit(main())
