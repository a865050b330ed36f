"""What the benchmarks run on: checkpoints of random weights, photographs of given sizes, questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file, save_file

from vqa_embeddings.app.demo import DATA
from vqa_embeddings.data.table_reader import read_table
from vqa_embeddings.models.phi4mm.model import Phi4
from vqa_embeddings.models.phi4mm.random_checkpoint import SMALL, Sizes, make_checkpoint
from vqa_embeddings.models.phi4mm.weights import load_model
from vqa_embeddings.models.registry import find_checkpoint

# The real model's proportions, as far as they can be kept, at a hundredth of its parameters: 35 million in the
# decoder's layers, a vision tower of a tenth of that, and a head of a fifth.
HUNDREDTH = Sizes(
    decoder={
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 12544,
    },
    vision={"hidden_size": 192, "intermediate_size": 720, "num_hidden_layers": 9, "num_attention_heads": 3},
    audio=SMALL.audio,
    rank=32,
)
# The real model with its vision LoRA, 5.1 billion parameters; the other 0.5 are the LoRA for speech, which is not read.
FULL = Sizes(
    decoder={
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 200064,
    },
    vision={"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16},
    audio={},
    rank=256,
)
PHOTOGRAPHS = ("cat.jpg", "coffee.jpg", "rocket.jpg", "astronaut.jpg", "hubble.jpg")


class Noting(Phi4):
    """The model, with the tokens of every answer that it has given."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.written: list[list[int]] = []

    def detokenize(self, output: Sequence[int]) -> str:
        """The answer; its tokens are kept."""
        self.written.append(list(output))
        return super().detokenize(output)


def write_checkpoint(folder: Path, sizes: Sizes, ending: bool, device: str = "cpu", dtype: str = "float32") -> None:
    """A checkpoint of these sizes; unless `ending`, its answers never end before the last token that is asked for."""
    make_checkpoint(folder, sizes=sizes, device=device, dtype=dtype)
    if not ending:
        path = folder / "model.safetensors"
        added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        tokens = [token["id"] for token in added if token["content"] in ("<|end|>", "<|endoftext|>")]
        weights = load_file(path)
        weights["model.embed_tokens.weight"][tokens] *= 0.001
        save_file(weights, path, metadata={"format": "pt"})


def load(folder: Path, device: str, dtype: str) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor, as the extraction loads them."""
    return load_model(find_checkpoint(str(folder), None, folder), device, dtype, "sdpa")


def write_pictures(folder: Path, count: int, size: tuple[int, int]) -> list[str]:
    """So many photographs of a width and height below `folder`, no two alike; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{size[0]}x{size[1]}-{number}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        if not (folder / name).exists():
            shift = number // len(PHOTOGRAPHS)
            with Image.open(DATA / PHOTOGRAPHS[number % len(PHOTOGRAPHS)]) as photograph:
                larger = photograph.convert("RGB").resize((size[0] + 64, size[1] + 64))
            larger.crop((shift % 64, shift // 64, size[0] + shift % 64, size[1] + shift // 64)).save(folder / name)
    return names


def questions(count: int) -> list[str]:
    """Questions of the lengths that the shipped ones have."""
    shipped = list(read_table(DATA / "vqa.csv").questions)
    return [shipped[7 * number % len(shipped)] for number in range(count)]
