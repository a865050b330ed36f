"""Attention: the library's kernels where queries and keys belong together, and our own over keys that are shared.

Attention over several sets of keys is the mean of the attention over each, weighted by the sum of its exponentials
(as in FlashAttention: Dao et al., 2022). So the keys of a picture are read in one place for all rows on it, and each
row's own in another; nothing is copied together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def attend(module: Any, states: tuple[Tensor, Tensor, Tensor], causal: bool) -> Tensor:
    """Attention of one sequence a batch entry, through the kernels that the module's config names.

    Args:
        module: the library's attention module.
        states: queries, [batch, heads, queries, size]; keys and values, [batch, key heads, keys, size], all of which
            are seen but for those that `causal` hides.
        causal: there are as many queries as keys, and each sees the keys up to its own.
    Returns:
        [batch, queries, heads, size].
    """
    kind, (queries, keys, values) = module.config._attn_implementation, states
    if kind != "eager":
        mixed, _ = ALL_ATTENTION_FUNCTIONS[kind](
            module, *states, None, dropout=0.0, scaling=module.scaling, is_causal=causal
        )
        return mixed
    groups = queries.shape[1] // keys.shape[1]
    scores = queries @ keys.repeat_interleave(groups, dim=1).transpose(2, 3) * module.scaling
    if causal:
        length = queries.shape[2]
        later = torch.ones(length, length, dtype=torch.bool, device=queries.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(queries.dtype)
    return (weights @ values.repeat_interleave(groups, dim=1)).transpose(1, 2)


class Partial(NamedTuple):
    """Attention over some of the keys, to be joined with that over the others. All float32."""

    mixed: Tensor  # [..., queries, size]: values weighted by exponentials, not yet divided
    total: Tensor  # [..., queries, 1]: the sum of the exponentials
    top: Tensor  # [..., queries, 1]: the score that was taken off before the exponential


def attend_some(queries: Tensor, keys: Tensor, values: Tensor, unseen: Tensor, scale: float) -> Partial:
    """Attention of each batch entry's queries over its keys, in float32 but for the number format of the input.

    Args:
        queries: [batch, key heads, queries, size].
        keys, values: [batch, key heads, keys, size]; values must be finite where they are not seen, too.
        unseen: bool, broadcast to [batch, 1, queries, keys]. An entry that sees no key gets finite nonsense.
    """
    scores = _matmul(queries, keys.transpose(2, 3)).mul_(scale)
    scores.masked_fill_(unseen, torch.finfo(torch.float32).min)
    top = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return Partial(_matmul(weights.to(values.dtype), values), weights.sum(dim=-1, keepdim=True), top)


def gather(parts: Partial, index: Tensor, there: Tensor) -> Partial:
    """Join the parts that belong together.

    Args:
        parts: of [parts, ...].
        index: int64 [wholes, most], the parts of each whole.
        there: bool of the same shape, false where `index` is padding.
    Returns:
        Of [wholes, ...]; a whole without parts has weight 0.
    """
    there = there.view(*there.shape, *[1] * (parts.top.dim() - 1))
    tops = parts.top[index].masked_fill(~there, torch.finfo(torch.float32).min)
    top = tops.amax(dim=1)
    weights = (tops - top[:, None]).exp_() * there
    return Partial((parts.mixed[index] * weights).sum(dim=1), (parts.total[index] * weights).sum(dim=1), top)


def join(first: Partial, second: Partial) -> Tensor:
    """The attention over both sets of keys, float32 [..., queries, size]."""
    top = torch.maximum(first.top, second.top)
    one, two = (first.top - top).exp_(), (second.top - top).exp_()
    return (first.mixed * one + second.mixed * two) / (first.total * one + second.total * two)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """[batch, heads, m, k] times [batch, heads, k, n] in float32, whatever the input: 8 bits of a score are too few."""
    shape = (*left.shape[:2], left.shape[2], right.shape[3])
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    if left.dtype == torch.float32:
        return torch.bmm(left, right).view(shape)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32).view(shape)
    return torch.bmm(left.float(), right.float()).view(shape)
