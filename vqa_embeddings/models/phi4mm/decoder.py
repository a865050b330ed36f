"""The decoder over pictures and over rows: the library's layers, with attention over keys that rows share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vqa_embeddings.layers.attention import attend, attend_some, gather, join
from vqa_embeddings.layers.device import to_device
from vqa_embeddings.layers.kv_cache import CacheSize, Company, KVCache

NOT_FINITE = -1  # stands for a token where there is none to choose


class Decoder:
    """The library's decoder layers, norm and head; what is computed beyond the last kept position is left out.

    Args:
        model: the library's `Phi4MultimodalForCausalLM`.
        kept: the layers whose states are wanted.
        never: tokens that are never chosen.
    """

    def __init__(self, model: Any, kept: Sequence[int], never: Sequence[int]) -> None:
        config = model.config
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.never = torch.tensor(never, dtype=torch.int64, device=self.device)
        self.embed = model.model.embed_tokens
        self.rotary = RowRotary(model.model.rotary_emb).to(self.device)
        self._layers = list(model.model.layers)
        self._norm = model.model.norm
        self._head = model.lm_head
        self._kept = tuple(kept)
        self._key_heads: int = config.num_key_value_heads
        self._head_size: int = self._layers[0].self_attn.head_dim
        self.heads: int = config.num_attention_heads

    @property
    def key_bytes(self) -> int:
        """Memory of one token's keys and values in all layers, bytes."""
        return 2 * len(self._layers) * self._key_heads * self._head_size * self.dtype.itemsize

    def new_cache(self, size: CacheSize) -> KVCache:
        """A cache for this decoder."""
        return KVCache(len(self._layers), self._key_heads, self._head_size, size, self.dtype, self.device)

    def read_picture(self, embeddings: Tensor, long: bool, cache: KVCache, pages: Sequence[int]) -> Tensor:
        """Run over a picture's part of the prompt, and leave its keys and values in pages of the cache.

        Args:
            embeddings: [length, hidden].
            long: whether under the long rotary factors.
        Returns:
            float32 [kept layers, hidden], the states at its last position.
        """
        length = len(embeddings)
        positions = torch.arange(length, device=self.device)[None]
        angles = self.rotary(embeddings, positions, torch.full((1,), long, device=self.device))
        where = to_device(torch.tensor(pages), self.device)
        hidden, states = embeddings[None], []
        for index, layer in enumerate(self._layers):
            queries, keys, values = self._project(layer, hidden, angles)
            cache.write_pages(index, where, keys[0], values[0])
            last = index == len(self._layers) - 1
            if last:  # nothing reads the other positions of the last layer
                queries, hidden = queries[:, -1:], hidden[:, -1:]
            by_head = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
            mixed = attend(layer.self_attn, by_head, causal=not last)
            hidden = self._finish(layer, hidden, mixed)
            if index in self._kept:
                states.append((self._norm(hidden) if last else hidden)[0, -1])
        return torch.stack(states).float()

    def read_rows(
        self, cache: KVCache, company: Company, pages: Tensor | int, first: int, tokens: Tensor, starts: Tensor,
        ends: Tensor, width: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Run over further tokens of rows in neighbouring seats, and leave their keys and values there.

        Args:
            company: which pages they share, of `pages`.
            first: the first row's seat.
            tokens: int64 [rows, length]; rows that have fewer are padded on the right.
            starts: int64 [rows], how many keys each seat holds already.
            ends: int64 [rows], where in `tokens` each row's last one is.
            width: how many keys of the seats are read: none holds more afterwards.
        Returns:
            The token that follows each row's last, int64 [rows], NOT_FINITE where a logit is NaN or infinite; and the
            states of the last, float32 [rows, kept layers, hidden].
        """
        rows = torch.arange(len(tokens), device=self.device)
        own = starts[:, None] + torch.arange(tokens.shape[1], device=self.device)
        hidden, states = self.embed(tokens.clamp(min=0)), []  # a seat without a row may hold a NOT_FINITE
        angles = self.rotary(hidden, company.length[:, None] + own, company.long)
        for index, layer in enumerate(self._layers):
            queries, keys, values = self._project(layer, hidden, angles)
            cache.write_seats(index, first, starts, keys, values)
            last = index == len(self._layers) - 1
            if last:
                queries, hidden, own = (
                    queries[rows, ends][:, None],
                    hidden[rows, ends][:, None],
                    own[rows, ends][:, None],
                )
                ends = torch.zeros_like(ends)
            mixed = self._attend(layer.self_attn, cache, index, company, pages, first, queries, own, width)
            hidden = self._finish(layer, hidden, mixed)
            if index in self._kept:
                states.append((self._norm(hidden) if last else hidden)[rows, ends])
        return self._choose(self._head(self._norm(hidden[:, 0]))), torch.stack(states, dim=1).float()

    def _choose(self, logits: Tensor) -> Tensor:
        """The likeliest token of each row that may be chosen, int64 [rows]; by the lowest number where two are.

        Where not all logits are finite, NOT_FINITE: the likeliest of them would be the vocabulary's first token, and
        an answer of it looks like any other.

        Args:
            logits: [rows, vocabulary]; changed.
        """
        least, most = logits.aminmax(dim=-1)  # both NaN where one of them is
        chosen = logits.index_fill_(1, self.never, -torch.inf).argmax(dim=-1)
        return chosen.masked_fill_(~(least.isfinite() & most.isfinite()), NOT_FINITE)

    def _attend(
        self, module: Any, cache: KVCache, layer: int, company: Company, pages: Tensor | int, first: int, queries: Tensor,
        own: Tensor, width: int,
    ) -> Tensor:  # fmt: skip
        """Attention of rows over their picture's keys and their own up to `own`, [rows, length, heads, size]."""
        count, length = own.shape
        groups = self.heads // self._key_heads
        # A group of heads reads the same keys: to them, its heads are so many more queries.
        folded = queries.view(count, length, self._key_heads, groups, -1).transpose(1, 2).flatten(2, 3)
        keys, values = cache.read_pages(layer, pages)
        on_picture = folded[company.rows].transpose(1, 2).flatten(2, 3)
        shared = gather(
            attend_some(on_picture[company.picture_of_page], keys, values, company.unseen, module.scaling),
            company.parts,
            company.there,
        )
        shape = (len(company.rows), self._key_heads, company.rows.shape[1], length * groups, -1)
        shared = type(shared)(*(part.view(shape)[company.picture, :, company.place] for part in shared))
        keys, values = cache.read_seats(layer, first, count, width)
        later = torch.arange(width, device=self.device) > own.repeat_interleave(groups, dim=1)[:, None, :, None]
        mixed = join(shared, attend_some(folded, keys, values, later, module.scaling)).to(queries.dtype)
        return mixed.view(count, self._key_heads, length, groups, -1).transpose(1, 2).flatten(2, 3)

    def _project(self, layer: Any, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [batch, length, heads, head size], the first two turned by their positions."""
        states = layer.self_attn.qkv_proj(layer.input_layernorm(hidden))
        states = states.view(*states.shape[:-1], -1, self._head_size)
        _turn(states[:, :, : self.heads + self._key_heads], *angles)
        queries, keys, values = states.split((self.heads, self._key_heads, self._key_heads), dim=2)
        return queries, keys, values

    def _finish(self, layer: Any, hidden: Tensor, mixed: Tensor) -> Tensor:
        """The rest of a layer, after attention."""
        hidden = layer.self_attn.o_proj(mixed.flatten(2)).add_(hidden)
        return layer.mlp(layer.post_attention_layernorm(hidden)).add_(hidden)


def _turn(states: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Turn queries and keys by their positions, in place: the first half of what is turned against the second.

    Args:
        states: [batch, length, heads, head size].
        cosines, sines: [batch, length, 1, half of what is turned].
    """
    half = cosines.shape[-1]
    first, second = states[..., :half], states[..., half : 2 * half]
    turned = torch.addcmul(first * cosines, second, sines, value=-1)
    second.mul_(cosines).addcmul_(first, sines)
    first.copy_(turned)


class RowRotary(nn.Module):
    """Rotary angles with the short or the long factors, row by row: the library's are one choice for a whole batch.

    LongRoPE (Ding et al., 2024) as the checkpoint's config has it; the same scaling in both regimes.
    """

    def __init__(self, library: Any) -> None:
        super().__init__()
        short = long = library.original_inv_freq
        self.short_context: int | None = None  # the longest sequence under the short factors, where there are two sets
        if library.rope_type == "longrope":
            self.short_context = library.config.rope_parameters["original_max_position_embeddings"]
            longer = self.short_context + 1
            long, _ = ROPE_INIT_FUNCTIONS["longrope"](library.config, short.device, seq_len=longer)
        self.register_buffer("short_frequencies", short.float(), persistent=False)
        self.register_buffer("long_frequencies", long.float(), persistent=False)
        self._scaling: float = library.attention_scaling

    def forward(self, x: Tensor, positions: Tensor, long: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [rows, length, 1, half of the rotated size] in the format of `x`.

        Args:
            positions: int64 [rows, length].
            long: bool [rows].
        """
        frequencies = torch.where(long[:, None], self.long_frequencies, self.short_frequencies)
        angles = (positions[..., None].float() * frequencies[:, None, :])[:, :, None]
        return (angles.cos() * self._scaling).to(x.dtype), (angles.sin() * self._scaling).to(x.dtype)
