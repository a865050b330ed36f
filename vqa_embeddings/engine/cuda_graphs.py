"""One step of all rows, on a GPU as a captured graph: some hundred small kernels, launched as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vqa_embeddings.errors import one_line
from vqa_embeddings.layers.device import is_out_of_memory, leave_capture, to_device
from vqa_embeddings.layers.kv_cache import Company

PASSES_BEFORE_CAPTURE = 2  # of one shape: a rare one is not worth a graph, and what a library sets up must be there


@dataclass(frozen=True)
class Step:
    """What a step reads, and changes in place: `newest` becomes the token that it chose, `kept` one more."""

    company: Company
    newest: Tensor  # int64 [rows], the token chosen last
    kept: Tensor  # int64 [rows], keys in the row's seat

    def shape(self) -> tuple[tuple[int, ...], ...]:
        """All sizes."""
        return (*self.company.shape(), tuple(self.newest.shape))

    def to(self, device: torch.device) -> Step:
        """The same on another device."""
        return Step(self.company.to(device), to_device(self.newest, device), to_device(self.kept, device))

    def clone(self) -> Step:
        """A copy in memory of its own."""
        return Step(self.company.clone(), self.newest.clone(), self.kept.clone())


Advance = Callable[[Step, int], None]


class Steps:
    """Runs steps: as they are, or on a GPU by graphs that are captured once a shape.

    What takes a step is given with each: were it kept here, it and what it holds, the cache, would hold each other.
    """

    def __init__(self, device: torch.device) -> None:
        self.captures = device.type == "cuda"
        self._device = device
        self.notes: list[str] = []  # what the user should know
        self._seen: Counter[object] = Counter()
        self._graphs: dict[object, _Captured | None] = {}  # None: of this shape there can be none
        self._pool: object = None  # the graphs run one after another, and can share their memory

    def run(self, advance: Advance, step: Step, width: int) -> list[int]:
        """Take a step, by which `step` changes. Returns the chosen tokens, padding included."""
        graph = self._graph(advance, step, width) if self.captures else None
        if graph:
            graph.run(step)
        else:
            advance(step, width)
        return step.newest.tolist()

    def _graph(self, advance: Advance, step: Step, width: int) -> _Captured | None:
        """The graph of the step's shape, where there is one by now."""
        shape = (step.shape(), width)
        self._seen[shape] += 1
        if shape not in self._graphs and self._seen[shape] > PASSES_BEFORE_CAPTURE:
            self._graphs[shape] = self._capture(advance, step, width)
        return self._graphs.get(shape)

    def _capture(self, advance: Advance, step: Step, width: int) -> _Captured | None:
        """A graph of the step, of which nothing is computed yet; None where it fails, for want of memory or else."""
        try:
            own = step.clone()
            graph = torch.cuda.CUDAGraph()
            torch.cuda.set_device(self._device)  # on whose stream the capture is
            # Other threads may ask the driver for memory meanwhile: that is none of this capture's business.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                advance(own, width)
        except Exception as error:  # the step itself comes next, as it is: what is broken for good, it will say
            reason = "for want of memory" if is_out_of_memory(error) else one_line(error)
            if not isinstance(error, torch.OutOfMemoryError):  # which alone ends a capture well
                self._pool = None  # torch may count it as in use by this capture for ever, and let no other one begin
        else:
            self._pool = self._pool or graph.pool()
            return _Captured(graph, own)
        leave_capture(self._device)
        self.notes.append(f"steps of {len(step.kept)} rows run without a CUDA graph, slower and as exact: {reason}")
        return None


class _Captured:
    """A graph, and the tensors that it computes on."""

    def __init__(self, graph: torch.cuda.CUDAGraph, own: Step) -> None:
        self._graph = graph
        self._own = own
        self._holds: Step | None = None  # whose company it has

    def run(self, step: Step) -> None:
        if self._holds is not step:
            self._own.company.copy_from(step.company)
            self._holds = step
        self._own.newest.copy_(step.newest)
        self._own.kept.copy_(step.kept)
        self._graph.replay()
        step.newest.copy_(self._own.newest)
        step.kept.copy_(self._own.kept)
