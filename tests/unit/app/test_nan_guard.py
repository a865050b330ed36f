"""Values that are not finite: a few rows are failed rows, and where there are only such rows the rank ends."""

from __future__ import annotations

import numpy as np
import pytest

from vqa_embeddings.app.nan_guard import FEW, JUDGED, NaNGuard
from vqa_embeddings.errors import NothingFiniteError
from vqa_embeddings.records import Extracted, Failed


def finite(row: int) -> Extracted:
    return Extracted(row, {}, answer="yes")


def not_finite(row: int) -> Failed:
    return Failed(row, "NonFiniteValues", f"layer_{row} holds a NaN")


def not_found(row: int) -> Failed:
    return Failed(row, "PictureNotFound", "no such file")


def released(
    units: list[list[Extracted | Failed]], rows: int, over: bool = False, of_a_picture: int = 2
) -> tuple[list[int], str]:
    """The rows that may be committed, and what ended the rank; so many rows are on one picture."""
    passed: list[int] = []
    try:
        for records in NaNGuard(np.arange(rows), np.arange(rows) // of_a_picture, "float16", over).release(units):
            passed += [record.row for record in records]
    except NothingFiniteError as error:
        return passed, str(error)
    return passed, ""


@pytest.mark.parametrize("together", [1, 5, 100])
@pytest.mark.parametrize("rows", [FEW, JUDGED - 1, JUDGED, 100])
def test_a_rank_without_a_finite_row_ends_and_commits_none_of_them(rows, together):
    units = [[not_finite(row) for row in range(rows)[first:][:together]] for first in range(0, rows, together)]
    passed, error = released(units, rows)
    assert not passed
    failed = next(count for count in (*range(together, rows, together), rows) if count >= min(rows, JUDGED))
    wanted = f"none of the first {failed} rows came out finite in float16, and none of them is committed: layer_0 holds"
    assert error.startswith(wanted)


def test_one_picture_that_is_too_much_for_the_format_does_not_end_the_run_by_itself():
    units = [[not_finite(row)] for row in range(50)]
    passed, error = released([*units, [finite(50)], [finite(51)]], 52, of_a_picture=50)
    assert (sorted(passed), error) == (list(range(52)), "")
    assert "none of the first 51 rows" in released([*units, [not_finite(50)]], 100, of_a_picture=50)[1]
    assert "none of the first 50 rows" in released(units, 50, of_a_picture=50)[1], "there is no other picture"


@pytest.mark.parametrize("rows", range(1, FEW))
def test_a_few_rows_that_are_not_finite_are_failed_rows(rows):
    assert released([[not_finite(row)] for row in range(rows)], rows) == (list(range(rows)), "")


@pytest.mark.parametrize("before", [0, 1, JUDGED - 1])
def test_once_a_row_has_come_out_finite_all_that_failed_are_kept(before):
    units = [*([not_finite(row)] for row in range(before)), [finite(before)]]
    passed, error = released([*units, *([not_finite(row)] for row in range(before + 1, 100))], 100)
    assert (sorted(passed), error) == (list(range(100)), "")


def test_where_the_folder_has_finite_rows_those_that_failed_may_be_tried_again_and_fail_again():
    rows = list(range(100))
    assert released([[not_finite(row)] for row in rows], 100, over=True) == (rows, "")


def test_rows_that_end_first_are_not_taken_for_the_first_rows():
    """One in a batch that comes out finite may have a long answer, and those that fail end at once."""
    rows = [*range(1, 100), 0]
    passed, error = released([[not_finite(row) for row in rows[:-1]], [finite(0)]], 100)
    assert (sorted(passed), error) == (list(range(100)), "")


def test_rows_that_failed_for_another_reason_are_passed_on_and_do_not_count():
    units = [[not_found(row)] if row % 2 else [not_finite(row)] for row in range(200)]
    odd, even = list(range(1, 2 * JUDGED - 1, 2)), len(range(0, 2 * JUDGED, 2))
    passed, error = released(units, 200)
    assert passed == odd and f"first {even} rows" in error
    few = [[not_finite(row)] for row in range(FEW - 1)]
    many = [[not_found(row) for row in range(FEW - 1, 100)]]
    assert sorted(released([*few, *many], 100)[0]) == list(range(100))
    passed, error = released([*few, [not_finite(FEW - 1)], [not_found(row) for row in range(FEW, 100)]], 100)
    assert passed == list(range(FEW, 100)) and error, "what ends the run with others does not cost them"


def test_what_is_held_back_when_the_run_is_stopped_is_left_to_the_next():
    units = [[not_finite(row)] for row in range(JUDGED - 1)]
    assert released([*units, [not_found(99)]], 100) == ([99], "")
