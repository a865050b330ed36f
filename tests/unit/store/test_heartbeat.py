"""How far each rank is, by the file that it writes: read while it is written, and shown as a table."""

from __future__ import annotations

from vqa_embeddings.store import heartbeat as heartbeat_module
from vqa_embeddings.store.heartbeat import (
    HEADER,
    HeartbeatWriter,
    describe_shards,
    duration,
    read_heartbeat,
    read_heartbeats,
    read_latest,
)


def lines_of(*numbers: tuple[float, int, int, int]) -> str:
    return "".join(f"{time_},{to_do},{done},{failed}\n" for time_, to_do, done, failed in numbers)


def test_lines_that_are_half_written_or_damaged_count_for_nothing(tmp_path):
    path = tmp_path / "20260101T000000-abcdef-r0" / "pace.csv"
    assert read_heartbeat(path) is None and read_latest(path) == (0, 0)
    path.parent.mkdir()
    path.write_text(f"{HEADER}\n")
    assert read_heartbeat(path) is None and read_latest(path) == (0, 0)
    whole = lines_of((100, 50, 0, 0), (105, 50, 10, 1))
    path.write_text(f"{HEADER}\n{whole}\x00\xff,,\nnan,50,20,0\n110,50,60,0\n110,50,20,30\n110,50,2")
    pace = read_heartbeat(path)
    assert (pace.done.tolist(), pace.failed.tolist(), pace.to_do, pace.left) == ([0, 10], [0, 1], 50, 40)
    assert read_latest(path) == (10, 1)
    assert pace.rows_per_second() == 2.0


def test_a_pace_is_that_of_the_last_minutes(tmp_path):
    path = tmp_path / "shard" / "pace.csv"
    path.parent.mkdir()
    slow_then_fast = [(60.0 * minute, 9000, 6 * minute, 0) for minute in range(100)]
    slow_then_fast += [(6000 + 60.0 * minute, 9000, 600 + 600 * minute, 0) for minute in range(10)]
    path.write_text(lines_of(*slow_then_fast))
    pace = read_heartbeat(path)
    assert pace.rows_per_second() == 10.0
    assert pace.is_at_work(6540 + 60) and not pace.is_at_work(6540 + 600)


def test_a_pace_that_cannot_be_written_ends_nothing_and_makes_no_folder_anew(tmp_path):
    writer = HeartbeatWriter(tmp_path / "gone", "launch", 0, 10)
    writer.update(3, 0, last=True)
    assert not list(tmp_path.iterdir())


def test_many_shards_become_a_short_table(monkeypatch, tmp_path):
    monkeypatch.setattr(heartbeat_module, "LISTED", 2)
    folder = tmp_path / "shards" / "e-r0"
    folder.mkdir(parents=True)
    (folder / "pace.csv").write_text(lines_of((1000, 500, 0, 0), (1010, 500, 50, 2)))
    committed = {"a-r0": (100, 1), "b-r0": (200, 0), "c-r0": (300, 0), "d-r0": (7, 0), "e-r0": (40, 2)}
    table = describe_shards(committed, read_heartbeats(tmp_path), 1015)
    assert [" ".join(line.split()) for line in table] == [
        "shard committed failed done now rows/s",
        "2 before these 300 1",
        "c-r0 300 0",
        "d-r0 7 0",
        "e-r0 40 2 50 of 500 5.0",
        "1 rank at work, 5.0 rows/s over the last 5 minutes: 1:30 left for their 450 rows",
    ]
    assert describe_shards({}, [], 0) == []


def test_durations_are_said_as_people_say_them():
    assert [duration(seconds) for seconds in (5, 65, 3600, 86_399.6)] == ["0:05", "1:05", "1:00:00", "24:00:00"]
