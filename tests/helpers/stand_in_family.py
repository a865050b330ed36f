"""A model family in about a hundred lines: self-attention only, no LoRA, one vector more than the others have.

What a row's values are by definition is in tests/system/test_stand_in_family.py, which shares no code with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vqa_embeddings.errors import InputError, PromptTooLong
from vqa_embeddings.layers.attention import attend_partially, attend_prefixes, merge_two
from vqa_embeddings.layers.kv_cache import KVGroup
from vqa_embeddings.models.base import Checkpoint, EncodedImage, FinishReason, ModelSpec
from vqa_embeddings.models.checkpoint import fingerprint

LAYERS, HEADS, SIZE, HIDDEN, VISION, PATCHES, CONTEXT = 4, 2, 8, 16, 6, 9, 400
BEGIN, SEPARATOR, END, UNUSED, VOCABULARY = 256, 257, 258, 259, 260
MEAN_COLOUR = "mean_colour_representation"  # the vector that other families do not have
SHAPES = {"patch": (3, VISION), "project": (VISION, HIDDEN), "embed": (VOCABULARY, HIDDEN), "place": (CONTEXT, HIDDEN)}
SHAPES |= {f"{name}{layer}": (HIDDEN, n * HIDDEN) for layer in range(LAYERS) for name, n in (("qkv", 3), ("out", 1))}


def make_weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) / shape[0] ** 0.25 for name, shape in sorted(SHAPES.items())}


@dataclass(frozen=True)
class Patches:
    colours: Tensor  # float32 [PATCHES, 3]
    patches: int = PATCHES


class StandIn:
    def __init__(self, checkpoint: Checkpoint, device: str, max_new_tokens: int) -> None:
        self.weights = {name: one.to(device) for name, one in make_weights(checkpoint.config["seed"]).items()}
        group = KVGroup("self", LAYERS, HEADS, SIZE, per_row=True, longest_prefix=1 + PATCHES)
        where = torch.device(device)
        self.spec = ModelSpec(checkpoint.layers, [group], HEADS, [UNUSED], max_new_tokens, 900, where, torch.float32)

    def preprocess(self, image: Image.Image) -> Patches:
        return Patches(torch.from_numpy(np.asarray(image.resize((3, 3)), np.float32).reshape(PATCHES, 3) / 255))

    def encode_images(self, pixels: list[Patches]) -> list[EncodedImage]:
        encoded = []
        for one in pixels:
            seen = (one.colours.to(self.spec.device) @ self.weights["patch"]).tanh()
            tokens = torch.cat([self.weights["embed"][BEGIN][None], seen @ self.weights["project"]])
            extra = {MEAN_COLOUR: one.colours.mean(dim=0).numpy()}
            encoded.append(EncodedImage(tokens, len(tokens), {"self": len(tokens)}, seen.mean(dim=0), extra, False))
        return encoded

    def tokenize(self, question: str) -> list[int]:
        return [*question.encode(), SEPARATOR]

    def rope_variant(self, image: EncodedImage, tokens: list[int]) -> int:
        if image.prompt_length + len(tokens) + self.spec.max_new_tokens > CONTEXT:
            raise PromptTooLong("the question is too long")
        return 0

    def prefill_image(self, image, variant, kv, blocks) -> Tensor:
        hidden, where, states = self._place(image.inputs, torch.arange(image.prompt_length)), blocks["self"], []
        for layer in range(LAYERS):
            queries, keys, values = self._project(layer, hidden)  # [length, heads, size]
            kv.pools["self"].write_blocks(layer, torch.tensor(where), keys, values)
            by_head = (one.transpose(0, 1) for one in (queries, keys, values))
            mixed = F.scaled_dot_product_attention(*by_head, is_causal=True).transpose(0, 1)
            hidden = self._finish(layer, hidden, mixed)
            states.append(hidden[-1])
        return torch.stack(states)[list(self.spec.layers)]

    def forward(self, kv, inputs) -> tuple[Tensor, Tensor]:
        sharing, pool, (count, length) = inputs.sharing["self"], kv.pools["self"], inputs.tokens.shape
        own = inputs.starts[:, None] + torch.arange(length)
        places = (sharing.length[:, None] + own).clamp(max=CONTEXT - 1)  # padding may lie beyond
        hidden, states = self._place(self.weights["embed"][inputs.tokens.clamp(min=0)], places), []
        later = (torch.arange(inputs.width) > own[..., None])[:, None]
        for layer in range(LAYERS):
            queries, keys, values = self._project(layer, hidden)
            pool.write_slots(layer, inputs.first_slot, inputs.starts, keys, values)
            queries = queries.transpose(1, 2)
            on_image = attend_prefixes(queries, pool, layer, sharing, inputs.blocks["self"], SIZE**-0.5)
            own_keys = pool.read_slots(layer, inputs.first_slot, count, inputs.width)
            mixed = merge_two(on_image, attend_partially(queries, *own_keys, later, SIZE**-0.5))
            hidden = self._finish(layer, hidden, mixed.transpose(1, 2))
            states.append(hidden[torch.arange(count), inputs.ends])
        return states[-1] @ self.weights["embed"].T, torch.stack(states, dim=1)[:, list(self.spec.layers)]

    def _place(self, embedded: Tensor, places: Tensor) -> Tensor:
        return embedded + self.weights["place"][places]

    def _project(self, layer: int, hidden: Tensor) -> tuple[Tensor, ...]:
        return (hidden @ self.weights[f"qkv{layer}"]).unflatten(-1, (3, HEADS, SIZE)).unbind(-3)

    def _finish(self, layer: int, hidden: Tensor, mixed: Tensor) -> Tensor:
        return F.layer_norm(hidden + mixed.flatten(-2) @ self.weights[f"out{layer}"], (HIDDEN,))

    def finish_reason(self, prompt: int, output: list[int], variant: int) -> FinishReason | None:
        ended = FinishReason.STOP if output[-1] == END else None
        return ended or (FinishReason.LENGTH if len(output) == self.spec.max_new_tokens else None)

    def detokenize(self, output: list[int]) -> str:
        return " ".join(str(token) for token in output if token != END)


class StandInFamily:
    name, model_types = "the stand-in", {"stand_in": "a family of the tests"}
    default_model, default_revision, unused_files = "nobody/stand-in", "main", []
    file_prefix, model_type = "stand_in", "stand-in"

    def explain_folder(self, folder: Path) -> None: ...

    def inspect(self, folder: Path, name: str, revision: str, config: dict, lora: str) -> Checkpoint:
        sizes, extra = ([0, 1, LAYERS - 1], HIDDEN, VISION), {MEAN_COLOUR: 3}
        return Checkpoint(
            self, name, folder, revision, "plain", "", *sizes, extra, {}, "float32", fingerprint(folder), config
        )

    def describe_form(self, checkpoint: Checkpoint) -> str:
        return "plain"

    def describe_settings(self, checkpoint: Checkpoint) -> str:
        return f"{PATCHES} patches a picture"

    def load(self, checkpoint, device, dtype, attention, max_new_tokens) -> StandIn:
        return StandIn(checkpoint, device, max_new_tokens)

    def describe_reference(self, checkpoint: Checkpoint) -> str:
        raise InputError("--self-check was given, and no library has the stand-in; leave it out")

    def reference(self, checkpoint, device, dtype) -> None: ...

    def write_random_checkpoint(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "stand_in", "seed": 3}))


FAMILY = StandInFamily()
