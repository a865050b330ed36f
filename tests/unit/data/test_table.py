"""The table is read as it is: as text, whole, whatever its dress."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import pickle
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.runs import random_run
from vqa_embeddings.app.launch import read_input
from vqa_embeddings.base.files import new_csv
from vqa_embeddings.cli.options import parse_extract
from vqa_embeddings.data import csv_reader, table_reader
from vqa_embeddings.data import table as tables
from vqa_embeddings.data.columns import choose, clean, undecided
from vqa_embeddings.data.csv_reader import DELIMITERS
from vqa_embeddings.data.table import Table, sample, select
from vqa_embeddings.data.table_reader import read_rows, read_table
from vqa_embeddings.errors import InputError
from vqa_embeddings.store.run import Run, claim_run, keep_rows, read_run, read_run_rows

HEADER = "question_id,image_id,question\n"
PLAIN = 'question_id,image_id,question,answer\n007,a.jpg,"Why, ""now""?",NA\n1e5,b.jpg,"two\nlines",\n'


def dress(text: str, delimiter: str, quoting: int = csv.QUOTE_MINIMAL) -> str:
    """The same rows with another delimiter."""
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter, quoting=quoting, lineterminator="\n").writerows(
        csv.reader(io.StringIO(text))
    )
    return stream.getvalue()


def table(tmp_path: Path, data: bytes):
    path = tmp_path / "vqa.csv"
    path.write_bytes(data)
    return read_table(path)


def test_ids_and_answers_stay_the_text_that_they_are(tmp_path):
    read = table(tmp_path, PLAIN.encode())
    assert list(read.ids) == ["007", "1e5"]
    assert list(read.questions) == ['Why, "now"?', "two\nlines"]
    assert list(read.truths) == ["NA", ""]


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_a_blank_after_each_delimiter_is_no_part_of_the_values(tmp_path, delimiter):
    """Or the question would be asked with its quotation marks, and no id would be found again."""
    data = 'image_id, question_id, question, answer\na.jpg, 7, "Is it red, or not?", yes\n'
    if delimiter == ";":
        data = data.replace(", ", "; ").replace("red; or", "red, or")
    assert table(tmp_path, data.encode()).row(0) == ["7", "a.jpg", "Is it red, or not?", "yes"]


@pytest.mark.parametrize(
    "dressed",
    [
        PLAIN.encode("utf-8-sig"),
        PLAIN.encode("utf-16"),
        PLAIN.replace("two\nlines", "two|lines").replace("\n", "\r\n").replace("|", "\n").encode(),
        PLAIN.replace("\n1e5", "\n\n1e5").encode(),
        PLAIN.replace("image_id", "image_name").replace(",answer", ",ground_truth_answer").encode(),
        *[dress(PLAIN, delimiter).encode() for delimiter in ";\t|"],
        *[dress(PLAIN, delimiter, csv.QUOTE_ALL).encode() for delimiter in ",;\t|"],
        dress(PLAIN, "\t").encode("utf-16"),
        ("\ufeff" + PLAIN).encode("utf-8-sig"),
        ("\ufeff" + dress(PLAIN, ";", csv.QUOTE_ALL)).encode("utf-8-sig"),
        ("\ufeff" + PLAIN).encode("utf-16"),
        dress("\ufeff" + PLAIN, ",", csv.QUOTE_ALL).encode("utf-8-sig"),
        ("\n" + PLAIN.replace(",question,", ",question ,\xa0", 1)).encode(),
    ],
    ids=[
        *("byte-order mark", "UTF-16", "CRLF", "blank line", "other names", "semicolons", "tabs", "bars"),
        *("quoted", "quoted semicolons", "quoted tabs", "quoted bars", "UTF-16 tabs"),
        *(
            "two marks",
            "two marks before a quotation mark",
            "two marks in UTF-16",
            "a mark within them",
            "blanks around names",
        ),
    ],
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


def test_rows_that_are_listed_again_are_a_table_too_whatever_stood_between_their_fields(tmp_path):
    path, listed = tmp_path / "vqa.csv", tmp_path / "missing.csv"
    path.write_bytes("\ufeff\ufeffquestion_id;image_id;question ;a,b\n007;a.jpg;Why, now?;x\n1;b;;\n".encode())
    header, rows = read_rows(path)
    with new_csv(listed, [*header, "error"]) as add:
        for row in rows:
            add([*row, "gone"])
    assert listed.read_text().startswith('question_id,image_id,question ,"a,b",error\n007,a.jpg,"Why, now?",x,gone\n')
    assert read_table(listed).fingerprint() == read_table(path).fingerprint()


def test_a_table_with_commas_stays_one_whatever_its_other_names_and_its_questions_hold(tmp_path):
    header = "question_id;image_id;question;x,question_id,image_id,question\n"
    read = table(tmp_path, (header + 'w;x;y;z,1,a.jpg,"Is it; or|is\tit, not?"\n').encode())
    assert read.columns.delimiter == ","
    assert read.row(0) == ["1", "a.jpg", "Is it; or|is\tit, not?", ""]


def test_a_question_of_a_megabyte_is_a_question(tmp_path):
    long = "why " * 250_000
    assert table(tmp_path, f"question_id,image_id,question\n1,a.jpg,{long}\n".encode()).questions[:] == [long]


field = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=20)


@given(st.lists(st.tuples(field, field, field), min_size=1, max_size=10), st.sampled_from(DELIMITERS))
def test_whatever_text_was_written_is_read_again(tmp_path_factory, rows, delimiter):
    path = tmp_path_factory.mktemp("any") / "vqa.csv"
    frame = pandas.DataFrame(rows, columns=["image_id", "question", "answer"], dtype=object)
    frame.insert(0, "question_id", [f"q{index}" for index in range(len(rows))])
    frame.to_csv(path, index=False, encoding="utf-8", sep=delimiter)
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
    with pytest.raises(InputError) as refused:
        table(tmp_path, data)
    return str(refused.value)


ROW = {"question_id": "007", "image_id": "a.jpg", "question": "Où?", "answer": "NA"}


@pytest.mark.parametrize("name", ["JSON", "JSON lines", "VQAv2's JSON"])
def test_json_becomes_the_same_table_by_the_line_that_is_given(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    rows = [ROW, ROW | {"question_id": "1e5"}, ROW | {"question_id": 12345678901234567890123, "answer": None}]
    rows.append(ROW | {"question_id": 7, "image_id": 139, "answer": "là"})
    data = "\n".join(map(json.dumps, rows)) if name == "JSON lines" else json.dumps(rows)
    said = refusal(tmp_path, (f'{{"info": 1, "questions": {data}}}' if name == "VQAv2's JSON" else data).encode())
    eval(said.partition("convert it: ")[2], {"pandas": pandas, "json": json})
    made = read_table(tmp_path / "vqa.csv")
    texts = [["" if value is None else str(value) for value in row.values()] for row in rows]
    assert [made.row(place) for place in range(4)] == texts


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (json.dumps(ROW).encode(), "JSON lines"),
        (f"\n{json.dumps({'id': 1})}\n{json.dumps({'id': 2})}\n".encode("utf-16"), "JSON lines"),
        (json.dumps({"questions": [ROW]}).encode("utf-8-sig"), "JSON"),
        (b"[" * 100_000, "JSON"),
        (gzip.compress(PLAIN.encode()), "compressed with gzip"),
        (b"PAR1\x15\x04PAR1", "Parquet"),
        (b"PK\x03\x04\x14\0", "an Excel workbook, or another zip"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_csv_is_refused_by_its_name(tmp_path, data, name):
    assert f"vqa.csv is {name}; expected CSV, convert it: " in refusal(tmp_path, data)


@pytest.mark.parametrize(
    ("header", "saying"),
    [
        ("id;image_id;question", "no column question_id; found id, image_id, question; rename"),
        ("Question_ID,image_id,question", "no column question_id; found Question_ID, image_id, question; rename"),
        ("question\u200b_id,image_id,question", r"no column question_id; found 'question\u200b_id', image_id"),
        ("question_id,image_id, question,question ", "2 columns question; expected one"),
        ('"question_id,image_id,question', "line 1 is not CSV"),
        ("A text\n\nwith, some, commas", "no column question_id, image_id or image_name, question; found A text"),
    ],
)
def test_what_is_wrong_about_a_header_is_shown(tmp_path, header, saying):
    assert saying in refusal(tmp_path, (header + "\n").encode())


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_a_chunk_at_a_time_and_what_is_not_text_is_named_by_its_place(
    tmp_path, monkeypatch, chunk, encoding
):
    monkeypatch.setattr(csv_reader, "CHUNK_BYTES", chunk)
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
    monkeypatch.setattr(csv_reader, "FIELD_CHARACTERS", 100)
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
    with patch.object(table_reader, "hash", digest, create=True):
        if not bad:
            assert list(read_table(path).ids) == ids
        else:
            with pytest.raises(InputError) as refused:
                read_table(path)
            assert f"({'; '.join(bad[:3])})" in str(refused.value)


def test_only_the_first_bad_ids_are_named(tmp_path):
    rows = "".join(f"same,a.jpg,q{index}\n" for index in range(9))
    with pytest.raises(InputError) as refusal:
        table(tmp_path, f"question_id,image_id,question\n{rows}".encode())
    assert str(refusal.value).count("is there already") == 3


BOTH = ["question_id", "image_id", "image_name", "question", "answer", "gt_answer", "ground_truth_answer"]
A, B = Path("a"), Path("b")


def chosen(known: dict[str, str] | None = None, **files: list[Path | None]) -> tuple[str, str, str]:
    """Of a header in which several columns could be meant: picture and ground truth, and why this picture."""
    columns = choose(BOTH, known, files or None)
    return columns.names["image_id"], columns.names["answer"], columns.reasons["image_id"]


def test_the_picture_is_the_column_whose_values_are_files_and_the_truth_no_models_answer():
    none = [None] * 4
    assert chosen(image_id=none, image_name=[A, A, None, A]) == (
        *("image_name", "gt_answer", "3 of its first 4 values are files, 0 of image_id's"),
    )
    assert chosen(image_id=[None, A, None, None], image_name=none)[0] == "image_id"
    assert chosen(image_id=[None, A, None, None], image_name=[B, B, B, None])[0] == "image_name"
    assert chosen(image_id=[A, B], image_name=[A, B]) == ("image_id", "gt_answer", "image_name names the same files")
    other = "2 of its first 2 values are files, 2 of image_name's, which are other ones"
    assert chosen(image_id=[A, A], image_name=[B, A]) == ("image_id", "gt_answer", other)
    reasons = choose(BOTH).reasons
    assert reasons["answer"] == "rather than ground_truth_answer and answer, which may be a model's"
    assert choose(BOTH[:2] + BOTH[3:5]).reasons == {}


def test_a_run_keeps_the_columns_that_it_was_begun_with():
    begun = {"question_id": "question_id", "image_id": "image_name", "question": "question", "answer": "answer"}
    assert undecided(BOTH, begun) == undecided(BOTH, {}) == []
    assert chosen(begun)[:2] == ("image_name", "answer")
    assert chosen({})[:2] == ("image_id", "answer"), "so did those that do not remember them"
    assert clean(["image_id ", "answer"], begun) == clean(["image_id ", "answer"]) == ["image_id", "answer"]
    assert clean(["image_id ", "answer"], {}) == ["image_id ", "answer"]
    assert undecided(BOTH, None) == undecided(BOTH, {**begun, "image_id": "picture"}) == ["image_id", "image_name"]
    assert undecided(BOTH[:2] + BOTH[3:], None) == []


@pytest.fixture
def two_columns(tmp_path) -> Path:
    """A folder with a table whose image_id is a number, and the pictures that image_name names."""
    (tmp_path / "images").mkdir()
    rows = "".join(f"{number},{number},{number}.jpg,Why?,a model's,no\n" for number in range(9))
    (tmp_path / "vqa.csv").write_text(f"question_id,image_id,image_name,question,answer,gt_answer\n{rows}")
    for number in range(2, 9):
        (tmp_path / "images" / f"{number}.jpg").touch()
    return tmp_path


def begin(folder: Path, *options: str) -> Table:
    """The table as the extraction reads it."""
    inputs = ["--vqa-dataset", folder / "vqa.csv", "--images-dir", folder / "images", "--output-dir", folder / "out"]
    return read_input(parse_extract(None, [*map(str, inputs), *options]))[0]


def remember(folder: Path, columns: dict[str, str] | None) -> Run:
    """Begin a run with these columns, or as an earlier version did."""
    kept = read_table(folder / "vqa.csv", columns or {})
    run = replace(random_run(len(kept), kept.fingerprint(), [0], 4, 4), columns=columns or {})
    (folder / "out").mkdir()
    claim_run(folder / "out", run)
    keep_rows(folder / "out", lambda target: shutil.copy(folder / "vqa.csv", target))
    if columns is None:
        told = json.loads((folder / "out" / "run.json").read_text())
        del told["columns"]
        (folder / "out" / "run.json").write_text(json.dumps(told))
    return read_run(folder / "out")


def test_of_two_columns_the_one_that_names_files_is_taken_and_said(two_columns):
    read = begin(two_columns)
    assert read.row(3) == ["3", "3.jpg", "Why?", "no"]
    assert read.columns.describe() == (
        "question_id, image_name as the picture (7 of its first 9 values are files, 0 of image_id's), question, "
        "gt_answer as the ground truth (rather than answer, which may be a model's)"
    )
    assert begin(two_columns, "--test").columns == read.columns


def test_where_neither_column_names_files_both_are_named(two_columns):
    shutil.rmtree(two_columns / "images")
    (two_columns / "images").mkdir()
    with pytest.raises(InputError) as refused:
        begin(two_columns)
    assert (
        "has the columns image_id and image_name, and the first values of neither are pictures (such as '0' and "
        in (str(refused.value))
    )


def test_a_run_keeps_its_columns_when_the_pictures_are_gone_and_so_does_its_merge(two_columns):
    names = dict(begin(two_columns).columns.names)
    run = remember(two_columns, names)
    shutil.rmtree(two_columns / "images")
    (two_columns / "images").mkdir()
    (two_columns / "images" / "3").touch()
    assert begin(two_columns).fingerprint() == run.rows_sha256
    assert read_run_rows(two_columns / "out", run).row(3) == ["3", "3.jpg", "Why?", "no"]


def test_a_run_of_an_earlier_version_keeps_the_columns_that_it_chose(two_columns):
    run = remember(two_columns, None)
    assert run.columns == {}
    assert read_run_rows(two_columns / "out", run).row(3) == ["3", "3", "Why?", "a model's"]
    again = begin(two_columns)
    assert again.fingerprint() == run.rows_sha256
    assert "image_id as the picture (as in the run that is there)" in again.columns.describe()


def test_of_two_launches_that_begin_at_once_the_one_that_chose_other_columns_is_refused(two_columns):
    late = begin(two_columns)
    for picture in list((two_columns / "images").iterdir()):
        picture.rename(picture.with_suffix(""))
    run = remember(two_columns, dict(begin(two_columns).columns.names))
    wanted = replace(run, rows_sha256=late.fingerprint(), columns=dict(late.columns.names))
    with pytest.raises(InputError, match=r"columns: question_id, image_id, .* there, question_id, image_name, .* now"):
        claim_run(two_columns / "out", wanted)
