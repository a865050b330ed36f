"""The fields of a row, once. Records, segments, parts, the reader, the report and the check for NaN loop over them.

To add a vector: a line in `VECTORS`, its value in the record that the engine makes (`engine.outcome`), and a test. What
only some runs store, as a model's own vectors, is in the run's `extra_vectors`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class Vector(NamedTuple):
    """A float32 vector that every row has, or has for each layer."""

    name: str  # of its dataset, or of the group that has a dataset for each layer
    size: str  # the number of a run that is its length: "vision_size" or "hidden_size"
    per_layer: bool
    per_picture: bool  # it is the same for all questions on a picture
    place: str  # what it belongs to, for people


VISION_ONLY = "vision_only_representation"
VISION_TOKEN = "vision_token_representation"
QUERY_TOKEN = "query_token_representation"
VECTORS = (
    Vector(VISION_ONLY, "vision_size", per_layer=False, per_picture=True, place="the picture alone"),
    Vector(VISION_TOKEN, "hidden_size", per_layer=True, per_picture=True, place="the last image token"),
    Vector(QUERY_TOKEN, "hidden_size", per_layer=True, per_picture=False, place="the last prompt token"),
)
SUFFIX = "_representation"  # of names on the disk, which people leave out
QUESTION_ID = "question_id"
IMAGE_ID = "image_id"
ANSWER = "answer"
TABLE_TEXTS = (QUESTION_ID, IMAGE_ID, "question", "ground_truth_answer")  # in the order of `Table.row`
TRUNCATED = "picture_truncated"  # a flag, stored only where a row has it: its picture is cut off


class VectorColumn(NamedTuple):
    """One vector of each row, as a matrix."""

    name: str
    layer: int | None
    size: int

    @property
    def path(self) -> str:
        """Where it lies in a file, or in a row's group."""
        return path_of(self.name, self.layer)


def path_of(name: str, layer: int | None = None) -> str:
    """Where a vector lies in a file, or in a row's group."""
    return name if layer is None else f"{name}/layer_{layer}"


def find(name: str) -> Vector | None:
    """The vector of this name; None where it is a model's own."""
    return next((vector for vector in VECTORS if vector.name == name), None)


def short_name(name: str) -> str:
    """What people call a vector: "query_token"."""
    return name.removesuffix(SUFFIX)


def list_columns(layers: Sequence[int], sizes: Mapping[str, int], extra: Mapping[str, int]) -> list[VectorColumn]:
    """The columns of a run, in the order in which they are stored: those without layers come first.

    Args:
        sizes: the numbers that `Vector.size` names.
        extra: further vectors of the run, their lengths by their names.
    """
    plain = [VectorColumn(vector.name, None, sizes[vector.size]) for vector in VECTORS if not vector.per_layer]
    further = [VectorColumn(name, None, size) for name, size in extra.items()]
    of_layers = [vector for vector in VECTORS if vector.per_layer]
    by_layer = [VectorColumn(vector.name, layer, sizes[vector.size]) for vector in of_layers for layer in layers]
    return plain + further + by_layer


def shapes_of(columns: Sequence[VectorColumn]) -> dict[str, tuple[int, ...]]:
    """The shapes of a record's vectors by their names, those of several layers together."""
    layers = Counter(column.name for column in columns if column.layer is not None)
    return {c.name: (c.size,) if c.layer is None else (layers[c.name], c.size) for c in columns}


def by_path(vectors: Mapping[str, np.ndarray], layers: Sequence[int]) -> Iterator[tuple[str, np.ndarray]]:
    """The vectors of a record one by one, float32 `[size]`, each with its path.

    Args:
        vectors: by name, those of several layers as `[layers, size]`.
    """
    for name, values in vectors.items():
        if values.ndim == 1:
            yield name, values
        else:
            yield from ((path_of(name, layer), of_layer) for layer, of_layer in zip(layers, values, strict=True))
