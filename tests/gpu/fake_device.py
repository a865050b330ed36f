"""A CUDA device without a GPU: its tensors have shapes and formats, and no values; what is done with them is recorded.

Tensors of the host are real. What runs on the device runs as torch's fake tensors, so that every operator checks its
devices, formats and shapes as it would there. Recorded are copies and waits, what happens inside a graph's capture,
live bytes, and of every operator the bytes, the operations and the least time. What a kernel does with values,
alignments and streams is not seen, nor are the allocator's rounding and the libraries' workspaces.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# An H100: bytes a second, operations a second in 16 bits and in float32, seconds of the shortest kernel in a graph.
BANDWIDTH, RATE_16, RATE_32, SHORTEST = 3.0e12, 6.5e14, 4.3e13, 2.0e-6
GPUS = 8
PROGRAM = str(Path(__file__).parent.parent.parent / "vqa_embeddings")
WITHOUT_KERNEL = {
    *("view", "_unsafe_view", "_reshape_alias", "reshape", "as_strided", "alias", "detach", "expand", "permute"),
    *("transpose", "t", "slice", "select", "split", "split_with_sizes", "unbind", "squeeze", "unsqueeze", "unfold"),
    *("empty", "empty_like", "empty_strided", "new_empty", "lift_fresh", "view_dtype"),
}
READ_WHAT_THEY_WRITE = {"embedding", "index", "index_select", "gather"}  # and not the whole of what they read from
LEFT_FACTOR = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # of matrix products: which argument it is
# Where the program means to wait: for the first tokens of new rows with all that is stored of them, and for a step's.
MEANT = {("device.py", "in_one_piece"), ("cuda_graphs.py", "run")}


@dataclass(frozen=True)
class Place:
    """A line of the program."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function})"


