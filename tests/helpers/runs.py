"""The run of an output folder whose vectors no model made."""

from __future__ import annotations

from collections.abc import Sequence

from vqa_embeddings.store.run import Run


def random_run(rows: int, fingerprint: str, layers: Sequence[int], hidden_size: int, vision_size: int) -> Run:
    """A run over so many rows, with vectors of these sizes."""
    return Run(
        rows=rows,
        rows_sha256=fingerprint,
        model="random",
        revision="local",
        model_sha256="0" * 64,
        layout="native",
        lora="merged",
        dtype="float32",
        attn_implementation="sdpa",
        layers=list(layers),
        max_new_tokens=200,
        pixel_mean=False,
        hidden_size=hidden_size,
        vision_size=vision_size,
        device="cpu",
        versions={},
    )
