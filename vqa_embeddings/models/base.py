"""The protocol that a model family fulfils: all that the engine, and whatever lies downstream of it, knows of a model.

For the engine, "the picture enters the decoder" always means the same: there is a set of keys and values a picture,
computed once, that all questions on it read. How a family makes them, and what it calls its parts, is its own affair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image
    from torch import Tensor

    from vqa_embeddings.layers.kv_cache import KVCache, KVGroup
    from vqa_embeddings.layers.prefix_sharing import PrefixSharing


@dataclass(frozen=True)
class Checkpoint:
    """A folder that can be loaded, and what its files say without loading it. Families add what they need to load it.

    Sizes are lengths of vectors.
    """

    family: ModelFamily
    name: str  # as the user gave it
    folder: Path
    revision: str
    layout: str  # the form that its files have, as `run.json` names it
    lora: str  # what is done with its adapter, as `--lora` names it; empty where the family has none
    layers: list[int]  # the decoder layers whose states are stored
    hidden_size: int
    vision_size: int
    extra_vectors: Mapping[str, int]  # further ones of each row, their lengths by their names in a part
    optional_vectors: Mapping[str, Mapping[str, int]]  # likewise, by the option that asks for them
    dtype: str  # of the weights as they are stored
    fingerprint: str
    config: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class ReferenceRow:
    """What a reference makes of one row."""

    vectors: Mapping[str, np.ndarray]  # all that a run can store, by their names: float32 [n], or [layers, hidden]
    answer: str


class Reference(Protocol):
    """Another implementation of a model, loaded from the same files: what a self-check holds this program against."""

    def extract(self, image: Image.Image, question: str, layers: Sequence[int], max_new_tokens: int) -> ReferenceRow:
        """The values of one row, computed alone.

        Args:
            image: in RGB.
            layers: whose states are wanted.
        Raises:
            RowError: it cannot be extracted, or is one of those that the two are meant to read differently.
        """


class ModelFamily(Protocol):
    """One kind of model: how its checkpoints are recognised, inspected and loaded. Importing it imports no torch."""

    name: str  # for people
    model_types: Mapping[str, str]  # of `config.json`, and what each means
    default_model: str  # name on the hub
    default_revision: str  # of that model
    unused_files: Sequence[str]  # patterns of files of its models that need not be downloaded
    file_prefix: str  # what its part files begin with, as published
    model_type: str  # attribute of its part files, as published

    def explain_folder(self, folder: Path) -> None:
        """Say what a folder without a `config.json` is, where it is known from something else.

        Raises:
            InputError: it is; with what to do.
        """

    def inspect(self, folder: Path, name: str, revision: str, config: dict[str, Any], lora: str) -> Checkpoint:
        """What a checkpoint of this family is, by its files.

        Raises:
            InputError: it is not whole, or not what it should be.
        """

    def describe_form(self, checkpoint: Any) -> str:
        """For the plan, what kind of checkpoint it is, and what is done with its adapter."""

    def describe_settings(self, checkpoint: Any) -> str:
        """For the plan, what the checkpoint's files settle about pictures and answers."""

    def load(
        self, checkpoint: Any, device: str, dtype: str, attention: str, max_new_tokens: int
    ) -> VisionLanguageModel:
        """The model, ready to infer.

        Raises:
            InputError: a file is damaged, or does not fit the others.
        """

    def describe_reference(self, checkpoint: Any) -> str:
        """For the plan and the result of a self-check, what `reference` is: a library, its version, how it is used.

        Raises:
            InputError: there is none for this checkpoint.
        """

    def reference(self, checkpoint: Any, device: str, dtype: str) -> Reference:
        """Another implementation of the model. It is as large as the model, and goes before that is loaded.

        Raises:
            InputError: it does not take the checkpoint's files.
        """

    def write_random_checkpoint(self, folder: Path) -> None:
        """Write a small checkpoint with random weights, for the demo and for tests."""


@dataclass(frozen=True)
class ModelSpec:
    """What the engine has to know of a loaded model."""

    layers: Sequence[int]  # the decoder layers whose states are stored
    kv_groups: Sequence[KVGroup]
    attention_heads: int
    suppressed_tokens: Sequence[int]  # never chosen for an answer
    max_new_tokens: int
    patches_at_once: int  # that go through the vision tower together, about
    device: torch.device
    dtype: torch.dtype


