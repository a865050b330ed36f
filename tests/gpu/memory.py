"""Timings `memory`, `full-memory` and `failed-captures`: less memory than the program believes costs no row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from tests.gpu.answers import Answers, Noting, answer_all, counted, difference, is_astray
from tests.gpu.report import Report, Skipped, say
from tests.gpu.scene import Scene
from vqa_embeddings.engine.cuda_graphs import DecodeInputs
from vqa_embeddings.engine.runner import Runner
from vqa_embeddings.records import Failed

TOKENS = 24  # few, so that no tie falls to the other side in a smaller batch
GIB = 1 << 30
FEW = 4  # rows of a step that is not greedy
BATCH_SIZE = 5  # where captures fail
CAPTURE_ROOM = 2 * GIB
FIFTH = 0.2  # of the GPU's memory
NEAR = 0.05  # relative error in bfloat16, where a batch of another size rounds otherwise


@dataclass(frozen=True)
class Trial:
    """An extraction with so many bytes beyond what the process has taken."""

    room: int
    greedy: bool  # whether a step with more than FEW rows asks for them all
    where: str  # what must have run out of memory


TRIALS = [Trial(2 * GIB, False, "the cache"), Trial(GIB // 2, False, "the cache"), Trial(GIB // 2, True, "work")]


def memory(scene: Scene, report: Report) -> str:
    """The small checkpoint in float32, whose answers do not depend on the batch."""
    if scene.device.kind != "cuda":
        raise Skipped("a CPU has no share of memory that could be taken away")
    return _run_short(scene, scene.load(scene.small, "float32"), report)


def failed_captures(scene: Scene, report: Report) -> str:
    """The last stage: after it torch gives no memory back, and what it has reserved is lost to launches."""
    if scene.device.kind != "cuda":
        raise Skipped("a CPU has no captures")
    model = scene.load(scene.small, "float32")
    figures = _fail_captures(scene, model, report)
    drawn = torch.rand(1, device=model.spec.device).item()  # a capture that fails may leave the generator captured
    say(f"     random numbers can still be drawn: {drawn:.3f}")
    return figures


def full_memory(scene: Scene, report: Report) -> str:
    """The checkpoint of full size in bfloat16, on a fifth of the GPU."""
    model = scene.full_model
    expected, live = answer_all(model, None, TOKENS), _live(scene)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(FIFTH)
    try:
        with counted() as counts:
            found = answer_all(model, None, TOKENS)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    apart, now, peak = difference(found, expected), _live(scene), torch.cuda.max_memory_reserved() / GIB
    halved, whole = sum(counts.halved.values()), not any(isinstance(one.record, Failed) for one in found.values())
    figures = f"halved {dict(counts.halved)}, at most {peak:.1f} GiB reserved; {counts}"
    report.check(whole and halved > 0 and apart.error < NEAR, f"{figures}; {apart}; expected vectors within {NEAR}")
    report.check(now == live, f"{now} bytes live afterwards, expected {live} as without")
    return figures


def _run_short(scene: Scene, model: Noting, report: Report) -> str:
    """Extractions that run out of memory, and what they leave behind."""
    expected = answer_all(model, None, TOKENS)
    live, halved = _live(scene), []
    for trial in TRIALS:
        beside = _greedy(trial.room) if trial.greedy else None
        with _capped(scene, trial.room), _advancing(beside), counted() as counts:
            found = answer_all(model, None, TOKENS)
        apart, now = difference(found, expected), _live(scene)
        halved.append(counts.halved.total())
        what = f"{trial.room / GIB:.1f} GiB{', greedy steps' if trial.greedy else ''}"
        right = apart.none and counts.halved[trial.where] > 0
        report.check(right, f"{what}: halved {dict(counts.halved)}, expected some in {trial.where}; {apart}; {counts}")
        report.check(now == live, f"{what}: {now} bytes live afterwards, expected {live} as without")
    return f"halved {', '.join(map(str, halved))} times"


def _fail_captures(scene: Scene, model: Noting, report: Report) -> str:
    """The first capture fails, in one way and in another; the others must not."""
    expected = answer_all(model, BATCH_SIZE, TOKENS)
    figures = []
    for what, fault in (("waits", _wait), ("runs out of memory", _run_out)):
        with _capped(scene, CAPTURE_ROOM), _advancing(_once_in_a_capture(fault)), counted() as counts:
            found = answer_all(model, BATCH_SIZE, TOKENS)
        right = _goes_on(found, expected) and counts.failed == 1 and counts.graphs > 0
        line = f"a capture that {what}: {counts}, expected 1 failed and others not; {difference(found, expected)}"
        report.check(right, line)
        astray = counts.astray or is_astray()
        report.check(not astray, f"the stream is {'not ' if astray else ''}the default one after it; expected that")
        say(f"     {_live(scene)} bytes live afterwards")
        figures.append(f"a capture that {what}: {counts.graphs} others")
    return ", ".join(figures)


def _goes_on(found: Answers, expected: Answers) -> bool:
    return difference(found, expected).none


def _live(scene: Scene) -> int:
    """Bytes in tensors of this process."""
    scene.release()
    return torch.cuda.memory_allocated()


@contextmanager
def _capped(scene: Scene, room: int) -> Iterator[None]:
    """Let this process take so many bytes more and no others. What the driver says to be free does not tell."""
    scene.release()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def _advancing(beside: Callable[[DecodeInputs], None] | None) -> Iterator[None]:
    """Let every step do something more."""
    advance = Runner._advance

    def advancing(self: Runner, inputs: DecodeInputs, width: int) -> None:
        advance(self, inputs, width)
        if beside:
            beside(inputs)

    with mock.patch.object(Runner, "_advance", advancing):
        yield


def _greedy(room: int) -> Callable[[DecodeInputs], None]:
    def take(inputs: DecodeInputs) -> None:
        if len(inputs.tokens) > FEW:
            _take(room, inputs.tokens)

    return take


def _once_in_a_capture(fault: Callable[[DecodeInputs], None]) -> Callable[[DecodeInputs], None]:
    left = [fault]

    def fail(inputs: DecodeInputs) -> None:
        if left and torch.cuda.is_current_stream_capturing():
            left.pop()(inputs)

    return fail


def _wait(inputs: DecodeInputs) -> None:
    inputs.num_keys.sum().item()


def _run_out(inputs: DecodeInputs) -> None:
    _take(2 * CAPTURE_ROOM, inputs.tokens)


def _take(count: int, beside: Tensor) -> None:
    torch.empty(count, dtype=torch.uint8, device=beside.device)
