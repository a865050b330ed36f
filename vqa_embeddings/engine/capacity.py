"""How much of the device's memory is used for what. Pure decisions of plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Listed
from dataclasses import dataclass

import torch

from vqa_embeddings.engine.sequence import Sequence
from vqa_embeddings.layers.kv_cache import BLOCK, Capacity, KVGroup, count_blocks

WIDTH_STEP = 64  # how many keys of the slots are read is rounded up to these, so that few shapes of a step occur
SCORES_AT_ONCE = 1 << 27  # of a pass over questions, in float32: half a GiB
MOST_SLOTS = {"cuda": 256, "cpu": 64}  # with more, a row's share of a step is hardly less
SLOTS_SHARE, BLOCKS_SHARE = {"cuda": 0.2, "cpu": 0.05}, {"cuda": 0.5, "cpu": 0.15}  # of the free memory


@dataclass(frozen=True)
class CapacityRequest:
    """What the next cache has to have room for."""

    width: int  # keys of a row's own
    prefix: Mapping[str, int]  # keys of the next picture, by KV group; empty where none waits
    slots: int | None  # as many as were asked for; None leaves it to the memory
    most_slots: int | None  # more are not wanted
    share: float  # of what is usually taken of the memory; less after that was too much


def find_capacity(
    request: CapacityRequest, groups: Listed[KVGroup], dtype: torch.dtype, kind: str, free: int
) -> Capacity:
    """How large a cache to make.

    Args:
        kind: of the device, "cuda" or "cpu".
        free: bytes that this process may still take.
    """
    memory, width = request.share * free, round_width(request.width)
    slot_bytes = width * sum(group.key_bytes(dtype) for group in groups if group.per_row)
    fitting = int(memory * SLOTS_SHARE[kind]) // slot_bytes if slot_bytes else MOST_SLOTS[kind]
    slots = request.slots or max(1, min(fitting, MOST_SLOTS[kind]))
    of_picture = {group.name: count_blocks(group.longest_prefix) for group in groups}
    block_bytes = {group.name: BLOCK * group.key_bytes(dtype) for group in groups}
    picture_bytes = sum(of_picture[name] * block_bytes[name] for name in of_picture)
    blocks = {}
    for group in groups:
        # Each group has room for as many pictures as the others.
        fitting = int(memory * BLOCKS_SHARE[kind] * of_picture[group.name] / picture_bytes)
        useful = slots * of_picture[group.name]  # where each row is on a picture of its own
        blocks[group.name] = max(min(fitting, useful), count_blocks(request.prefix.get(group.name, 0)))
    return Capacity(blocks, min(slots, request.most_slots or slots), width)


def round_width(keys: int) -> int:
    """So many keys, rounded up to WIDTH_STEP."""
    return -(-keys // WIDTH_STEP) * WIDTH_STEP


def split_passes(sequences: Listed[Sequence], heads: int) -> Iterator[Listed[Sequence]]:
    """Split rows into passes whose scores, padding included, fit into memory; a row alone may not."""
    first = 0
    for last in range(1, len(sequences)):
        if count_scores(sequences[first : last + 1], heads) > SCORES_AT_ONCE:
            yield sequences[first:last]
            first = last
    yield sequences[first:]


def tokens_at_once(sequences: Listed[Sequence], heads: int) -> int:
    """How many tokens of each row a pass reads: all, but of a row that is alone and has too many for the memory."""
    longest = max(sequence.num_tokens for sequence in sequences)
    if len(sequences) > 1:
        return longest
    return max(1, SCORES_AT_ONCE // count_scores(sequences, heads, length=1))


def count_scores(sequences: Listed[Sequence], heads: int, length: int | None = None) -> int:
    """How many scores a pass makes at once: rows and pictures are padded to the largest.

    Args:
        length: tokens of each row that are read; by default all.
    """
    on_each = Counter(id(sequence.prefix) for sequence in sequences)
    length = length or max(sequence.num_tokens for sequence in sequences)
    queries = heads * length * len(on_each) * max(on_each.values())
    return queries * max(sequence.longest_prefix + sequence.num_tokens for sequence in sequences)
