"""Values that are not finite: one row's own fault, or that of the number format, which is every row's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from vqa_embeddings.errors import NonFiniteValues, NothingFinite
from vqa_embeddings.records import Extracted, Failed

JUDGED = 32  # rows: where so many fail and none comes out finite, all others would fail too
FEW = 8  # rows: fewer than that may well be odd ones
NOT_FINITE = NonFiniteValues.__name__


class Probation:
    """Holds back the rows that failed by NonFiniteValues until a row of the run has come out finite.

    The first rows to begin are judged, not the first to end: a row that fails may do so at once, while those beside
    it that will come out finite are still answering. What failed for another reason is passed on and counts for
    nothing. What is still held back when the rank ends is missing, so that the next launch does it. One picture may
    have hundreds of rows and be the only one that is too much for a number format: a second one has to agree.

    Args:
        rows: those of this rank, in the order in which they begin.
        pictures: the picture of each, int `[n]`.
        dtype: the number format, as `--dtype` names it.
        over: whether a row of the run has come out finite before.
    """

    def __init__(
        self, rows: Sequence[int] | np.ndarray, pictures: Sequence[int] | np.ndarray, dtype: str, over: bool
    ) -> None:
        self._rows, self._pictures = rows, pictures
        self._dtype = dtype
        self._over = over
        self._held: list[Failed] = []
        self._ended: dict[int, bool] = {}  # rows from `_place` on, and whether they are held back
        self._place = 0  # in `rows`, of the first that has not ended
        self._failed = 0  # rows before that one which are held back
        self._failed_on: set[int] = set()  # their pictures

    def release(self, units: Iterable[Sequence[Extracted | Failed]]) -> Iterator[Sequence[Extracted | Failed]]:
        """The records that may be committed.

        Args:
            units: the records that a unit of work has finished each.
        Raises:
            NothingFinite: the first 32 rows, on two pictures at least, have failed by values that are not finite, or
                all where they are 8 at least. They are not among the records.
        """
        for records in units:
            self._over = self._over or any(isinstance(record, Extracted) for record in records)
            yield records if self._over else self._hold_back(records)
            self._over = self._over or self._judge()
            if self._over and self._held:
                yield self._held
                self._held = []

    def _hold_back(self, records: Sequence[Extracted | Failed]) -> list[Extracted | Failed]:
        """Returns those that failed for another reason."""
        failed = [record for record in records if isinstance(record, Failed)]
        self._ended.update((record.row, record.error == NOT_FINITE) for record in failed)
        self._held += [record for record in failed if record.error == NOT_FINITE]
        return [record for record in failed if record.error != NOT_FINITE]

    def _judge(self) -> bool:
        """Returns whether all rows have ended, too few of them by values that are not finite to say more."""
        while self._place < len(self._rows) and (row := int(self._rows[self._place])) in self._ended:
            if self._ended.pop(row):
                self._failed += 1
                self._failed_on.add(int(self._pictures[self._place]))
            self._place += 1
        over = self._place == len(self._rows)
        if self._failed >= FEW if over else self._failed >= JUDGED and len(self._failed_on) > 1:
            raise NothingFinite(
                f"none of the first {self._failed} rows came out finite in {self._dtype}, and none of them is "
                f"committed: {self._held[0].message}"
            )
        return over
