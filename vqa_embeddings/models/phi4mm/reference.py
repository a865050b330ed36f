"""The library's own model as a reference for a self-check: one row alone, eager attention, no cache, no batch.

What is independent of this program where the layout is native: the library reads config, weights and picture settings
from the checkpoint itself, and its PEFT integration loads and applies `vision-lora/`. Where the vision LoRA lies among
the weights, and in the original layout, the library cannot read the files by itself: there the names of the tensors,
the config and the picture settings are this program's reading of them (`formats`, `settings`, `adapters`). What is
computed from them, the LoRA included, is the library's alone in either layout; the weights are never merged here.

How the library is kept from what it gets silently wrong (transformers 5.17 to 5.24):

- Its sdpa and flash attention of the vision tower are causal where no patch is masked; eager attention never is.
- Its `output_hidden_states` reads the wrong vision layer after an image; hooks of our own read each module's output.
- Its long or short rotary factors are one choice a batch; a row alone has its own.
- Its `generate` loses the context where an answer crosses the original context length. Answers are read without its
  cache, which only guesses what comes, so that one reading confirms many tokens.
- A generated image or audio token crashes it; they are suppressed, as they are in an extraction.
- Its padding to the longest text and the most crops of a call; there is none with one row.
- In 16 bits up to 5.17, its positions of patches are rounded into wrong places; its embedding of patches is kept in
  float32, and only what it gives is rounded.
- The tokenizer class that a checkpoint names splits text its own way from transformers 5 on; the fast class reads
  `tokenizer.json` as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqa_embeddings.base.file_names import for_libraries
from vqa_embeddings.errors import InputError, PictureUnreadable, PromptTooLong, RowError, one_line
from vqa_embeddings.layers.device import keep_float32
from vqa_embeddings.models.base import ReferenceRow
from vqa_embeddings.models.checkpoint import machine_errors
from vqa_embeddings.models.phi4mm.checkpoint import ADAPTER_FOLDER, PIXEL_MEAN, Adapter, Phi4Checkpoint
from vqa_embeddings.models.phi4mm.formats import (
    IMAGE_TOKENS,
    ORIGINAL_AUDIO_TOKEN,
    TENSOR_NAMES,
    is_read,
    native_settings,
)
from vqa_embeddings.models.phi4mm.weights import quiet_library
from vqa_embeddings.schema import QUERY_TOKEN, VISION_ONLY, VISION_TOKEN

ADAPTER_NAME = "of_the_reference"  # the library's loader reports false losses for adapters named "vision"
VISION = "vision"  # of what hooks have seen; the rest is by decoder layer


class LibraryReference:
    """A `Reference`: the library's `Phi4MultimodalForCausalLM`, with its vision LoRA beside the weights.

    Args:
        checkpoint: of either layout.
        device: as torch names it.
        dtype: of the weights, and of what is computed.
    Raises:
        InputError: the library cannot load it.
    """

    def __init__(self, checkpoint: Phi4Checkpoint, device: str, dtype: str) -> None:
        keep_float32()
        quiet_library()  # what it reports as a loss is looked at below
        self._native = checkpoint.layout == "native"
        try:
            self._processor = _load_processor(checkpoint)
            self._model = _load_model(checkpoint, self._processor.tokenizer, device, dtype)
            self._vision = _find_vision_layer(self._model, checkpoint)
            if checkpoint.lora != "none":
                assert checkpoint.adapter is not None
                _load_adapter(self._model, checkpoint, checkpoint.adapter)
        except InputError:
            raise
        except machine_errors():
            raise
        except Exception as error:  # the libraries raise nearly every kind of error
            raise InputError(
                f"the library by itself cannot load {checkpoint.folder}, which a self-check needs: {one_line(error)}; "
                "leave out --self-check, or download the checkpoint again"
            ) from error
        self._model.eval().requires_grad_(False)
        self._device = device
        self._ends = _end_tokens(self._model, checkpoint)
        _embed_patches_in_float32(self._model)

    @torch.inference_mode()
    def extract(self, image: Image.Image, question: str, layers: Sequence[int], max_new_tokens: int) -> ReferenceRow:
        """See `Reference.extract`."""
        self._refuse(question)
        inputs = self._prepare(image, question)
        ids, mask = inputs["input_ids"], inputs["image_attention_mask"]
        decoder, config = self._model.model, self._model.config
        image_token: int = config.vision_config.image_token_id
        if ids.shape[1] > config.max_position_embeddings:
            raise PromptTooLong(
                f"the prompt has {ids.shape[1]} tokens, the model's context {config.max_position_embeddings}"
            )
        with self._seeing(layers) as seen:
            embeddings = decoder.embed_tokens_extend(
                ids,
                decoder.embed_tokens(ids),
                image_pixel_values=inputs["image_pixel_values"],
                image_sizes=inputs["image_sizes"],
                image_attention_mask=mask,
            )
            hidden = decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        last_image = int((ids[0] == image_token).nonzero().max())
        shown = mask[0].flatten(1).bool()
        vectors = {
            VISION_ONLY: seen[VISION][shown].float().mean(dim=0),
            VISION_TOKEN: torch.stack([seen[layer][0, last_image] for layer in layers]),
            QUERY_TOKEN: torch.stack([seen[layer][0, -1] for layer in layers]),
            PIXEL_MEAN: inputs["image_pixel_values"][0].float().mean(dim=(0, 1, 2)),
        }
        found = {name: _numpy(values) for name, values in vectors.items()}
        if not all(np.isfinite(values).all() for values in found.values()):
            raise RowError("the library's own vectors of it are NaN or infinite")
        return ReferenceRow(found, self._answer(embeddings, hidden, ids.shape[1], max_new_tokens))

    def _refuse(self, question: str) -> None:
        """Refuse questions that the library's processor and this program are meant to read differently.

        Raises:
            RowError: it is one.
        """
        special = next((text for text in self._processor.tokenizer.get_added_vocab() if text in question), None)
        if special is not None:
            raise RowError(f"its question holds {special}, which the library takes for a token, and not for text")
        if not self._native and question != question.strip():  # of which the native layout's tokens decide
            raise RowError("its question begins or ends with white space, which the original layout's tokens swallow")

    def _prepare(self, image: Image.Image, question: str) -> Any:
        prompt = f"<|user|>{self._processor.tokenizer.image_token}{question}<|end|><|assistant|>"
        try:
            return self._processor(text=prompt, images=image, return_tensors="pt").to(self._device)
        except machine_errors():
            raise
        except Exception as error:
            raise PictureUnreadable(f"the library's processor does not take it ({one_line(error)})") from None

    @contextmanager
    def _seeing(self, layers: Sequence[int]) -> Iterator[dict[Any, Tensor]]:
        """A block in which the outputs of modules are seen: of decoder layers, and of the vision layer that is read."""
        decoder = self._model.model
        modules: dict[Any, Any] = {VISION: self._vision}
        last = len(decoder.layers) - 1
        modules |= {layer: decoder.norm if layer == last else decoder.layers[layer] for layer in layers}
        seen: dict[Any, Tensor] = {}
        hooks = [module.register_forward_hook(_keep(seen, name)) for name, module in modules.items()]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def _answer(self, embeddings: Tensor, hidden: Tensor, prompt: int, max_new_tokens: int) -> str:
        """The answer, greedy, by reading the whole sequence without a cache.

        One such reading tells the next token at every place of it, so that guessed tokens are seen to be right or wrong
        together. Whatever the guess, the answer is what reading the sequence anew for each token gives.
        """
        decoder = self._model.model
        output = [self._next_tokens(hidden[0, -1:])[0]]
        while not self._is_over(prompt, output, max_new_tokens):
            so_far = torch.cat([embeddings, self._embed(output)], dim=1)
            guess = self._guess(so_far, min(max_new_tokens - len(output), self._room(so_far.shape[1])))
            read = torch.cat([so_far, self._embed(guess)], dim=1) if guess else so_far
            hidden = decoder(inputs_embeds=read, use_cache=False).last_hidden_state
            for token, guessed in zip_longest(self._next_tokens(hidden[0, so_far.shape[1] - 1 :]), guess):
                output.append(token)
                if token != guessed or self._is_over(prompt, output, max_new_tokens):
                    break
        tokenizer = self._processor.tokenizer
        text = tokenizer.decode(output, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).replace("\0", "\ufffd").strip()  # as answers are stored

    def _guess(self, embeddings: Tensor, most: int) -> list[int]:
        """The tokens that probably follow, by the library's cache: so many, or up to an end token."""
        from transformers import DynamicCache

        decoder, step, guess = self._model.model, embeddings, list[int]()
        known = signature(decoder.forward).parameters  # the library is about to give the argument another name
        cache = {"cache" if "cache" in known else "past_key_values": DynamicCache(config=self._model.config)}
        while len(guess) < most and not self._ends.intersection(guess):
            made = decoder(inputs_embeds=step, use_cache=True, **cache)
            guess += self._next_tokens(made.last_hidden_state[0, -1:])
            step = self._embed(guess[-1:])
        return guess

    def _room(self, length: int) -> int:
        """How many tokens may follow so many under the same rotary factors, which one reading has throughout."""
        config = self._model.config
        short = config.original_max_position_embeddings
        return max(0, (short if length <= short else config.max_position_embeddings) - length)

    def _is_over(self, prompt: int, output: list[int], max_new_tokens: int) -> bool:
        longest = self._model.config.max_position_embeddings
        return output[-1] in self._ends or len(output) >= max_new_tokens or prompt + len(output) > longest

    def _next_tokens(self, hidden: Tensor) -> list[int]:
        """The most probable token after each state, [n, hidden]."""
        config = self._model.config
        logits = self._model.lm_head(hidden)
        logits[:, [config.vision_config.image_token_id, config.audio_config.audio_token_id]] = -torch.inf
        tokens: list[int] = logits.argmax(dim=-1).tolist()
        return tokens

    def _embed(self, tokens: list[int]) -> Tensor:
        return self._model.model.embed_tokens(torch.tensor([tokens], device=self._device))


