"""A decoding step of all rows, on a GPU as a captured CUDA graph: some hundred small kernels, launched as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vqa_embeddings.errors import one_line
from vqa_embeddings.layers.device import is_out_of_memory, leave_capture, to_device
from vqa_embeddings.layers.prefix_sharing import PrefixSharing

PASSES_BEFORE_CAPTURE = 2  # of one shape: a rare one is not worth a graph, and what a library sets up must be there


@dataclass(frozen=True)
class DecodeInputs:
    """What a step reads, and changes in place: `tokens` become those that it chose, `num_keys` one more."""

    sharing: Mapping[str, PrefixSharing]  # by KV group
    tokens: Tensor  # int64 [rows], chosen last
    num_keys: Tensor  # int64 [rows], in the row's slot

    def shape(self) -> tuple[object, ...]:
        """All sizes."""
        return (*(sharing.shape() for sharing in self.sharing.values()), tuple(self.tokens.shape))

    def to(self, device: torch.device) -> DecodeInputs:
        """The same on another device."""
        sharing = {name: one.to(device) for name, one in self.sharing.items()}
        return DecodeInputs(sharing, to_device(self.tokens, device), to_device(self.num_keys, device))

    def clone(self) -> DecodeInputs:
        """A copy in memory of its own."""
        sharing = {name: one.clone() for name, one in self.sharing.items()}
        return DecodeInputs(sharing, self.tokens.clone(), self.num_keys.clone())

    def copy_sharing_from(self, other: DecodeInputs) -> None:
        """Take over who shares what from inputs of the same shape, in place."""
        for name, sharing in self.sharing.items():
            sharing.copy_from(other.sharing[name])


Advance = Callable[[DecodeInputs, int], None]  # takes a step, which reads so many keys of the slots


class CudaGraphRunner:
    """Runs steps: eagerly, or on a GPU by graphs that are captured once a shape.

    The function that takes a step is given with each: if it were kept here, it and the cache that it holds would keep
    each other alive.
    """

    def __init__(self, device: torch.device) -> None:
        self.captures = device.type == "cuda"
        self.notes: list[str] = []  # what the user should know
        self._device = device
        self._seen: Counter[object] = Counter()
        self._graphs: dict[object, CapturedGraph | None] = {}  # None: of this shape there can be none
        self._pool: object = None  # the graphs run one after another, and can share their memory

    def run(self, advance: Advance, inputs: DecodeInputs, width: int) -> list[int]:
        """Take a step, which changes `inputs`. Returns the chosen tokens, padding included."""
        graph = self._find_graph(advance, inputs, width) if self.captures else None
        if graph:
            graph.run(inputs)
        else:
            advance(inputs, width)
        return inputs.tokens.tolist()

    def _find_graph(self, advance: Advance, inputs: DecodeInputs, width: int) -> CapturedGraph | None:
        """The graph of the step's shape, where there is one by now."""
        shape = (inputs.shape(), width)
        self._seen[shape] += 1
        if shape not in self._graphs and self._seen[shape] > PASSES_BEFORE_CAPTURE:
            self._graphs[shape] = self._capture(advance, inputs, width)
        return self._graphs.get(shape)

    def _capture(self, advance: Advance, inputs: DecodeInputs, width: int) -> CapturedGraph | None:
        """A graph of the step, of which nothing is computed yet; None where capturing fails, for whatever reason."""
        try:
            own = inputs.clone()
            graph = torch.cuda.CUDAGraph()
            torch.cuda.set_device(self._device)  # on whose stream the capture is
            # Other threads may ask the driver for memory meanwhile, which must not end this capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                advance(own, width)
        except Exception as error:  # the step itself is run eagerly next: an error that lasts, it will raise
            reason = "for want of memory" if is_out_of_memory(error) else one_line(error)
            if not isinstance(error, torch.OutOfMemoryError):  # which alone ends a capture well
                self._pool = None  # torch may count it as in use by this capture for ever, and let no other one begin
        else:
            self._pool = self._pool or graph.pool()
            return CapturedGraph(graph, own)
        leave_capture(self._device)
        self.notes.append(f"steps of {len(inputs.tokens)} rows run without a CUDA graph, slower and as exact: {reason}")
        return None


class CapturedGraph:
    """A graph, and the tensors that it computes on."""

    def __init__(self, graph: torch.cuda.CUDAGraph, own: DecodeInputs) -> None:
        self._graph = graph
        self._own = own
        self._holds: DecodeInputs | None = None  # whose sharing it has

    def run(self, inputs: DecodeInputs) -> None:
        """Take a step, which changes `inputs`."""
        if self._holds is not inputs:
            self._own.copy_sharing_from(inputs)
            self._holds = inputs
        self._own.tokens.copy_(inputs.tokens)
        self._own.num_keys.copy_(inputs.num_keys)
        self._graph.replay()
        inputs.tokens.copy_(self._own.tokens)
        inputs.num_keys.copy_(self._own.num_keys)
