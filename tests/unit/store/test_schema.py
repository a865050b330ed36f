"""A field of a row is one line of `schema.VECTORS`: everything else finds it there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.helpers.output_folders import LAYERS, PART, PART_SIZE, ROWS, begin_run, commit, record, with_vectors
from vqa_embeddings import open_embeddings, schema
from vqa_embeddings.app import merge as merging
from vqa_embeddings.cli.options import parse_merge
from vqa_embeddings.engine.outcome import checked
from vqa_embeddings.records import Extracted, Failed
from vqa_embeddings.store.run import read_run

IMAGE_MEAN = schema.Vector("image_mean_representation", "hidden_size", True, True, "the mean image token")


@pytest.fixture
def one_more(monkeypatch):
    """The one line."""
    monkeypatch.setattr(schema, "VECTORS", (*schema.VECTORS, IMAGE_MEAN))


def longer(row: int) -> Extracted:
    mean = np.random.default_rng(1000 + row).standard_normal((len(LAYERS), 8)).astype(np.float32)
    return with_vectors(record(row), image_mean=mean)


def mean_of(row: int, layer: int) -> np.ndarray:
    return longer(row).vectors[IMAGE_MEAN.name][LAYERS.index(layer)]


def merged(out: Path, layout: str) -> str:
    assert (
        merging.merge(parse_merge(None, ["--output-dir", str(out), "--part-size", "5", "--layout", layout])) is not None
    )
    return (out / "report.html").read_text(encoding="utf-8")


def test_one_line_makes_a_field_of_every_file_of_the_reader_and_of_the_report(tmp_path, one_more):
    out = begin_run(tmp_path)
    commit(out, [longer(row) for row in range(ROWS)])
    assert read_run(out).row_bytes == 4 * (6 + 3 * 3 * 8)
    reports = [merged(out, layout) for layout in ("columnar", "grouped")]
    assert all("<h2>States at the mean image token</h2>" in report for report in reports)
    with h5py.File(out / PART.format(1)) as file:
        assert np.array_equal(file["q3/image_mean_representation/layer_2"][:], mean_of(3, 2))
    for kept in ("*columns_part*", "*embeddings_part*", "shards"):
        alone = tmp_path / kept.strip("*")
        shutil.copytree(out, alone, ignore=lambda _, names, kept=kept: set(names) & _others(kept))
        e = open_embeddings(alone)
        assert len(e) == ROWS
        for layer in LAYERS:
            wanted = np.stack([mean_of(row, layer) for row in range(ROWS)])
            assert np.array_equal(e.vectors("image_mean", layer), wanted)
        assert np.array_equal(e["q9"]["image_mean"][3], mean_of(9, 3))
        assert np.array_equal(e.dataset(2, "image_mean")[4][0].numpy(), mean_of(4, 2))


def _others(kept: str) -> set[str]:
    kinds = {
        "shards": {"shards"},
        "*columns_part*": {f"phi4_multimodal_columns_part_{number:03d}.h5" for number in range(1, 6)},
        "*embeddings_part*": {PART.format(number) for number in range(1, 6)},
    }
    return set().union(*(names for kind, names in kinds.items() if kind != kept))


def test_a_record_without_the_field_is_an_error(tmp_path, one_more):
    out = begin_run(tmp_path)
    with pytest.raises(ValueError, match=r"image_mean_representation of row 1 has shape None; expected \(3, 8\)"):
        commit(out, [record(0)])


def test_a_field_that_is_not_finite_fails_its_row(one_more):
    broken = longer(4)
    broken.vectors[IMAGE_MEAN.name][2, 5] = np.nan
    failed = checked(broken, LAYERS)
    assert isinstance(failed, Failed) and "image_mean_representation/layer_3 holds 1 values" in failed.message


def test_further_vectors_of_a_model_are_read_by_their_names(tmp_path):
    out = begin_run(tmp_path)
    told = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**told, "extra_vectors": {"depth_representation": 4}}))
    rows = [with_vectors(record(row), depth=np.full(4, row, np.float32)) for row in range(PART_SIZE)]
    commit(out, rows)
    e = open_embeddings(out)
    for name in ("depth", "depth_representation"):
        assert np.array_equal(e.vectors(name)[:, 0], range(PART_SIZE))
    assert np.array_equal(e["q2"]["depth"], np.full(4, 2, np.float32))
    with pytest.raises(
        ValueError, match=r"'height' was not extracted; .* has vision_only, depth, vision_token, query_token"
    ):
        e.vectors("height")
    with pytest.raises(ValueError, match="'depth' has no layers, found layer 2"):
        e.vectors("depth", 2)
    with pytest.raises(ValueError, match="layer None was not extracted"):
        e.vectors("query_token")
    assert replace(e.run, extra_vectors={}).row_bytes == e.run.row_bytes - 16
