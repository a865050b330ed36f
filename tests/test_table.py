"""The table is read as it is: as text, whole, whatever its dress."""

from __future__ import annotations

import hashlib
import pickle
import tracemalloc
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqa_embeddings import table as tables
from vqa_embeddings.errors import Refused
from vqa_embeddings.table import Table, read_rows, read_table, sample, select

HEADER = "question_id,image_id,question\n"
PLAIN = 'question_id,image_id,question,answer\n007,a.jpg,"Why, ""now""?",NA\n1e5,b.jpg,"two\nlines",\n'


def table(tmp_path: Path, data: bytes):
    path = tmp_path / "vqa.csv"
    path.write_bytes(data)
    return read_table(path)


def test_ids_and_answers_stay_the_text_that_they_are(tmp_path):
    read = table(tmp_path, PLAIN.encode())
    assert list(read.ids) == ["007", "1e5"]
    assert list(read.questions) == ['Why, "now"?', "two\nlines"]
    assert list(read.truths) == ["NA", ""]


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


def test_the_fingerprint_of_a_table_never_changes(tmp_path):
    """Or else every output folder that there is would be refused."""
    known = "90d1eb081c5bbc2816b91fdb2f4ed5107f8fa592a82570aea5f44c864fb8f4c1"
    assert table(tmp_path, PLAIN.encode()).fingerprint() == known


@pytest.mark.parametrize("change", [("007", "7"), ("a.jpg", "b.jpg"), ("NA", ""), ("now", "then")])
def test_other_rows_are_another_table(tmp_path, change):
    other = PLAIN.replace(*change)
    assert table(tmp_path, other.encode()).fingerprint() != table(tmp_path, PLAIN.encode()).fingerprint()


def test_a_table_without_answers_has_empty_ones(tmp_path):
    assert table(tmp_path, b"question_id,image_id,question\n1,a.jpg,Why?\n").truths[:] == [""]


def test_further_columns_are_kept_for_the_reports(tmp_path):
    path = tmp_path / "vqa.csv"
    path.write_text("source,question_id,image_id,question\nx,1,a.jpg,Why?\n")
    header, rows = read_rows(path)
    assert header == ["source", "question_id", "image_id", "question"]
    assert list(rows) == [["x", "1", "a.jpg", "Why?"]]


def test_a_question_of_a_megabyte_is_a_question(tmp_path):
    long = "why " * 250_000
    assert table(tmp_path, f"question_id,image_id,question\n1,a.jpg,{long}\n".encode()).questions[:] == [long]


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


rows_of_text = st.lists(st.tuples(field, field, field, field), max_size=9)


@given(rows_of_text)
def test_a_column_is_a_sequence_of_its_texts(rows):
    with patch.object(tables, "BLOCK_ROWS", 2):
        kept = Table.from_rows(iter(rows))
        for column, place in ((kept.ids, 0), (kept.images, 1), (kept.questions, 2), (kept.truths, 3)):
            texts = [row[place] for row in rows]
            assert len(column) == len(texts)
            assert list(column) == texts
            assert [column[position] for position in np.arange(-len(texts), len(texts))] == texts + texts
            assert (column[1:], column[::-2]) == (texts[1:], texts[::-2])
            for outside in (len(texts), -len(texts) - 1):
                with pytest.raises(IndexError):
                    column[outside]


@given(rows_of_text, st.data())
def test_a_selection_is_a_table_that_another_process_can_be_given(rows, data):
    positions = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9) if rows else st.just([]))
    with patch.object(tables, "BLOCK_ROWS", 2):
        selected = pickle.loads(pickle.dumps(select(Table.from_rows(rows), positions)))
        assert [tuple(selected.row(place)) for place in range(len(selected))] == [rows[place] for place in positions]


@given(rows_of_text)
def test_fingerprint_and_pictures_are_those_of_the_rows_however_they_are_kept(rows):
    with patch.object(tables, "BLOCK_ROWS", 2):
        kept = Table.from_rows(rows)
        whole = "".join(f"{field}\0" for row in rows for field in row)
        assert kept.fingerprint() == hashlib.sha256(whole.encode()).hexdigest()
        order = list(dict.fromkeys(row[1] for row in rows))
        assert kept.pictures().tolist() == [order.index(row[1]) for row in rows]