def _load_processor(checkpoint: Phi4Checkpoint) -> Any:
    from transformers import (
        Phi4MultimodalFeatureExtractor,
        Phi4MultimodalImageProcessor,
        Phi4MultimodalProcessor,
        PreTrainedTokenizerFast,
    )

    folder = for_libraries(checkpoint.folder)
    if checkpoint.layout == "native":
        names = {}
        images = Phi4MultimodalImageProcessor.from_pretrained(folder, local_files_only=True)
    else:
        names = {"extra_special_tokens": {"image_token": IMAGE_TOKENS["original"], "audio_token": ORIGINAL_AUDIO_TOKEN}}
        images = Phi4MultimodalImageProcessor(**checkpoint.pictures.given)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, **names)
    return Phi4MultimodalProcessor(images, Phi4MultimodalFeatureExtractor(), tokenizer)


def _load_model(checkpoint: Phi4Checkpoint, tokenizer: Any, device: str, dtype: str) -> Any:
    from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

    own: dict[str, Any] = {"key_mapping": TENSOR_NAMES}  # which match no native name
    if checkpoint.layout != "native":
        tokens = tokenizer.image_token_id, tokenizer.audio_token_id
        own["config"] = Phi4MultimodalConfig(**native_settings(checkpoint.config, *tokens))
    model, loading = Phi4MultimodalForCausalLM.from_pretrained(
        for_libraries(checkpoint.folder),
        dtype=getattr(torch, dtype),
        attn_implementation="eager",
        device_map={"": device},
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # of the audio tower, whose sizes the original layout keeps elsewhere
        local_files_only=True,
        use_safetensors=True,
        **own,
    )
    random = [*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])]
    lacking = sorted(filter(is_read, random))
    if lacking:
        raise InputError(f"{checkpoint.folder} has no {lacking[0]} that fits the library; download it again")
    model.model.embed_tokens_extend.audio_embed = None  # no picture reaches it
    return model


