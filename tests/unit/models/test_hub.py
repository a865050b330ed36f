"""Where a model of the hub is taken from."""

from __future__ import annotations

from pathlib import Path

import pytest

from vqa_embeddings.models.hub import choose_cache

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
