"""What a kill costs: the rows since the last commit, and nothing else."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil

from tests.helpers.launching import (
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
)
from tests.helpers.published_reader import read_published
from tests.helpers.running import LIMIT, all_end, until
from tests.helpers.tables import table_rows
from tests.system.test_rows import assert_equal_to_reference

KILLS = 20


def until_committed(out: Path, count: int, launch: subprocess.Popen) -> None:
    """Until there are so many segments."""
    until(lambda: len(segments(out)) >= count, launch)


def test_a_killed_launch_goes_on_with_another_number_of_ranks(tmp_path, many_rows, checkpoint, expected):
    arguments = [*arguments_for(many_rows, checkpoint), "--output-dir", tmp_path]
    arguments += ["--checkpoint-interval", 8, "--batch-size", 4]
    first = begin(command(2, *arguments))
    until_committed(tmp_path, 3, first)
    kill(processes(first))
    first.wait()
    kept = {path: path.read_bytes() for path in segments(tmp_path)}
    assert 3 <= len(kept) < 31 * COPIES // 8, "the kill came too early or too late to show anything"

    early = merge(tmp_path)
    assert early.returncode == 3, early.stdout
    arguments += ["--batch-size", 16]  # the last run is to end soon
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
    committed: set[Path] = set()
    fruitful = 0
    starting = 0.0  # seconds from a start to the first commit here, by the first launch
    # From the first commit on the moments are worth more than during start-up: most kills come then.
    during_start = set(chance.sample(range(1, KILLS), KILLS // 4))
    for number in range(KILLS):
        begun = time.monotonic()
        launch = begin(command(chance.choice([1, 2, 3]), *arguments))
        if number in during_start:
            time.sleep(chance.uniform(0, starting))
        else:
            until_committed(tmp_path, len(committed) + 1, launch)
            starting = starting or time.monotonic() - begun
            # Commits, not seconds: a fast machine would soon have no row left. Then a moment between two of them.
            until_committed(tmp_path, len(committed) + chance.randint(1, 4), launch)
            time.sleep(chance.uniform(0, 0.1))
        launch.send_signal(signal.SIGSTOP)  # so that it starts no rank that is not among the victims
        assert launch.poll() is None, "the launch ended before its kill"
        victims = processes(launch)
        ranks = list(filter(is_rank, victims[1:]))
        fruitful += len(segments(tmp_path)) > len(committed)
        kill(victims if chance.random() < 0.7 or not ranks else [chance.choice(ranks)])
        launch.send_signal(signal.SIGCONT)
        launch.wait()
        assert all_end(victims, LIMIT), "a rank outlived its launch"  # and would commit beside the next one
        now = set(segments(tmp_path))
        assert committed <= now, "a committed segment is gone"
        committed = now
    assert fruitful >= 10, "too few of the killed launches had committed anything"

    arguments += ["--batch-size", 16]  # the last run is to end soon
    done = run(command(2, *arguments))
    assert done.returncode == 0, done.stderr
    merged = merge(tmp_path)
    assert merged.returncode == 0, merged.stdout
    rows = read_published(tmp_path)
    assert rows.keys() == {row["question_id"] for row in table_rows(many_rows)}
    assert_equal_to_reference(rows, of_copies(expected, rows))
    assert not list(tmp_path.glob("shards/**/*.damaged"))
    assert json.loads((tmp_path / "coverage.json").read_text())["duplicates"] == 0
