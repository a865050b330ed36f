"""Which column of a table holds what: decided by its header, what the run has recorded, and which values are files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# The roles of a column, each named like the column that says it most plainly.
IDENTITY, IMAGE, QUESTION, TRUTH = ROLES = ("question_id", "image_id", "question", "answer")
NEEDED = (IDENTITY, IMAGE, QUESTION)
NAMES = {
    IDENTITY: ("question_id",),
    IMAGE: ("image_id", "image_name"),
    QUESTION: ("question",),
    TRUTH: ("gt_answer", "ground_truth_answer", "answer"),  # "answer" may be a model's
}
# As in the first versions, whose runs do not record their columns.
NAMES_OF_FIRST_VERSIONS = {**NAMES, TRUTH: ("answer", "gt_answer", "ground_truth_answer")}
AS_RECORDED = "as in the run that is there"
SHOWN_DELIMITERS = {"\t": "tab"}

Files = Mapping[str, Sequence[Path | None]]  # by column, the file of each of some values, or None


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read.

    Attributes:
        names: by role, as in `ROLES`; without `TRUTH` if the table has none.
        reasons: by role, why this column was chosen, if there was another one.
        delimiter: between the fields of the CSV.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    delimiter: str = ","

    def describe(self) -> str:
        """The choice, with its reasons, as a sentence."""
        phrases = [self._describe(IDENTITY), self._describe(IMAGE, "the picture"), self._describe(QUESTION)]
        phrases.append(self._describe(TRUTH, "the ground truth") if TRUTH in self.names else "no ground truth")
        delimiter = SHOWN_DELIMITERS.get(self.delimiter, repr(self.delimiter))
        return ", ".join(phrases) + (f"; delimiter {delimiter}" if self.delimiter != "," else "")

    def _describe(self, role: str, meaning: str = "") -> str:
        reason = f" ({self.reasons[role]})" if role in self.reasons else ""
        return self.names[role] + (f" as {meaning}" if meaning else "") + reason


def clean(header: Sequence[str], known: Mapping[str, str] | None = None) -> list[str]:
    """The names of a header without blanks and byte-order marks around them, unless that would make two the same.

    For a run of a first version they are left unchanged: it took them for other names.
    """
    if _is_of_first_version(known):
        return list(header)
    bare = [name.strip().strip("\ufeff").strip() for name in header]
    return [name if short in header else short for name, short in zip(header, bare, strict=True)]


def count_needed(header: Sequence[str]) -> int:
    """How many of the `NEEDED` columns a header has."""
    found = find(clean(header))
    return sum(bool(found[role]) for role in NEEDED)


def find(header: Sequence[str], names: Mapping[str, Sequence[str]] = NAMES) -> dict[str, list[str]]:
    """The columns of a clean header that may have each role, the preferred one first."""
    return {role: [name for name in names[role] if name in header] for role in ROLES}


def undecided(header: Sequence[str], known: Mapping[str, str] | None) -> list[str]:
    """The columns that may name the pictures, if the header and the run leave a choice; otherwise empty.

    Args:
        header: clean.
        known: as for `choose`.
    """
    images = find(header)[IMAGE]
    recorded = _is_of_first_version(known) or (known or {}).get(IMAGE) in images
    return [] if recorded or len(images) < 2 else images


def choose(header: Sequence[str], known: Mapping[str, str] | None = None, files: Files | None = None) -> Columns:
    """Choose the columns of a table.

    Args:
        header: clean, and with all `NEEDED` columns.
        known: the columns of the run that the table belongs to, by role; empty for a run of a first version, None if
            there is no run yet.
        files: of each `undecided` column, the files that its first values name.
    """
    found = find(header, NAMES_OF_FIRST_VERSIONS if _is_of_first_version(known) else NAMES)
    names, reasons = {}, {}
    for role, present in found.items():
        if not present:
            continue
        names[role], why = present[0], f"rather than {' and '.join(present[1:])}"
        if known is not None and known.get(role, present[0]) in present:
            names[role], why = known.get(role, present[0]), AS_RECORDED
        elif role == IMAGE and files:
            names[role], why = _choose_image(present, files)
        elif role == TRUTH and "answer" in present[1:]:
            why += ", which may be a model's"
        if len(present) > 1:
            reasons[role] = why
    return Columns(names, reasons)


def _is_of_first_version(known: Mapping[str, str] | None) -> bool:
    return known is not None and not known


def _choose_image(present: Sequence[str], files: Files) -> tuple[str, str]:
    """The first column at least half of whose values are files, else the one with the most files; and why."""
    counts = {name: sum(path is not None for path in files[name]) for name in present}
    half = [name for name in present if 2 * counts[name] >= len(files[name])]
    chosen = half[0] if half else max(present, key=counts.__getitem__)
    other = next(name for name in present if name != chosen)
    if files[chosen] == files[other]:
        return chosen, f"{other} names the same files"
    shares = f"{counts[chosen]} of its first {len(files[chosen])} values are files, {counts[other]} of {other}'s"
    return chosen, f"{shares}, which are other ones" if counts[other] else shares
