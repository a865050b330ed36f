"""What people see of a launch: the plan before it, one bar for all its ranks, and how far it is from anywhere."""

from __future__ import annotations

import re
import signal
import time

import numpy as np
import pytest

from tests.helpers.launching import COPIES, arguments_for, command, merge, run
from tests.helpers.running import Running, until
from tests.helpers.tables import table_rows, write_table
from tests.unit.app.test_merge import begin_run, commit, record
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.app.plan_summary import describe_pictures, find_shortage
from vqa_embeddings.store import heartbeat as pace_module
from vqa_embeddings.store.heartbeat import (
    HEADER,
    HeartbeatWriter,
    describe_shards,
    duration,
    read_heartbeat,
    read_heartbeats,
    read_latest,
)


@pytest.mark.slow
def test_one_bar_counts_the_rows_of_all_ranks_and_a_login_node_sees_them(tmp_path, many_rows, checkpoint):
    out, rows = tmp_path / "out", 31 * COPIES
    inputs = [*arguments_for(many_rows, checkpoint), "--batch-size", 1]
    launch = Running(command(2, *inputs, "--output-dir", out), out, tmp_path / "log")
    launch.until_all_have_done_rows(2)
    looked_at = time.time() + 0.8 * pace_module.WRITE_SECONDS  # when the main rank has seen the other's file
    looked = merge(out, "--check")
    assert looked.returncode == 3
    together = r"^2 ranks at work, \d+\.\d rows/s over the last 5 minutes: \d+:\d\d left for"
    assert re.search(together, looked.stdout, re.M), looked.stdout
    assert len(re.findall(r"^\S+-r[01] +0 +0 +\d+ of \d+ +\d+\.\d$", looked.stdout, re.M)) == 2, looked.stdout
    until(lambda: read_heartbeats(out)[0].times[-1] > looked_at, launch.process)
    launch.ends(signal.SIGTERM)
    totals = set(re.findall(r" \d+/(\d+) \[", launch.shown()))
    assert totals == {str(rows)}, "one bar, over the rows of both"
    committed = launch.committed()
    assert committed[0] < launch.bar() <= committed.total(), "it has counted what the other rank did"
    assert re.search(r"rank 1: \d+ rows extracted", launch.said())
    for pace in read_heartbeats(out):
        assert pace.done[-1] == committed[int(pace.shard[-1])] < pace.to_do


