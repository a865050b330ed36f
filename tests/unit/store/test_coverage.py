"""Pure decisions, for any history: every row is accounted for, a part is written when its rows are, nothing twice."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vqa_embeddings.store.coverage import KEEP, NOBODY, WAIT, WRITE, cover, plan_parts

chance = st.integers(0, 2**32 - 1)


held = st.lists(st.lists(st.integers(0, 29), max_size=12, unique=True), max_size=6)


@given(held, held, st.lists(st.integers(0, 29), max_size=10))
def test_every_row_is_extracted_failed_or_missing_and_copies_are_counted(held, in_parts, failed):
    arrays = [np.array(rows, np.int64) for rows in held]
    coverage = cover(30, arrays, [np.array(rows, np.int64) for rows in in_parts], [np.array(failed, np.int64)])
    states = coverage.extracted.astype(int) + coverage.failed + coverage.missing
    assert (states == 1).all()
    anywhere = {row for rows in held + in_parts for row in rows}
    assert set(np.flatnonzero(coverage.extracted)) == anywhere
    assert set(np.flatnonzero(coverage.failed)) == set(failed) - anywhere
    copies = [row for rows in held for row in rows]
    assert coverage.duplicates == len(copies) - len(set(copies))
    for row in range(30):
        holder = coverage.holder[row]
        if holder == NOBODY:
            assert row not in copies
        else:
            assert arrays[holder][coverage.position[row]] == row
            assert all(row not in rows for rows in held[:holder])


@settings(max_examples=200)
@given(held, st.lists(st.integers(0, 29), max_size=10), st.integers(1, 12), chance)
def test_a_part_is_written_when_its_rows_are_accounted_for_and_kept_while_it_is_right(held, failed, size, seed):
    arrays = [np.array(rows, np.int64) for rows in held]
    failures = [np.array(failed, np.int64)]
    first = cover(30, arrays, [], failures)
    plans = plan_parts(first, size, {})
    assert [row for plan in plans for row in range(plan.first, plan.last)] == list(range(30))
    assert [plan.number for plan in plans] == list(range(1, len(plans) + 1))
    there = {}
    for plan in plans:
        assert (plan.action == WAIT) == first.missing[plan.first : plan.last].any()
        if plan.action == WRITE:
            there[plan.number] = plan.first + np.flatnonzero(first.extracted[plan.first : plan.last])
    for plan in plan_parts(cover(30, arrays, there.values(), failures), size, there):
        assert plan.action == (KEEP if plan.number in there else WAIT)
    retried = [np.array([row], np.int64) for row in failed]
    again = cover(30, arrays + retried, there.values(), failures)
    for plan in plan_parts(again, size, there):
        changed = any(plan.first <= row < plan.last and not first.extracted[row] for row in failed)
        if plan.number in there:
            assert plan.action == (WRITE if changed else KEEP)
