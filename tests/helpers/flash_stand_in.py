"""flash-attn's interface in plain torch, for machines without its kernels: [batch, length, heads, head size].

As its documentation has it: causal means aligned at the lower right, and of keys there may be fewer heads.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as library

calls: list[bool] = []  # of each call, whether it was causal


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), **_: object
) -> Tensor:
    calls.append(causal)
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    if causal:
        rows, columns = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
        scores = scores.masked_fill(columns > rows + k.shape[1] - q.shape[1], -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q=0, max_seqlen_k=0,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), **_: object,
) -> Tensor:  # fmt: skip
    rows = []
    for row in range(len(cu_seqlens_q) - 1):
        own, keys = slice(*cu_seqlens_q[row : row + 2]), slice(*cu_seqlens_k[row : row + 2])
        rows.append(flash_attn_func(q[None, own], k[None, keys], v[None, keys], 0.0, softmax_scale, causal)[0])
    return torch.cat(rows)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library find the stand-in where it looks for flash-attn."""
    package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
    vars(package).update(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    vars(package).update(flash_attn_with_kvcache=flash_attn_func)
    vars(padding).update(pad_input=library._pad_input, unpad_input=library._unpad_input)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(library, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(library, "_loaded_implementation", None)
    calls.clear()
