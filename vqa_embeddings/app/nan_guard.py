"""Values that are not finite: are they the fault of one row, or of the number format, which every row has?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from vqa_embeddings.errors import NonFiniteValues, NothingFiniteError
from vqa_embeddings.records import Extracted, Failed

JUDGED = 32  # rows: where so many fail and none comes out finite, all others would fail too
FEW = 8  # rows: fewer than that may well be odd ones
FAILURE = NonFiniteValues.__name__


class NaNGuard:
    """Holds back the rows that failed by NonFiniteValues until a row of the run has come out finite.

    The first rows to begin are judged, not the first to end: a row that fails may do so at once, while those beside
    it that will come out finite are still answering. Rows that failed for another reason are passed on and not
    counted. Rows that are still held back when the rank ends are missing, so that the next launch extracts them.
    One picture may have hundreds of rows and be the only one that overflows a number format, so rows on a second
    picture have to fail too.

    Args:
        rows: those of this rank, in the order in which they begin.
        pictures: the picture of each, int `[n]`.
        dtype: the number format, as `--dtype` names it.
        finite_before: whether a row of the run has come out finite in an earlier launch.
    """

    def __init__(
        self, rows: Sequence[int] | np.ndarray, pictures: Sequence[int] | np.ndarray, dtype: str, finite_before: bool
    ) -> None:
        self._rows, self._pictures = rows, pictures
        self._dtype = dtype
        self._is_open = finite_before  # whether every record is passed on
        self._held: list[Failed] = []
        self._ended: dict[int, bool] = {}  # rows from `_position` on, and whether they are held back
        self._position = 0  # in `rows`, of the first that has not ended
        self._failed = 0  # rows before that one which are held back
        self._failed_on: set[int] = set()  # their pictures

    def release(self, units: Iterable[Sequence[Extracted | Failed]]) -> Iterator[Sequence[Extracted | Failed]]:
        """The records that may be committed.

        Args:
            units: for each unit of work, the records that it has finished.
        Raises:
            NothingFiniteError: the first 32 rows, on two pictures at least, have failed by values that are not finite;
                or all rows have, where they are 8 at least. None of them is among the records.
        """
        for records in units:
            self._is_open = self._is_open or any(isinstance(record, Extracted) for record in records)
            yield records if self._is_open else self._hold_back(records)
            self._is_open = self._is_open or self._all_have_ended()
            if self._is_open and self._held:
                yield self._held
                self._held = []

    def _hold_back(self, records: Sequence[Extracted | Failed]) -> list[Extracted | Failed]:
        """Returns those that failed for another reason."""
        failed = [record for record in records if isinstance(record, Failed)]
        self._ended.update((record.row, record.error == FAILURE) for record in failed)
        self._held += [record for record in failed if record.error == FAILURE]
        return [record for record in failed if record.error != FAILURE]

    def _all_have_ended(self) -> bool:
        """Whether all rows have ended, without enough failures to blame the number format.

        Raises:
            NothingFiniteError: there are enough.
        """
        while self._position < len(self._rows) and (row := int(self._rows[self._position])) in self._ended:
            if self._ended.pop(row):
                self._failed += 1
                self._failed_on.add(int(self._pictures[self._position]))
            self._position += 1
        all_ended = self._position == len(self._rows)
        if self._failed >= FEW if all_ended else self._failed >= JUDGED and len(self._failed_on) > 1:
            raise NothingFiniteError(
                f"none of the first {self._failed} rows came out finite in {self._dtype}, and none of them is "
                f"committed: {self._held[0].message}"
            )
        return all_ended
