"""A model in this process, asked questions about pictures; its records held against the reference's values."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tests.helpers.launching import TOKENS
from tests.helpers.reference import strict_error
from vqa_embeddings.base.timings import Timings
from vqa_embeddings.engine.core import Engine
from vqa_embeddings.models.phi4mm.model import Phi4
from vqa_embeddings.models.phi4mm.weights import load_model
from vqa_embeddings.models.registry import find_checkpoint
from vqa_embeddings.records import Extracted, Failed
from vqa_embeddings.schema import QUERY_TOKEN, VISION_ONLY, VISION_TOKEN

TOLERANCE = 1e-4


def load(
    checkpoint: Path, lora: str = "merged", attention: str = "sdpa", tokens: int = TOKENS, dtype: str = "float32"
) -> Phi4:
    found = find_checkpoint(str(checkpoint), None, checkpoint, lora)
    return Phi4(*load_model(found, "cpu", dtype, attention), tokens)


def ask(
    model: Phi4, asked: list[tuple[Image.Image, list[str]]], batch_size: int | None = None
) -> list[Extracted | Failed]:
    """All questions on pictures, in batches of so many rows; records in the order of the questions."""
    questions: list[str] = []
    pictures = []
    for picture, texts in asked:
        rows = list(range(len(questions), len(questions) + len(texts)))
        questions += texts
        pictures.append((rows, model.preprocess(picture)))
    engine, records = Engine(model, questions, iter(pictures), batch_size, Timings()), []
    while not engine.is_done:
        records += engine.advance()
    assert sorted(record.row for record in records) == list(range(len(questions)))
    return sorted(records, key=lambda record: record.row)


def assert_equals(model: Phi4, found, wanted) -> None:
    assert found.answer == wanted.answer
    assert strict_error(found.vectors[VISION_ONLY], wanted.vision_only) < TOLERANCE
    for index, layer in enumerate(model.spec.layers):
        assert strict_error(found.vectors[VISION_TOKEN][index], wanted.vision_token[layer]) < TOLERANCE
        assert strict_error(found.vectors[QUERY_TOKEN][index], wanted.query_token[layer]) < TOLERANCE
