"""The decoder over pictures and over rows: the library's layers, with attention over keys that rows share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vqa_embeddings.layers.attention import attend, attend_partially, attend_prefixes, merge_two
from vqa_embeddings.layers.device import to_device
from vqa_embeddings.layers.kv_cache import KVCache, KVGroup, KVPool
from vqa_embeddings.layers.rotary import RowRotary, rotate
from vqa_embeddings.models.base import ForwardInputs

GROUP = "self"  # all layers read the same keys
LONGEST_PREFIX = 6144  # keys of the largest picture, about


class Decoder:
    """The library's decoder layers, norm and head; what is computed beyond the last stored position is left out.

    Args:
        model: the library's `Phi4MultimodalForCausalLM`.
        stored: the layers whose states are wanted.
    """

    def __init__(self, model: Any, stored: Sequence[int]) -> None:
        config = model.config
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.embed = model.model.embed_tokens
        self.rotary, self.short_context = _find_rotary(model.model.rotary_emb)
        self.rotary.to(self.device)
        self.heads: int = config.num_attention_heads
        self._layers = list(model.model.layers)
        self._norm = model.model.norm
        self._head = model.lm_head
        self._stored = tuple(stored)
        self._key_heads: int = config.num_key_value_heads
        self._head_size: int = self._layers[0].self_attn.head_dim
        layers, heads, size = len(self._layers), self._key_heads, self._head_size
        self.group = KVGroup(GROUP, layers, heads, size, per_row=True, longest_prefix=LONGEST_PREFIX)

    def prefill_image(self, embeddings: Tensor, variant: int, kv: KVCache, blocks: Sequence[int]) -> Tensor:
        """Run over a picture's part of the prompt, and leave its keys and values in blocks of the cache.

        Args:
            embeddings: [length, hidden].
        Returns:
            float32 [stored layers, hidden], the states at its last position.
        """
        length, pool = len(embeddings), kv.pools[GROUP]
        positions = torch.arange(length, device=self.device)[None]
        angles = self.rotary(embeddings, positions, torch.full((1,), variant, device=self.device))
        where = to_device(torch.tensor(blocks), self.device)
        hidden, states = embeddings[None], []
        for index, layer in enumerate(self._layers):
            queries, keys, values = self._project(layer, hidden, angles)
            pool.write_blocks(index, where, keys[0], values[0])
            last = index == len(self._layers) - 1
            if last:  # nothing reads the other positions of the last layer
                queries, hidden = queries[:, -1:], hidden[:, -1:]
            by_head = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
            mixed = attend(layer.self_attn, by_head, causal=not last)
            hidden = self._finish_layer(layer, hidden, mixed)
            if index in self._stored:
                states.append((self._norm(hidden) if last else hidden)[0, -1])
        return torch.stack(states).float()

    def forward(self, kv: KVCache, inputs: ForwardInputs) -> tuple[Tensor, Tensor]:
        """Run over further tokens of rows, and leave their keys and values in their slots.

        Returns:
            Logits [rows, vocabulary], and states, float32 [rows, stored layers, hidden], at the last token of each.
        """
        tokens, starts, ends, pool = inputs.tokens, inputs.starts, inputs.ends, kv.pools[GROUP]
        sharing = inputs.sharing[GROUP]
        rows = torch.arange(len(tokens), device=self.device)
        own = starts[:, None] + torch.arange(tokens.shape[1], device=self.device)  # places among the row's own keys
        hidden, states = self.embed(tokens.clamp(min=0)), []  # an empty slot may hold a NOT_FINITE
        angles = self.rotary(hidden, sharing.length[:, None] + own, sharing.rope_variant)
        for index, layer in enumerate(self._layers):
            queries, keys, values = self._project(layer, hidden, angles)
            pool.write_slots(index, inputs.first_slot, starts, keys, values)
            last = index == len(self._layers) - 1
            if last:  # nothing reads the other positions of the last layer
                queries, hidden, own = (states_[rows, ends][:, None] for states_ in (queries, hidden, own))
                ends = torch.zeros_like(ends)
            mixed = self._attend(layer.self_attn, pool, index, inputs, queries, own)
            hidden = self._finish_layer(layer, hidden, mixed)
            if index in self._stored:
                states.append((self._norm(hidden) if last else hidden)[rows, ends])
        return self._head(self._norm(hidden[:, 0])), torch.stack(states, dim=1).float()

    def _attend(
        self, module: Any, pool: KVPool, layer: int, inputs: ForwardInputs, queries: Tensor, own: Tensor
    ) -> Tensor:
        """Attention of rows over their picture's keys and their own up to `own`, [rows, length, heads, size]."""
        count, length = own.shape
        groups = self.heads // self._key_heads
        # A group of heads reads the same keys: to them, its heads are so many more queries.
        folded = queries.view(count, length, self._key_heads, groups, -1).transpose(1, 2).flatten(2, 3)
        sharing, blocks = inputs.sharing[GROUP], inputs.blocks[GROUP]
        on_image = attend_prefixes(folded, pool, layer, sharing, blocks, module.scaling)
        keys, values = pool.read_slots(layer, inputs.first_slot, count, inputs.width)
        later = torch.arange(inputs.width, device=self.device) > own.repeat_interleave(groups, dim=1)[:, None, :, None]
        on_own = attend_partially(folded, keys, values, later, module.scaling)
        mixed = merge_two(on_image, on_own).to(queries.dtype)
        return mixed.view(count, self._key_heads, length, groups, -1).transpose(1, 2).flatten(2, 3)

    def _project(self, layer: Any, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [batch, length, heads, head size], the first two rotated by their positions."""
        states = layer.self_attn.qkv_proj(layer.input_layernorm(hidden))
        states = states.view(*states.shape[:-1], -1, self._head_size)
        rotate(states[:, :, : self.heads + self._key_heads], *angles)
        queries, keys, values = states.split((self.heads, self._key_heads, self._key_heads), dim=2)
        return queries, keys, values

    def _finish_layer(self, layer: Any, hidden: Tensor, mixed: Tensor) -> Tensor:
        """The rest of a layer, after attention."""
        hidden = layer.self_attn.o_proj(mixed.flatten(2)).add_(hidden)
        return layer.mlp(layer.post_attention_layernorm(hidden)).add_(hidden)


def _find_rotary(library: Any) -> tuple[RowRotary, int | None]:
    """The short factors (variant 0) and the long ones (variant 1), and the longest sequence under the short ones.

    LongRoPE (Ding et al., 2024) as the checkpoint's config has it, the same scaling in both. Without it there is one
    set of factors for all lengths.
    """
    short = long = library.original_inv_freq
    short_context = None
    if library.rope_type == "longrope":
        short_context = library.config.rope_parameters["original_max_position_embeddings"]
        long, _ = ROPE_INIT_FUNCTIONS["longrope"](library.config, short.device, seq_len=short_context + 1)
    return RowRotary([short, long], library.attention_scaling), short_context
