"""Keys and values of the decoder, in memory that is allocated once: pages that rows share, and a seat for each row."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from vqa_embeddings.layers.device import to_device

PAGE = 384  # keys of a page: the fewest bytes a step, of 128 to 512, on pictures of the usual sizes


@dataclass(frozen=True)
class CacheSize:
    """How much a cache holds."""

    pages: int  # of PAGE keys, for what rows share
    seats: int  # rows
    width: int  # keys of a row's own


class KVCache:
    """The decoder's keys and values, by layer.

    A picture's lie in pages, which all rows on it read. A row's own, of its question and its answer, lie in its seat.
    What is not seen must be finite where it is a value, as it is multiplied by a weight of zero.
    """

    def __init__(
        self, layers: int, heads: int, head_size: int, size: CacheSize, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.size = size
        pages, seats = (size.pages, heads, PAGE, head_size), (size.seats, heads, size.width, head_size)
        self._page_keys = torch.empty(layers, *pages, dtype=dtype, device=device)
        self._page_values = torch.empty_like(self._page_keys)
        self._seat_keys = torch.empty(layers, *seats, dtype=dtype, device=device)
        self._seat_values = torch.empty_like(self._seat_keys)
        self._free = list(range(size.pages))  # a heap: the lowest go first, so that those in use lie together

    def take_pages(self, keys: int) -> list[int] | None:
        """Pages for so many keys, or None where there are not enough of them."""
        count = -(-keys // PAGE)
        if count > len(self._free):
            return None
        return [heapq.heappop(self._free) for _ in range(count)]

    def give_pages(self, pages: Sequence[int]) -> None:
        """Take pages back."""
        for page in pages:
            heapq.heappush(self._free, page)

    def write_pages(self, layer: int, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """Fill pages with the keys and values of one picture, [length, heads, head size]; with 0 at the end."""
        for pool, states in ((self._page_keys, keys), (self._page_values, values)):
            padded = states.new_zeros(len(pages) * PAGE, *states.shape[1:])
            padded[: len(states)] = states
            pool[layer, pages] = padded.view(len(pages), PAGE, *states.shape[1:]).transpose(1, 2)

    def read_pages(self, layer: int, pages: Tensor | int) -> tuple[Tensor, Tensor]:
        """Keys and values, [pages, heads, PAGE, head size]: those named, or in place the pool's first so many."""
        chosen = slice(pages) if isinstance(pages, int) else pages
        return self._page_keys[layer, chosen], self._page_values[layer, chosen]

    def clear_seats(self, first: int, count: int) -> None:
        """Make seats ready for new rows."""
        self._seat_values[:, first : first + count].zero_()

    def write_seats(self, layer: int, first: int, starts: Tensor, keys: Tensor, values: Tensor) -> None:
        """Add keys and values, [rows, length, heads, head size], to the seats from `first` on, each from its start."""
        rows = torch.arange(len(starts), device=starts.device)[:, None]
        columns = starts[:, None] + torch.arange(keys.shape[1], device=starts.device)
        seats = slice(first, first + len(starts))
        self._seat_keys[layer, seats].transpose(1, 2)[rows, columns] = keys
        self._seat_values[layer, seats].transpose(1, 2)[rows, columns] = values

    def read_seats(self, layer: int, first: int, count: int, width: int) -> tuple[Tensor, Tensor]:
        """Keys and values of seats, [count, heads, width, head size], in place."""
        chosen = (layer, slice(first, first + count), slice(None), slice(width))
        return self._seat_keys[chosen], self._seat_values[chosen]

    def move_seat(self, source: int, target: int, width: int) -> None:
        """Let the row at one seat sit at another."""
        for pool in (self._seat_keys, self._seat_values):
            pool[:, target, :, :width] = pool[:, source, :, :width]


@dataclass(frozen=True)
class Prefix:
    """A picture's part of the prompt in the cache, under one set of rotary factors."""

    pages: list[int]
    length: int  # keys
    long: bool


@dataclass(frozen=True)
class Company:
    """Which rows share which pages: the indexes of one pass, tensors on its device."""

    unseen: Tensor  # bool [pages, 1, 1, PAGE], where a page holds no key of its picture
    picture_of_page: Tensor  # int64 [pages], which of the pass's pictures
    rows: Tensor  # int64 [pictures, most rows], the rows on each picture; padded
    parts: Tensor  # int64 [pictures, most pages], which of the pass's pages are the picture's; padded
    there: Tensor  # bool of the same shape, false where that is padding
    picture: Tensor  # int64 [rows], which picture each row is on
    place: Tensor  # int64 [rows], where among the rows on it
    length: Tensor  # int64 [rows], keys of the picture
    long: Tensor  # bool [rows]

    def shape(self) -> tuple[tuple[int, ...], ...]:
        """All sizes: passes of the same shape can share a captured graph."""
        return tuple(tuple(getattr(self, field.name).shape) for field in fields(self))

    def copy_from(self, other: Company) -> None:
        """Take over the content of another of the same shape, in place."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))

    def to(self, device: torch.device) -> Company:
        """The same on another device."""
        return Company(*(to_device(getattr(self, field.name), device) for field in fields(self)))

    def clone(self) -> Company:
        """A copy in memory of its own."""
        return Company(*(getattr(self, field.name).clone() for field in fields(self)))


def arrange(
    prefixes: Sequence[Prefix],
    page_count: int | None = None,
    row_count: int | None = None,
    grown: Callable[[int], int] = int,
) -> tuple[Company, list[int]]:
    """Who shares what in a pass over rows.

    Args:
        prefixes: of each row, the same object for all rows on a picture.
        page_count: read the cache's first so many pages in place; without it, those that the rows need.
        row_count: how many rows the pass has, padding included; without it, those that there are.
        grown: rounds the other sizes up, so that passes have few different shapes.
    Returns:
        The indexes, and the pages in their order.
    """
    pictures: dict[int, int] = {}
    seated: list[list[int]] = []
    distinct: list[Prefix] = []
    for row, prefix in enumerate(prefixes):
        number = pictures.setdefault(id(prefix), len(pictures))
        if number == len(seated):
            seated.append([])
            distinct.append(prefix)
        seated[number].append(row)
    pages = [page for prefix in distinct for page in prefix.pages] if page_count is None else list(range(page_count))
    where = {page: index for index, page in enumerate(pages)}
    count = grown(len(distinct))
    rows = np.zeros((count, grown(max(map(len, seated)))), np.int64)
    parts = np.zeros((count, grown(max(len(prefix.pages) for prefix in distinct))), np.int64)
    there = np.zeros(parts.shape, bool)
    keys = np.zeros(len(pages), np.int64)
    picture_of_page = np.zeros(len(pages), np.int64)
    of_row = np.zeros((4, row_count or len(prefixes)), np.int64)
    for number, (prefix, members) in enumerate(zip(distinct, seated, strict=True)):
        rows[number, : len(members)] = members
        own = [where[page] for page in prefix.pages]
        parts[number] = own[0]  # padding by a page of its own: another's values may not be finite
        parts[number, : len(own)] = own
        there[number, : len(own)] = True
        picture_of_page[own] = number
        keys[own] = PAGE
        keys[own[-1]] = prefix.length - PAGE * (len(own) - 1)
        for place, row in enumerate(members):
            of_row[:, row] = number, place, prefix.length, prefix.long
    unseen = np.arange(PAGE) >= keys[:, None, None, None]
    indexes = (unseen, picture_of_page, rows, parts, there, *of_row[:3], of_row[3].astype(bool))
    return Company(*map(torch.from_numpy, indexes)), pages
