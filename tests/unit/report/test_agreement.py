"""Whether an answer agrees with its ground truth, which may be a list in any notation."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from vqa_embeddings.report.agreement import accepted_answers, agrees, count_yes_no, verdict


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
