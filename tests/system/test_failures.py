"""Rows that fail are data: recorded with a reason, and the rest goes on."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.helpers.launching import arguments_for, command, merge, run, segments
from tests.helpers.published_reader import read_published
from tests.helpers.tables import table_rows, write_table
from tests.system.test_rows import assert_equal_to_reference
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.data.table_reader import read_table
from vqa_embeddings.store.segments import read_failures

BAD = {
    "missing.jpg": "PictureNotFound",
    "long" * 80 + ".jpg": "PictureNotFound",
    "folder.jpg": "PictureNotFound",
    "": "PictureNotFound",
    "../secret.jpg": "PictureOutsideFolder",
    "/etc/hostname": "PictureOutsideFolder",
    "empty.jpg": "PictureUnreadable",
    "text.jpg": "PictureUnreadable",
    "truncated.jpg": "PictureUnreadable",
    "strip.png": "PictureUnreadable",
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> tuple[Path, Path]:
    """A table with one good row among ten bad ones, and its pictures."""
    base = tmp_path_factory.mktemp("damaged")
    images = base / "images"
    (images / "folder.jpg").mkdir(parents=True)
    cat = (DATA / "cat.jpg").read_bytes()
    (base / "secret.jpg").write_bytes(cat)
    (images / "cat.jpg").symlink_to(base / "secret.jpg")  # links inside the folder are followed
    (images / "empty.jpg").write_bytes(b"")
    (images / "text.jpg").write_text("no picture")
    (images / "truncated.jpg").write_bytes(cat[: len(cat) // 2])
    Image.new("RGB", (4000, 2)).save(images / "strip.png")
    good = next(row for row in table_rows() if row["image_id"] == "cat.jpg")
    rows = [{**good, "question_id": f"bad {index}", "image_id": name} for index, name in enumerate(BAD)]
    return write_table(base / "vqa.csv", [*rows[:4], good, *rows[4:]]), images


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_one_good_row_among_bad_ones_comes_out_right(tmp_path, damaged, checkpoint, expected):
    table, images = damaged
    out = tmp_path / "out"
    inputs = [*arguments_for(table, checkpoint, images), "--output-dir", out]
    done = run(command(0, *inputs))
    assert done.returncode == 0, done.stderr
    merged = merge(out)
    assert merged.returncode == 4, merged.stdout + merged.stderr
    rows = read_published(out)
    assert len(rows) == 1
    assert_equal_to_reference(rows, expected)

    failed = read_csv(out / "failed.csv")
    assert {row["image_id"]: row["error"] for row in failed} == BAD
    assert all(len(row["message"].split()) > 4 for row in failed)
    given = {row["question_id"]: row for row in table_rows(table)}
    for row in failed:
        assert {key: row[key] for key in given[row["question_id"]]} == given[row["question_id"]]
    assert read_csv(out / "missing.csv") == []

    # Failed rows are not tried again unasked ...
    part = out / "phi4_multimodal_embeddings_part_001.h5"
    before = part.read_bytes()
    assert "nothing to do" in run(command(0, *inputs)).stdout
    # ... and when they are, only they: the part is replaced, with the row that it held as it was.
    shutil.copy(DATA / "cat.jpg", images / "missing.jpg")
    try:
        again = run(command(0, *inputs, "--retry-failed"))
    finally:
        (images / "missing.jpg").unlink()
    assert again.returncode == 0, again.stderr
    assert "10 rows to do now" in again.stdout
    assert merge(out).returncode == 4
    assert part.read_bytes() != before
    now = read_published(out)
    assert now.keys() == {*rows, "bad 0"}
    assert now["bad 0"]["answer"] == next(iter(rows.values()))["answer"]
    coverage = json.loads((out / "coverage.json").read_text())
    assert (coverage["extracted"], coverage["failed"], coverage["missing"]) == (2, 9, 0)


SEMICOLONS = """question_id;image_id;image_name;question;answer;gt_answer
1;7;cat.jpg;;a model's;yes
2;7;cat.jpg;"Is it; here, a cat?";a model's;['yes', 'no']
3;8;gone.jpg; ;;yes
4;7;cat.jpg;nan;;no
"""


def test_a_row_without_a_question_fails_before_its_picture_is_looked_for(tmp_path, checkpoint):
    (tmp_path / "vqa.csv").write_text(SEMICOLONS)
    (tmp_path / "images").mkdir()
    shutil.copy(DATA / "cat.jpg", tmp_path / "images")
    out = tmp_path / "out"
    inputs = [*arguments_for(tmp_path / "vqa.csv", checkpoint, tmp_path / "images"), "--max-new-tokens", 2]
    done = run(command(0, *inputs, "--output-dir", out))
    assert done.returncode == 0, done.stderr
    assert "2 rows extracted, 2 failed, 0 left" in done.stdout
    assert "columns: question_id, image_name as the picture (1 of its first 2 values are files" in done.stdout
    assert "; delimiter ';'\n" in done.stdout
    warnings = [line.partition(":")[2] for line in done.stdout.splitlines() if line.startswith("warning:")]
    assert warnings == [
        " no question in 2 rows, first '1': recorded as failed",
        " question 'nan' in row '4': it looks like a missing value, and is taken as it stands",
    ]

    shutil.rmtree(tmp_path / "images")  # from here on only the run knows which column names the pictures
    (tmp_path / "images").mkdir()
    assert "nothing to do" in run(command(0, *inputs, "--output-dir", out)).stdout
    assert merge(out).returncode == 4
    rows = read_published(out)
    assert {key: (row["image_id"], row["question"], row["ground_truth_answer"]) for key, row in rows.items()} == {
        "2": ("cat.jpg", "Is it; here, a cat?", "['yes', 'no']"),
        "4": ("cat.jpg", "nan", "no"),
    }
    failed = read_csv(out / "failed.csv")
    assert [(row["question_id"], row["error"]) for row in failed] == [("1", "QuestionEmpty"), ("3", "QuestionEmpty")]
    assert failed[0]["message"].startswith("the row has no question, or only white space; expected text, ")
    given = list(csv.DictReader(SEMICOLONS.splitlines(), delimiter=";"))
    assert [{name: row[name] for name in given[0]} for row in failed] == [given[0], given[2]]
    assert read_table(out / "failed.csv").ids[:] == ["1", "3"]


def test_a_picture_is_shown_as_its_exif_says(tmp_path, checkpoint, reference):
    with Image.open(DATA / "rocket.jpg") as upright:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees when shown
        upright.save(tmp_path / "turned.png", exif=exif)
        question = "Is there a person in the image?"
        wanted = reference.row(upright.transpose(Image.Transpose.ROTATE_270), question, 4)
    row = {"question_id": "007", "image_id": "turned.png", "question": question, "answer": "NA"}
    table = write_table(tmp_path / "vqa.csv", [row])
    inputs = [*arguments_for(table, checkpoint, tmp_path), "--max-new-tokens", 4, "--output-dir", tmp_path / "out"]
    assert run(command(0, *inputs)).returncode == 0
    assert merge(tmp_path / "out").returncode == 0
    rows = read_published(tmp_path / "out")
    assert_equal_to_reference(rows, {"007": wanted})
    assert rows["007"]["ground_truth_answer"] == "NA"


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory, checkpoint) -> Path:
    """A checkpoint that is finite in float32 and, as a decoder with large activations may be, not in float16."""
    folder = tmp_path_factory.mktemp("overflowing") / "checkpoint"
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"] *= 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_number_format_that_is_too_narrow_ends_the_run_before_anything_of_it_is_committed(tmp_path, overflowing):
    rows = [*table_rows()[:9], {**table_rows()[9], "image_id": "gone.jpg"}]
    inputs = [*arguments_for(write_table(tmp_path / "vqa.csv", rows), overflowing), "--max-new-tokens", 1]
    out = tmp_path / "float16"
    done = run(command(0, *inputs, "--dtype", "float16", "--output-dir", out))
    assert done.returncode == 1
    [error] = [line for line in done.stderr.splitlines() if "error" in line]
    assert error.startswith("error: none of the first 9 rows came out finite in float16, and none of them is committed")
    assert "layer_2 holds" in error and error.endswith("try --dtype bfloat16 or float32 in another --output-dir")
    assert "0 rows extracted, 1 failed, 9 left" in done.stdout
    assert [failed.error for path in segments(out) for failed in read_failures(path)] == ["PictureNotFound"]
    looked = merge(out, "--check")
    assert looked.returncode == 3 and "extracted: 0; failed: 1; missing: 9" in looked.stdout
    # What the sentence advises holds.
    advised = run(command(0, *inputs, "--output-dir", tmp_path / "float32"))
    assert advised.returncode == 0 and "9 rows extracted, 1 failed, 0 left" in advised.stdout
