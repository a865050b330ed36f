"""`--self-check N`: some rows of a run, extracted as all are, against another implementation of the model.

The other one comes first and goes again before the model is loaded, so that a GPU needs to hold one of them at a time,
and the plan's figures of memory stay true. The rows are then extracted together in one batch, two neighbours each time,
which mostly share a picture: so batches, shared prefixes and captured graphs are part of what is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TypeVar

import numpy as np

from vqa_embeddings.app.assignment import Assignment
from vqa_embeddings.app.extract import extract
from vqa_embeddings.app.launch import LaunchSetup
from vqa_embeddings.data.decode_options import DecodeOptions
from vqa_embeddings.data.decode_pool import DecodePool
from vqa_embeddings.errors import InputError, QuestionEmpty, RowError, SelfCheckError, StorageError, one_line
from vqa_embeddings.layers.device import is_out_of_memory, release_memory
from vqa_embeddings.models.base import Reference, ReferenceRow, VisionLanguageModel
from vqa_embeddings.records import Extracted, Failed
from vqa_embeddings.schema import by_path, path_of
from vqa_embeddings.store.self_check import SelfCheck, VectorCheck, record_self_check

T = TypeVar("T")

TOGETHER = 2  # neighbouring rows that are taken at each place
FRUITLESS = 100  # rows that are passed over in all, after which no further one is tried
LARGEST = 4  # values: in trained decoders a few dwarf all others, and errors relative to them hide in the rest
FLOAT32_ERROR = 1e-4  # the project's promise for a row; 1e-6 to 4e-6 are measured, at full size too
# Rounding alone moves a vector of a trained decoder in bfloat16 by a cosine of 0.99922 from float32, and by an error of
# 0.13, this program's and the library's alike (tests/benchmarks/RESULTS.md). Two such computations may differ by the
# sum of both, 0.9984 and 0.26: the bounds leave three times as much of 1 - cosine, and twice the error. In float16 the
# sums are 0.9999 and 0.05. The error is bounded too, as a cosine sees no scale: a state before its norm, say.
COSINES = {"bfloat16": 0.995, "float16": 0.999}
ERRORS = {"bfloat16": 0.5, "float16": 0.1}
# In 16 bits an answer may turn at any near tie, but hardly all of several within their first two or three tokens.
ANSWERS = 3  # from so many on, one of them has to begin like the reference's
BEGINNING = 8  # characters: more than the first token, which alone comes from the prompt without the cache


@dataclass(frozen=True)
class Difference:
    """How far a vector is from another, the worse of two ways: in all values, and without the few largest.

    Attributes:
        error: largest difference over the largest value.
        cosine: of the angle between them.
    """

    error: float
    cosine: float


@dataclass(frozen=True)
class Tolerance:
    """How far a vector may be from the reference's, and whether answers have to be equal letter for letter.

    Where they need not be equal, one of `ANSWERS` or more has to begin with the same `BEGINNING` characters.
    """

    error: float
    cosine: float
    answers: bool

    def accepts(self, vector: VectorCheck) -> bool:
        """Whether a vector is near enough. NaN is not."""
        return vector.error <= self.error and vector.cosine >= self.cosine

    def exhausted(self, vector: VectorCheck) -> float:
        """How much of what is allowed a vector takes: above 1 where it is too far."""
        return max(vector.error / self.error, (1 - vector.cosine) / (1 - self.cosine))

    def __str__(self) -> str:
        if self.answers:
            return f"an error of {self.error:.0e} at most and equal answers"
        near = f"a cosine of {self.cosine} or more and an error of {self.error} at most"
        return f"{near}, and one of {ANSWERS} or more answers to begin with the same {BEGINNING} characters"


def tolerance_of(dtype: str) -> Tolerance:
    """What two computations in a number format may differ by. In 16 bits answers turn at near ties, and may."""
    if dtype in COSINES:
        return Tolerance(ERRORS[dtype], COSINES[dtype], answers=False)
    return Tolerance(FLOAT32_ERROR, cosine=-1.0, answers=True)


def compare(found: np.ndarray, expected: np.ndarray) -> Difference:
    """How far a vector is from what it should be, both float `[size]`; as far as can be where one is not finite."""
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return Difference(np.inf, -1.0)
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    rest = np.argsort(np.abs(expected), kind="stable")[: len(expected) - min(LARGEST, len(expected) // 8)]
    pairs = ((found, expected), (found[rest], expected[rest]))
    return Difference(max(_error(*pair) for pair in pairs), min(_cosine(*pair) for pair in pairs))


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-30))


def _cosine(found: np.ndarray, expected: np.ndarray) -> float:
    norms = float(np.linalg.norm(found) * np.linalg.norm(expected))
    return min(1.0, float(found @ expected) / norms) if norms else float(np.array_equal(found, expected))


def compare_all(
    found: Iterable[Mapping[str, np.ndarray]], expected: Iterable[Mapping[str, np.ndarray]], layers: Sequence[int]
) -> list[VectorCheck]:
    """Each vector that both have, at its worst in all rows; the largest error first.

    Args:
        found, expected: the vectors of each row by their names, those of several layers as `[layers, size]`.
    """
    worst: dict[str, tuple[float, float]] = {}
    places: dict[str, tuple[str, int | None]] = {}
    for ours, theirs in zip(found, expected, strict=True):
        both = [name for name in theirs if name in ours]
        places |= {path_of(name, layer): (name, layer) for name in both for layer in (None, *layers)}
        wanted = dict(by_path({name: theirs[name] for name in both}, layers))
        for path, vector in by_path({name: ours[name] for name in both}, layers):
            one, (error, cosine) = compare(vector, wanted[path]), worst.get(path, (0.0, 1.0))
            worst[path] = max(error, one.error), min(cosine, one.cosine)
    checks = [VectorCheck(*places[path], *numbers) for path, numbers in worst.items()]
    return sorted(checks, key=lambda check: -check.error)


def choose_rows(rows: Sequence[int], wanted: int, take: Callable[[int], T | None]) -> Iterator[tuple[int, T]]:
    """So many of the rows, from places that are spread evenly over them, with what `take` makes of each.

    Args:
        rows: the questions on one picture one after another.
        take: gives None for a row that cannot be used; the next one is tried instead.
    """
    places = -(-wanted // TOGETHER)
    begins = [place * len(rows) // places for place in range(places)]
    left, passed = wanted, 0
    tried: set[int] = set()
    for begin, most in (*((begin, TOGETHER) for begin in begins), (0, wanted)):  # the last for what is lacking then
        taken = 0
        for position in range(begin, len(rows)):
            if not left or taken == most or passed == FRUITLESS:
                break
            if position in tried:
                continue
            tried.add(position)
            made = take(rows[position])
            if made is None:
                passed += 1
            else:
                left, taken = left - 1, taken + 1
                yield rows[position], made


def judge(
    setup: LaunchSetup, reference: str, expected: Mapping[int, ReferenceRow], records: Mapping[int, Extracted | Failed]
) -> SelfCheck:
    """Compare what was extracted with what the reference gives, and say whether they are near enough.

    Args:
        reference: what the expected values are from.
        expected: by row.
        records: likewise.
    """
    ids, tolerance = setup.table.ids, tolerance_of(setup.dtype.value)
    failed = [one for one in records.values() if isinstance(one, Failed)]
    extracted = {row: one for row, one in records.items() if isinstance(one, Extracted)}
    vectors = compare_all(
        [one.vectors for one in extracted.values()], [expected[row].vectors for row in extracted], setup.run.layers
    )
    others = [row for row, one in extracted.items() if one.answer != expected[row].answer]
    lost = [row for row in expected if row not in records]
    compared = {path_of(vector.name, vector.layer) for vector in vectors}
    left_out = [column.path for column in setup.run.vectors if column.path not in compared]
    begin_alike = [row for row, one in extracted.items() if _begin_alike(one.answer, expected[row].answer)]
    fault = ""
    if failed:
        one = failed[0]
        fault = f"row {ids[one.row]!r} fails here and not there ({one.error}: {one.message})"
    elif lost:
        fault = f"row {ids[lost[0]]!r} is neither extracted nor failed here"
    elif left_out:
        fault = f"{left_out[0]} is stored and was not compared"
    elif beyond := [vector for vector in vectors if not tolerance.accepts(vector)]:
        worst = max(beyond, key=tolerance.exhausted)
        by = f"by {worst.error:.1e} of its largest value, cosine {worst.cosine:.6f}"
        fault = f"{worst} differs from it {by}; expected {tolerance}"
    elif others:
        given, wanted = extracted[others[0]].answer, expected[others[0]].answer
        shown = f"the answer to row {ids[others[0]]!r} is {_shortened(given)} and not {_shortened(wanted)}"
        if tolerance.answers:
            fault = f"{shown}; expected {tolerance}"
        elif len(extracted) >= ANSWERS and not begin_alike:
            fault = f"none of {len(extracted)} answers begins like the reference's: {shown}; expected {tolerance}"
    return SelfCheck(
        reference=reference,
        dtype=setup.dtype.value,
        device=setup.device.description,
        rows=[ids[row] for row in expected],
        vectors=vectors,
        answers_equal=len(extracted) - len(others),
        allowed=str(tolerance),
        passed=not fault,
        fault=fault,
        checked_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _begin_alike(answer: str, wanted: str) -> bool:
    return answer[:BEGINNING] == wanted[:BEGINNING]


def _shortened(answer: str, longest: int = 60) -> str:
    return repr(answer if len(answer) <= longest else answer[:longest] + "…")


class SelfChecker:
    """Holds what the reference makes of some rows, until the model has extracted them too.

    The reference is loaded, asked, and gone when this is made.

    Raises:
        InputError: there is no reference, it does not load, or none of the rows that were tried can be used.
    """

    def __init__(self, setup: LaunchSetup, assignment: Assignment) -> None:
        self._setup = setup
        self._reference = setup.checkpoint.family.describe_reference(setup.checkpoint)
        self._decode_options = DecodeOptions(setup.options.max_megapixels, setup.options.truncated_pictures == "show")
        # Where all rows are done they are checked all the same, for those who want to know afterwards.
        rows = assignment.rows if len(assignment.rows) else np.argsort(assignment.pictures, kind="stable")
        self._reasons: list[str] = []
        self._expected = self._ask(rows.tolist())
        release_memory(setup.device.name)
        if not self._expected:
            raise InputError(
                f"--self-check was asked for, and none of the {len(self._reasons)} rows that were tried can be used, "
                f"the first one because: {self._reasons[0]}; correct that, or leave out --self-check"
            )

    def check(self, model: VisionLanguageModel) -> SelfCheck:
        """Extract the rows with the model, all in one batch, and compare.

        Raises:
            SelfCheckError: they differ by more than the number format explains; the run that is there, if any, says so.
        """
        setup = self._setup
        rows = sorted(self._expected, key=lambda row: (setup.table.images[row], row))
        found = extract(
            model,
            setup.table,
            rows,
            setup.folder,
            batch_size=setup.options.batch_size,
            workers=1,
            decode_options=self._decode_options,
        )
        records = {record.row: record for some in found for record in some}
        del found
        release_memory(setup.device.name)
        check = judge(setup, self._reference, self._expected, records)
        if check.passed:
            return check
        with suppress(StorageError, InputError):  # what was found matters more than that it cannot be recorded
            record_self_check(setup.options.output_dir, check)  # an earlier one must not go on saying that all is well
        raise SelfCheckError(
            f"the self-check against {self._reference} has failed: {check.fault}; this rank has committed nothing, "
            "and its vectors are not to be trusted: see whether --attn-implementation eager or --batch-size 1 passes, "
            "download the checkpoint again, and report it with the plan's lines"
        )

    def _ask(self, rows: list[int]) -> dict[int, ReferenceRow]:
        """What the reference makes of the rows that are chosen."""
        setup = self._setup
        try:
            reference = setup.checkpoint.family.reference(setup.checkpoint, setup.device.name, setup.dtype.value)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(
                f"the reference of the self-check does not fit into the memory of {setup.device.description}; "
                "leave out --self-check, or choose a larger GPU"
            ) from None
        open_ = DecodePool(self._decode_options)
        chosen = choose_rows(rows, setup.options.self_check, lambda row: self._extract(reference, row, open_))
        return dict(chosen)

    def _extract(self, reference: Reference, row: int, open_: DecodePool) -> ReferenceRow | None:
        setup, table = self._setup, self._setup.table
        try:
            if not table.questions[row].strip():
                raise QuestionEmpty("it has no question")
            image = setup.folder.read(table.images[row], open_)
            return reference.extract(image, table.questions[row], setup.run.layers, setup.options.max_new_tokens)
        except RowError as reason:
            self._reasons.append(f"{table.ids[row]!r}: {one_line(reason)}")
        except RuntimeError as error:  # attention over all of a large picture at once takes more than ours
            if not is_out_of_memory(error):
                raise
            self._reasons.append(f"{table.ids[row]!r}: it does not fit into the memory of {setup.device.description}")
        return None
