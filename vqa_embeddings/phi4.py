"""All that knows the model: prompt, vision features, decoder states, greedy answers.

What the library (transformers 5.17 to 5.23) does silently wrong here is closed in this module:

- Its vision attention is causal wherever no patch is masked. `_PatchFeatures` turns that off.
- Its `output_hidden_states` reads the wrong vision layer after an image. Own hooks read the states.
- Its long or short rotary factors are one choice a batch. `_RowRotary` makes them each row's own.
- Its `generate` loses the context where an answer crosses the original context length. `answer` begins anew there.
- A generated image or audio token crashes it. `answer` never chooses one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vqa_embeddings.checkpoint import kept_layers
from vqa_embeddings.errors import PictureUnreadable, PromptTooLong

# What the tokenizer's `rstrip` tokens swallow after them: Unicode's White_Space, which str.strip() exceeds.
WHITE_SPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
)


@dataclass(frozen=True)
class Pixels:
    """A picture as the library's image processor makes it."""

    crops: Tensor  # [crops, 3, 448, 448]: the global view, then the real crops, none of them padding
    mask: Tensor  # [crops, 32, 32], 1 where a patch shows the picture
    size: Tensor  # [1, 2], height and width of the crops laid out, pixels
    tokens: int  # how many image tokens stand for the picture in the prompt
    mean: np.ndarray  # float32 [448], over crops, channels and rows, as the published script has it


@dataclass(frozen=True)
class Picture:
    """What is the same for all questions on a picture."""

    embeddings: Tensor  # [1, prefix, hidden]: `<|user|>` and the image tokens, as the decoder reads them
    vision_only: np.ndarray  # float32 [vision]
    pixel_mean: np.ndarray  # `Pixels.mean`


@dataclass(frozen=True)
class Prefix:
    """The decoder's pass over a picture's part of the prompt, under one set of rotary factors."""

    cache: DynamicCache
    length: int
    long: bool
    vision_token: np.ndarray  # float32 [layers, hidden], at the last image token


@dataclass(frozen=True)
class Answer:
    """What the model gives for one question on a picture."""

    vision_token: np.ndarray  # float32 [layers, hidden]
    query_token: np.ndarray  # float32 [layers, hidden]
    text: str


