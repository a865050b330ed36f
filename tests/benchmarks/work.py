"""How much arithmetic a row needs, and how fast the machine can do it: the floor that a run is held against."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from vqa_embeddings.models.phi4mm.vision import Pixels


@dataclass(frozen=True)
class Work:
    """Useful floating-point operations by stage, a multiplication and an addition counted as two."""

    vision: float
    prefix: float
    questions: float
    decoding: float

    @property
    def total(self) -> float:
        return self.vision + self.prefix + self.questions + self.decoding


def work_of(config: Any, pixels: Pixels, questions: list[int], new_tokens: list[int], vision_layers: int) -> Work:
    """What one picture and its questions need, with nothing computed twice and nothing that is not read.

    Args:
        config: the library's.
        questions: tokens of each question.
        new_tokens: tokens of each answer.
        vision_layers: layers of the vision tower that are read.
    """
    vision, patches = config.vision_config, pixels.patches
    by_crop = [int(mask.sum()) for mask in pixels.mask]
    linear = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    attention = sum(2 * count**2 for count in by_crop) * vision.hidden_size
    patch = 3 * vision.patch_size**2 * vision.hidden_size
    projector = pixels.tokens * (vision.hidden_size + config.hidden_size) * config.hidden_size
    seeing = vision_layers * (patches * linear + attention) + patches * patch + projector

    size = config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * size
    keys = config.hidden_size * 2 * config.num_key_value_heads * size
    rest = 2 * config.hidden_size * width + 3 * config.hidden_size * config.intermediate_size
    layers, length = config.num_hidden_layers, 1 + pixels.tokens
    # The last layer is needed at the last position only, but for its keys and values.
    reading = length * ((layers - 1) * (rest + keys) + keys) + (layers - 1) * length**2 * width + rest

    def after(tokens: int, before: int) -> float:
        """Further tokens of one row, logits aside."""
        return layers * tokens * (rest + keys + 2 * (before + tokens / 2) * width)

    head = config.hidden_size * config.vocab_size
    asking = sum(after(tokens, length) + head for tokens in questions)
    answers = zip(questions, new_tokens, strict=True)
    writing = sum(after(new - 1, length + asked) + (new - 1) * head for asked, new in answers)
    return Work(2 * seeing, 2 * reading, 2 * asking, 2 * writing)


def matrix_rate(device: str, dtype: str) -> float:
    """What the machine's matrix multiplication does in the model's format, operations a second: the median of nine."""
    count = 8192 if device != "cpu" else 2048
    left, right = torch.randn(2, count, count, device=device, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(10):
        synchronise(device)
        begun = time.perf_counter()
        left @ right
        synchronise(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * count**3 / statistics.median(seconds[1:])


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()
