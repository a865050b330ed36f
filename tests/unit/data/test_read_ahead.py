"""Pictures are prepared ahead, and one that never comes ends the run."""

from __future__ import annotations

import time
from threading import Event

import pytest

from vqa_embeddings.data import read_ahead as read_ahead_module
from vqa_embeddings.data.read_ahead import read_ahead
from vqa_embeddings.errors import StorageError


def test_a_server_that_does_not_answer_at_all_ends_the_run_and_not_one_that_is_slow(monkeypatch):
    monkeypatch.setattr(read_ahead_module, "LONGEST_WAIT", 1.5)
    slow = read_ahead(range(6), lambda key: time.sleep(0.3) or key, 1)
    assert [found for _, found in slow] == [0, 1, 2, 3, 4, 5]
    over = Event()
    with pytest.raises(StorageError, match="no picture has come for 0 minutes, and the next would be that of 0"):
        next(read_ahead(range(4), lambda key: over.wait(60), 1))
    over.set()
