"""What a kill costs: the rows since the last commit, and nothing else."""

from __future__ import annotations

import json
import random
import time

import psutil
from conftest import (
    COPIES,
    arguments_for,
    begin,
    command,
    kill,
    merge,
    of_copies,
    processes,
    run,
    segments,
    table_rows,
)
from published_reader import read_published
from test_rows import assert_equal_to_reference

KILLS = 20


def test_a_killed_launch_goes_on_with_another_number_of_ranks(tmp_path, many_rows, checkpoint, expected):
    arguments = [*arguments_for(many_rows, checkpoint), "--output-dir", tmp_path]
    arguments += ["--checkpoint-interval", 8, "--batch-size", 4]
    first = begin(command(2, *arguments))
    deadline = time.monotonic() + 120
    while len(segments(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    kill(processes(first))
    first.wait()
    kept = {path: path.read_bytes() for path in segments(tmp_path)}
    assert 3 <= len(kept) < 31 * COPIES // 8, "the kill came too early or too late to show anything"

    early = merge(tmp_path)
    assert early.returncode == 3, early.stdout
    done = run(command(3, *arguments))
    assert done.returncode == 0, done.stderr
    assert merge(tmp_path).returncode == 0
    assert all(path.read_bytes() == content for path, content in kept.items()), "a committed segment has changed"
    rows = read_published(tmp_path)
    assert rows.keys() == {row["question_id"] for row in table_rows(many_rows)}
    assert_equal_to_reference(rows, of_copies(expected, rows))
    coverage = json.loads((tmp_path / "coverage.json").read_text())
    assert (coverage["extracted"], coverage["missing"], coverage["duplicates"]) == (31 * COPIES, 0, 0)


def is_rank(process: psutil.Process) -> bool:
    """Not one that opens pictures, whose death the rank survives."""
    try:
        return any(word.endswith("extract_dist.py") for word in process.cmdline()[:3])
    except psutil.Error:
        return False


def test_kills_at_random_moments_lose_no_committed_row_and_double_none(tmp_path, many_rows, checkpoint, expected):
    chance = random.Random(20)
    arguments = [*arguments_for(many_rows, checkpoint), "--output-dir", tmp_path]
    arguments += ["--checkpoint-interval", 3, "--batch-size", 2]
    struck, committed = 0, set()
    for _ in range(2 * KILLS):
        launch = begin(command(chance.choice([1, 2, 3]), *arguments))
        before = len(segments(tmp_path))
        time.sleep(chance.uniform(1, 5))
        # From the first commit on the moments are worth more than during start-up: most kills come then.
        deadline = time.monotonic() + chance.uniform(0, 15)
        while len(segments(tmp_path)) == before and time.monotonic() < deadline and launch.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.7))
        struck += launch.poll() is None
        victims = processes(launch)
        ranks = list(filter(is_rank, victims[1:]))
        kill(victims if chance.random() < 0.7 or not ranks else [chance.choice(ranks)])
        launch.wait()
        now = set(segments(tmp_path))
        assert committed <= now, "a committed segment is gone"
        committed = now
        if struck == KILLS:
            break
    assert struck == KILLS, "too many launches ended before their kill"
    assert len({path.parent for path in committed}) >= 10, "too few of the killed launches had committed anything"

    done = run(command(2, *arguments))
    assert done.returncode == 0, done.stderr
    merged = merge(tmp_path)
    assert merged.returncode == 0, merged.stdout
    rows = read_published(tmp_path)
    assert rows.keys() == {row["question_id"] for row in table_rows(many_rows)}
    assert_equal_to_reference(rows, of_copies(expected, rows))
    assert not list(tmp_path.glob("shards/**/*.damaged"))
    assert json.loads((tmp_path / "coverage.json").read_text())["duplicates"] == 0
