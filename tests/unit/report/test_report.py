"""`report.html`: what a run looks like, in one file that fetches and runs nothing, on a phone and on paper."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.launching import ROOT, merge, run
from tests.helpers.output_folders import PART_SIZE, ROWS, begin_run, commit, contents, record, with_vectors
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.records import Failed
from vqa_embeddings.report.build import SAMPLE, choose_sample, count_stripes
from vqa_embeddings.report.charts import project
from vqa_embeddings.store.coverage import Coverage
from vqa_embeddings.store.run import read_run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return begin_run(tmp_path)


def report(out: Path) -> str:
    return (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_it_is_the_same_until_something_changes(out):
    commit(out, [record(row) for row in range(ROWS - 1)])
    assert merge(out, "--part-size", PART_SIZE).returncode == 3
    path = out / "report.html"
    first, made = contents(out), path.stat().st_mtime_ns
    assert merge(out, "--part-size", PART_SIZE).returncode == 3
    assert contents(out) == first and path.stat().st_mtime_ns == made, "made again for nothing"
    path.unlink()
    assert merge(out, "--part-size", PART_SIZE).returncode == 3
    assert contents(out) == first, "the same rows give other bytes"
    commit(out, [record(ROWS - 1)])
    assert merge(out, "--part-size", PART_SIZE).returncode == 0
    assert f"<b>{ROWS}</b>extracted" in report(out)
    pruned = merge(out, "--part-size", PART_SIZE, "--prune")
    assert pruned.returncode == 0
    path.unlink()
    before = report_parts(first)
    assert merge(out, "--part-size", PART_SIZE).returncode == 0
    assert before.keys() <= contents(out).keys() and f"<b>{ROWS}</b>extracted" in report(out)


def report_parts(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith("report.html")}


def test_a_matplotlib_that_does_not_work_costs_the_charts_and_says_so(out, tmp_path):
    commit(out, [record(row) for row in range(ROWS)])
    (tmp_path / "hidden" / "matplotlib").mkdir(parents=True)
    (tmp_path / "hidden" / "matplotlib" / "__init__.py").write_text("raise ImportError('built for another numpy')")
    script = [sys.executable, str(ROOT / "merge_shards.py"), "--output-dir", str(out)]
    assert run(script, PYTHONPATH=str(tmp_path / "hidden")).returncode == 0
    text = report(out)
    assert "matplotlib could not draw them (built for another numpy)" in text and '<svg class="strip"' in text
    assert f"<b>{ROWS}</b>extracted" in text and "question 3" in text


def broken(layer: int, states: str) -> list:
    records = []
    for row in range(ROWS):
        one = record(row)
        values = one.vectors[f"{states}_representation"].copy()
        values[layer] = 0 if states == "query_token" else 3
        records.append(with_vectors(one, **{states: values}))
    return records


def test_a_broken_layer_is_seen_at_once(out):
    commit(out, broken(1, "query_token"))
    assert merge(out).returncode == 0
    assert '<p class="warning">layer 2: the query_token states are all zero</p>' in report(out)


def test_states_that_do_not_depend_on_the_picture_are_seen_at_once(out):
    commit(out, broken(2, "vision_token"))
    assert merge(out).returncode == 0
    assert re.findall(r'class="warning">([^<]*)<', report(out)) == [
        "layer 3: the vision_token states of 8 different inputs are all the same"
    ]


@pytest.mark.slow
def test_what_is_right_has_no_warning_and_pictures_that_are_elsewhere_are_said_to_be(out):
    commit(out, [record(row) for row in range(ROWS)])
    assert merge(out).returncode == 0
    assert 'class="warning"' not in report(out) and "Without pictures, which were not recorded" in report(out)
    told = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**told, "images_dir": "/nowhere"}))
    (out / "report.html").unlink()
    assert merge(out).returncode == 0
    assert "Without pictures, which cannot be read here in /nowhere" in report(out)


def test_a_run_of_an_earlier_version_is_read(out):
    told = json.loads((out / "run.json").read_text())
    del told["images_dir"]
    (out / "run.json").write_text(json.dumps(told))
    assert read_run(out).images_dir == ""


def test_nothing_extracted_is_a_report_too(out):
    assert merge(out).returncode == 3
    assert f"<b>{ROWS}</b>missing" in report(out)
    commit(out, [Failed(row, "PictureNotFound", "gone") for row in range(ROWS)])
    assert merge(out).returncode == 4
    assert f"<b>{ROWS}</b>failed" in report(out) and "<h2>Failed rows</h2>" in report(out)


def test_a_large_table_is_looked_at_in_stretches(out):
    rows = np.arange(3, 100_003)
    sample = choose_sample(rows)
    assert len(sample) == SAMPLE and sample[0] == 3 and sample[-1] == 100_002
    assert len(np.flatnonzero(np.diff(sample) > 1)) == 19
    assert choose_sample(rows[:SAMPLE]).tolist() == rows[:SAMPLE].tolist()
    assert len(choose_sample(rows[: SAMPLE + 1])) <= SAMPLE
    assert len(choose_sample(rows[:0])) == 0


def test_stripes_are_shares_of_what_became_of_the_rows():
    extracted, failed = np.arange(1000) < 500, np.arange(1000) >= 990
    nobody = np.full(1000, -1)
    stripes = count_stripes(Coverage(nobody, nobody, extracted, failed, 0))
    assert len(stripes) == 200 and stripes[0] == (1, 0, 0) and stripes[150] == (0, 0, 1) and stripes[-1] == (0, 1, 0)


def test_a_projection_shows_what_lies_apart_and_nothing_where_all_is_the_same():
    random = np.random.default_rng(0)
    states = random.standard_normal((60, 300)).astype(np.float32)
    states[:30, 0] += 50
    points, share = project(states)
    assert (points[:30, 0] > 0).all() != (points[30:, 0] > 0).all() and share[0] > 0.5 > share[1]
    centred = states - states.mean(axis=0)
    expected = np.linalg.svd(centred, full_matrices=False)
    assert np.allclose(np.abs(points), np.abs(expected[0][:, :2] * expected[1][:2]), atol=1e-2)
    assert project(np.ones((9, 5), np.float32))[0].tolist() == [[0, 0]] * 9
    assert project(np.ones((1, 5), np.float32))[1] == (0, 0)


def test_thumbnails_come_only_from_below_the_folder(tmp_path):
    from vqa_embeddings.report.thumbnails import make_thumbnails

    (tmp_path / "images").mkdir()
    for place in (tmp_path / "images" / "cat.jpg", tmp_path / "secret.jpg"):
        shutil.copy(DATA / "cat.jpg", place)
    (tmp_path / "images" / "text.jpg").write_text("no picture")
    names = ["cat.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "text.jpg", "gone.jpg", ""]
    made = make_thumbnails(tmp_path / "images", names)
    assert made.keys() == {"cat.jpg"} and made["cat.jpg"].startswith("data:image/jpeg;base64,")
    assert make_thumbnails(Path("images"), names) == {}


@pytest.mark.slow
def test_a_full_disk_while_the_report_is_written_is_one_sentence(out, small_disk):
    commit(out, [record(row) for row in range(ROWS)])
    assert merge(out).returncode == 0
    (out / "report.html").unlink()
    disk = small_disk(4 << 20)
    there = shutil.copytree(out, disk / "out")
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - (24 << 10)))
    merged = merge(there)
    assert merged.returncode == 1 and merged.stderr.count("\n") == 1
    assert merged.stderr.startswith(f"error: {there}/report.html cannot be written (No space left on device)")
    filler.unlink()
    assert merge(there).returncode == 0
    assert (there / "report.html").read_bytes()
    assert subprocess.run(["ls", there], capture_output=True).stdout.count(b".tmp") == 0