class Phi4:
    """Phi-4-multimodal with its vision LoRA, asked questions about pictures.

    Args:
        model: the library's `Phi4MultimodalForCausalLM`, its adapter merged or active.
        tokenizer: its tokenizer, whose image token the model's config names.
        image_processor: its `Phi4MultimodalImageProcessor`.
        max_new_tokens: the longest answer, in tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, max_new_tokens: int) -> None:
        self.device: torch.device = model.device
        self.max_new_tokens = max_new_tokens
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self._decoder = model.model
        self._lm_head = model.lm_head
        self._image_embed = model.model.embed_tokens_extend.image_embed
        self._vision = _PatchFeatures(self._image_embed.img_processor, model.config.vision_config.feature_layer)
        self._image_embed.img_processor = self._vision
        self._rotary = _RowRotary(model.model.rotary_emb).to(self.device)
        model.model.rotary_emb = self._rotary
        self.layers = kept_layers(model.config.num_hidden_layers)
        self._taps = _Taps(model.model, self.layers)
        self._context: int = model.config.max_position_embeddings
        self._short_context = self._rotary.short_context or self._context
        self._image_token: int = model.config.vision_config.image_token_id
        self._never = [self._image_token, model.config.audio_config.audio_token_id]
        ends = model.generation_config.eos_token_id or model.config.eos_token_id
        self._ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.convert_tokens_to_ids("<|end|>")}
        self._plain = _without_added_tokens(self._tokenizer.backend_tokenizer)
        placeholder = tokenizer.convert_ids_to_tokens(self._image_token)
        self._end_swallows = self._strips("<|end|>", "lstrip")
        self._image_swallows = self._strips(placeholder, "rstrip")
        self._head = tokenizer("<|user|>" + placeholder)["input_ids"]
        self._tail = tokenizer("<|end|><|assistant|>", add_special_tokens=False)["input_ids"]

    def pixels(self, picture: Image.Image) -> Pixels:
        """Crops of an RGB picture; safe to call from several threads.

        Raises:
            PictureUnreadable: the processor takes no picture of this shape.
        """
        try:
            made = self._image_processor(images=[picture], return_tensors="pt")
        except Exception as error:  # of one picture, whatever it is: the others go on
            raise PictureUnreadable(
                f"a picture of {picture.width}x{picture.height} pixels is refused: {error}"
            ) from None
        crops, mask = made["image_pixel_values"][0], made["image_attention_mask"][0]
        mean = crops.float().mean(dim=(0, 1, 2)).numpy()
        return Pixels(crops, mask, made["image_sizes"], int(made["num_img_tokens"][0]), mean)

    @torch.inference_mode()
    def picture(self, pixels: Pixels) -> Picture:
        """Run SigLIP and the projector over one picture, alone."""
        repeats = [pixels.tokens if token == self._image_token else 1 for token in self._head]
        tokens = torch.tensor(self._head).repeat_interleave(torch.tensor(repeats))[None].to(self.device)
        embeddings = self._image_embed(
            tokens,
            self._decoder.embed_tokens(tokens),
            image_pixel_values=pixels.crops[None].to(self.device),
            image_sizes=pixels.size.to(self.device),
            image_attention_mask=pixels.mask[None].to(self.device),
        )
        shown = pixels.mask.flatten(1).bool().to(self.device)
        vision_only = self._vision.features[shown].float().mean(dim=0)
        return Picture(embeddings, vision_only.cpu().numpy(), pixels.mean)

    def question(self, text: str) -> list[int]:
        """The tokens that follow the image tokens. Text that looks like a special token stays text."""
        if self._image_swallows:
            text = text.lstrip(WHITE_SPACE)
        if self._end_swallows:
            text = text.rstrip(WHITE_SPACE)
        return [*self._plain.encode(text, add_special_tokens=False).ids, *self._tail]

    def is_long(self, picture: Picture, question: Sequence[int]) -> bool:
        """Whether the prompt needs the long rotary factors.

        Raises:
            PromptTooLong: it is longer than the model's context.
        """
        length = picture.embeddings.shape[1] + len(question)
        if length > self._context:
            raise PromptTooLong(f"the prompt has {length} tokens; the model's context is {self._context}")
        return length > self._short_context

    @torch.inference_mode()
    def prefix(self, picture: Picture, long: bool) -> Prefix:
        """Run the decoder over the part of the prompt that all questions on the picture share."""
        cache, length = DynamicCache(), picture.embeddings.shape[1]
        self._forward(picture.embeddings, cache, torch.arange(length)[None], torch.ones(1, length), long)
        return Prefix(cache, length, long, self._taps.last()[0])

    @torch.inference_mode()
    def answer(self, picture: Picture, prefix: Prefix, questions: Sequence[list[int]]) -> list[Answer]:
        """States at the last prompt token, and greedy answers, of questions that share a prefix.

        Args:
            questions: tokens from `question`, each of the regime, `is_long`, that the prefix was made for.
        """
        states, written = self._generate(prefix, questions, [self.max_new_tokens] * len(questions))
        crossing = [row for row, tokens in enumerate(written) if self._crosses(prefix, questions[row], tokens)]
        if crossing:
            # From here on each of these rows is a long one: keys under short factors would be wrong beside the new.
            anew = self.prefix(picture, long=True)
            for row in crossing:
                left = self.max_new_tokens - len(written[row])
                written[row] += self._generate(anew, [[*questions[row], *written[row]]], [left])[1][0]
        texts = [
            self._tokenizer.decode(t, skip_special_tokens=True, clean_up_tokenization_spaces=False) for t in written
        ]
        # A NUL cannot be stored as HDF5 text; the replacement character is what stands for what has no text.
        return [
            Answer(prefix.vision_token, states[row], text.replace("\0", "\ufffd").strip())
            for row, text in enumerate(texts)
        ]

    def _crosses(self, prefix: Prefix, question: Sequence[int], written: Sequence[int]) -> bool:
        """Whether an answer stopped only because its next step needs the long factors."""
        ended = len(written) >= self.max_new_tokens or written[-1] in self._ends
        return not ended and not prefix.long and self._short_context < self._context

    def _generate(
        self, prefix: Prefix, questions: Sequence[list[int]], budgets: Sequence[int]
    ) -> tuple[np.ndarray, list[list[int]]]:
        """Greedy tokens for each question, until an end token, its budget, or the end of the prefix's regime.

        The questions are padded on the left, between prefix and question; the padding is masked out and the
        positions are each row's own, so that a row does not see its company.
        """
        limit = self._context if prefix.long else self._short_context
        longest = max(map(len, questions))
        padding = torch.tensor([longest - len(question) for question in questions])
        tokens = torch.tensor([[self._tail[0]] * (longest - len(q)) + q for q in questions], device=self.device)
        columns = torch.arange(longest)[None]
        mask = torch.cat([torch.ones(len(questions), prefix.length), columns >= padding[:, None]], dim=1)
        positions = (prefix.length + columns - padding[:, None]).clamp(min=0)
        cache = copy.deepcopy(prefix.cache)
        cache.batch_repeat_interleave(len(questions))
        logits = self._forward(self._decoder.embed_tokens(tokens), cache, positions, mask, prefix.long)
        states = self._taps.last()

        written: list[list[int]] = [[] for _ in questions]
        rows, position = list(range(len(questions))), positions[:, -1]
        while True:
            chosen = logits.argmax(dim=-1).tolist()
            for row, token in zip(rows, chosen, strict=True):
                written[row].append(token)
            position = position + 1
            going = [
                index
                for index, row in enumerate(rows)
                if chosen[index] not in self._ends and len(written[row]) < budgets[row] and position[index] < limit
            ]
            if not going:
                return states, written
            if len(going) < len(rows):
                cache.batch_select_indices(torch.tensor(going, device=self.device))
                rows, position, mask = [rows[index] for index in going], position[going], mask[going]
            mask = torch.cat([mask, torch.ones(len(rows), 1)], dim=1)
            last = torch.tensor([[written[row][-1]] for row in rows], device=self.device)
            logits = self._forward(self._decoder.embed_tokens(last), cache, position[:, None], mask, prefix.long)

    def _forward(self, embeddings: Tensor, cache: DynamicCache, positions: Tensor, mask: Tensor, long: bool) -> Tensor:
        """One pass of the decoder over new positions, added to the cache. Returns the last one's logits, float32."""
        self._rotary.long = torch.full((len(embeddings),), long, device=self.device)
        hidden = self._decoder(
            inputs_embeds=embeddings,
            past_key_values=cache,
            position_ids=positions.to(self.device),
            attention_mask=mask.to(self.device, torch.long),
            use_cache=True,
        ).last_hidden_state
        logits = self._lm_head(hidden[:, -1]).float()
        logits[:, self._never] = -torch.inf
        return logits

    def _strips(self, token: str, side: str) -> bool:
        added = self._tokenizer.added_tokens_decoder.get(self._tokenizer.convert_tokens_to_ids(token))
        return bool(added is not None and getattr(added, side))


