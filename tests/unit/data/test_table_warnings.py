"""Values that another program has changed are warned of before the work, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from vqa_embeddings.data import table as tables
from vqa_embeddings.data.table import Table
from vqa_embeddings.data.table_reader import read_table
from vqa_embeddings.data.table_warnings import find_warnings


def told(ids: Sequence[str] = "12", images: Sequence[str] = "ab", questions: Sequence[str] = "??") -> list[str]:
    """The warnings about a table of two rows."""
    return list(find_warnings(Table(ids, images, questions, ["", "nan"])))


def test_nothing_is_said_of_a_table_that_looks_right():
    assert told() == told(ids=["1e5", "1.05"], images=["v1.0", "1e+x"]) == told(questions=["Name?", "None of them?"])
    assert told() == told(ids=["0x1e+05", "C+"], questions=["nan?", "1e+05"]) == told(questions=["1.0", "う"]) == []


def test_what_a_program_has_probably_changed_is_counted_and_shown():
    assert told(questions=["", "\t \n"]) == ["no question in 2 rows, first '1': recorded as failed"]
    assert told(questions=["\u3000\xa0", "\u2003"]) == ["no question in 2 rows, first '1': recorded as failed"]
    assert told(images=["", "x"]) == ["no image_id in row '1': recorded as failed"]
    for text in ("nan", "NaN", "None", "null", "NULL", "<NA>"):
        assert told(questions=["Why?", text]) == [
            f"question '{text}' in row '2': it looks like a missing value, and is taken as it stands"
        ]
    assert "image_id 'nan' in 2 rows, first '1': it looks like" in told(images=["nan", "nan"])[0]
    assert told(ids=["139.0", "2.0"])[0].startswith(
        "question_id '139.0' in 2 rows, first '139.0': pandas makes such of"
    )
    assert told(images=["", "139.0"])[1].startswith("image_id '139.0' in row '2': pandas makes such of whole numbers")
    assert told(ids=["7", "1.39E+05"])[0].startswith("question_id '1.39E+05' in row '1.39E+05': such numbers may have")
    assert told(ids=["1e+16", "7"])[0].startswith("question_id '1e+16' in row '1e+16'")
    assert len(told(ids=["x" * 5000, "2"], questions=["nan", ""])[0]) < 500


def test_rows_that_a_quotation_mark_has_swallowed_are_pointed_out(tmp_path):
    path = tmp_path / "vqa.tsv"
    rows = '1\ta.jpg\t"stop\n2\tb.jpg\tgo"\n3\tc.jpg\t"two\nlines"\n'
    path.write_text(f"question_id\timage_id\tquestion\n{rows}")
    assert [said.partition(":")[0] for said in find_warnings(read_table(path))] == [
        "question 'stop\\n2\\tb.jpg\\tgo' in row '1'"
    ]


@given(st.lists(st.tuples(*[st.sampled_from(["", " ", "nan", "1e+05", "5.0", "Nö", "a+b"])] * 4), max_size=7))
def test_what_is_counted_is_there_whatever_stands_beside_it(rows):
    expected = []
    for texts, place, shown in (
        (("", " "), 1, "no image_id"),
        (("", " "), 2, "no question"),
        (("nan",), 1, "image_id 'nan'"),
        (("nan",), 2, "question 'nan'"),
        *(
            ((text,), place, f"{('question_id', 'image_id')[place]} '{text}'")
            for text in ("5.0", "1e+05")
            for place in (0, 1)
        ),
    ):
        count = sum(row[place] in texts for row in rows)
        expected += [f"{shown} in {f'{count} rows' if count > 1 else 'row'}"] * bool(count)
    with patch.object(tables, "BLOCK_ROWS", 2):
        said = list(find_warnings(Table.from_rows(rows)))
    assert len(said) == len(expected)
    assert all(sentence.startswith(begin) for sentence, begin in zip(said, expected, strict=True))
