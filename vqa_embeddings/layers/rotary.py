"""Rotary position embeddings with factors of each row's own: libraries have one choice for a whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RowRotary(nn.Module):
    """Rotary angles under one of several sets of frequencies, row by row.

    Args:
        frequencies: of each variant, float [half of what is rotated].
        scaling: of cosines and sines, the same in all variants.
    """

    def __init__(self, frequencies: Sequence[Tensor], scaling: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.stack([one.float() for one in frequencies]), persistent=False)
        self._scaling = scaling

    def forward(self, x: Tensor, positions: Tensor, variants: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [rows, length, 1, half of what is rotated] in the format of `x`.

        Args:
            positions: int64 [rows, length].
            variants: int64 [rows].
        """
        angles = (positions[..., None].float() * self.frequencies[variants][:, None, :])[:, :, None]
        return (angles.cos() * self._scaling).to(x.dtype), (angles.sin() * self._scaling).to(x.dtype)


def rotate(states: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Rotate queries and keys by their positions, in place: the first half of what is rotated against the second.

    Args:
        states: [batch, length, heads, head size].
        cosines, sines: [batch, length, 1, half of what is rotated].
    """
    half = cosines.shape[-1]
    first, second = states[..., :half], states[..., half : 2 * half]
    rotated = torch.addcmul(first * cosines, second, sines, value=-1)
    second.mul_(cosines).addcmul_(first, sines)
    first.copy_(rotated)