def _without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer for plain text: `split_special_tokens` would leave those added tokens that are not special."""
    description = json.loads(tokenizer.to_str())
    description.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    return Tokenizer.from_str(json.dumps(description))


class _PatchFeatures(nn.Module):
    """SigLIP up to the layer that the projector reads, in the place where the projector looks for all of it.

    Its attention looks both ways. After a call, `features` holds what the projector read, [crops, patches, vision].
    """

    def __init__(self, tower: Any, feature_layer: int) -> None:
        super().__init__()
        layers = tower.encoder.layers
        self._feature_layer = feature_layer
        self.features = torch.empty(0)
        count = feature_layer if feature_layer >= 0 else len(layers) + 1 + feature_layer
        tower.encoder.layers = layers[:count]
        tower.post_layernorm = nn.Identity()
        tower.head = _Nothing()
        for layer in tower.encoder.layers:
            layer.self_attn.is_causal = False
        self.tower = tower
        self.embeddings = tower.embeddings  # where the projector looks for the number format

    def forward(self, pixel_values: Tensor, patch_attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        self.features = self.tower(pixel_values, patch_attention_mask=patch_attention_mask).last_hidden_state
        return SimpleNamespace(hidden_states={self._feature_layer: self.features})


class _Nothing(nn.Module):
    """Stands where the tower's pooling head was, whose output nobody reads."""

    def forward(self, **_: Any) -> None:
        return None


class _RowRotary(nn.Module):
    """Rotary angles with the short or the long factors, row by row, as `long` says: bool [rows].

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
        self.long = torch.zeros(1, dtype=torch.bool)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = torch.where(self.long[:, None], self.long_frequencies, self.short_frequencies)
        angles = position_ids[..., None].float() * frequencies[:, None, :]
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self._scaling).to(x.dtype), (angles.sin() * self._scaling).to(x.dtype)


class _Taps:
    """Reads the states of the kept layers at the last position: layer k's output, the last one after the norm."""

    def __init__(self, decoder: Any, layers: Sequence[int]) -> None:
        self._states: dict[int, Tensor] = {}
        self._layers = layers
        for layer in layers:
            last = layer == len(decoder.layers) - 1
            (decoder.norm if last else decoder.layers[layer]).register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            self._states[layer] = states[:, -1]

        return keep

    def last(self) -> np.ndarray:
        """float32 [rows, layers, hidden] of the pass that has just run."""
        states = torch.stack([self._states[layer] for layer in self._layers], dim=1)
        return states.float().cpu().numpy()
