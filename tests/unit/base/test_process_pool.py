"""Work in several processes comes back in order, and no more of it is made than they can take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vqa_embeddings.base.process_pool import AHEAD, start_pool


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_the_order_of_the_items(processes):
    with start_pool(processes) as pool:
        assert list(pool(abs, range(-20, 0))) == list(range(20, 0, -1))
        assert list(pool(str, iter([]))) == []
        assert list(pool(str, range(3))) == ["0", "1", "2"], "the same processes take other work too"


@pytest.mark.parametrize("processes", [1, 2])
def test_items_are_made_when_their_turn_comes(processes):
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    with start_pool(processes) as pool:
        results = pool(abs, items())
        for taken in range(1, 10):
            next(results)
            assert len(made) < taken + AHEAD * processes


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_comes_to_the_one_who_waits_for_the_result(processes):
    with start_pool(processes) as pool, pytest.raises(ValueError, match="invalid literal"):
        list(pool(int, ["1", "2", "two", "4"]))
