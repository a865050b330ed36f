"""The independent reference: what a row's values are by definition.

Each row alone, float32, eager attention, no cache, no batch, hooks of its own, and the library's own loading of the
adapter. It shares no code with the extractor.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from PIL import Image, ImageOps
from transformers import Phi4MultimodalForCausalLM, Phi4MultimodalProcessor


@dataclass
class Expected:
    vision_only: np.ndarray
    vision_token: dict[int, np.ndarray]
    query_token: dict[int, np.ndarray]
    answer: str
    tokens: int  # of the prompt


class Reference:
    """The library's model.

    Args:
        dtype: "float32", or a narrower one for what the library itself makes of that.
    """

    def __init__(self, checkpoint: Path, device: str = "cpu", dtype: str = "float32") -> None:
        # Float32 is to be float32, in products and in convolutions: containers may have switched TF32 on.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.device = device
        self.processor = Phi4MultimodalProcessor.from_pretrained(checkpoint)
        self.model = Phi4MultimodalForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype), attn_implementation="eager", device_map={"": device}
        ).eval()
        self.model.load_adapter(str(checkpoint / "vision-lora"), adapter_name="reference_adapter")
        adapted = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        assert adapted and all(module.active_adapters == ["reference_adapter"] for module in adapted)
        count = len(self.model.model.layers)
        self.layers = sorted({0, count // 4, count // 2, 3 * count // 4, count - 1})

    @torch.no_grad()
    def row(self, picture: Path | Image.Image, question: str, max_new_tokens: int) -> Expected:
        image = ImageOps.exif_transpose(picture if isinstance(picture, Image.Image) else Image.open(picture))
        tokenizer = self.processor.tokenizer
        prompt = f"<|user|>{tokenizer.image_token}{question}<|end|><|assistant|>"
        inputs = self.processor(text=prompt, images=image.convert("RGB"), return_tensors="pt").to(self.device)
        ids = inputs["input_ids"]
        seen: dict[object, torch.Tensor] = {}
        decoder = self.model.model
        tower = decoder.embed_tokens_extend.image_embed.img_processor
        # hidden_states[-2] of the tower is what its last layer but one gives
        hooks = [tower.encoder.layers[-2].register_forward_hook(lambda m, i, o: seen.update(vision=_tensor(o)))]
        for layer in self.layers:
            last = layer == len(decoder.layers) - 1
            module = decoder.norm if last else decoder.layers[layer]
            hooks.append(module.register_forward_hook(lambda m, i, o, key=layer: seen.update({key: _tensor(o)})))
        embeddings = decoder.embed_tokens_extend(
            ids,
            decoder.embed_tokens(ids),
            image_pixel_values=inputs["image_pixel_values"].to(self.model.dtype),
            image_sizes=inputs["image_sizes"],
            image_attention_mask=inputs["image_attention_mask"],
        )
        hidden = decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        for hook in hooks:
            hook.remove()
        last_image = int((ids[0] == tokenizer.image_token_id).nonzero().max())
        shown = inputs["image_attention_mask"][0].flatten(1).bool()
        return Expected(
            vision_only=_numpy(seen["vision"][shown].mean(dim=0)),
            vision_token={layer: _numpy(seen[layer][0, last_image]) for layer in self.layers},
            query_token={layer: _numpy(seen[layer][0, -1]) for layer in self.layers},
            answer=self._answer(embeddings, hidden, max_new_tokens),
            tokens=ids.shape[1],
        )

    def _answer(self, embeddings: torch.Tensor, hidden: torch.Tensor, max_new_tokens: int) -> str:
        config, tokenizer = self.model.config, self.processor.tokenizer
        written: list[int] = []
        while True:
            logits = self.model.lm_head(hidden[0, -1])
            logits[config.vision_config.image_token_id] = -torch.inf
            logits[config.audio_config.audio_token_id] = -torch.inf
            written.append(int(logits.argmax()))
            if written[-1] in config.eos_token_id or len(written) == max_new_tokens:
                break
            step = self.model.model.embed_tokens(torch.tensor([[written[-1]]], device=self.device))
            embeddings = torch.cat([embeddings, step], dim=1)
            hidden = self.model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        text = tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.replace("\0", "\ufffd").strip()


def _tensor(output: object) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


LARGEST = 4  # dimensions: in trained decoders a few dwarf all others, and an error relative to them hides in the rest


def relative_error(found: np.ndarray, expected: np.ndarray, without: int = 0) -> float:
    """Largest difference over the largest value of the vector, where so many of its largest dimensions are left out."""
    kept = _smallest(expected, len(expected) - without)
    return float(np.abs(found - expected)[kept].max() / np.abs(expected)[kept].max())


def cosine(found: np.ndarray, expected: np.ndarray, without: int = 0) -> float:
    """Where so many of the largest dimensions of what is expected are left out."""
    kept = _smallest(expected, len(expected) - without)
    found, expected = found[kept], expected[kept]
    return float(found @ expected / np.linalg.norm(found) / np.linalg.norm(expected))


def strict_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The larger of the relative errors of all dimensions and of those that are not the few largest."""
    return max(relative_error(found, expected), relative_error(found, expected, LARGEST))


def _smallest(vector: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(np.abs(vector), kind="stable")[:count]