def test_a_table_of_lists_is_that_of_its_rows():
    made = Table(["1", "2"], ["a", "b"], ["Why?", "Où?"], ["", "là"])
    assert [made.row(0), made.row(1)] == [["1", "a", "Why?", ""], ["2", "b", "Où?", "là"]]
    with pytest.raises(ValueError, match="NUL"):
        Table(["1"], ["a"], ["W\0hy?"], [""])


def test_a_table_takes_little_more_memory_than_its_file(tmp_path):
    row = "question_{},picture_{}.jpg,Is the man on the left of the picture holding something?,no\n"
    data = PLAIN.splitlines(True)[0] + "".join(row.format(number, number // 10) for number in range(50_000))
    path = tmp_path / "vqa.csv"
    path.write_text(data)
    tracemalloc.start()
    try:
        kept = read_table(path)
        now, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(kept) == 50_000
    assert now < 1.3 * len(data)
    assert most < 2.5 * len(data)


def refusal(tmp_path: Path, data: bytes) -> str:
    with pytest.raises(Refused) as refused:
        table(tmp_path, data)
    return str(refused.value)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_a_chunk_at_a_time_and_what_is_not_text_is_named_by_its_place(
    tmp_path, monkeypatch, chunk, encoding
):
    monkeypatch.setattr(tables, "CHUNK_BYTES", chunk)
    good = (HEADER + "1,é.jpg,Où 🐈?\r\n").encode(encoding)
    assert table(tmp_path, good).row(0) == ["1", "é.jpg", "Où 🐈?", ""]
    wide = encoding == "utf-16"
    broken = b"\x00\xdc" if wide else b"\xff"  # a lone surrogate; a byte that UTF-8 has not
    name = "UTF-16" if wide else "UTF-8"
    assert f"not {name} text (byte {len(good)})" in refusal(tmp_path, good + broken + good)
    cut = "🐈".encode(encoding)[:-1]
    assert f"not {name} text (byte" in refusal(tmp_path, good + cut)
    nul = "2,b.jpg,\0\n".encode(encoding.removesuffix("-sig"))
    assert "line 3 holds a NUL" in refusal(tmp_path, good + (nul[2:] if wide else nul))


def test_a_quotation_mark_that_is_never_closed_costs_no_more_memory_than_a_field_may(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FIELD_CHARACTERS", 100)
    data = HEADER + '1,a.jpg,Why?\n2,a.jpg,"Why?\n' + "3,a.jpg,Why?\n" * 50
    assert "line 3 is not CSV (field larger than field limit (100))" in refusal(tmp_path, data.encode())


def test_a_row_of_another_length_is_named_by_the_line_that_it_begins_on(tmp_path):
    rows = '1,a.jpg,"two\nlines"\n\n' + "".join(f"{number},a.jpg,Why?\n" for number in range(2, 3000))
    assert "line 3003 has 2 fields; expected 3" in refusal(tmp_path, f"{HEADER}{rows}3000,a.jpg\n".encode())


identities = st.lists(st.sampled_from(["", ".", "a/b", "1", "2", "3", "4", "..", "é"]), min_size=1, max_size=9)


@pytest.mark.parametrize("digest", [hash, lambda text: 0], ids=["digests", "digests that are all the same"])
@given(identities)
def test_ids_that_cannot_be_used_are_named_by_their_lines_and_no_others(tmp_path_factory, digest, ids):
    path = tmp_path_factory.mktemp("any") / "vqa.csv"
    path.write_text(HEADER + "".join(f'\n{identity},a.jpg,"two\nlines"\n' for identity in ids))
    bad = []
    for place, identity in enumerate(ids):
        if identity in ("", ".", "a/b"):
            bad.append(f"line {3 + 3 * place}: {identity!r} cannot name an HDF5 group")
        elif identity in ids[:place]:
            bad.append(f"line {3 + 3 * place}: {identity!r} is there already")
    with patch.object(tables, "hash", digest, create=True):
        if not bad:
            assert list(read_table(path).ids) == ids
        else:
            with pytest.raises(Refused) as refused:
                read_table(path)
            assert f"({'; '.join(bad[:3])})" in str(refused.value)


def test_only_the_first_bad_ids_are_named(tmp_path):
    rows = "".join(f"same,a.jpg,q{index}\n" for index in range(9))
    with pytest.raises(Refused) as refusal:
        table(tmp_path, f"question_id,image_id,question\n{rows}".encode())
    assert str(refusal.value).count("is there already") == 3
