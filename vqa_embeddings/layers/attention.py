"""Attention: the library's kernels within one sequence, and cascade attention over keys that rows share.

Attention over several sets of keys is the mean of the attention over each, weighted by the sum of its exponentials
(as in FlashAttention: Dao et al., 2022). So the keys of a picture are read in one place for all rows on it, and each
row's own keys in another; nothing is copied together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vqa_embeddings.layers.kv_cache import KVPool
from vqa_embeddings.layers.prefix_sharing import PrefixSharing


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
    """Attention over some of the keys, to be merged with that over the others. All float32."""

    out: Tensor  # [..., queries, size]: values weighted by exponentials, not yet divided
    sum_exp: Tensor  # [..., queries, 1]: the sum of the exponentials
    max: Tensor  # [..., queries, 1]: the score that was taken off before the exponential


def attend_partially(queries: Tensor, keys: Tensor, values: Tensor, masked: Tensor, scale: float) -> Partial:
    """Attention of each batch entry's queries over its keys, in float32 but for the number format of the input.

    Args:
        queries: [batch, key heads, queries, size].
        keys, values: [batch, key heads, keys, size]; values must be finite where they are masked, too.
        masked: bool, broadcast to [batch, 1, queries, keys]. The output for a query that sees no key means nothing,
            and is finite.
    """
    scores = _matmul(queries, keys.transpose(2, 3)).mul_(scale)
    scores.masked_fill_(masked, torch.finfo(torch.float32).min)
    highest = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    return Partial(_matmul(weights.to(values.dtype), values), weights.sum(dim=-1, keepdim=True), highest)


def merge_partials(partials: Partial, index: Tensor, is_there: Tensor) -> Partial:
    """Merge the partial results that belong together.

    Args:
        partials: of [partials, ...].
        index: int64 [wholes, most], the partials of each whole.
        is_there: bool of the same shape, false where `index` is padding.
    Returns:
        Of [wholes, ...]; a whole without partials has weight 0.
    """
    is_there = is_there.view(*is_there.shape, *[1] * (partials.max.dim() - 1))
    each = partials.max[index].masked_fill(~is_there, torch.finfo(torch.float32).min)
    highest = each.amax(dim=1)
    weights = (each - highest[:, None]).exp_() * is_there
    out, sum_exp = (partials.out[index] * weights).sum(dim=1), (partials.sum_exp[index] * weights).sum(dim=1)
    return Partial(out, sum_exp, highest)


def merge_two(first: Partial, second: Partial) -> Tensor:
    """The attention over both sets of keys, float32 [..., queries, size]."""
    highest = torch.maximum(first.max, second.max)
    one, two = (first.max - highest).exp_(), (second.max - highest).exp_()
    return (first.out * one + second.out * two) / (first.sum_exp * one + second.sum_exp * two)


def attend_prefixes(
    queries: Tensor, pool: KVPool, layer: int, sharing: PrefixSharing, blocks: Tensor | int, scale: float
) -> Partial:
    """Attention of rows over the keys of their images, which are read once for all rows on an image.

    Args:
        queries: [rows, key heads, queries, size].
        blocks: those that `sharing` is about, as `KVPool.read_blocks` takes them.
    Returns:
        Of [rows, key heads, queries, ...].
    """
    keys, values = pool.read_blocks(layer, blocks)
    on_image = queries[sharing.rows].transpose(1, 2).flatten(2, 3)  # [images, heads, rows on it * queries, size]
    partials = attend_partially(on_image[sharing.image_of_block], keys, values, sharing.masked, scale)
    merged = merge_partials(partials, sharing.blocks, sharing.is_block)
    shape = (len(sharing.rows), queries.shape[1], sharing.rows.shape[1], queries.shape[2], -1)
    return Partial(*(one.view(shape)[sharing.image, :, sharing.place] for one in merged))


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """[batch, heads, m, k] times [batch, heads, k, n] in float32, whatever the input: 8 bits of a score are too few."""
    shape = (*left.shape[:2], left.shape[2], right.shape[3])
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    if left.dtype == torch.float32:
        return torch.bmm(left, right).view(shape)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32).view(shape)
    return torch.bmm(left.float(), right.float()).view(shape)
