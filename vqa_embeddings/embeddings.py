"""Reading what was extracted: vectors as matrices, answers and questions as lists, one row by its id.

from vqa_embeddings import open_embeddings

e = open_embeddings("OUT")
vectors, answers = e.query_token(16), e.answers
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from h5py import h5d, h5f, h5s

from vqa_embeddings.errors import Refused, one_line
from vqa_embeddings.hdf5 import get_dataset, open_file
from vqa_embeddings.holdings import look
from vqa_embeddings.run import Run, read_run, read_run_rows
from vqa_embeddings.shards import UNUSABLE, VECTORS
from vqa_embeddings.table import Table

if TYPE_CHECKING:
    import pandas
    import torch

QUERY, VISION = "query_token", "vision_token"


def open_embeddings(folder: str | Path) -> Embeddings:
    """The extracted rows of an output folder, merged or not, in the order of its table.

    Each row is read from where that is fastest: a columnar part, a segment, a part in the published layout. Nothing is
    hashed; `merge_shards.py --verify` does that.

    Raises:
        ValueError: the folder holds no run, or not its table.
    """
    folder = Path(folder)
    try:
        run = read_run(folder)
        table = read_run_rows(folder, run)
        holdings = look(folder, run, table)
    except Refused as refusal:
        raise ValueError(str(refusal)) from None
    coverage = holdings.coverage()
    left = coverage.extracted.copy()
    sources = []

    def take(path: Path, layout: str, rows: np.ndarray, places: np.ndarray) -> None:
        if len(rows):
            sources.append(_Source(path, layout, rows, places))
            left[rows] = False

    for part in holdings.parts:
        if part.layout == "columnar":
            take(part.path, "columnar", part.rows, np.arange(len(part.rows)))
    for number, segment in enumerate(holdings.segments):
        rows = np.unique(segment.rows[(coverage.holder[segment.rows] == number) & left[segment.rows]])
        take(segment.path, "segment", rows, coverage.position[rows])
    for part in holdings.parts:
        if part.layout == "grouped":
            rows = part.rows[left[part.rows]]
            take(part.path, "grouped", rows, rows)
    return Embeddings(folder, run, table, np.flatnonzero(coverage.extracted), sources)


@dataclass(frozen=True)
class _Source:
    """Some rows of a file: positions in the table, and in the file; both int64 `[m]`."""

    path: Path
    layout: str  # columnar, segment or grouped
    rows: np.ndarray
    places: np.ndarray


class Embeddings:
    """Vectors, answers and questions of `n` extracted rows, in the order of the table.

    Attributes:
        run: what was extracted: model, layers, settings.
        ids: the `question_id` of each row.
    """

    def __init__(self, folder: Path, run: Run, table: Table, rows: np.ndarray, sources: Sequence[_Source]) -> None:
        self.folder, self.run = folder, run
        self._table, self._rows, self._sources = table, rows, sources

    def __len__(self) -> int:
        return len(self._rows)

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
            for place, answer in zip(self._places(source).tolist(), _read_answers(source, self._table), strict=True):
                answers[place] = answer
        return answers

    def query_token(self, layer: int) -> np.ndarray:
        """Outputs of a decoder layer at the last prompt token, float32 `[n, hidden]`."""
        return self._read_matrix(VECTORS[2], layer)

    def vision_token(self, layer: int) -> np.ndarray:
        """Outputs of a decoder layer at the last image token, float32 `[n, hidden]`."""
        return self._read_matrix(VECTORS[1], layer)

    def vision_only(self) -> np.ndarray:
        """Means of the SigLIP patch features that the projector reads, float32 `[n, vision]`."""
        return self._read_matrix(VECTORS[0])

    def table(self) -> pandas.DataFrame:
        """Ids, pictures, questions, ground truths and answers, a row each. Needs pandas."""
        import pandas

        rows = [self._table.row(row) for row in self._rows.tolist()]
        columns = ["question_id", "image_id", "question", "ground_truth_answer"]
        return pandas.DataFrame(rows, columns=columns).assign(answer=self.answers)

    def __getitem__(self, question_id: str) -> dict[str, Any]:
        """One row: its texts by their names, `vision_only` float32 `[vision]`, and for each layer in `query_token` and
        `vision_token` float32 `[hidden]`.

        Raises:
            KeyError: no row of this id was extracted.
        """
        place = self._place_of_id[question_id]
        row = int(self._rows[place])
        one = self._of_rows(np.array([row]))
        texts = zip(("question_id", "image_id", "question", "ground_truth_answer"), self._table.row(row), strict=True)
        return {
            **dict(texts),
            "answer": one.answers[0],
            "vision_only": one.vision_only()[0],
            QUERY: {layer: one.query_token(layer)[0] for layer in self.layers},
            VISION: {layer: one.vision_token(layer)[0] for layer in self.layers},
        }

    def dataset(
        self, layer: int, token: str = QUERY, target: Callable[[dict[str, str]], Any] | None = None
    ) -> torch.utils.data.Dataset:
        """A map-style dataset of `(vector, target)` for a `torch.utils.data.DataLoader`. Needs torch.

        Args:
            layer: a decoder layer.
            token: "query_token" or "vision_token".
            target: makes a row's texts, by the names of `table`, its target; without, the target is its `question_id`.
        """
        import torch
        from torch.utils.data import StackDataset

        read = {QUERY: self.query_token, VISION: self.vision_token}
        if token not in read:
            raise ValueError(f"found token {token!r}; expected one of {', '.join(read)}")
        texts = self.table().to_dict("records") if target else []
        targets = [target(row) for row in texts] if target else self.ids
        return StackDataset(torch.from_numpy(read[token](layer)), targets)

    @cached_property
    def _place_of_id(self) -> dict[str, int]:
        return {identity: place for place, identity in enumerate(self.ids)}

    def _of_rows(self, rows: np.ndarray) -> Embeddings:
        """The same of some of its rows, int64 and in order."""
        sources = []
        for source in self._sources:
            chosen = np.isin(source.rows, rows)
            if chosen.any():
                sources.append(_Source(source.path, source.layout, source.rows[chosen], source.places[chosen]))
        return Embeddings(self.folder, self.run, self._table, rows, sources)

    def _places(self, source: _Source) -> np.ndarray:
        """Where the source's rows are among these, int64 `[m]`."""
        return np.searchsorted(self._rows, source.rows)

    def _read_matrix(self, name: str, layer: int | None = None) -> np.ndarray:
        if layer is not None and layer not in self.layers:
            raise ValueError(f"layer {layer} was not extracted; {self.folder} has the layers {self.layers}")
        matrix = np.empty((len(self), self.run.vision_size if layer is None else self.run.hidden_size), np.float32)
        for source in self._sources:
            with _open(source.path) as file:
                if source.layout == "grouped":
                    _read_groups(file, source, self._table, _path(name, layer), matrix, self._places(source))
                elif source.layout == "columnar":
                    _read_columns(get_dataset(file, _path(name, layer)), source, matrix, self._places(source))
                else:
                    where = () if layer is None else (self.layers.index(layer),)
                    _read_columns(get_dataset(file, name), source, matrix, self._places(source), where)
        return matrix


@contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    try:
        with open_file(path) as file:
            yield file
    except UNUSABLE as error:
        raise OSError(
            f"{path} cannot be read ({one_line(error)}); merge_shards.py --verify finds what is damaged"
        ) from error


def _path(name: str, layer: int | None) -> str:
    return name if layer is None else f"{name}/layer_{layer}"


def _read_columns(
    dataset: h5py.Dataset, source: _Source, matrix: np.ndarray, places: np.ndarray, where: tuple[int, ...] = ()
) -> None:
    """Read rows of a dataset `[rows, ..., size]` into those of a matrix; `where` chooses between the two."""
    lowest, highest = int(source.places.min()), int(source.places.max()) + 1
    chosen = (slice(lowest, highest), *where)
    if np.all(np.diff(source.places) == 1) and np.all(np.diff(places) == 1):
        dataset.read_direct(matrix, chosen, slice(places[0], places[-1] + 1))
    else:
        matrix[places] = dataset[chosen][source.places - lowest]


def _read_groups(
    file: h5py.File, source: _Source, table: Table, path: str, matrix: np.ndarray, places: np.ndarray
) -> None:
    """Read a vector of each row's group into the rows of a matrix, in a quarter of the time that h5py's groups take."""
    own = h5f.get_name(file.id)
    for row, place in zip(source.rows.tolist(), places.tolist(), strict=True):
        dataset = h5d.open(file.id, f"{table.ids[row]}/{path}".encode())
        if h5f.get_name(dataset) != own or dataset.get_offset() is None:  # of another file, or not simply in this one
            get_dataset(file, f"{table.ids[row]}/{path}")  # which says so
        if dataset.shape != matrix.shape[1:]:
            raise ValueError(f"row {row} has a {path} of shape {dataset.shape}, expected {matrix.shape[1:]}")
        dataset.read(h5s.ALL, h5s.ALL, matrix[place])


def _read_answers(source: _Source, table: Table) -> list[str]:
    with _open(source.path) as file:
        if source.layout == "grouped":
            return [get_dataset(file, f"{table.ids[row]}/answer").asstr()[()] for row in source.rows.tolist()]
        answers = get_dataset(file, "answer").asstr()[:]
        return [answers[place] for place in source.places.tolist()]
