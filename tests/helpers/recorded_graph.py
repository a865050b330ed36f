"""A stand-in of CUDA graphs on the CPU that is as literal as they are.

A capture computes nothing that lasts: it records operators with their tensors. A replay executes them on these very
tensors, and nothing else: a number that Python read while capturing stays what it was, and a tensor that takes the
place of another is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqa_embeddings.engine.cuda_graphs import CudaGraphRunner


class Recorded(TorchDispatchMode):
    """The operators of a capture, to be executed again by `replay`."""

    def __init__(self) -> None:
        super().__init__()
        self.replays = 0
        self.asked_for: object = None  # the pool that the capture was to share
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # what was changed and its content, by its storage
        self._made: dict[int, Tensor] = {}  # by its storage, what the capture has made: in a real graph's own memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._can_decompose():  # in inference mode composite operators arrive whole
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func._schema.is_mutable:
            for tensor in tensors:
                self._keep(tensor)
        made = func(*args, **kwargs)
        known = {_storage(tensor) for tensor in tensors}
        new = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and _storage(leaf) not in known]
        self._made.update((_storage(tensor), tensor) for tensor in new)
        if new or func._schema.is_mutable:  # all else is a view, which lies where it lies
            self._calls.append((func, args, kwargs, new))
        return made

    def _keep(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        if storage not in self._made and storage not in self._before:
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self._before[storage] = whole, whole.clone()

    @contextmanager
    def capture(self) -> Iterator[None]:
        with self:
            yield
        for whole, content in self._before.values():
            whole.copy_(content)
        for tensor in self._made.values():  # nothing has been computed
            tensor.fill_(torch.nan if tensor.is_floating_point() else 1)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, outputs in self._calls:
            made = func(*args, **kwargs)
            if outputs:  # without any, it has changed its arguments in place
                found = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
                for output, result in zip(outputs, found, strict=True):
                    output.copy_(result)

    def pool(self) -> object:
        return self.asked_for or self


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def recorded_graphs() -> Iterator[list[Recorded]]:
    """CudaGraphRunner by recorded graphs until the end of the block; the graphs that were captured."""
    graphs: list[Recorded] = []
    begin = CudaGraphRunner.__init__

    def begin_capturing(self: CudaGraphRunner, *given: Any) -> None:
        begin(self, *given)
        self.captures = True

    @contextmanager
    def capture(graph: Recorded, pool: object, **_: Any) -> Iterator[None]:
        graph.asked_for = pool
        with graph.capture():
            yield
        graphs.append(graph)

    stand_ins = {"CUDAGraph": Recorded, "graph": capture, "set_device": lambda device: None}
    with mock.patch.multiple(torch.cuda, **stand_ins), mock.patch.object(CudaGraphRunner, "__init__", begin_capturing):
        yield graphs
