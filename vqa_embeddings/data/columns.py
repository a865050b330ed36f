"""Which column of a table is taken for what. Pure: its header, what a run remembers and what is a file decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# What a column can be taken for, each named as the column that says it most plainly.
IDENTITY, IMAGE, QUESTION, TRUTH = ROLES = ("question_id", "image_id", "question", "answer")
NEEDED = (IDENTITY, IMAGE, QUESTION)
NAMES = {
    IDENTITY: ("question_id",),
    IMAGE: ("image_id", "image_name"),
    QUESTION: ("question",),
    TRUTH: ("gt_answer", "ground_truth_answer", "answer"),  # the last may be what some model has answered
}
# As runs were begun that do not remember their columns.
EARLIER = {**NAMES, TRUTH: ("answer", "gt_answer", "ground_truth_answer")}
REMEMBERED = "as in the run that is there"
SHOWN_DELIMITERS = {"\t": "tab"}

Files = Mapping[str, Sequence[Path | None]]


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read.

    Attributes:
        names: by role, as in `ROLES`; without `TRUTH` where the table has none.
        reasons: by role, why this one, where another could be meant.
        delimiter: what stands between the fields.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    delimiter: str = ","

    def describe(self) -> str:
        """The choice, with its reasons, as a sentence."""
        said = [self._say(IDENTITY), self._say(IMAGE, "the picture"), self._say(QUESTION)]
        said.append(self._say(TRUTH, "the ground truth") if TRUTH in self.names else "no ground truth")
        shown = SHOWN_DELIMITERS.get(self.delimiter, repr(self.delimiter))
        return ", ".join(said) + (f"; delimiter {shown}" if self.delimiter != "," else "")

    def _say(self, role: str, meaning: str = "") -> str:
        reason = f" ({self.reasons[role]})" if role in self.reasons else ""
        return self.names[role] + (f" as {meaning}" if meaning else "") + reason


def clean(header: Sequence[str], known: Mapping[str, str] | None = None) -> list[str]:
    """The names of a header without blanks and byte-order marks around them, unless another name is the same then.

    Those of a run that does not remember its columns stay as they are: to it they were other names.
    """
    if _is_of_earlier_version(known):
        return list(header)
    bare = [name.strip().strip("\ufeff").strip() for name in header]
    return [name if short in header else short for name, short in zip(header, bare, strict=True)]


def count_needed(header: Sequence[str]) -> int:
    """How many of the columns that a table needs its header names."""
    found = find(clean(header))
    return sum(bool(found[role]) for role in NEEDED)


def find(header: Sequence[str], names: Mapping[str, Sequence[str]] = NAMES) -> dict[str, list[str]]:
    """The columns of a clean header that could be meant, by role and in order of preference."""
    return {role: [name for name in names[role] if name in header] for role in ROLES}


def undecided(header: Sequence[str], known: Mapping[str, str] | None) -> list[str]:
    """The columns of a clean header of which only the files can say which one names the pictures; mostly none."""
    images = find(header)[IMAGE]
    remembered = _is_of_earlier_version(known) or (known or {}).get(IMAGE) in images
    return [] if remembered or len(images) < 2 else images


def choose(header: Sequence[str], known: Mapping[str, str] | None = None, files: Files | None = None) -> Columns:
    """Choose the columns of a table.

    Args:
        header: clean, and with all columns that are `NEEDED`.
        known: those of the run that the table belongs to, by role; empty of a run that does not remember them, None
            where there is no run.
        files: of each `undecided` column, where the files of its first values lie, None for each that is none.
    """
    found = find(header, EARLIER if _is_of_earlier_version(known) else NAMES)
    names, reasons = {}, {}
    for role, present in found.items():
        if not present:
            continue
        names[role], why = present[0], f"rather than {' and '.join(present[1:])}"
        if known is not None and known.get(role, present[0]) in present:
            names[role], why = known.get(role, present[0]), REMEMBERED
        elif role == IMAGE and files:
            names[role], why = _choose_image(present, files)
        elif role == TRUTH and "answer" in present[1:]:
            why += ", which may be a model's"
        if len(present) > 1:
            reasons[role] = why
    return Columns(names, reasons)


def _is_of_earlier_version(known: Mapping[str, str] | None) -> bool:
    return known is not None and not known


def _choose_image(present: Sequence[str], files: Files) -> tuple[str, str]:
    """The first column of which half of the values are files, else the one with the most of them; and why."""
    counts = {name: sum(path is not None for path in files[name]) for name in present}
    half = [name for name in present if 2 * counts[name] >= len(files[name])]
    chosen = half[0] if half else max(present, key=counts.__getitem__)
    other = next(name for name in present if name != chosen)
    if files[chosen] == files[other]:
        return chosen, f"{other} names the same files"
    shares = f"{counts[chosen]} of its first {len(files[chosen])} values are files, {counts[other]} of {other}'s"
    return chosen, f"{shares}, which are other ones" if counts[other] else shares
