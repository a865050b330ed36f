"""The rows under way: a sequence for each, and what those on one image share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from vqa_embeddings.layers.kv_cache import Prefix
from vqa_embeddings.models.base import EncodedImage

NOT_FINITE = -1  # stands for a token where the logits leave none to choose


@dataclass(eq=False)
class ImageEntry:
    """An image whose rows are not all finished. Dictionaries are by the rotary factors that its rows are read under."""

    image: EncodedImage
    users: Counter[int] = field(default_factory=Counter)  # rows that are not finished
    prefixes: dict[int, Mapping[str, Prefix]] = field(default_factory=dict)  # in the cache, by KV group
    states: dict[int, Tensor] = field(default_factory=dict)  # float32 [layers, hidden], at the prefix's last token
    # On the host, from the prefill of its first rows on:
    vision_token: dict[int, np.ndarray] = field(default_factory=dict)  # those states
    vision_only: np.ndarray | None = None  # float32 [vision]


@dataclass(eq=False)
class Sequence:
    """A row under way."""

    row: int  # of the table
    entry: ImageEntry
    question: list[int]  # the tokens of the prompt that follow the image
    rope_variant: int
    number: int = 0  # how many rows came before it
    output: list[int] = field(default_factory=list)  # NOT_FINITE at the end where there was none to choose
    vision_token: np.ndarray | None = None  # float32 [layers, hidden], of its image under its prompt's factors
    query_token: np.ndarray | None = None  # float32 [layers, hidden]
    # In the batch:
    slot: int | None = None
    num_keys: int = 0  # in its slot
    written: int = 0  # how far its slot was written to: behind the keys lies padding of the question's pass

    @property
    def tokens(self) -> list[int]:
        """What a prefill reads: the question, and the answer so far of a row that was in the batch before."""
        return self.question + self.output

    @property
    def num_tokens(self) -> int:
        """How many those are."""
        return len(self.question) + len(self.output)

    @property
    def prefix(self) -> Mapping[str, Prefix]:
        """The keys of its image in the cache, by KV group."""
        return self.entry.prefixes[self.rope_variant]

    @property
    def longest_prefix(self) -> int:
        """Keys of its image, in the group where they are most."""
        return max(self.entry.image.prefix_lengths.values())

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, the image's included."""
        return self.entry.image.prompt_length + len(self.question)
