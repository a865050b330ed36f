"""The choice of a token from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from vqa_embeddings.engine.sequence import NOT_FINITE


def choose_tokens(logits: Tensor, suppressed: Tensor) -> Tensor:
    """The likeliest token of each row that may be chosen, int64 [rows]; by the lowest number where two are.

    Where not all logits are finite, NOT_FINITE: the likeliest of them would be the vocabulary's first token, and
    an answer of it looks like any other.

    Args:
        logits: [rows, vocabulary]; changed.
        suppressed: int64 [tokens], those that are never chosen.
    """
    least, most = logits.aminmax(dim=-1)  # both NaN where one of them is
    chosen = logits.index_fill_(1, suppressed, -torch.inf).argmax(dim=-1)
    return chosen.masked_fill_(~(least.isfinite() & most.isfinite()), NOT_FINITE)
