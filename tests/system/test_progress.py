"""What users see of a launch: the plan before it, and one bar for all its ranks, which a login node sees too."""

from __future__ import annotations

import re
import signal
import time

import pytest

from tests.helpers.launching import COPIES, arguments_for, command, merge, run
from tests.helpers.running import Running, until
from tests.helpers.tables import table_rows, write_table
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.store import heartbeat as heartbeat_module
from vqa_embeddings.store.heartbeat import (
    read_heartbeats,
)


@pytest.mark.slow
def test_one_bar_counts_the_rows_of_all_ranks_and_a_login_node_sees_them(tmp_path, many_rows, checkpoint):
    out, rows = tmp_path / "out", 31 * COPIES
    inputs = [*arguments_for(many_rows, checkpoint), "--batch-size", 1]
    launch = Running(command(2, *inputs, "--output-dir", out), out, tmp_path / "log")
    launch.until_all_have_done_rows(2)
    looked_at = time.time() + 0.8 * heartbeat_module.WRITE_SECONDS  # when the main rank has seen the other's file
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
