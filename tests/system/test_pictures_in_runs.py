"""Pictures in whole runs: names and texts of every kind in every locale, and pictures that are cut off."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.asking import load
from tests.helpers.launching import ROOT, arguments_for, command, run
from tests.helpers.odd_pictures import CAT, encoded, lay
from tests.helpers.published_reader import read_published
from tests.helpers.tables import table_rows, write_table
from vqa_embeddings import open_embeddings
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.app.extract import extract
from vqa_embeddings.data.decode_options import DecodeOptions
from vqa_embeddings.data.picture_folder import PictureFolder
from vqa_embeddings.data.table import Table
from vqa_embeddings.data.table_reader import read_table
from vqa_embeddings.errors import RowError
from vqa_embeddings.models.registry import find_checkpoint
from vqa_embeddings.records import Extracted
from vqa_embeddings.schema import QUERY_TOKEN

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SHOW = DecodeOptions(show_truncated=True)
PICTURE = encoded(CAT[:48, :64], "PNG")
THERE = (
    "plain.png",
    "图片 🐈.png",
    "größe/Ä.png",
    "שלום\u202e.png",
    "\ufffe\uffff\u2028\x7f\x85\x1b[31m.png",
    "line\nfeed\rtab\t.png",
    "quo\"te', comma.png",
    "back\\slash.png",
    " blanks around ",
    "dots...",
    "%00.png",
    "-rf",
    "~",
    "$HOME;a&b|c*?[d]`e`",
    "x" * 251 + ".png",
)
ABSENT = ("nicht da 图.png", "é" * 200, "caf\ufffd.png", "/größe/Ä.png", "图/../Ä.png", "\u3000", "\ufeff")
IDS = (
    "x" * 70_000,
    "..",
    " ",
    "\n",
    "\r",
    "e\u0301",
    "é",
    "\ufeff",
    "\x01\x1f\x7f",
    "\U0001d54f\u2029\uffff",
    "<b>&\"'",
    "-1",
    "NaN",
)


@pytest.fixture(scope="module")
def nasty(tmp_path_factory) -> tuple[Path, Path]:
    """A table of such names, ids and texts, and its pictures, in folders whose names are no better."""
    base = tmp_path_factory.mktemp("names") / "grö\udcffe 图"  # the byte is no UTF-8
    images = base / "bilder 图"
    for name in THERE:
        lay(images, name, PICTURE)
    lay(images, "caf\udce9.png", PICTURE)
    named = [(f"{number} {name}".replace("/", "|"), name) for number, name in enumerate((*THERE, *ABSENT))]
    rows = [*named, *((identity, "plain.png") for identity in IDS)]
    texts = [{"question_id": i, "image_id": n, "question": f"{n[:99]}?", "answer": i[:99]} for i, n in rows]
    return write_table(base / "vqa 表.csv", texts), images


def test_every_row_of_a_nasty_table_is_extracted_or_has_failed_in_a_locale_without_utf8(tmp_path, nasty, checkpoint):
    table, images = nasty
    model, out = tmp_path / "modell \udcff ü", tmp_path / "größe \udcff"
    shutil.copytree(checkpoint, model)
    (model / "notiz ü.txt").touch()
    inputs = [*arguments_for(table, model, images), "--max-new-tokens", 1, "--num-workers", 1]
    done = run(command(0, *inputs, "--output-dir", out), **ASCII)
    assert done.returncode == 0, done.stdout + done.stderr
    good, bad = len(THERE) + len(IDS), len(ABSENT)
    assert f"{good} rows extracted, {bad} failed, 0 left" in done.stdout
    for layout in ("grouped", "columnar"):
        line = [sys.executable, str(ROOT / "merge_shards.py"), "--output-dir", str(out), "--layout", layout]
        merged = run(line, **ASCII)
        assert merged.returncode == 4, merged.stdout + merged.stderr
        assert f"rows: {good + bad}; extracted: {good}; failed: {bad}; missing: 0" in merged.stdout

    run_file = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert run_file["images_dir"] == str(images)
    assert run_file["model_sha256"] == find_checkpoint(str(model), None, tmp_path).fingerprint

    given = read_table(table)
    by_id = {row[0]: row for row in map(given.row, range(len(given)))}
    published = read_published(out)
    assert published.keys() == by_id.keys() - {row[0] for row in by_id.values() if row[1] in ABSENT}
    first = published[next(iter(published))]["vision_only"]
    for identity, row in published.items():
        assert [row[name] for name in ("image_id", "question", "ground_truth_answer")] == by_id[identity][1:]
        assert np.allclose(row["vision_only"], first, rtol=1e-4), "another picture was read"
    opened = open_embeddings(out)
    assert opened.answers == [published[identity]["answer"] for identity in opened.ids]

    folder = PictureFolder(images)  # in the locale of this process: the reasons are the same
    with open(out / "failed.csv", newline="", encoding="utf-8") as stream:
        failed = list(csv.DictReader(stream))
    assert [row["image_id"] for row in failed] == list(ABSENT)
    for row in failed:
        with pytest.raises(RowError) as failure:
            folder.read(row["image_id"], lambda path: path)
        told = str(failure.value).encode(errors="backslashreplace").decode()
        assert (row["error"], row["message"]) == (type(failure.value).__name__, told)
    assert 'src="data:image' in (out / "report.html").read_text(encoding="utf-8"), "the report has no pictures"


def test_rows_that_failed_on_pictures_cut_off_are_tried_again_in_the_same_folder(tmp_path, checkpoint):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    cat = (DATA / "cat.jpg").read_bytes()
    for name, data in (("cut.jpg", cat[: len(cat) // 2]), ("end.jpg", cat[:-1]), ("cat.jpg", cat)):
        (images / name).write_bytes(data)
    question = table_rows()[0]["question"]
    names = ("cut.jpg", "end.jpg", "cat.jpg")
    rows = [{"question_id": name[:3], "image_id": name, "question": question, "answer": ""} for name in names]
    table = write_table(tmp_path / "vqa.csv", rows)
    inputs = [*arguments_for(table, checkpoint, images), "--max-new-tokens", 3, "--output-dir", out]
    done = run(command(0, *inputs))
    assert "2 rows extracted, 1 failed, 0 left" in done.stderr + done.stdout
    done = run(command(0, *inputs, "--retry-failed", "--truncated-pictures", "show", "--num-workers", 0))
    assert "1 rows extracted, 0 failed, 0 left" in done.stderr + done.stdout, done.stderr
    e = open_embeddings(out)
    assert e.truncated.tolist() == [True, False, False]
    states = e.query_token(e.layers[-1])
    assert np.array_equal(states[1], states[2]) and not np.allclose(states[0], states[2])
    # The same with a decode process, and by no choice of the run.
    (shown,) = extract_here(checkpoint, read_table(table), images)
    assert shown.truncated and np.array_equal(shown.vectors[QUERY_TOKEN][-1], states[0])


def extract_here(checkpoint: Path, table: Table, images: Path) -> list[Extracted]:
    """The first row, its picture opened by a decode process."""
    records = extract(
        load(checkpoint, tokens=3), table, [0], PictureFolder(images), batch_size=None, workers=1, decode_options=SHOW
    )
    return [record for some in records for record in some]
