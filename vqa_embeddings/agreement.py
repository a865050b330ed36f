"""Whether a model's answer says what the ground truth says. Pure functions of texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

YES_NO = ("yes", "no")
OTHER = "other"
LEFT_OUT = {"a", "an", "the"}


def agrees(answer: str, truth: str) -> bool | None:
    """Whether they agree; None where there is no ground truth.

    Of a truth that is yes or no the answer's first word counts; any other has to stand in the answer, word for word,
    whatever the case, the punctuation and the articles.
    """
    expected, found = words(truth), words(answer)
    if not expected:
        return None
    if expected[0] in YES_NO and len(expected) == 1:
        return verdict(answer) == expected[0]
    return f" {' '.join(expected)} " in f" {' '.join(found)} "


def verdict(answer: str) -> str:
    """ "yes" or "no", whichever the answer begins with, else "other"."""
    first = words(answer)[:1]
    return first[0] if first and first[0] in YES_NO else OTHER


def count_yes_no(pairs: Iterable[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """How often each (truth, verdict) comes, of the `(answer, truth)` whose truth is yes or no."""
    return Counter((words(truth)[0], verdict(answer)) for answer, truth in pairs if words(truth) in (["yes"], ["no"]))


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and articles; of one that has only articles, those."""
    found = re.findall(r"\w+", text.casefold())
    return [word for word in found if word not in LEFT_OUT] or found
