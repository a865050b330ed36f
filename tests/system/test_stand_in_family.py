"""A family that the program does not know, from the launch to the parts: what another model has to bring."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.helpers.launching import COPIES, ROOT, begin, command, kill, merge, processes, run, segments
from tests.helpers.reference import strict_error
from tests.helpers.running import until
from tests.helpers.stand_in_family import (
    BEGIN,
    CONTEXT,
    END,
    FAMILY,
    HEADS,
    HIDDEN,
    LAYERS,
    MEAN_COLOUR,
    SEPARATOR,
    SIZE,
    UNUSED,
    make_weights,
)
from tests.helpers.tables import table_rows
from vqa_embeddings import open_embeddings
from vqa_embeddings.app.demo import DATA

TOKENS, PART_SIZE = 12, 10_000
REGISTER = """
from vqa_embeddings.models import registry
registry.FAMILIES.append("tests.helpers.stand_in_family:FAMILY")
"""


@functools.cache
def shrink(path: Path) -> np.ndarray:
    """The colours of nine patches, float64 [9, 3]."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB").resize((3, 3))
    return np.asarray(image, np.float64).reshape(-1, 3) / 255


def expected_row(row: dict[str, str]) -> tuple[np.ndarray, dict[int, np.ndarray], dict[int, np.ndarray], str]:
    """A row alone, the whole sequence again for each token: vision_only, states by layer at both tokens, the answer."""
    weights = {name: one.double() for name, one in make_weights(3).items()}
    seen = torch.tanh(torch.from_numpy(shrink(DATA / row["image_id"])) @ weights["patch"])
    question = [*row["question"].encode(), SEPARATOR]
    output: list[int] = []
    while True:
        tokens = weights["embed"][question + output]
        hidden = torch.cat([weights["embed"][BEGIN][None], seen @ weights["project"], tokens])
        hidden = hidden + weights["place"][: len(hidden)]
        states = []
        for layer in range(LAYERS):
            qkv = (hidden @ weights[f"qkv{layer}"]).view(-1, 3, HEADS, SIZE)
            scores = torch.einsum("qhd,khd->hqk", qkv[:, 0], qkv[:, 1]) / SIZE**0.5
            scores += torch.full_like(scores[0], -torch.inf).triu(1)
            mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), qkv[:, 2]).reshape(-1, HIDDEN)
            hidden = hidden + mixed @ weights[f"out{layer}"]
            hidden = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, False, keepdim=True) + 1e-5).sqrt()
            states.append(hidden)
        if not output:
            image_end, prompt_end = 9, len(hidden) - 1
            at = [{layer: states[layer][place].numpy() for layer in (0, 1, 3)} for place in (image_end, prompt_end)]
        logits = hidden[-1] @ weights["embed"].T
        logits[UNUSED] = -torch.inf
        output.append(int(logits.argmax()))
        if output[-1] == END or len(output) == TOKENS:
            answer = " ".join(str(token) for token in output if token != END)
            return seen.mean(dim=0).numpy(), at[0], at[1], answer


@pytest.fixture
def stand_in(tmp_path: Path) -> list[object]:
    """The arguments of an extraction with it; processes know the family by PYTHONPATH."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(REGISTER)
    FAMILY.write_random_checkpoint(tmp_path / "checkpoint")
    inputs = ["--vqa-dataset", DATA / "vqa.csv", "--images-dir", DATA, "--model", tmp_path / "checkpoint"]
    return [*inputs, "--output-dir", tmp_path / "out", "--max-new-tokens", TOKENS]


def test_a_family_of_a_hundred_lines_is_launched_killed_resumed_and_merged(tmp_path, stand_in, many_rows):
    environment = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"}
    out, count = tmp_path / "out", 31 * COPIES
    stand_in += ["--vqa-dataset", many_rows]
    first = begin(command(2, *stand_in, "--checkpoint-interval", 8, "--batch-size", 4), **environment)
    until(lambda: len(segments(out)) >= 3, first)
    kill(processes(first))
    first.wait()
    kept = {path: path.read_bytes() for path in segments(out)}
    assert 3 <= len(kept) < count // 8, "the kill came too early or too late to show anything"
    done = run(command(3, *stand_in), **environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^done before: [1-9]\d* rows extracted, 0 failed", done.stdout, re.M)
    assert f"(plain), layers 0, 1, {LAYERS - 1}" in done.stdout and "9 patches a picture" in done.stdout
    assert all(path.read_bytes() == content for path, content in kept.items()), "a committed segment has changed"
    merged = merge(out, "--part-size", PART_SIZE)  # which knows the family by its run alone
    assert merged.returncode == 0, merged.stdout + merged.stderr
    assert merge(out, "--layout", "columnar", "--part-size", PART_SIZE).returncode == 0
    described = json.loads((out / "run.json").read_text())
    assert (described["model_type"], described["file_prefix"], described["lora"]) == ("stand-in", "stand_in", "")
    assert "LoRA" not in (out / "report.html").read_text() + done.stdout, "it has none"

    with h5py.File(out / "stand_in_embeddings_part_001.h5") as part:
        assert part.attrs["model_type"] == "stand-in" and part.attrs["num_samples"] == len(part) == count
        expected = {row["question_id"]: expected_row(row) for row in table_rows()}
        for row in table_rows(many_rows):
            vision_only, vision_token, query_token, answer = expected[row["question_id"].rpartition("-")[0]]
            found = part[row["question_id"]]
            assert found["answer"][()].decode() == answer
            assert strict_error(found["vision_only_representation"][:], vision_only) < 1e-4
            for layer in (0, 1, LAYERS - 1):
                assert strict_error(found[f"vision_token_representation/layer_{layer}"][:], vision_token[layer]) < 1e-4
                assert strict_error(found[f"query_token_representation/layer_{layer}"][:], query_token[layer]) < 1e-4
            colours = shrink(DATA / row["image_id"])
            assert np.allclose(found[MEAN_COLOUR][:], colours.mean(axis=0), atol=1e-6)
    with h5py.File(out / "stand_in_columns_part_001.h5") as part:
        assert part[MEAN_COLOUR].shape == (count, 3)
    embeddings = open_embeddings(out)
    assert embeddings.query_token(1).shape == (count, HIDDEN)
    assert len(set(embeddings.answers)) > 1, "otherwise the answers show nothing"


def test_what_the_family_has_not_is_refused_and_so_is_the_folder_of_another_run(tmp_path, stand_in, photographs):
    environment = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"}
    refused = run(command(0, *stand_in, "--pixel-mean"), **environment)
    assert refused.returncode == 2
    assert "--pixel-mean was given, and the stand-in has no such vector; leave it out" in refused.stderr
    assert run(command(0, *stand_in, "--test"), **environment).returncode == 0
    other = run(command(0, *photographs, "--output-dir", tmp_path / "out"), **environment)
    assert other.returncode == 2 and "belongs to another run" in other.stderr


def test_a_question_that_is_too_long_for_it_is_a_failed_row(tmp_path, stand_in):
    table = tmp_path / "long.csv"
    table.write_text(f"question_id,image_id,question,answer\n1,cat.jpg,{'x' * CONTEXT},\n2,cat.jpg,Why?,\n")
    inputs = [*stand_in, "--vqa-dataset", table]
    done = run(command(0, *inputs), PYTHONPATH=f"{tmp_path / 'site'}:{ROOT}")
    assert "1 rows extracted, 1 failed, 0 left" in done.stdout, done.stderr
