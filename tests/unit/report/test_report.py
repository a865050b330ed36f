"""`report.html`: what a run looks like, in one file that fetches and runs nothing, on a phone and on paper."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.launching import ROOT, arguments_for, command, merge, run
from tests.helpers.tables import table_rows, write_table
from tests.unit.app.test_merge import PART_SIZE, ROWS, begin_run, commit, contents, record
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.records import Failed
from vqa_embeddings.report.agreement import accepted_answers, agrees, count_yes_no, verdict
from vqa_embeddings.report.build import SAMPLE, choose_sample, count_stripes
from vqa_embeddings.report.charts import project
from vqa_embeddings.store.coverage import Coverage
from vqa_embeddings.store.run import read_run

HOSTILE = '<script>document.title="broken"</script><img src=x onerror="document.title=\'broken\'">'


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return begin_run(tmp_path)


def report(out: Path) -> str:
    return (out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shown(tmp_path_factory, checkpoint) -> Path:
    """An output folder of a real launch of two ranks, with failed and hostile rows, merged."""
    folder = tmp_path_factory.mktemp("report")
    rows = table_rows()
    rows[3] = {**rows[3], "image_id": "gone.jpg"}
    rows[5] = {**rows[5], "question": HOSTILE, "answer": HOSTILE}
    table = write_table(folder / "vqa.csv", rows)
    out = folder / "out"
    assert run(command(2, *arguments_for(table, checkpoint), "--output-dir", out)).returncode == 0
    assert merge(out).returncode == 4
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[object]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-quic"):
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as session:
        yield session


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_whole_at_a_phones_and_a_desks_width(browser, shown, width):
    browser.execute_cdp_cmd("Network.enable", {})
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(f"file://{shown / 'report.html'}")
    assert browser.title.startswith("31 rows, ")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    too_wide = "return [...document.querySelectorAll('h1,h2,p,article,svg,img,.numbers div')].filter(e =>"
    assert not browser.execute_script(f"{too_wide} e.getBoundingClientRect().right > {width}).map(e => e.outerHTML)")
    headings = [heading.text for heading in browser.find_elements("tag name", "h2")]
    assert headings == [
        *("Coverage", "Throughput", "Failed rows", "Agreement", "Norms by layer"),
        *("States at the last prompt token", "States at the last image token", "Answers"),
    ]
    columns = len({e.rect["x"] for e in browser.find_elements("css selector", ".maps svg")})
    assert columns == (2 if width == 390 else 5)
    images = browser.execute_script("return [...document.images].map(i => i.naturalWidth)")
    assert len(images) == 24 and all(0 < size <= 160 for size in images), "a thumbnail is broken"
    assert not browser.find_elements("tag name", "script")
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith("data:") for name in loaded), "something was fetched"
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_it_prints_on_a_few_pages(browser, shown):
    browser.get(f"file://{shown / 'report.html'}")
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12


@pytest.mark.slow
def test_it_says_what_became_of_the_rows(shown):
    text = report(shown)
    for count, name in ((31, "rows"), (30, "extracted"), (1, "failed"), (0, "missing")):
        assert f"<div><b>{count}</b>{name}</div>" in text
    assert "PictureNotFound" in text and "gone.jpg" in text and "cannot be found" in text
    assert "of 30 answers agree with the ground truth; of all rows" in text
    assert text.count('<svg class="strip"') == 1 and len(re.findall(r"<svg\b", text)) == 1 + 1 + 1 + 10
    assert "layer 7" in text and "dtype" not in text
    assert HOSTILE not in text and "&lt;script&gt;" in text
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in text


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
        values = getattr(one, states).copy()
        values[layer] = 0 if states == "query_token" else 3
        records.append(replace(one, **{states: values}))
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


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        *[("Yes.", "yes", True), ("yes, it is", "Yes", True), ("No, it is not", "yes", False), ("", "yes", False)],
        *[("There is no dog, yes", "no", False), ("Nothing", "no", False), ("It is a red ball.", "red", True)],
        *[
            ("The colour is Red", "the red", True),
            ("infrared", "red", False),
            ("an orange suit", "orange suits", False),
        ],
        *[("whatever", "", None), ("whatever", " ?", None), ("two cats", "cats two", False), ("a", "A", True)],
        *[("no parking sign", "no parking", True), ("İstanbul", "i̇stanbul", True)],
    ],
)
def test_answers_are_compared_as_the_report_says(answer, truth, expected):
    assert agrees(answer, truth) is expected


def test_yes_and_no_are_counted_by_truth_and_answer():
    pairs = [("Yes", "yes"), ("no.", "yes"), ("maybe", "no"), ("No!", "No"), ("no", "two"), ("x", "")]
    assert count_yes_no(pairs) == Counter({("yes", "yes"): 1, ("yes", "no"): 1, ("no", "other"): 1, ("no", "no"): 1})
    assert verdict("no") == "no" and verdict("¡Yes!") == "yes" and verdict("") == "other"


THREE = ["it's 'a' 'b'", 'the "no" sign', "no"]


@pytest.mark.parametrize(
    "truth",
    [
        *[str(THREE), json.dumps(THREE), json.dumps(THREE, indent=1), str(np.array(THREE)), str(tuple(THREE))],
        *[str([{"answer": text, "answer_id": 1} for text in THREE]), f" {json.dumps([*THREE, None])}\n"],
        str(np.array([{"answer": text} for text in THREE])),
    ],
)
def test_a_list_of_answers_is_read_however_it_was_written(truth):
    assert accepted_answers(truth) == THREE


@pytest.mark.parametrize(
    "truth",
    [
        *[
            "yes",
            "",
            "(a)",
            "[no parking]",
            "[]",
            "[10, 20, 30, 40]",
            "['a', 3]",
            "{'a': 1}",
            "['a'",
            r"['a\']",
            "[[]]",
            *["[{{}}]", "[{[]: 1}]", "({[1]})"],  # which Python reads, and cannot make
        ],
        *[30_000 * "[", 30_000 * "['a'", str(["a"] * 20_000)],
    ],
    ids=lambda truth: truth[:20],
)
def test_what_is_no_list_of_answers_is_an_answer(truth):
    assert accepted_answers(truth) == [truth]


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        *[
            ("Yes.", "['yes', 'yes', 'no']", True),
            ("no", "['yes', 'yes', 'no']", True),
            ("It is red", "['yes']", False),
        ],
        *[("It is red", "['blue' 'red']", True), ("a red", "[{'answer': 'red'}]", True), ("x", "['', ' ']", None)],
        *[("blue", '["red", ""]', False), ("x", "[]", None), (r"\d", r"['\d']", True)],
    ],
)
def test_one_answer_of_a_list_has_to_agree(answer, truth, expected, recwarn):
    assert agrees(answer, truth) is expected
    assert not recwarn.list


def test_a_list_counts_as_what_most_of_its_answers_say():
    pairs = [
        ("no", "['yes', 'Yes', 'no']"),
        ("no", "['no', 'yes']"),
        ("no", "['red', 'red', 'no']"),
        ("x", "['', 'no']"),
    ]
    assert count_yes_no(pairs) == Counter({("yes", "no"): 1, ("no", "other"): 1})


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
