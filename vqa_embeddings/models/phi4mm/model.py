"""Phi-4-multimodal behind the protocol: its prompt, its pictures as the decoder reads them, the end of an answer.

What the library (transformers 5.17 to 5.24) does silently wrong is avoided here and in the modules beside this one:

- Its vision attention is causal wherever no patch is masked; that of `vision` never is.
- Its `output_hidden_states` reads the wrong vision layer after an image; `vision` and `decoder` read the states.
- Its long or short rotary factors are one choice a batch; in `decoder` they are each row's own.
- Its `generate` loses the context where an answer crosses the original context length; `finish_reason` says where.
- A generated image or audio token crashes it; they are suppressed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from vqa_embeddings.data.picture_limits import is_truncated
from vqa_embeddings.errors import PictureUnreadable, PromptTooLong
from vqa_embeddings.layers.device import to_device
from vqa_embeddings.layers.kv_cache import KVCache
from vqa_embeddings.models.base import EncodedImage, FinishReason, ForwardInputs, ModelSpec
from vqa_embeddings.models.checkpoint import stored_layers
from vqa_embeddings.models.phi4mm.checkpoint import PIXEL_MEAN
from vqa_embeddings.models.phi4mm.decoder import GROUP, Decoder
from vqa_embeddings.models.phi4mm.formats import END_LSTRIP, IMAGE_RSTRIP, IMAGE_TOKENS
from vqa_embeddings.models.phi4mm.vision import PATCHES_AT_ONCE, Pixels, Vision

SHORT, LONG = 0, 1  # rotary factors

# What the tokenizer's `rstrip` tokens swallow after them: Unicode's White_Space, which str.strip() exceeds.
WHITE_SPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
)


class Phi4:
    """Phi-4-multimodal with its vision LoRA: a `VisionLanguageModel`.

    Args:
        model: the library's `Phi4MultimodalForCausalLM`, its adapter merged or active.
        tokenizer: its tokenizer, whose image token the model's config names.
        image_processor: its `Phi4MultimodalImageProcessor`.
        max_new_tokens: the longest answer, in tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, max_new_tokens: int) -> None:
        config = model.config
        layers = stored_layers(config.num_hidden_layers)
        self._image_token: int = config.vision_config.image_token_id
        self.decoder = Decoder(model, layers)
        self.vision = Vision(model.model.embed_tokens_extend.image_embed, config.vision_config)
        self.spec = ModelSpec(
            layers=layers,
            kv_groups=[self.decoder.group],
            attention_heads=self.decoder.heads,
            suppressed_tokens=[self._image_token, config.audio_config.audio_token_id],
            max_new_tokens=max_new_tokens,
            patches_at_once=PATCHES_AT_ONCE[self.decoder.device.type],
            device=self.decoder.device,
            dtype=self.decoder.dtype,
        )
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self._context: int = config.max_position_embeddings
        self._short_context = self.decoder.short_context or self._context
        self._ends = set(model.generation_config.eos_token_id)  # as `Phi4Checkpoint.ends` has them
        self._plain = _without_added_tokens(self._tokenizer.backend_tokenizer)
        placeholder = tokenizer.convert_ids_to_tokens(self._image_token)
        self._end_swallows, self._image_swallows = END_LSTRIP, IMAGE_RSTRIP
        if placeholder != IMAGE_TOKENS["original"]:  # a native tokenizer, whose own flags are the rule
            self._end_swallows = self._strips("<|end|>", "lstrip")
            self._image_swallows = self._strips(placeholder, "rstrip")
        self._head = tokenizer("<|user|>" + placeholder)["input_ids"]
        self._tail = tokenizer("<|end|><|assistant|>", add_special_tokens=False)["input_ids"]

    def preprocess(self, image: Image.Image) -> Pixels:
        """Crops of an RGB picture; safe to call from several threads.

        Raises:
            PictureUnreadable: the processor takes no picture of this shape.
        """
        try:
            made = self._image_processor(images=[image], return_tensors="pt")
        except Exception as error:  # of one picture, whatever it is: the others go on
            raise PictureUnreadable(
                f"the model's processor takes no picture of {image.width}x{image.height} pixels ({error}); "
                "expected sides that are less unlike, crop or scale it"
            ) from None
        crops, mask = made["image_pixel_values"][0], made["image_attention_mask"][0]
        height, width = made["image_sizes"][0].tolist()
        return Pixels(
            crops=crops.to(self.vision.dtype),
            mask=mask,
            size=(height, width),
            tokens=int(made["num_img_tokens"][0]),
            mean=crops.float().mean(dim=(0, 1, 2)).numpy(),
            truncated=is_truncated(image),
        )

    @torch.inference_mode()
    def encode_images(self, pixels: Sequence[Pixels]) -> list[EncodedImage]:
        """Run SigLIP and the projector over pictures, together; each comes to what it comes to alone.

        Returns:
            Their `inputs` are embeddings, [prefix, hidden]: `<|user|>` and the image tokens, as the decoder reads them.
        """
        place = self._head.index(self._image_token)
        around = self.decoder.embed(to_device(torch.tensor(self._head), self.decoder.device))
        encoded = []
        for picture, seen in zip(pixels, self.vision(pixels), strict=True):
            embeddings = torch.cat([around[:place], seen.tokens.to(around.dtype), around[place + 1 :]])
            length = len(embeddings)
            extra = {PIXEL_MEAN: picture.mean}
            encoded.append(EncodedImage(embeddings, length, {GROUP: length}, seen.mean, extra, picture.truncated))
        return encoded

    def tokenize(self, question: str) -> list[int]:
        """The tokens that follow the image tokens. Text that looks like a special token stays text."""
        if self._image_swallows:
            question = question.lstrip(WHITE_SPACE)
        if self._end_swallows:
            question = question.rstrip(WHITE_SPACE)
        return [*self._plain.encode(question, add_special_tokens=False).ids, *self._tail]

    def rope_variant(self, image: EncodedImage, tokens: Sequence[int]) -> int:
        """The long rotary factors, 1, where the prompt does not fit under the short ones, 0.

        Raises:
            PromptTooLong: it is longer than the model's context.
        """
        length = image.prompt_length + len(tokens)
        if length > self._context:
            raise PromptTooLong(
                f"the prompt has {length} tokens; expected {self._context} at most, the model's context: "
                "shorten the question"
            )
        return LONG if length > self._short_context else SHORT

    def prefill_image(
        self, image: EncodedImage, variant: int, kv: KVCache, blocks: Mapping[str, Sequence[int]]
    ) -> Tensor:
        """See `VisionLanguageModel.prefill_image`."""
        return self.decoder.prefill_image(image.inputs, variant, kv, blocks[GROUP])

    def forward(self, kv: KVCache, inputs: ForwardInputs) -> tuple[Tensor, Tensor]:
        """See `VisionLanguageModel.forward`."""
        return self.decoder.forward(kv, inputs)

    def finish_reason(self, prompt: int, output: Sequence[int], variant: int) -> FinishReason | None:
        """Whether an answer has ended, and why.

        RESTART where its next step needs the long rotary factors: keys under the short ones would be wrong beside the
        new. The library's `generate` goes on without the context there.
        """
        if output[-1] in self._ends:
            return FinishReason.STOP
        if len(output) >= self.spec.max_new_tokens:
            return FinishReason.LENGTH
        if prompt + len(output) <= (self._context if variant == LONG else self._short_context):
            return None
        return FinishReason.RESTART if variant == SHORT and self._short_context < self._context else FinishReason.LENGTH

    def detokenize(self, output: Sequence[int]) -> str:
        """An answer as it is stored. A NUL cannot be; the replacement character stands for what has no text."""
        text = self._tokenizer.decode(output, skip_special_tokens=True, clean_up_tokenization_spaces=False)
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
