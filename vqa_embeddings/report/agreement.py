"""Whether a model's answer says what the ground truth says. Pure functions of texts."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable

YES_NO = ("yes", "no")
OTHER = "other"
LEFT_OUT = {"a", "an", "the"}
LONGEST_LIST = 1 << 16  # characters: a longer one is none of answers, and might take all memory to parse
QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
NUMPY_LIST = re.compile(rf"\[\s*(?:{QUOTED})(?:\s+(?:{QUOTED}))*\s*\]", re.DOTALL)


def agrees(answer: str, truth: str) -> bool | None:
    """Whether they agree; None where there is no ground truth.

    Of a truth that is yes or no the answer's first word counts; any other has to stand in the answer, word for word,
    whatever the case, the punctuation and the articles. Of a truth that is a list, one of its answers has to agree.
    """
    verdicts = [_agrees(answer, accepted) for accepted in accepted_answers(truth)]
    return None if all(one is None for one in verdicts) else any(verdicts)


def _agrees(answer: str, truth: str) -> bool | None:
    expected, found = words(truth), words(answer)
    if not expected:
        return None
    if expected[0] in YES_NO and len(expected) == 1:
        return verdict(answer) == expected[0]
    return f" {' '.join(expected)} " in f" {' '.join(found)} "


def accepted_answers(truth: str) -> list[str]:
    """The answers that a ground truth accepts: those of a list of texts, or of VQAv2's annotations; else itself.

    A list is written as JSON, Python or NumPy do. Numbers without quotation marks are no answers, but may be a box.
    """
    text = truth.strip()
    if not text.startswith(("[", "(")) or len(text) > LONGEST_LIST:
        return [truth]
    items = _parse_list(text)
    given = [item.get("answer") if isinstance(item, dict) else item for item in items]
    answers = [answer for answer in given if isinstance(answer, str)]
    others = [answer for answer in given if not isinstance(answer, str) and answer is not None]
    return [truth] if others or not answers else answers


def _parse_list(text: str) -> list[object] | tuple[object, ...]:
    """What a list holds, empty where it is none."""
    if NUMPY_LIST.fullmatch(text):  # which Python would read as one long text
        text = f"[{', '.join(re.findall(QUOTED, text))}]"
    as_numpy_writes_dicts = re.sub(r"\}\s+\{", "}, {", text)  # without commas between them
    for parse, form in ((json.loads, text), (_parse_python, text), (_parse_python, as_numpy_writes_dicts)):
        try:
            found = parse(form)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        return found if isinstance(found, (list, tuple)) else []
    return []


def _parse_python(text: str) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of backslashes that Python would not have written
        return ast.literal_eval(text)


def usual_answer(truth: str) -> str:
    """The words of the answer that a ground truth gives most often; "" where two are given as often, or none is."""
    texts = (" ".join(words(answer)) for answer in accepted_answers(truth))
    counts = Counter(filter(None, texts)).most_common(2)
    return counts[0][0] if len(counts) == 1 or (counts and counts[0][1] > counts[1][1]) else ""


def verdict(answer: str) -> str:
    """ "yes" or "no", whichever the answer begins with, else "other"."""
    first = words(answer)[:1]
    return first[0] if first and first[0] in YES_NO else OTHER


def count_yes_no(pairs: Iterable[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """How often each (truth, verdict) comes, of the `(answer, truth)` whose truth is yes or no.

    A row has one place in this table, so that a list of answers counts as what most of them say.
    """
    usual = ((answer, usual_answer(truth)) for answer, truth in pairs)
    return Counter((truth, verdict(answer)) for answer, truth in usual if truth in YES_NO)


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and articles; of one that has only articles, those."""
    found = re.findall(r"\w+", text.casefold())
    return [word for word in found if word not in LEFT_OUT] or found
