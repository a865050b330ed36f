"""What a thousand ranks would each do, done once; what a rank would hold all of, made as it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.runs import random_run
from vqa_embeddings.app.extract import _by_picture
from vqa_embeddings.data.table import Table
from vqa_embeddings.errors import InputError
from vqa_embeddings.store.run import check_run, claim_run, keep_rows

RUN = random_run(3, "0" * 64, [0, 1], 8, 8)


def never(path: Path) -> None:
    raise AssertionError(f"{path} was to be left alone")


def test_of_many_that_start_together_one_begins_the_run(tmp_path: Path):
    assert [check_run(tmp_path, RUN) for _ in range(2)] == [False, False]
    with ThreadPoolExecutor(8) as together:
        began = list(together.map(lambda _: claim_run(tmp_path, RUN), range(64)))
    assert sum(began) == 1
    assert not (tmp_path / "rows.csv").exists(), "the table is copied by whom the claim tells to, not by all"
    assert check_run(tmp_path, RUN)
    assert not list(tmp_path.glob("*.tmp"))


def test_the_table_is_kept_once(tmp_path: Path):
    claim_run(tmp_path, RUN)
    keep_rows(tmp_path, lambda path: path.write_text("the table"))
    keep_rows(tmp_path, never)
    assert (tmp_path / "rows.csv").read_text() == "the table"


def test_no_table_is_laid_where_no_run_is_and_another_run_is_refused(tmp_path: Path):
    keep_rows(tmp_path, never)
    claim_run(tmp_path, RUN)
    with pytest.raises(InputError, match="another run"):
        claim_run(tmp_path, replace(RUN, dtype="float16"))


def test_the_pictures_of_a_rank_come_as_they_are_asked_for():
    table = Table("abcde", ["x", "x", "y", "z", "z"], "?????", "12345")
    asked = []

    def rows() -> Iterator[int]:
        for row in np.arange(5):
            asked.append(int(row))
            yield row

    groups = _by_picture(table, rows())
    assert next(groups) == ("x", [0, 1])
    assert asked == [0, 1, 2]
    assert list(groups) == [("y", [2]), ("z", [3, 4])]
    assert all(type(row) is int for _, found in _by_picture(table, np.arange(5)) for row in found)


def test_rows_without_a_question_are_apart_from_the_others_of_their_picture_and_come_with_none():
    table = Table("abcdef", ["x", "x", "x", "y", "y", "z"], ["?", " \n", "?", "", "\u3000", "?"], "123456")
    assert list(_by_picture(table, range(6))) == [(None, [1]), ("x", [0, 2]), (None, [3, 4]), ("z", [5])]
