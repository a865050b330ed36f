"""What a finished row comes to: its values, or why it has none. Values that are not finite are never stored."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listed

import numpy as np
import torch

from vqa_embeddings.engine.sequence import NOT_FINITE, Sequence
from vqa_embeddings.errors import NonFiniteValues, RowError
from vqa_embeddings.records import Extracted, Failed
from vqa_embeddings.schema import QUERY_TOKEN, VISION_ONLY, VISION_TOKEN, by_path

Record = Extracted | Failed

OTHER_FORMAT = "try --dtype bfloat16 or float32 in another --output-dir"
OTHER_WEIGHTS = "check the weights of --model"  # where it was not float16: the other formats reach equally far


def make_record(
    sequence: Sequence, layers: Listed[int], dtype: torch.dtype, detokenize: Callable[[Listed[int]], str]
) -> Record:
    """The record of a finished row.

    Args:
        layers: those of its states.
        dtype: the number format that the model computes in.
    """
    entry = sequence.entry
    assert entry.vision_only is not None and sequence.vision_token is not None and sequence.query_token is not None
    output = [token for token in sequence.output if token != NOT_FINITE]  # which only the last can be
    remedy = OTHER_FORMAT if dtype == torch.float16 else OTHER_WEIGHTS
    record = checked(
        Extracted(
            row=sequence.row,
            vectors={
                VISION_ONLY: entry.vision_only,
                VISION_TOKEN: sequence.vision_token,
                QUERY_TOKEN: sequence.query_token,
                **entry.image.extra,
            },
            answer=detokenize(output),
            truncated=entry.image.truncated,
        ),
        layers,
        remedy,
    )
    if isinstance(record, Failed) or len(output) == len(sequence.output):
        return record
    return failed(
        sequence.row,
        NonFiniteValues(
            f"the logits of token {len(sequence.output)} of the answer are NaN or infinite; expected finite ones, "
            f"{remedy}"
        ),
    )


def checked(record: Extracted, layers: Listed[int], remedy: str = OTHER_WEIGHTS) -> Record:
    """The record, or that of a failed row where a vector holds NaN or infinite values.

    Args:
        remedy: what to do about them, for the message.
    """
    try:
        for path, vector in by_path(record.vectors, layers):
            _check_finite(path, vector, remedy)
    except NonFiniteValues as failure:
        return failed(record.row, failure)
    return record


def failed(row: int, failure: RowError) -> Failed:
    """The record of a row that cannot be extracted."""
    return Failed(row, type(failure).__name__, str(failure))


def _check_finite(name: str, vector: np.ndarray, remedy: str) -> None:
    finite = np.isfinite(vector)
    if not finite.all():
        raise NonFiniteValues(
            f"{name} holds {int((~finite).sum())} values that are NaN or infinite, of {vector.size}; expected none, "
            f"{remedy}"
        )
