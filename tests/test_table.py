"""The table is read as it is: as text, whole, whatever its dress."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqa_embeddings.errors import Refused
from vqa_embeddings.table import read_rows, read_table, sample

PLAIN = 'question_id,image_id,question,answer\n007,a.jpg,"Why, ""now""?",NA\n1e5,b.jpg,"two\nlines",\n'


def table(tmp_path: Path, data: bytes):
    path = tmp_path / "vqa.csv"
    path.write_bytes(data)
    return read_table(path)


def test_ids_and_answers_stay_the_text_that_they_are(tmp_path):
    read = table(tmp_path, PLAIN.encode())
    assert read.ids == ["007", "1e5"]
    assert read.questions == ['Why, "now"?', "two\nlines"]
    assert read.truths == ["NA", ""]


@pytest.mark.parametrize(
    "dressed",
    [
        PLAIN.encode("utf-8-sig"),
        PLAIN.encode("utf-16"),
        PLAIN.replace("two\nlines", "two|lines").replace("\n", "\r\n").replace("|", "\n").encode(),
        PLAIN.replace("\n1e5", "\n\n1e5").encode(),
        PLAIN.replace("image_id", "image_name").replace(",answer", ",ground_truth_answer").encode(),
    ],
    ids=["byte-order mark", "UTF-16", "CRLF", "blank line", "other names"],
)
def test_the_same_rows_in_another_dress_are_the_same_table(tmp_path, dressed):
    assert table(tmp_path, dressed).fingerprint() == table(tmp_path, PLAIN.encode()).fingerprint()


@pytest.mark.parametrize("change", [("007", "7"), ("a.jpg", "b.jpg"), ("NA", ""), ("now", "then")])
def test_other_rows_are_another_table(tmp_path, change):
    other = PLAIN.replace(*change)
    assert table(tmp_path, other.encode()).fingerprint() != table(tmp_path, PLAIN.encode()).fingerprint()


def test_a_table_without_answers_has_empty_ones(tmp_path):
    assert table(tmp_path, b"question_id,image_id,question\n1,a.jpg,Why?\n").truths == [""]


def test_further_columns_are_kept_for_the_reports(tmp_path):
    path = tmp_path / "vqa.csv"
    path.write_text("source,question_id,image_id,question\nx,1,a.jpg,Why?\n")
    header, rows = read_rows(path)
    assert header == ["source", "question_id", "image_id", "question"]
    assert list(rows) == [["x", "1", "a.jpg", "Why?"]]


def test_a_question_of_a_megabyte_is_a_question(tmp_path):
    long = "why " * 250_000
    assert table(tmp_path, f"question_id,image_id,question\n1,a.jpg,{long}\n".encode()).questions == [long]


field = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=20)


@given(st.lists(st.tuples(field, field, field), min_size=1, max_size=10))
def test_whatever_text_was_written_is_read_again(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("any") / "vqa.csv"
    frame = pandas.DataFrame(rows, columns=["image_id", "question", "answer"], dtype=object)
    frame.insert(0, "question_id", [f"q{index}" for index in range(len(rows))])
    frame.to_csv(path, index=False, encoding="utf-8")
    read = read_table(path)
    assert list(zip(read.images, read.questions, read.truths, strict=True)) == rows


@pytest.mark.parametrize("count", [1, 2, 3, 31, 1000])
def test_the_sample_is_the_published_one(count):
    frame = pandas.DataFrame({"row": range(count)})
    assert sample(count, 3) == sorted(frame.sample(n=min(3, count), random_state=42)["row"])


def test_only_the_first_bad_ids_are_named(tmp_path):
    rows = "".join(f"same,a.jpg,q{index}\n" for index in range(9))
    with pytest.raises(Refused) as refusal:
        table(tmp_path, f"question_id,image_id,question\n{rows}".encode())
    assert str(refusal.value).count("is there already") == 3
