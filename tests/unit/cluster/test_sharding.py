"""Shares, for any rows, ranks, slices and history: exact cover, no overlap, pictures together, balance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqa_embeddings.cluster.sharding import PICTURE_COST, deal, pack, share_rows, split, unpack

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


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_rows_than_ranks_leave_ranks_with_nothing(count):
    of = np.arange(count)
    shares = [share_rows(of, np.ones(count, bool), (0, 1), rank, 8)[1].tolist() for rank in range(8)]
    assert sorted(row for share in shares for row in share) == list(range(count))
