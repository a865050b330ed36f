"""What a program has done to a table on its way is said before the work, of any table and of no other."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from vqa_embeddings import table as tables
from vqa_embeddings.survey import survey
from vqa_embeddings.table import Table


def told(ids: Sequence[str] = "12", images: Sequence[str] = "ab", questions: Sequence[str] = "??") -> list[str]:
    """What is said of a table of two rows."""
    return list(survey(Table(ids, images, questions, ["", "nan"])))


def test_nothing_is_said_of_a_table_that_looks_right():
    assert (
        told() == told(ids=["1e5", "1.0"], images=["1.0", "1e+x"]) == told(questions=["Name?", "None of them?"]) == []
    )
    assert told(ids=["0x1e+05", "C+"], questions=["nan?", "1e+05"]) == []


def test_what_a_program_has_probably_changed_is_counted_and_shown():
    assert told(questions=["", "\t \n"]) == ["no question in 2 rows, first '1': recorded as failed"]
    assert told(images=["", "x"]) == ["no image_id in row '1': recorded as failed"]
    for text in ("nan", "NaN", "None", "null", "NULL", "<NA>"):
        assert told(questions=["Why?", text]) == [
            f"question '{text}' in row '2': it looks like a missing value, and is asked as it stands"
        ]
    assert "image_id 'nan' in 2 rows, first '1': it looks like" in told(images=["nan", "nan"])[0]
    assert "question_id is '139.0' and the like in all rows, which pandas makes" in told(ids=["139.0", "2.0"])[0]
    assert "image_id is '139.0' and the like in all rows" in told(images=["", "139.0"])[1]
    assert told(ids=["7", "1.39E+05"])[0].startswith("question_id '1.39E+05' in row '1.39E+05': such numbers may have")
    assert told(ids=["1e+16", "7"])[0].startswith("question_id '1e+16' in row '1e+16'")


@given(st.lists(st.tuples(*[st.sampled_from(["", " ", "nan", "1e+05", "5.0", "Nö", "a+b"])] * 4), max_size=7))
def test_what_is_counted_is_there_whatever_stands_beside_it(rows):
    expected = []
    for what, place in (("no image_id", 1), ("image_id 'nan'", 1), ("no question", 2), ("question 'nan'", 2)):
        count = sum(row[place] == "nan" if "nan" in what else not row[place].strip() for row in rows)
        expected += [f"{what} in {f'{count} rows' if count > 1 else 'row'}"] * bool(count)
    for name, place in (("question_id", 0), ("image_id", 1)):
        column = [row[place] for row in rows]
        expected += [f"{name} is '5.0'"] * ("5.0" in column and set(column) <= {"5.0", ""})
        count = column.count("1e+05")
        expected += [f"{name} '1e+05' in {f'{count} rows' if count > 1 else 'row'}"] * bool(count)
    with patch.object(tables, "BLOCK_ROWS", 2):
        said = list(survey(Table.from_rows(rows)))
    assert len(said) == len(expected)
    assert all(sentence.startswith(begin) for sentence, begin in zip(said, expected, strict=True))
