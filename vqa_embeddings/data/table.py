"""The rows of a table of questions in memory: text, compact, and the same fingerprint however the file was written."""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count, islice
from typing import overload

import numpy as np

from vqa_embeddings.data.columns import Columns

BLOCK_ROWS = 1024  # larger blocks are no faster to read, and slower to make


class Table:
    """The rows of a CSV in its order: four columns of text, each `[n]`. A missing ground truth is "".

    It holds the very bytes that are hashed for the fingerprint: every field in UTF-8 with a NUL after it, row after
    row, in blocks of `BLOCK_ROWS` rows. Ten million rows take a little more memory than their file takes on the disk.

    Attributes:
        columns: the columns of the file that it was read from.
    """

    def __init__(
        self,
        ids: Iterable[str] = (),
        images: Iterable[str] = (),
        questions: Iterable[str] = (),
        truths: Iterable[str] = (),
    ) -> None:
        self.columns = Columns()
        self._blocks: list[bytes] = []
        self._offsets = array("q", [0])  # of each row, counted in bytes over all blocks, and of the end
        self._add(zip(ids, images, questions, truths, strict=True))

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[str]], read_from: Columns | None = None) -> Table:
        """A table of rows, each `(id, image, question, truth)`. They are consumed one after another."""
        table = cls()
        table.columns = read_from or table.columns
        table._add(rows)
        return table

    def _add(self, rows: Iterable[Sequence[str]]) -> None:
        rows = iter(rows)
        while batch := list(islice(rows, BLOCK_ROWS)):
            block = "\0".join(chain.from_iterable((*batch, [""]))).encode()
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 0) + 1
            if len(ends) != 4 * len(batch):
                raise ValueError(f"found {len(ends)} fields in {len(batch)} rows; expected 4 a row, and no NUL in them")
            self._offsets.frombytes((self._offsets[-1] + ends[3::4]).astype(np.int64).tobytes())
            self._blocks.append(block)

    @property
    def ids(self) -> Column:
        """The `question_id` of each row."""
        return Column(self, 0)

    @property
    def images(self) -> Column:
        """The picture of each row, as the CSV names it."""
        return Column(self, 1)

    @property
    def questions(self) -> Column:
        """The question of each row."""
        return Column(self, 2)

    @property
    def truths(self) -> Column:
        """The ground truth of each row."""
        return Column(self, 3)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def row(self, position: int) -> list[str]:
        """The row at a position as `[id, image, question, truth]`; IndexError where there is none."""
        position = range(len(self))[position]
        block = position // BLOCK_ROWS
        base = self._offsets[block * BLOCK_ROWS]
        text = self._blocks[block][self._offsets[position] - base : self._offsets[position + 1] - base - 1]
        return text.decode().split("\0")

    def blocks(self) -> Iterator[list[str]]:
        """The fields of one block of rows after another, row after row."""
        return (block[:-1].decode().split("\0") for block in self._blocks)

    def raw_blocks(self) -> Iterator[tuple[bytes, np.ndarray]]:
        """The UTF-8 bytes of one block of rows after another, and where each field begins: int64 `[rows, 4]`."""
        for block in self._blocks:
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 0) + 1
            yield block, np.append(0, ends[:-1]).reshape(-1, 4)

    def pictures(self) -> np.ndarray:
        """The picture of each row as a number, int64 `[n]`, counted by first appearance."""
        numbers: defaultdict[str, int] = defaultdict(count().__next__)
        return np.fromiter(map(numbers.__getitem__, self.images), np.int64, len(self))

    def fingerprint(self) -> str:
        """SHA-256 over the four columns in order. It does not depend on how the CSV quotes fields or ends lines."""
        digest = hashlib.sha256()
        for block in self._blocks:
            digest.update(block)
        return digest.hexdigest()


class Column(Sequence[str]):
    """One column of a table, `[n]`: one text by its position, a list of texts by a slice."""

    def __init__(self, table: Table, index: int) -> None:
        self._table, self._index = table, index

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        return self._table.row(index)[self._index]

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(fields[self._index :: 4] for fields in self._table.blocks())


def select(table: Table, positions: Iterable[int]) -> Table:
    """A new table of the rows at these positions."""
    return Table.from_rows(map(table.row, positions), table.columns)


def sample(count: int, size: int) -> list[int]:
    """Positions of `size` rows of `count`, sampled as pandas' `sample(random_state=42)` does, in CSV order."""
    chosen = np.random.RandomState(42).choice(count, min(size, count), replace=False)
    return sorted(int(position) for position in chosen)
