"""The sentences of the plan."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.launching import merge
from tests.helpers.output_folders import begin_run, commit, record
from vqa_embeddings.app.plan_summary import describe_pictures, find_shortage
from vqa_embeddings.store.run import read_run


@pytest.mark.parametrize(
    ("free", "segments", "parts", "said"),
    [
        (10e9, 4e9, 5e9, None),
        (10e9, 11e9, 0, "it needs about 11.0 GB and 10.0 GB are free"),
        (10e9, 6e9, 5e9, "the merge needs about 5.0 GB more, and 4.0 GB will be left"),
        (1e6, 2e6, 0, "it needs about 2.0 MB and 1.0 MB are free"),
        (10e9, 0, 0, None),
    ],
)
def test_too_little_room_is_said_before(free, segments, parts, said):
    found = find_shortage(int(free), int(segments), int(parts))
    assert (found is None) if said is None else found.startswith(said)


def test_pictures_are_described_in_words():
    assert describe_pictures(np.array([0, 1, 2])) == "3 pictures, 1 question a picture"
    assert describe_pictures(np.repeat(np.arange(4), 6)) == "4 pictures, 6 questions a picture"
    assert describe_pictures(np.array([0, 0, 0])) == "1 picture, 3 questions a picture"
    assert describe_pictures(np.array([], np.int64)) == "0 pictures"


def test_parts_that_are_there_need_no_more_room(tmp_path):
    from vqa_embeddings.store.parts import count_part_bytes

    out = begin_run(tmp_path)
    run = read_run(out)
    commit(out, [record(row) for row in range(23)])
    assert count_part_bytes(out, run) == 0
    assert merge(out).returncode == 0
    (part,) = out.glob("*.h5")
    for name in ("my_embeddings_part_old.h5", f".{part.name}", "other_embeddings_part_001.h5"):
        (out / name).write_bytes(b"of somebody else")
    assert count_part_bytes(out, run) == part.stat().st_size
