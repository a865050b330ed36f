"""Pure decisions, for any rows, ranks, slices and history: exact cover, no overlap, pictures together, balance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqa_embeddings.cluster.sharding import PICTURE_COST, deal, pack, share_rows, split, unpack
from vqa_embeddings.models.hub import choose_cache
from vqa_embeddings.store.coverage import KEEP, NOBODY, WAIT, WRITE, cover, plan_parts

pictures = st.lists(st.integers(0, 12), max_size=80).map(lambda numbers: np.array(numbers, np.int64))
chance = st.integers(0, 2**32 - 1)


def flags(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < 0.6


@given(pictures, chance, st.integers(1, 9))
def test_every_wanted_row_has_one_share_and_every_picture_too(of, seed, shares):
    wanted = flags(len(of), seed)
    owner = split(of, wanted, shares)
    assert ((owner >= 0) == wanted).all()
    assert owner.max(initial=-1) < shares
    for picture in np.unique(of[wanted]):
        assert len(set(owner[wanted & (of == picture)])) == 1


@given(pictures, chance, st.integers(1, 9))
def test_no_share_has_more_than_the_fair_one_and_a_picture(of, seed, shares):
    wanted = flags(len(of), seed)
    owner = split(of, wanted, shares)
    costs = {picture: PICTURE_COST + np.sum(of[wanted] == picture) for picture in np.unique(of[wanted])}
    loads = [sum(costs[picture] for picture in np.unique(of[owner == share])) for share in range(shares)]
    assert max(loads) <= sum(costs.values()) / shares + max(costs.values(), default=0)


@given(st.lists(st.integers(1, 9), max_size=120), st.integers(1, 9))
def test_costs_go_one_after_another_to_the_least_loaded(costs, shares):
    costs = np.array(sorted(costs, reverse=True), float)
    loads, expected = [0.0] * shares, []
    for cost in costs.tolist():
        expected.append(loads.index(min(loads)))
        loads[expected[-1]] += cost
    assert deal(costs, shares).tolist() == expected


def test_a_part_of_a_large_table_comes_from_few_ranks_and_they_are_balanced_all_the_same():
    of = np.repeat(np.arange(120_000), 5)
    owner = split(of, np.ones(len(of), bool), 8)
    assert max(len(np.unique(rows)) for rows in np.split(owner, 600)) <= 5
    assert np.bincount(owner).max() < 1.005 * len(of) / 8
    assert (owner.reshape(-1, 5) == owner[::5, None]).all()  # the questions on a picture together


def test_pictures_whose_size_depends_on_their_place_are_shared_evenly():
    """Two cameras in turn, two sources mixed: dealt one by one, all large pictures would go to every other rank."""
    of = np.arange(200_000)
    owner = split(of, np.ones(len(of), bool), 8)
    large = np.bincount(owner[::2], minlength=8)
    assert large.max() < 1.02 * large.mean()


@given(pictures, chance, st.integers(1, 4), st.integers(1, 5))
def test_slices_and_ranks_cover_what_is_left_exactly_once(of, seed, slices, ranks):
    pending = flags(len(of), seed)
    seen: list[int] = []
    for index in range(slices):
        for rank in range(ranks):
            inside, rows = share_rows(of, pending, (index, slices), rank, ranks)
            assert inside[rows].all()
            seen += rows.tolist()
            assert (np.diff(of[rows]) >= 0).all() if len(rows) else True  # picture after picture
    assert sorted(seen) == np.flatnonzero(pending).tolist()


@given(pictures, chance, st.integers(1, 5))
def test_ranks_that_see_different_histories_still_leave_no_gap(of, seed, ranks):
    """Each looks at what is done at a moment of its own; what one does not see as done, its owner does."""
    done_by_the_end = ~flags(len(of), seed)
    taken: list[int] = []
    for rank in range(ranks):
        seen = ~done_by_the_end | flags(len(of), seed + rank)  # some of what is done is not seen yet
        taken += share_rows(of, seen, (0, 1), rank, ranks, agreed=False)[1].tolist()
    assert len(taken) == len(set(taken))
    assert set(taken) >= set(np.flatnonzero(~done_by_the_end))


@given(pictures, chance, chance, st.integers(1, 5))
def test_a_slice_stays_the_same_whatever_has_been_done(of, seed, later, slices):
    for index in range(slices):
        before, _ = share_rows(of, flags(len(of), seed), (index, slices), 0, 1)
        after, _ = share_rows(of, flags(len(of), later), (index, slices), 0, 1)
        assert (before == after).all()


def test_the_slices_of_a_table_never_change():
    """Array tasks that start after an update share the table with those that started before it."""
    of = np.array([0, 1, 2, 0, 3, 4, 1, 5, 0, 6])
    assert split(of, np.ones(len(of), bool), 3).tolist() == [0, 1, 2, 0, 2, 1, 1, 0, 0, 2]


def test_few_uneven_pictures_are_balanced():
    of = np.repeat(np.arange(5), [14, 8, 5, 3, 1])
    rows = np.bincount(split(of, np.ones(31, bool), 2))
    assert sorted(rows.tolist()) == [14, 17]


@given(st.integers(0, 300), chance)
def test_flags_survive_the_exchange(count, seed):
    wanted = flags(count, seed)
    assert (unpack(pack(wanted), count) == wanted).all()


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


OWN, HUBS = Path("model_cache"), Path("hub")


@pytest.mark.parametrize(
    ("whole", "begun", "named", "chosen"),
    [
        ((False, False), (False, False), False, OWN),  # as published
        ((False, False), (False, False), True, HUBS),
        ((False, True), (False, True), False, HUBS),
        ((True, False), (True, False), True, OWN),  # from an earlier run
        ((True, True), (True, True), True, OWN),  # which goes on with the very files that it began with
        ((False, True), (True, True), False, HUBS),
        ((True, False), (True, True), True, OWN),
        ((False, False), (False, True), False, HUBS),
        ((False, False), (True, False), False, OWN),  # a download that was cut off
        ((False, False), (True, True), False, OWN),
        ((False, False), (True, True), True, HUBS),  # where the environment says so
    ],
)
def test_a_hub_model_is_taken_from_where_least_is_to_be_downloaded(whole, begun, named, chosen):
    assert choose_cache([OWN, HUBS], whole, begun, named) == chosen
    assert choose_cache([Path("given")], whole[:1], begun[:1], named) == Path("given")


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_rows_than_ranks_leave_ranks_with_nothing(count):
    of = np.arange(count)
    shares = [share_rows(of, np.ones(count, bool), (0, 1), rank, 8)[1].tolist() for rank in range(8)]
    assert sorted(row for share in shares for row in share) == list(range(count))
