"""The published script's way, row by row: what this program is measured against.

Every row alone: the picture is read, prepared and run through the model twice, once to generate and once for the hidden
states, of which all layers at all positions are kept, with logits for every position. Its own way of asking for the
states, `output_hidden_states` after an image, reads the wrong vision layer or crashes on today's library, so hooks keep
them here; that is no slower.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vqa_embeddings.models.checkpoint import stored_layers


class Published:
    """The algorithm on a loaded model. It needs the library's whole vision tower, so the model must be its own."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, max_new_tokens: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.max_new_tokens = max_new_tokens
        self.layers = stored_layers(model.config.num_hidden_layers)
        self._states: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, inputs, output: self._states.append(_tensor(output)))

    @torch.inference_mode()
    def row(self, picture: Path, question: str) -> tuple[dict[str, np.ndarray], str]:
        """The vectors and the answer of one row."""
        model, device = self.model, self.model.device
        with Image.open(picture) as opened:
            images = self.image_processor(images=[opened.convert("RGB")], return_tensors="pt")
        placeholder = self.tokenizer.convert_ids_to_tokens(model.config.vision_config.image_token_id)
        placeholders = placeholder * int(images.pop("num_img_tokens")[0])
        prompt = f"<|user|>{placeholders}{question}<|end|><|assistant|>"
        inputs = {**self.tokenizer(prompt, return_tensors="pt"), **images}
        inputs = {name: value.to(device) for name, value in inputs.items()}
        length = inputs["input_ids"].shape[1]
        written = model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)[0, length:]
        answer = self.tokenizer.decode(written, skip_special_tokens=True).strip()
        self._states.clear()
        model(**inputs)
        last_image = int((inputs["input_ids"][0] == model.config.vision_config.image_token_id).nonzero().max())
        vectors = {"vision_only": inputs["image_pixel_values"].float().mean(dim=(0, 1, 2, 3)).cpu().numpy()}
        for layer in self.layers:
            states = self._states[layer][0].float().cpu().numpy()  # of all positions, as published
            vectors[f"vision_token_{layer}"], vectors[f"query_token_{layer}"] = states[last_image], states[-1]
        self._states.clear()
        return vectors, answer


def _tensor(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