class Pixels(Protocol):
    """A preprocessed picture. The engine needs its cost only; the rest is between the family's own functions."""

    @property
    def patches(self) -> int:
        """How many patches the vision tower is to compute."""


@dataclass(frozen=True)
class EncodedImage:
    """What is the same for all questions on a picture."""

    inputs: Any  # what `prefill_image` reads
    prompt_length: int  # tokens of the prompt up to the last image token
    prefix_lengths: Mapping[str, int]  # keys that all its rows read, by KV group
    vision_only: Tensor  # float32 [vision]
    extra: Mapping[str, np.ndarray]  # further vectors of the picture, float32 [n], by their names in a part
    truncated: bool  # it is what there is of a picture that is cut off


@dataclass(frozen=True)
class ForwardInputs:
    """Further tokens of rows in neighbouring slots."""

    sharing: Mapping[str, PrefixSharing]  # which rows share which blocks, by KV group
    blocks: Mapping[str, Tensor | int]  # those that `sharing` is about, as `KVPool.read_blocks` takes them
    first_slot: int  # of the first row
    tokens: Tensor  # int64 [rows, length]; rows that have fewer are padded on the right
    starts: Tensor  # int64 [rows], how many keys each slot holds already
    ends: Tensor  # int64 [rows], where in `tokens` each row's last one is
    width: int  # how many keys of the slots are read: none holds more afterwards


class FinishReason(Enum):
    """Why a row leaves the batch."""

    STOP = "stop"  # an end token
    LENGTH = "length"  # as many tokens as were asked for, or as the context has
    RESTART = "restart"  # its next step needs other rotary factors: it begins again under them


class VisionLanguageModel(Protocol):
    """A loaded model.

    `preprocess`, `tokenize` and the first `rope_variant` of a row may raise a `RowError`, which fails the rows that
    they are for. Any other error, and any in another method, ends the run.
    """

    spec: ModelSpec

    def preprocess(self, image: Image.Image) -> Pixels:
        """What the vision tower reads; safe to call from any thread.

        Raises:
            PictureUnreadable: the model's processor takes no picture of this shape.
        """

    def encode_images(self, pixels: Sequence[Any]) -> list[EncodedImage]:
        """Run the vision tower over pictures, together; each comes to what it comes to alone."""

    def tokenize(self, question: str) -> list[int]:
        """The prompt's tokens after the last image token. Text that looks like a special token stays text.

        Raises:
            RowError: no prompt can be made of it.
        """

    def rope_variant(self, image: EncodedImage, tokens: Sequence[int]) -> int:
        """Under which rotary factors the prompt is read, 0 nearly always.

        Args:
            tokens: those after the image; of a row that begins again (`FinishReason.RESTART`) its answer so far, too.
        Raises:
            PromptTooLong: it is longer than the model's context; not where a row begins again.
        """

    def prefill_image(
        self, image: EncodedImage, variant: int, kv: KVCache, blocks: Mapping[str, Sequence[int]]
    ) -> Tensor:
        """Leave the keys and values that all rows on a picture read in blocks of the cache.

        Args:
            variant: the rotary factors.
            blocks: as many as `prefix_lengths` needs, by KV group.
        Returns:
            float32 [layers, hidden], the states at its last token.
        """

    def forward(self, kv: KVCache, inputs: ForwardInputs) -> tuple[Tensor, Tensor]:
        """Read further tokens of rows, and leave their keys and values in the rows' slots.

        On a GPU a step of one token a row is captured as a graph and replayed: it must not wait for the device, nor
        depend on anything but the content of the tensors. What it makes of padding is never used, but must be finite:
        a padded token may be -1, as one is that could not be chosen, and its place may lie beyond the context.

        Returns:
            Logits [rows, vocabulary] and states, float32 [rows, layers, hidden], at the last token of each row.
        """

    def finish_reason(self, prompt: int, output: Sequence[int], variant: int) -> FinishReason | None:
        """Whether an answer has ended, and why.

        Args:
            prompt: tokens of the prompt, the picture's included.
            output: tokens of the answer so far, one at least.
            variant: the rotary factors that the row is read under.
        """

    def detokenize(self, output: Sequence[int]) -> str:
        """An answer as it is stored."""