def find_place() -> Place:
    """The innermost line of the program that is being executed."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PROGRAM):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return Place("?", 0, "?")
    return Place(Path(frame.f_code.co_filename).name, frame.f_lineno, frame.f_code.co_name)


@dataclass(frozen=True)
class Operator:
    """What one operator costs at the least."""

    name: str
    place: Place
    bytes: int
    operations: int
    seconds: float


@dataclass
class Memory:
    """Bytes of the device's tensors that are alive."""

    live: int = 0
    peak: int = 0
    peak_at: str = ""
    _known: dict[int, int] = field(default_factory=dict)

    def see(self, tensor: FakeTensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        size = self._known[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._forget, storage._cdata)
        self.live += size
        if self.live > self.peak:
            self.peak, self.peak_at = self.live, str(find_place())

    def _forget(self, storage: int) -> None:
        self.live -= self._known.pop(storage)


class Graph:
    """The stand-in of `torch.cuda.CUDAGraph`: which operators were captured."""

    def __init__(self) -> None:
        self.operators: list[Operator] = []
        self.replays = 0
        self.strayed = False  # whether it holds work of another device than its stream's
        self.device = FakeDevice.current
        self.device.graphs.append(self)

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def replay(self) -> None:
        self.replays += 1
        self.device.replays += 1
        if not self.operators:
            self.device.fault("an empty graph is replayed")
        self.device.count(self.operators)


class FakeDevice(TorchDispatchMode):
    """`cuda:index`, with so many bytes.

    Args:
        tokens: what is read where the program waits for tokens, given their count.
        processes: on the device; the others hold as much memory as this one does.
    """

    current: FakeDevice

    def __init__(
        self,
        index: int,
        total: int,
        tokens: Callable[[int], list[int]],
        processes: int = 1,
    ) -> None:
        super().__init__()
        self.device = torch.device("cuda", index)
        self.total, self._processes = total, processes
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)  # in which the model is to be made, before the rest
        self.memory = Memory()
        self.faults: Counter[str] = Counter()  # what must not be, each with its place
        self.notes: Counter[str] = Counter()  # what may be, and is worth knowing
        self.graphs: list[Graph] = []
        self.replays = 0
        self.lacks = 0
        self.stage = ""  # of the work, as the program's own timings name it
        self.capturing: Graph | None = None
        self.costs: dict[str, list[Operator]] = {}  # of each stage, replays included
        self._now: list[Operator] = []
        self._current_device = 0
        self._current_stream = torch.device("cuda", 0)  # the device of the stream that is current
        self._astray = False  # whether that is the stream of a capture that failed
        # Asked at every operator: raises what a real device would raise for want of memory.
        self.lack: Callable[[FakeDevice], None] = lambda device: None
        self._tokens = tokens
        FakeDevice.current = self

    def fault(self, what: str) -> None:
        self.faults[f"{what}, at {find_place()}"] += 1

    def count(self, operators: list[Operator]) -> None:
        self.costs.setdefault(self.stage, []).extend(operators)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name == "scaled_dot_product_attention" and leaves[0].is_cuda:
            return self._attention(*args, **kwargs)
        if func.namespace == "aten" and torch.is_inference_mode_enabled() and func._can_decompose():
            with self:  # composite operators arrive whole in inference mode
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        if func.namespace == "prim":
            return func(*args, **kwargs)
        target = kwargs.get("device")
        fake = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        if not fake and (target is None or torch.device(target).type == "cpu"):
            if self.capturing is not None:
                self.fault(f"work of the host inside a capture: {name}")
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        self._check(name, leaves, args, kwargs, fake)
        if name == "_local_scalar_dense" or self._to_host(name, args, kwargs):
            return self._wait(args[0], name)
        self.lack(self)
        if name == "_to_copy" and not fake:  # what is small would be taken for a constant, and be sent for real
            made = torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=self.device)
        else:
            made = func(*args, **kwargs)
        outs = [leaf for leaf in tree_leaves(made) if isinstance(leaf, FakeTensor) and leaf.device.type == "cuda"]
        for out in outs:
            self.memory.see(out)
        if name not in WITHOUT_KERNEL:
            self._record(func, name, leaves, outs, args, kwargs, made)
        return made

    def _check(self, name: str, leaves: list[Tensor], args: Any, kwargs: Any, fake: bool) -> None:
        """Take note of what a device cannot do, does slowly, or does not do inside a capture."""
        devices = {leaf.device for leaf in leaves if leaf.device.type == "cuda"}
        if target := kwargs.get("device"):
            devices |= {torch.device(target)} if torch.device(target).type == "cuda" else set()
        if devices - {self.device}:
            self.fault(f"{name} on {', '.join(map(str, devices - {self.device}))} beside {self.device}")
        if fake and name != "copy_" and any(leaf.device.type == "cpu" for leaf in leaves):
            self.fault(f"a tensor of the host beside the device's in {name}")
        source = args[1] if name == "copy_" else args[0] if name == "_to_copy" else None
        if isinstance(source, Tensor) and source.device.type == "cpu":
            pinned = getattr(source, "is_pretended_pinned", False)
            if self.capturing is not None:
                self.fault("a copy from the host inside a capture")
            if self.stage and not (pinned and kwargs.get("non_blocking", False)):
                self.fault("a copy from the host that waits")
            self.notes[f"copies from the host, {'pinned' if pinned else 'pageable'}"] += 1
        if self._astray and self.capturing is None:
            self.fault("work on the stream of a failed capture")
        if self.capturing is not None and self._current_stream != self.device and not self.capturing.strayed:
            self.capturing.strayed = True
            self.fault(f"work on {self.device} is captured on a stream of {self._current_stream}")

    @staticmethod
    def _to_host(name: str, args: Any, kwargs: Any) -> bool:
        if name == "copy_":
            return args[0].device.type == "cpu" and args[1].device.type == "cuda"
        target = kwargs.get("device")
        return name == "_to_copy" and args[0].device.type == "cuda" and str(target or "cuda").startswith("cpu")

    def _wait(self, tensor: Tensor, what: str) -> Any:
        """What the host reads, after it has waited: zeros."""
        place = find_place()
        if self.capturing is not None:
            self.fault(f"waits for the device inside a capture: {what}")
        elif (place.file, place.function) not in MEANT:
            self.fault(f"waits for the device: {what}")
        self.notes[f"waits in {place.function} of {place.file}"] += 1
        if what == "_local_scalar_dense":
            return 0
        with unset_fake_temporarily():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)

    def read_tokens(self, tensor: FakeTensor) -> list[int]:
        """The stand-in of `Tensor.tolist`."""
        self._wait(tensor, "tolist")
        return self._tokens(tensor.numel())

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """By the flash kernel, which torch takes on Ampere and later under these conditions; it asks a GPU for them."""
        states, sizes = (query, key, value), {query.shape[-1], key.shape[-1], value.shape[-1]}
        flash = attn_mask is None and len(sizes) == 1 and max(sizes) <= 256 and query.dtype.itemsize == 2
        flash &= all(state.stride(-1) == 1 and state.dim() == 4 for state in states)
        flash &= query.shape[1] == key.shape[1] or enable_gqa
        self.notes["attention by the flash kernel" if flash else f"attention by another kernel, {query.dtype}"] += 1
        padding = -max(sizes) % 8
        query, key, value = (torch.nn.functional.pad(s, (0, padding)) if padding else s for s in states)
        with self:
            whole = torch.ops.aten._scaled_dot_product_flash_attention
            return whole(query, key, value, dropout_p, is_causal, scale=scale)[0][..., : max(sizes)]

    def _record(
        self, func: Any, name: str, leaves: list[Tensor], outs: list[FakeTensor], args: Any, kwargs: Any, made: Any
    ) -> None:
        read = list({id(leaf): leaf for leaf in leaves if leaf.is_cuda}.values())
        if name in READ_WHAT_THEY_WRITE:
            moved = [*read[1:], *outs, *outs]
        elif name == "index_put_":
            moved = [args[2], args[2]]
        elif name in ("copy_", "fill_", "zero_"):
            moved = [*read[1:], *outs]
        else:
            moved = [*read, *outs]
        size = sum(tensor.numel() * tensor.element_size() for tensor in moved)
        operations = _count_operations(func, name, args, kwargs, made)
        rate = RATE_16 if read and read[0].dtype.itemsize == 2 else RATE_32
        seconds = max(size / BANDWIDTH, operations / rate, SHORTEST)
        operator = Operator(name, find_place(), size, operations, seconds)
        if self.capturing is not None:
            self.capturing.operators.append(operator)  # which is not executed before the graph is replayed
        else:
            self.count([operator])

    @contextmanager
    def capture(self, graph: Graph, pool: Any = None, stream: Any = None, **_: Any) -> Iterator[None]:
        """The stand-in of `torch.cuda.graph`, whose stream is one of the current device where none is given."""
        before = self._current_stream
        self._current_stream = torch.device("cuda", self._current_device) if stream is None else stream.device
        self.capturing = graph
        try:
            yield
        except BaseException:
            self.capturing, self._astray = None, True  # as torch leaves it where ending the capture fails, too
            raise
        self.capturing = None
        self._current_stream = before

    def set_device(self, device: Any) -> None:
        self._current_device = torch.device(device).index
        self._current_stream = torch.device("cuda", self._current_device)

    def _on_it(self, answer: Any) -> Any:
        """What is answered of a device, which makes itself at home on the current one."""
        if self._current_device != self.device.index:
            self.fault(f"cuda:{self._current_device} is used before {self.device} is the current device")
        return answer

    def _free(self) -> int:
        return self.total - self._processes * self.memory.live

    def set_stream(self, stream: Any) -> None:
        self._current_stream, self._astray = stream.device, False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let torch compute on this device until the end of the block."""
        stand_ins: dict[str, Any] = {
            "is_available": lambda: True,
            "device_count": lambda: GPUS,
            "current_device": lambda: self._current_device,
            "get_device_name": lambda device=None: "a stand-in of an H100",
            "get_device_capability": lambda device=None: (9, 0),
            "get_arch_list": lambda: ["sm_90"],
            "get_device_properties": lambda device=None: SimpleNamespace(
                uuid=f"fake-{device}", total_memory=self.total
            ),
            "set_device": self.set_device,
            "set_stream": self.set_stream,
            "default_stream": lambda device=None: SimpleNamespace(device=torch.device(device or self.device)),
            "mem_get_info": lambda device=None: self._on_it((self._free(), self.total)),
            "memory_allocated": lambda device=None: self.memory.live,
            "memory_reserved": lambda device=None: self.memory.live,
            "empty_cache": lambda: None,
            "CUDAGraph": Graph,
            "graph": self.capture,
        }
        with ExitStack() as stack:
            stack.enter_context(self.mode)  # first: it asks whether there is a GPU, and must hear the truth
            stack.enter_context(mock.patch.multiple(torch.cuda, **stand_ins))
            stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda tensor: self.read_tokens(tensor)))
            stack.enter_context(self)
            stack.enter_context(_HostTensors(self))
            yield


def _count_operations(func: Any, name: str, args: Any, kwargs: Any, made: Any) -> int:
    """Floating-point operations of the products in it, a multiplication and an addition counted as two."""
    if name in LEFT_FACTOR:
        return 2 * made.numel() * args[LEFT_FACTOR[name]].shape[-1]
    if name == "_scaled_dot_product_flash_attention":  # torch 2.11's own count knows no grouped heads
        return 4 * args[0].numel() * args[1].shape[2]
    formula = flop_registry.get(func._overloadpacket)
    return formula(*args, **kwargs, out_val=made) if formula else 0


class _HostTensors(TorchFunctionMode):
    """Keeps tensors of the host real, and marks those that were pinned."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            if self._device.capturing is not None:
                self._device.fault("a tensor of the host is made inside a capture")
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if getattr(func, "__name__", "") == "pin_memory":
            if self._device.capturing is not None:
                self._device.fault("memory is pinned inside a capture")
            with unset_fake_temporarily():
                copy = args[0].detach().clone()
            copy.is_pretended_pinned = True
            return copy
        return func(*args, **kwargs)
