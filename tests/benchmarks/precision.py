"""How far the vectors of each number format are from a float32 reference, also beside values that dwarf the rest.

An error relative to a vector's largest value says little where a few dimensions hold nearly all of it, as in trained
decoders: so every figure is there twice, with all dimensions and without the four largest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import smollm2
from tests.benchmarks.inputs import load
from tests.helpers.massive import make_massive
from tests.helpers.reference import LARGEST, Reference, cosine, relative_error
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.app.extract import extract
from vqa_embeddings.data.picture_folder import PictureFolder
from vqa_embeddings.data.table import Table, select
from vqa_embeddings.data.table_reader import read_table
from vqa_embeddings.layers.device import find_device
from vqa_embeddings.models.phi4mm.model import Phi4
from vqa_embeddings.models.phi4mm.random_checkpoint import make_checkpoint

LIBRARY = "the library in bfloat16"
FORMATS = ("float32", "float16", "bfloat16")
PICTURES, QUESTIONS = ("cat.jpg", "coffee.jpg"), 3
TOKENS = ("vision_token", "query_token")

Vectors = dict[tuple[str, int], list[np.ndarray]]  # by token and layer, of each row


@dataclass(frozen=True)
class Figures:
    """How far some vectors of a token and a layer are from the reference at most, in all rows."""

    decoder: str
    computed: str
    token: str
    layer: int
    peak: float  # the largest value of the reference over the median one
    error: float
    error_without: float
    cosine: float
    cosine_without: float


def measure(scratch: Path, quick: bool) -> dict[str, object]:
    """The shipped photographs through decoders of random weights, with massive activations, and of a trained model."""
    device, rows = find_device(0).name, 1 if quick else QUESTIONS
    folders = [scratch / name for name in ("random weights", "massive activations", "SmolLM2-135M")]
    make_checkpoint(folders[0])
    make_massive(folders[0], folders[1])
    if smollm2.is_there():
        smollm2.write_smollm2(folders[2])
    found = [figures for folder in folders if folder.exists() for figures in _of_decoder(folder, device, rows)]
    return {"rows": rows * len(PICTURES), "device": device, "figures": [asdict(figures) for figures in found]}


def table(result: dict[str, Any]) -> str:
    """The figures of `measure` in Markdown."""
    computed = [*FORMATS, LIBRARY]
    lines = [
        f"{result['rows']} rows, {result['device']}; the largest relative error and the smallest cosine, each with all "
        f"dimensions / without the {LARGEST} largest",
        "",
        f"| decoder | token | layer | largest over median | {' | '.join(computed)} |",
        "|---" * (4 + len(computed)) + "|",
    ]
    cells: dict[str, list[str]] = {}
    for one in result["figures"]:
        key = f"| {one['decoder']} | {one['token']} | {one['layer']} | {one['peak']:.0f} |"
        cosines = f"{one['cosine']:.6f} / {one['cosine_without']:.6f}"
        cells.setdefault(key, []).append(f"{one['error']:.1e} / {one['error_without']:.1e}; {cosines}")
    return "\n".join([*lines, *(f"{key} {' | '.join(some)} |" for key, some in cells.items())])


def _of_decoder(folder: Path, device: str, rows: int) -> Iterator[Figures]:
    """The figures of a checkpoint, by what computed them."""
    expected = _by_reference(folder, device, "float32", rows)
    ways = [*((dtype, _by_program, dtype) for dtype in FORMATS), (LIBRARY, _by_reference, "bfloat16")]
    for computed, compute, dtype in ways:
        found = compute(folder, device, dtype, rows)
        for (token, layer), wanted in expected.items():
            pairs = list(zip(found[token, layer], wanted, strict=True))
            yield Figures(
                folder.name,
                computed,
                token,
                layer,
                peak=float(max(np.abs(vector).max() / np.median(np.abs(vector)) for vector in wanted)),
                error=max(relative_error(*pair) for pair in pairs),
                error_without=max(relative_error(*pair, LARGEST) for pair in pairs),
                cosine=min(cosine(*pair) for pair in pairs),
                cosine_without=min(cosine(*pair, LARGEST) for pair in pairs),
            )


def _chosen(rows: int) -> Table:
    """So many questions on each picture."""
    shipped = read_table(DATA / "vqa.csv")
    names = [[row for row, image in enumerate(shipped.images) if image == name][:rows] for name in PICTURES]
    return select(shipped, sorted(row for some in names for row in some))


def _by_program(folder: Path, device: str, dtype: str, rows: int) -> Vectors:
    model, asked = Phi4(*load(folder, device, dtype), 1), _chosen(rows)
    records = [
        one
        for some in extract(model, asked, range(len(asked)), PictureFolder(DATA), batch_size=8, workers=0)
        for one in some
    ]
    records.sort(key=lambda record: record.row)
    return {
        (token, layer): [getattr(record, token)[index] for record in records]
        for token in TOKENS
        for index, layer in enumerate(model.spec.layers)
    }


def _by_reference(folder: Path, device: str, dtype: str, rows: int) -> Vectors:
    """Every row alone, by the library's model."""
    reference, asked = Reference(folder, device, dtype), _chosen(rows)
    found = [reference.row(DATA / asked.images[row], asked.questions[row], 1) for row in range(len(asked))]
    return {
        (token, layer): [getattr(row, token)[layer] for row in found] for token in TOKENS for layer in reference.layers
    }
