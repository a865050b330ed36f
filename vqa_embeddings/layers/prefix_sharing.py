"""Which rows of a pass share which blocks: the indexes by which attention reads each picture's keys in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from vqa_embeddings.layers.device import to_device
from vqa_embeddings.layers.kv_cache import BLOCK, Prefix


@dataclass(frozen=True)
class PrefixSharing:
    """The indexes of one pass over rows, tensors on its device. Images are numbered within the pass."""

    masked: Tensor  # bool [blocks, 1, 1, BLOCK], where a block holds no key of its image
    image_of_block: Tensor  # int64 [blocks]
    rows: Tensor  # int64 [images, most rows], the rows on each image; padded
    blocks: Tensor  # int64 [images, most blocks], which of the pass's blocks are the image's; padded
    is_block: Tensor  # bool of the same shape, false where that is padding
    image: Tensor  # int64 [rows], which image each row is on
    place: Tensor  # int64 [rows], where among the rows on it
    length: Tensor  # int64 [rows], keys of its image
    rope_variant: Tensor  # int64 [rows]

    def shape(self) -> tuple[tuple[int, ...], ...]:
        """All sizes: passes of the same shape can share a captured graph."""
        return tuple(tuple(getattr(self, field.name).shape) for field in fields(self))

    def copy_from(self, other: PrefixSharing) -> None:
        """Take over the content of another of the same shape, in place."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))

    def to(self, device: torch.device) -> PrefixSharing:
        """The same on another device."""
        return PrefixSharing(*(to_device(getattr(self, field.name), device) for field in fields(self)))

    def clone(self) -> PrefixSharing:
        """A copy in memory of its own."""
        return PrefixSharing(*(getattr(self, field.name).clone() for field in fields(self)))


def share_named_blocks(prefixes: Sequence[Prefix]) -> tuple[PrefixSharing, list[int]]:
    """Who shares what where a pass reads just the blocks that its rows need.

    Args:
        prefixes: of each row, the same object for all rows on an image.
    Returns:
        The indexes, and the blocks in the order in which the pass has to read them.
    """
    blocks = [block for prefix, _ in _by_image(prefixes) for block in prefix.blocks]
    return _index(prefixes, blocks, len(prefixes), int), blocks


def share_first_blocks(
    prefixes: Sequence[Prefix], block_count: int, row_count: int, round_up: Callable[[int], int]
) -> PrefixSharing:
    """Who shares what where a pass reads the first blocks of the pool in place, all of them.

    Args:
        prefixes: of each row, the same object for all rows on an image.
        block_count: how many blocks are read.
        row_count: how many rows the pass has, padding included.
        round_up: rounds the other sizes up, so that passes have few different shapes.
    """
    return _index(prefixes, list(range(block_count)), row_count, round_up)


def _by_image(prefixes: Sequence[Prefix]) -> list[tuple[Prefix, list[int]]]:
    """The distinct prefixes in the order of their first rows, each with its rows."""
    rows: dict[int, tuple[Prefix, list[int]]] = {}
    for row, prefix in enumerate(prefixes):
        rows.setdefault(id(prefix), (prefix, []))[1].append(row)
    return list(rows.values())


def _index(
    prefixes: Sequence[Prefix], blocks: Sequence[int], row_count: int, round_up: Callable[[int], int]
) -> PrefixSharing:
    images = _by_image(prefixes)
    place_of = {block: place for place, block in enumerate(blocks)}
    count = round_up(len(images))
    rows = np.zeros((count, round_up(max(len(members) for _, members in images))), np.int64)
    own_blocks = np.zeros((count, round_up(max(len(prefix.blocks) for prefix, _ in images))), np.int64)
    is_block = np.zeros(own_blocks.shape, bool)
    keys = np.zeros(len(blocks), np.int64)  # in each block
    image_of_block = np.zeros(len(blocks), np.int64)
    of_row = np.zeros((4, row_count), np.int64)
    for number, (prefix, members) in enumerate(images):
        own = [place_of[block] for block in prefix.blocks]
        own_blocks[number] = own[0]  # padding by a block of its own: another's values may not be finite
        own_blocks[number, : len(own)] = own
        is_block[number, : len(own)] = True
        image_of_block[own] = number
        keys[own] = BLOCK
        keys[own[-1]] = prefix.length - BLOCK * (len(own) - 1)
        rows[number, : len(members)] = members
        for place, row in enumerate(members):
            of_row[:, row] = number, place, prefix.length, prefix.rope_variant
    masked = np.arange(BLOCK) >= keys[:, None, None, None]
    return PrefixSharing(*map(torch.from_numpy, (masked, image_of_block, rows, own_blocks, is_block, *of_row)))
