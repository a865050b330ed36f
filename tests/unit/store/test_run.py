"""What an output folder says of its run: read as it was written, and refused where it was not."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.output_folders import begin_run, commit, record
from vqa_embeddings.errors import InputError
from vqa_embeddings.schema import QUERY_TOKEN, VISION_ONLY
from vqa_embeddings.store.run import check_run, known_columns, read_run


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "7", "{}", "{"])
def test_a_run_file_that_holds_something_else_is_refused(tmp_path, text):
    out = begin_run(tmp_path)
    (out / "run.json").write_text(text)
    with pytest.raises(InputError, match="is not a run of this program"):
        read_run(out)
    assert known_columns(out) is None


@pytest.mark.parametrize("field", ["columns", "extra_vectors"])
@pytest.mark.parametrize("value", [[], None, "x", 7])
def test_a_run_file_with_a_field_of_another_kind_is_refused(tmp_path, field, value):
    out = begin_run(tmp_path)
    values = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**values, field: value}))
    with pytest.raises(InputError, match="is not a run of this program"):
        read_run(out)


def test_a_launch_that_would_store_other_further_vectors_is_refused(tmp_path):
    out = begin_run(tmp_path)
    run = read_run(out)
    assert check_run(out, run)
    with pytest.raises(InputError, match=r"further vectors: none there, depth 3 now"):
        check_run(out, replace(run, extra_vectors={"depth": 3}))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({VISION_ONLY: np.zeros(1, np.float32)}, VISION_ONLY),
        ({QUERY_TOKEN: np.zeros((1, 8), np.float32)}, QUERY_TOKEN),
        ({"depth": np.zeros(1, np.float32)}, "depth"),
    ],
)
def test_a_vector_of_another_length_is_an_error_and_is_not_stretched(tmp_path, changes, name):
    """NumPy would copy its one value to all places of the vector."""
    out = begin_run(tmp_path)
    values = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**values, "extra_vectors": {"depth": 4}}))
    right = replace(record(0), vectors={**record(0).vectors, "depth": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match=f"{name} of row 2 has shape"):
        commit(out, [right, replace(right, row=1, vectors={**right.vectors, **changes})])