def _find_vision_layer(model: Any, checkpoint: Phi4Checkpoint) -> Any:
    """The layer of the vision tower whose output is read.

    Raises:
        InputError: the config names what goes into the first layer, or nothing.
    """
    layers = model.model.embed_tokens_extend.image_embed.img_processor.encoder.layers
    read: int = model.config.vision_config.feature_layer  # of the hidden states, the first of which precede all layers
    if read == 0 or not -len(layers) <= read <= len(layers):
        raise InputError(
            f"{checkpoint.folder} reads its pictures at feature_layer {read} of vision_config, which is the output of "
            f"none of its {len(layers)} vision layers; a self-check needs one: leave out --self-check"
        )
    return layers[read - 1 if read > 0 else read]


def _load_adapter(model: Any, checkpoint: Phi4Checkpoint, adapter: Adapter) -> None:
    """Put the vision LoRA on the model by the library's PEFT integration.

    Raises:
        InputError: a tensor of it has not arrived: the library would go on with the values that a LoRA begins with.
    """
    if adapter.where != checkpoint.folder:
        folder = for_libraries(checkpoint.folder) / ADAPTER_FOLDER
        loading = model.load_adapter(str(folder), adapter_name=ADAPTER_NAME)
    else:
        from peft import LoraConfig

        config = LoraConfig.from_peft_type(**adapter.settings)
        tensors = _read_tensors(adapter)
        loading = model.load_adapter(adapter_name=ADAPTER_NAME, peft_config=config, adapter_state_dict=tensors)
    lacking = sorted(loading.missing_keys)
    if lacking or not any(".lora_B." in name and ADAPTER_NAME in name for name, _ in model.named_parameters()):
        which = f" ({lacking[0]} has no value)" if lacking else ""
        raise InputError(
            f"the library by itself does not load the vision LoRA of {adapter.where}{which}; leave out --self-check"
        )


def _read_tensors(adapter: Adapter) -> dict[str, Tensor]:
    from safetensors import safe_open

    found = {}
    for name, (path, stored) in adapter.tensors.items():
        with safe_open(for_libraries(path.parent) / path.name, framework="pt") as file:
            found[name] = file.get_tensor(stored)
    return found


def _end_tokens(model: Any, checkpoint: Phi4Checkpoint) -> set[int]:
    """The tokens that end an answer, as the library reads them; of the original layout as the plan names them."""
    if checkpoint.layout != "native":
        return set(checkpoint.ends)
    named = (model.config.eos_token_id, model.generation_config.eos_token_id)
    return {token for some in named if some is not None for token in ([some] if isinstance(some, int) else some)}


def _embed_patches_in_float32(model: Any) -> None:
    """See the head of this module: the library computes positions in the format of the pixels, that of the weights."""
    embeddings = model.model.embed_tokens_extend.image_embed.img_processor.embeddings
    dtype = embeddings.patch_embedding.weight.dtype
    embeddings.float()
    embeddings.register_forward_hook(lambda module, inputs, output: output.to(dtype))


def _keep(seen: dict[Any, Tensor], name: Any) -> Any:
    def keep(module: Any, inputs: Any, output: Any) -> None:
        seen[name] = output[0] if isinstance(output, tuple) else output

    return keep


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
