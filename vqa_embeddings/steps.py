"""One step of all rows, on a GPU as a captured graph: some hundred small kernels, launched as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vqa_embeddings.cache import Company
from vqa_embeddings.compute import send

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
        return Step(self.company.to(device), send(self.newest, device), send(self.kept, device))

    def clone(self) -> Step:
        """A copy in memory of its own."""
        return Step(self.company.clone(), self.newest.clone(), self.kept.clone())


class Steps:
    """Runs steps: as they are, or on a GPU by graphs that are captured once a shape."""

    def __init__(self, advance: Callable[[Step, int], None], device: torch.device) -> None:
        self._advance = advance
        self.captures = device.type == "cuda"
        self._seen: Counter[object] = Counter()
        self._graphs: dict[object, _Captured] = {}
        self._pool: object = None  # the graphs run one after another, and can share their memory

    def run(self, step: Step, width: int) -> list[int]:
        """Take a step, by which `step` changes. Returns the chosen tokens, padding included."""
        if not self.captures:
            self._advance(step, width)
            return step.newest.tolist()
        shape = (step.shape(), width)
        self._seen[shape] += 1
        if shape not in self._graphs and self._seen[shape] <= PASSES_BEFORE_CAPTURE:
            self._advance(step, width)
        else:
            if shape not in self._graphs:
                self._graphs[shape] = self._capture(step, width)
            self._graphs[shape].run(step)
        return step.newest.tolist()

    def _capture(self, step: Step, width: int) -> _Captured:
        own = step.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._advance(own, width)
        self._pool = self._pool or graph.pool()
        return _Captured(graph, own)


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
