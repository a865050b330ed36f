"""Reading what was extracted: vectors as matrices, answers and questions as lists, one row by its id.

from vqa_embeddings import open_embeddings

e = open_embeddings("OUT")
vectors, answers = e.query_token(16), e.answers
one, some = e["question_7"], e[100:200].query_token(16)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, overload

import h5py
import numpy as np

from vqa_embeddings.data.table import Table
from vqa_embeddings.errors import InputError, StorageError, one_line
from vqa_embeddings.records import Failed
from vqa_embeddings.schema import (
    ANSWER,
    QUERY_TOKEN,
    TABLE_TEXTS,
    VISION_ONLY,
    VISION_TOKEN,
    VectorColumn,
    short_name,
)
from vqa_embeddings.store.catalog import Catalog, scan
from vqa_embeddings.store.chunks import Scratch
from vqa_embeddings.store.coverage import Coverage
from vqa_embeddings.store.hdf5 import UNUSABLE, open_file, stamp_of
from vqa_embeddings.store.row_sources import Source, part_source, segment_source
from vqa_embeddings.store.run import Run, read_run, read_run_rows

if TYPE_CHECKING:
    import pandas
    import torch

MOST_THREADS = 4  # that read files at a time: more would wait for each other more than they read


def open_embeddings(folder: str | Path) -> Embeddings:
    """The extracted rows of an output folder, merged or not, in the order of its table.

    Each row is read from where that is fastest: a columnar part, a segment, a part in the published layout. Nothing is
    hashed; `merge_shards.py --verify` does that.

    Raises:
        ValueError: the folder holds no run, or not its table.
        OSError: it cannot be read.
    """
    folder = Path(folder)
    try:
        run = read_run(folder)
        table = read_run_rows(folder, run)
        catalog = scan(folder, run, table)
    except InputError as refusal:
        raise ValueError(str(refusal)) from None
    except StorageError as failure:
        raise OSError(str(failure)) from None
    coverage = catalog.coverage()
    absent = _Absent(folder, catalog, coverage)
    extracted = np.flatnonzero(coverage.extracted)
    sources = _choose_sources(catalog, coverage, extracted)
    return Embeddings(folder, run, table, extracted, sources, absent, catalog.truncated(coverage)[extracted])


def _choose_sources(catalog: Catalog, coverage: Coverage, extracted: np.ndarray) -> list[Source]:
    """For each of the rows, int64 `[n]` and in order, a file that has it: one in columns where there is one."""
    left = coverage.extracted.copy()
    sources: list[Source] = []

    def take_parts(layout: str) -> None:
        for part in catalog.parts:
            if part.layout == layout and len(rows := part.rows[left[part.rows]]):
                sources.append(part_source(part, rows, extracted))
                left[rows] = False

    take_parts("columnar")
    for number, segment in enumerate(catalog.segments):
        rows = np.unique(segment.rows[(coverage.holder[segment.rows] == number) & left[segment.rows]])
        if len(rows):
            sources.append(segment_source(segment, coverage, rows, extracted))
            left[rows] = False
    take_parts("grouped")
    return sources


class _Absent:
    """Says why rows are not there. What has to be looked up for it is looked up once."""

    def __init__(self, folder: Path, catalog: Catalog, coverage: Coverage) -> None:
        self._folder, self._catalog, self._coverage = folder, catalog, coverage

    @cached_property
    def _rows(self) -> dict[str, int]:
        ids = self._catalog.table.ids
        return {ids[row]: row for row in np.flatnonzero(~self._coverage.extracted).tolist()}

    @cached_property
    def _reasons(self) -> dict[int, Failed]:
        return self._catalog.failures(self._coverage.failed)

    def __call__(self, identity: str) -> str:
        """Why there is no row of this id."""
        row = self._rows.get(identity)
        if row is None and identity in self._catalog.table.ids:
            return f"{identity!r} is not among the rows that were chosen of {self._folder}"
        if row is None:
            return f"{identity!r} is not a question_id of {self._folder}"
        if not self._coverage.failed[row]:
            return f"{identity!r} is missing: it has not been extracted, the same extract_dist.py command continues"
        try:
            why = f"{self._reasons[row].error}: {self._reasons[row].message}"
        except StorageError:
            why = f"its reason is no longer there, open {self._folder} again"
        return f"{identity!r} has failed ({why}); extract_dist.py --retry-failed tries it again"


class Embeddings(Mapping[str, dict[str, Any]]):
    """Vectors, answers and questions of `n` extracted rows, in the order of the table: a mapping by `question_id`.

    `e[10:20]`, `e[mask]` with a bool for each row, and `e[ids]` with several ids are the same of some rows, in the
    order asked for; of each file only the stretch that they span is read.

    Attributes:
        run: what was extracted: model, layers, settings.
        ids: the `question_id` of each row.
        truncated: bool `[n]`, whether the row's picture is cut off, and what there is of it was shown to the model.
    """

    def __init__(
        self,
        folder: Path,
        run: Run,
        table: Table,
        rows: np.ndarray,
        sources: Sequence[Source],
        absent: Callable[[str], str],
        truncated: np.ndarray,
    ) -> None:
        self.folder, self.run, self.truncated = folder, run, truncated
        self._table, self._rows, self._sources, self._absent = table, rows, sources, absent

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __contains__(self, key: object) -> bool:
        return _is_id(key) and str(key) in self._place_of_id

    def __eq__(self, other: object) -> bool:
        return self is other  # a mapping would compare all values

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<{len(self)} of {len(self._table)} rows in {self.folder}, layers {self.layers}>"

    @property
    def layers(self) -> list[int]:
        """The decoder layers whose states are there."""
        return self.run.layers

    @cached_property
    def ids(self) -> list[str]:
        """The `question_id` of each row."""
        return [self._table.ids[row] for row in self._rows.tolist()]

    @cached_property
    def answers(self) -> list[str]:
        """The model's answer to each row."""
        answers: list[str] = [""] * len(self)
        for source in self._sources:
            with _open(source) as file:
                source.read_answers(file, self._table.ids.__getitem__, answers)
        return answers

    def query_token(self, layer: int) -> np.ndarray:
        """Outputs of a decoder layer at the last prompt token, float32 `[n, hidden]`."""
        return self.vectors(QUERY_TOKEN, layer)

    def vision_token(self, layer: int) -> np.ndarray:
        """Outputs of a decoder layer at the last image token, float32 `[n, hidden]`."""
        return self.vectors(VISION_TOKEN, layer)

    def vision_only(self) -> np.ndarray:
        """Means of the vision tower's patch features that the projector reads, float32 `[n, vision]`."""
        return self.vectors(VISION_ONLY)

    def vectors(self, name: str, layer: int | None = None) -> np.ndarray:
        """Any vector of the rows, as a matrix, float32 `[n, size]`. Where segments or columnar parts have it, checked.

        Args:
            name: "query_token", "pixel_mean" and so on: that of a dataset, with or without "_representation".
            layer: a decoder layer, for what every layer has.
        Raises:
            ValueError: the run does not store it, or not of this layer.
            OSError: a file cannot be read, is damaged, or is no longer there.
        """
        column = self._find_column(name, layer)
        matrix = np.empty((len(self), column.size), np.float32)
        threads = threading.local()

        def read(source: Source) -> None:
            if not hasattr(threads, "scratch"):
                threads.scratch = Scratch()
            with _open(source) as file:
                source.read_matrix(file, column, self._table.ids.__getitem__, matrix, threads.scratch)

        in_columns = [source for source in self._sources if not source.grouped]
        if len(in_columns) > 1:
            with ThreadPoolExecutor(min(MOST_THREADS, _count_cores())) as pool:
                list(pool.map(read, in_columns))
        for source in self._sources:
            if source.grouped or len(in_columns) == 1:  # HDF5 itself reads one group at a time
                read(source)
        return matrix

    def _find_column(self, name: str, layer: int | None) -> VectorColumn:
        named = [column for column in self.run.vectors if name in (column.name, short_name(column.name))]
        if not named:
            known = ", ".join(dict.fromkeys(short_name(column.name) for column in self.run.vectors))
            raise ValueError(f"{name!r} was not extracted; {self.folder} has {known}")
        found = next((column for column in named if column.layer == layer), None)
        if found is None and named[0].layer is None:
            raise ValueError(f"{name!r} has no layers, found layer {layer}")
        if found is None:
            raise ValueError(f"layer {layer} was not extracted; {self.folder} has the layers {self.layers}")
        return found

    def table(self) -> pandas.DataFrame:
        """Ids, pictures, questions, ground truths and answers, a row each. Needs pandas."""
        import pandas

        rows = [self._table.row(row) for row in self._rows.tolist()]
        return pandas.DataFrame(rows, columns=list(TABLE_TEXTS)).assign(**{ANSWER: self.answers})

    @overload
    def __getitem__(self, key: str | int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, key: Any) -> Embeddings: ...
    def __getitem__(self, key: Any) -> dict[str, Any] | Embeddings:
        """One row by its id, or the same of some rows, by a slice of positions, a mask, or several ids.

        A number is an id, not a position. One row is its texts by their names and its vectors by theirs: `vision_only`
        float32 `[vision]`, and for each layer in `query_token` and `vision_token` float32 `[hidden]`.

        Raises:
            KeyError: no row of this id is there, and why.
            IndexError: the mask is not one of `n` rows.
            ValueError: the mask is a pandas Series about other rows, or in another order.
            TypeError: the key is of no such kind.
        """
        if not _is_id(key):
            return self._select(self._choose(key))
        place = self._find(key)
        one = self._select(np.array([place]))
        texts = self._table.row(int(self._rows[place]))
        row: dict[str, Any] = {**dict(zip(TABLE_TEXTS, texts, strict=True)), ANSWER: one.answers[0]}
        for column in self.run.vectors:
            vector = one.vectors(column.name, column.layer)[0]
            if column.layer is None:
                row[short_name(column.name)] = vector
            else:
                row.setdefault(short_name(column.name), {})[column.layer] = vector
        return row

    def dataset(
        self, layer: int, token: str = "query_token", target: Callable[[dict[str, str]], Any] | None = None
    ) -> torch.utils.data.Dataset:
        """A map-style dataset of `(vector, target)` for a `torch.utils.data.DataLoader`. Needs torch.

        Args:
            layer: a decoder layer.
            token: "query_token", "vision_token", or another vector that every layer has.
            target: makes a row's texts, by the names of `table`, its target; without, the target is its `question_id`.
        """
        import torch
        from torch.utils.data import StackDataset

        known = dict.fromkeys(short_name(column.name) for column in self.run.vectors if column.layer is not None)
        if token not in known:
            raise ValueError(f"found token {token!r}; expected one of {', '.join(sorted(known))}")
        texts = self.table().to_dict("records") if target else []
        targets = [target(row) for row in texts] if target else self.ids
        return StackDataset(torch.from_numpy(self.vectors(token, layer)), targets)

    @cached_property
    def _place_of_id(self) -> dict[str, int]:
        return {identity: place for place, identity in enumerate(self.ids)}

    @cached_property
    def _held(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each row, int64 `[n]`: which source holds it, and where among the rows of that one."""
        numbers, entries = np.empty(len(self), np.int64), np.empty(len(self), np.int64)
        for number, source in enumerate(self._sources):
            numbers[source.into], entries[source.into] = number, np.arange(len(source.into))
        return numbers, entries

    def _find(self, key: object) -> int:
        """Where the row of an id is."""
        if not _is_id(key):
            raise TypeError(f"found {key!r} of type {type(key).__name__}; expected a question_id")
        place = self._place_of_id.get(str(key))
        if place is None:
            hint = "" if isinstance(key, str) else "; a number is taken for an id, positions go by slice"
            raise KeyError(self._absent(str(key)) + hint)
        return place

    def _choose(self, key: Any) -> np.ndarray:
        """Where the rows of a slice, a mask or several ids are, int64 `[m]`."""
        if isinstance(key, slice):
            return np.arange(len(self))[key]
        mask = np.asarray(key)
        if mask.dtype == object and mask.ndim and all(isinstance(one, (bool, np.bool_)) for one in mask):
            mask = mask.astype(bool)  # as pandas has those that may lack
        if mask.dtype != bool:
            if isinstance(key, bytes) or not np.iterable(key):
                self._find(key)  # which says what is expected
            return np.array([self._find(one) for one in key], np.int64)
        if mask.shape != (len(self),):
            raise IndexError(f"found a mask of shape {mask.shape}; expected ({len(self)},), a bool for each row")
        labels = getattr(key, "index", None)  # of a pandas Series
        if not (labels is None or callable(labels) or list(labels) in (list(range(len(self))), self.ids)):
            raise ValueError("the mask's index is neither that of table() nor the ids in their order; give an array")
        return np.flatnonzero(mask)

    def _select(self, chosen: np.ndarray) -> Embeddings:
        """The same of the rows at these places, int64 `[m]`, in this order."""
        numbers, entries = self._held
        order = np.argsort(numbers[chosen], kind="stable")
        ends = np.flatnonzero(np.diff(numbers[chosen[order]])) + 1
        sources = []
        for into in np.split(order, ends) if len(order) else ():
            source, entry = self._sources[numbers[chosen[into[0]]]], entries[chosen[into]]
            sources.append(replace(source, rows=source.rows[entry], places=source.places[entry], into=into))
        rows, truncated = self._rows[chosen], self.truncated[chosen]
        return Embeddings(self.folder, self.run, self._table, rows, sources, self._absent, truncated)


def _count_cores() -> int:
    """Those that this process may use; a batch job often has few of a node's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_id(key: object) -> TypeGuard[str | int]:
    return isinstance(key, (str, int, np.integer)) and not isinstance(key, bool)


@contextmanager
def _open(source: Source) -> Iterator[h5py.File]:
    """The file that the source was found in, to read.

    Raises:
        OSError: it is gone, or another file has its name; or it cannot be read.
    """
    try:
        with open_file(source.path) as file:
            if not source.stamp or stamp_of(file) == source.stamp:
                yield file
                return
    except FileNotFoundError:
        pass
    except UNUSABLE as error:
        raise OSError(
            f"{source.path} cannot be read ({one_line(error)}); merge_shards.py --verify finds what is damaged"
        ) from error
    raise OSError(
        f"{source.path} is not the file that was there when the folder was opened: a merge has been at work; "
        "open the folder again"
    )