@pytest.mark.slow
def test_a_log_has_lines_few_and_whole(tmp_path, many_rows, checkpoint):
    inputs = arguments_for(many_rows, checkpoint)
    done = run(command(0, *inputs, "--output-dir", tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert "\r" not in done.stderr and 3 <= len(lines) <= 12, lines
    assert all(re.fullmatch(rf"\d+% \d+/{31 * COPIES} \[\d\d:\d\d<[^,]+, +\S+ ?rows/s\]", line) for line in lines), (
        lines
    )
    assert lines[-1].startswith("100% ")


@pytest.mark.slow
def test_failed_rows_are_counted_as_they_come(tmp_path, checkpoint):
    rows = [{**row, "image_id": "gone.jpg"} if number % 3 else row for number, row in enumerate(table_rows()[:9])]
    table = write_table(tmp_path / "vqa.csv", rows)
    done = run(command(0, *arguments_for(table, checkpoint), "--output-dir", tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].endswith("rows/s, 6 failed]"), done.stderr
    assert read_heartbeats(tmp_path / "out")[0].failed[-1] == 6


@pytest.mark.slow
def test_a_plan_says_what_is_to_do_and_touches_nothing(tmp_path, photographs):
    out = tmp_path / "out"
    begun = time.monotonic()
    planned = run(
        command(2, *photographs, "--output-dir", out, "--plan"),
        **{f"SLURM_ARRAY_TASK_{name}": number for name, number in (("ID", "0"), ("COUNT", "2"))},
    )
    assert planned.returncode == 0, planned.stderr
    assert time.monotonic() - begun < 60 and not out.exists()
    said = dict(line.split(": ", 1) for line in planned.stdout.splitlines())
    assert list(said) == [
        *("rows", "columns", "done before", "this launch", "vectors", "model", "crops", "device", "numbers")
    ]
    assert said["rows"] == "31 on 5 pictures, 1 to 14 (6.2 on average) questions a picture"
    assert said["columns"] == "question_id, image_id as the picture, question, answer as the ground truth"
    assert said["crops"].endswith("; end tokens: <|endoftext|> (512), <|end|> (516)")
    found = re.fullmatch(
        r"(\d+) rows to do now, 2 ranks \(by torchrun\), about (\d+) rows each, "
        r"slice 0 of 2 with (\d+) rows, from the Slurm array: --slice 0/1 takes the whole table",
        said["this launch"],
    )
    assert found and found[1] == found[3] and abs(int(found[2]) - int(found[1]) / 2) <= 1
    assert "layers 0, 2, 4, 6, 7" in said["model"] and "float32 (asked for)" in said["numbers"]

    by_hand = run(command(0, *photographs, "--output-dir", out, "--slice", "0/2"))
    assert by_hand.returncode == 0 and f"slice 0 of 2 with {found[3]} rows\n" in by_hand.stdout
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = run(command(0, *photographs, "--output-dir", out, "--plan"))
    assert f"done before: {found[1]} rows extracted, 0 failed" in again.stdout
    assert f"this launch: {31 - int(found[1])} rows to do now, 1 rank" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    other = run(command(0, *photographs, "--output-dir", out, "--plan", "--pixel-mean"))
    assert other.returncode == 2 and "--pixel-mean: False there, True now" in other.stderr


@pytest.mark.slow
def test_a_plan_warns_of_a_folder_that_has_none_of_the_pictures(tmp_path, checkpoint):
    (tmp_path / "images").mkdir()
    inputs = arguments_for(DATA / "vqa.csv", checkpoint, tmp_path / "images")
    planned = run(command(0, *inputs, "--output-dir", tmp_path / "out", "--plan"))
    assert planned.returncode == 0
    assert "warning: none of the first 5 pictures is in " in planned.stdout
    assert "not even 'astronaut.jpg'; check --images-dir" in planned.stdout


@pytest.mark.parametrize(
    ("free", "segments", "parts", "said"),
    [
        (10e9, 4e9, 5e9, None),
        (10e9, 11e9, 0, "it needs about 11.0 GB and 10.0 GB are free"),
        (10e9, 6e9, 5e9, "the merge needs about 5.0 GB more, and 4.0 GB will be left"),
        (1e6, 2e6, 0, "it needs about 2.0 MB and 1.0 MB are free"),
        (10e9, 0, 0, None),
    ],
)
def test_too_little_room_is_said_before(free, segments, parts, said):
    found = find_shortage(int(free), int(segments), int(parts))
    assert (found is None) if said is None else found.startswith(said)


def test_pictures_are_described_in_words():
    assert describe_pictures(np.array([0, 1, 2])) == "3 pictures, 1 question a picture"
    assert describe_pictures(np.repeat(np.arange(4), 6)) == "4 pictures, 6 questions a picture"
    assert describe_pictures(np.array([0, 0, 0])) == "1 picture, 3 questions a picture"
    assert describe_pictures(np.array([], np.int64)) == "0 pictures"


def test_parts_that_are_there_need_no_more_room(tmp_path):
    from vqa_embeddings.store.parts import count_part_bytes

    out = begin_run(tmp_path)
    commit(out, [record(row) for row in range(23)])
    assert count_part_bytes(out) == 0
    assert merge(out).returncode == 0
    (part,) = out.glob("*.h5")
    assert count_part_bytes(out) == part.stat().st_size


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
    monkeypatch.setattr(pace_module, "LISTED", 2)
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
