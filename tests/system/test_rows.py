"""What a row's values are, through real launches, against the independent reference."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import pytest
from PIL import Image

from tests.helpers.launching import command, merge, run
from tests.helpers.published_reader import read_published
from tests.helpers.reference import relative_error, strict_error
from tests.helpers.tables import table_rows
from vqa_embeddings.app.demo import DATA

TOLERANCE = 1e-4


def assert_equal_to_reference(rows: dict[str, dict], expected: dict[str, object]) -> None:
    for question_id, row in rows.items():
        wanted = expected[question_id]
        assert row["answer"] == wanted.answer
        assert strict_error(row["vision_only"], wanted.vision_only) < TOLERANCE
        for name in ("vision_token", "query_token"):
            found, states = row[name], getattr(wanted, name)
            assert found.keys() == states.keys()
            for layer in states:
                assert strict_error(found[layer], states[layer]) < TOLERANCE, f"{question_id} {name} layer {layer}"


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_row_equals_the_reference_whatever_the_number_of_ranks(tmp_path, photographs, expected, ranks):
    done = run(command(ranks, *photographs, "--output-dir", tmp_path, "--checkpoint-interval", 4))
    assert done.returncode == 0, done.stderr
    shards = {path.name.rpartition("-r")[2] for path in (tmp_path / "shards").iterdir()}
    assert shards == {str(rank) for rank in range(ranks)}, "the launcher did not start that many ranks"
    merged = merge(tmp_path)
    assert merged.returncode == 0, merged.stdout
    rows = read_published(tmp_path)
    assert_equal_to_reference(rows, expected)
    run_file = json.loads((tmp_path / "run.json").read_text())
    with h5py.File(tmp_path / "phi4_multimodal_embeddings_part_001.h5") as part:
        found = {name: part.attrs[name] for name in ("model_name", "device", "dtype", "created_at")}
    assert found == {
        "model_name": str(photographs[5]),
        "device": run_file["device"],
        "dtype": "float32",
        "created_at": run_file["created_at"],
    }
    table = {row["question_id"]: row for row in table_rows()}
    assert rows.keys() == table.keys()
    for question_id, row in rows.items():
        wanted = table[question_id]
        assert (row["image_id"], row["question"]) == (wanted["image_id"], wanted["question"])
        assert row["ground_truth_answer"] == wanted["answer"]


def test_the_reference_tells_the_rows_apart(expected):
    """Otherwise equality with it would mean little."""
    answers = {row.answer for row in expected.values()}
    assert len(answers) > 20
    states = list(expected.values())
    assert relative_error(states[0].query_token[7], states[1].query_token[7]) > 0.1
    assert relative_error(states[0].vision_token[7], states[-1].vision_token[7]) > 0.1


def test_three_rows_come_with_test_and_the_same_three_as_published(tmp_path: Path, photographs, expected):
    import pandas

    done = run(command(0, *photographs, "--test", "--output-dir", tmp_path))
    assert done.returncode == 0, done.stderr
    assert merge(tmp_path).returncode == 0
    rows = read_published(tmp_path)
    published = pandas.DataFrame(table_rows()).sample(n=3, random_state=42)
    assert rows.keys() == set(published["question_id"])
    assert_equal_to_reference(rows, expected)


def test_slices_done_one_after_another_make_the_whole(tmp_path: Path, photographs, expected, reference):
    """With the published pixel mean beside the rest."""
    inputs = [*photographs, "--pixel-mean", "--output-dir", tmp_path]
    for index in (1, 0):
        done = run(command(0, *inputs, "--slice", f"{index}/2"))
        assert done.returncode == 0, done.stderr
        assert merge(tmp_path).returncode == (3 if index else 0)
    assert json.loads((tmp_path / "coverage.json").read_text())["duplicates"] == 0
    assert_equal_to_reference(read_published(tmp_path), expected)
    with h5py.File(tmp_path / "phi4_multimodal_embeddings_part_001.h5") as part, Image.open(DATA / "cat.jpg") as cat:
        stored = part["question_comb_1104/pixel_mean_representation"][:]
        pixels = reference.processor.image_processor(images=cat.convert("RGB"), return_tensors="pt")
    assert stored.shape == (448,)
    assert relative_error(stored, pixels["image_pixel_values"].mean(dim=(0, 1, 2, 3)).numpy()) < TOLERANCE
