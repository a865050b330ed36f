"""What is said to the model and what it says: prompt, tokens, pictures as it reads them, the end of an answer.

What the library (transformers 5.17 to 5.24) does silently wrong is closed here and in the rooms beside it:

- Its vision attention is causal wherever no patch is masked; `vision` never is.
- Its `output_hidden_states` reads the wrong vision layer after an image; `vision` and `decoder` read the states.
- Its long or short rotary factors are one choice a batch; in `decoder` they are each row's own.
- Its `generate` loses the context where an answer crosses the original context length; `must_begin_anew` says where.
- A generated image or audio token crashes it; they are never chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from vqa_embeddings.data.picture_limits import is_truncated
from vqa_embeddings.errors import PictureUnreadable, PromptTooLong
from vqa_embeddings.layers.device import to_device
from vqa_embeddings.models.checkpoint import kept_layers
from vqa_embeddings.models.phi4mm.decoder import Decoder
from vqa_embeddings.models.phi4mm.formats import END_LSTRIP, IMAGE_RSTRIP, IMAGE_TOKENS
from vqa_embeddings.models.phi4mm.vision import Pixels, Vision

# What the tokenizer's `rstrip` tokens swallow after them: Unicode's White_Space, which str.strip() exceeds.
WHITE_SPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
)


@dataclass(frozen=True)
class Picture:
    """What is the same for all questions on a picture."""

    embeddings: Tensor  # [prefix, hidden]: `<|user|>` and the image tokens, as the decoder reads them
    vision_only: Tensor  # float32 [vision]
    pixel_mean: np.ndarray  # `Pixels.mean`
    truncated: bool  # `Pixels.truncated`


class Phi4:
    """Phi-4-multimodal with its vision LoRA, asked questions about pictures.

    Args:
        model: the library's `Phi4MultimodalForCausalLM`, its adapter merged or active.
        tokenizer: its tokenizer, whose image token the model's config names.
        image_processor: its `Phi4MultimodalImageProcessor`.
        max_new_tokens: the longest answer, in tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, max_new_tokens: int) -> None:
        config = model.config
        self.max_new_tokens = max_new_tokens
        self.layers = kept_layers(config.num_hidden_layers)
        self._image_token: int = config.vision_config.image_token_id
        self.decoder = Decoder(model, self.layers, [self._image_token, config.audio_config.audio_token_id])
        self.vision = Vision(model.model.embed_tokens_extend.image_embed, config.vision_config)
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self._context: int = config.max_position_embeddings
        self._short_context = self.decoder.rotary.short_context or self._context
        self._ends = set(model.generation_config.eos_token_id)  # as `Checkpoint.ends` has them
        self._plain = _without_added_tokens(self._tokenizer.backend_tokenizer)
        placeholder = tokenizer.convert_ids_to_tokens(self._image_token)
        self._end_swallows, self._image_swallows = END_LSTRIP, IMAGE_RSTRIP
        if placeholder != IMAGE_TOKENS["original"]:  # a native tokenizer, whose own flags are the rule
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
                f"the model's processor takes no picture of {picture.width}x{picture.height} pixels ({error}); "
                "expected sides that are less unlike, crop or scale it"
            ) from None
        crops, mask = made["image_pixel_values"][0], made["image_attention_mask"][0]
        height, width = made["image_sizes"][0].tolist()
        mean = crops.float().mean(dim=(0, 1, 2)).numpy()
        size, tokens = (height, width), int(made["num_img_tokens"][0])
        return Pixels(crops.to(self.vision.dtype), mask, size, tokens, mean, is_truncated(picture))

    @torch.inference_mode()
    def pictures(self, pixels: Sequence[Pixels]) -> list[Picture]:
        """Run SigLIP and the projector over pictures, together; each comes to what it comes to alone."""
        place = self._head.index(self._image_token)
        around = self.decoder.embed(to_device(torch.tensor(self._head), self.decoder.device))
        made = []
        for picture, seen in zip(pixels, self.vision(pixels), strict=True):
            embeddings = torch.cat([around[:place], seen.tokens.to(around.dtype), around[place + 1 :]])
            made.append(Picture(embeddings, seen.mean, picture.mean, picture.truncated))
        return made

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
        length = len(picture.embeddings) + len(question)
        if length > self._context:
            raise PromptTooLong(
                f"the prompt has {length} tokens; expected {self._context} at most, the model's context: "
                "shorten the question"
            )
        return length > self._short_context

    def is_over(self, prompt: int, written: Sequence[int], long: bool) -> bool:
        """Whether an answer has ended, or goes no further under its rotary factors: see `must_begin_anew`.

        Args:
            prompt: tokens of the prompt.
            written: the answer so far.
        """
        if len(written) >= self.max_new_tokens or written[-1] in self._ends:
            return True
        return prompt + len(written) > (self._context if long else self._short_context)

    def must_begin_anew(self, written: Sequence[int], long: bool) -> bool:
        """Whether an answer that is over stopped only where its next step needs the long factors.

        From there on the row is a long one: keys under the short factors would be wrong beside the new.
        """
        ended = len(written) >= self.max_new_tokens or written[-1] in self._ends
        return not ended and not long and self._short_context < self._context

    def text(self, written: Sequence[int]) -> str:
        """An answer as it is stored. A NUL cannot be; the replacement character stands for what has no text."""
        text = self._tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).replace("\0", "\ufffd").strip()

    def _strips(self, token: str, side: str) -> bool:
        added = self._tokenizer.added_tokens_decoder.get(self._tokenizer.convert_tokens_to_ids(token))
        return bool(added is not None and getattr(added, side))


def _without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer for plain text: `split_special_tokens` would leave those added tokens that are not special.

    It shares the other's vocabulary, which is large.
    """
    plain = Tokenizer(tokenizer.model)
    if tokenizer.normalizer is not None:
        plain.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        plain.pre_tokenizer = tokenizer.pre_tokenizer
    return plain
