"""Keys and values of a decoder, in memory that is allocated once.

A picture's lie in blocks, which all rows on it read. A row's own, of its question and its answer, lie in its slot.
Layers that read the same sets of keys make a group; each group has a pool of its own.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 384  # keys of a block: the fewest bytes a step, of 128 to 512, on pictures of the usual sizes


class KVGroup(NamedTuple):
    """Decoder layers that read the same sets of keys and values."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    per_row: bool  # whether rows add keys of their own to those of their picture
    longest_prefix: int  # keys of the largest picture, about

    def key_bytes(self, dtype: torch.dtype) -> int:
        """Memory of one token's keys and values in all layers of the group, bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize


@dataclass(frozen=True)
class Capacity:
    """How much a cache holds."""

    blocks: Mapping[str, int]  # of BLOCK keys, by group
    slots: int  # rows
    width: int  # keys of a row's own


@dataclass(frozen=True)
class Prefix:
    """The keys of a picture in one group, under one set of rotary factors."""

    blocks: list[int]
    length: int  # keys
    rope_variant: int


def count_blocks(keys: int) -> int:
    """How many blocks so many keys take."""
    return -(-keys // BLOCK)


class BlockPool:
    """Which blocks of a group are free. Decides, and holds no keys itself."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))  # a heap: the lowest go first, so that those in use lie together

    def has(self, count: int) -> bool:
        """Whether so many blocks are free."""
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """So many blocks, the lowest that are free."""
        return [heapq.heappop(self._free) for _ in range(count)]

    def free(self, blocks: Sequence[int]) -> None:
        """Take blocks back."""
        for block in blocks:
            heapq.heappush(self._free, block)


class KVPool:
    """The keys and values of one group, by layer.

    What a mask hides must still be finite where it is a value, as it is multiplied by a weight of zero.
    """

    def __init__(self, group: KVGroup, capacity: Capacity, dtype: torch.dtype, device: torch.device) -> None:
        blocks = (capacity.blocks[group.name], group.kv_heads, BLOCK, group.head_dim)
        slots = (capacity.slots if group.per_row else 0, group.kv_heads, capacity.width, group.head_dim)
        self._block_keys = torch.empty(group.layers, *blocks, dtype=dtype, device=device)
        self._block_values = torch.empty_like(self._block_keys)
        self._slot_keys = torch.empty(group.layers, *slots, dtype=dtype, device=device)
        self._slot_values = torch.empty_like(self._slot_keys)

    def write_blocks(self, layer: int, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Fill blocks with the keys and values of one picture, [length, heads, head size]; with 0 at the end."""
        for pool, states in ((self._block_keys, keys), (self._block_values, values)):
            padded = states.new_zeros(len(blocks) * BLOCK, *states.shape[1:])
            padded[: len(states)] = states
            pool[layer, blocks] = padded.view(len(blocks), BLOCK, *states.shape[1:]).transpose(1, 2)

    def read_blocks(self, layer: int, blocks: Tensor | int) -> tuple[Tensor, Tensor]:
        """Keys and values, [blocks, heads, BLOCK, head size]: those named, or in place the pool's first so many."""
        chosen = slice(blocks) if isinstance(blocks, int) else blocks
        return self._block_keys[layer, chosen], self._block_values[layer, chosen]

    def clear_slots(self, first: int, count: int) -> None:
        """Make slots ready for new rows."""
        self._slot_values[:, first : first + count].zero_()

    def write_slots(self, layer: int, first: int, starts: Tensor, keys: Tensor, values: Tensor) -> None:
        """Add keys and values, [rows, length, heads, head size], to the slots from `first` on, each from its start."""
        rows = torch.arange(len(starts), device=starts.device)[:, None]
        columns = starts[:, None] + torch.arange(keys.shape[1], device=starts.device)
        slots = slice(first, first + len(starts))
        self._slot_keys[layer, slots].transpose(1, 2)[rows, columns] = keys
        self._slot_values[layer, slots].transpose(1, 2)[rows, columns] = values

    def read_slots(self, layer: int, first: int, count: int, width: int) -> tuple[Tensor, Tensor]:
        """Keys and values of slots, [count, heads, width, head size], in place."""
        chosen = (layer, slice(first, first + count), slice(None), slice(width))
        return self._slot_keys[chosen], self._slot_values[chosen]

    def move_slot(self, source: int, target: int, width: int) -> None:
        """Copy the first so many keys and values of one slot to another."""
        for pool in (self._slot_keys, self._slot_values):
            pool[:, target, :, :width] = pool[:, source, :, :width]


class KVCache:
    """The pools of all groups of a decoder."""

    def __init__(self, groups: Sequence[KVGroup], capacity: Capacity, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = capacity
        self.pools = {group.name: KVPool(group, capacity, dtype, device) for group in groups}
        self._per_row = [self.pools[group.name] for group in groups if group.per_row]

    def clear_slots(self, first: int, count: int) -> None:
        """Make slots ready for new rows."""
        for pool in self._per_row:
            pool.clear_slots(first, count)

    def move_slot(self, source: int, target: int, width: int) -> None:
        """Move a row from one slot to another, its first so many keys."""
        for pool in self._per_row:
            pool.move_slot(source, target, width)
