"""Output folders with runs of their own: begun, filled with rows whose values are known, and looked at."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.helpers.published_reader import read_published
from tests.helpers.runs import random_run
from vqa_embeddings.data.table_reader import read_table
from vqa_embeddings.records import Extracted
from vqa_embeddings.schema import QUERY_TOKEN, VISION_ONLY, VISION_TOKEN
from vqa_embeddings.store.run import check_run, claim_run, keep_rows, read_run, read_run_rows
from vqa_embeddings.store.segments import ShardWriter

ROWS, PART_SIZE = 23, 5
LAYERS = [0, 2, 3]
PART = "phi4_multimodal_embeddings_part_{:03d}.h5"  # by number


def record(row: int) -> Extracted:
    """Values that tell the row: no two rows of the table have one in common."""
    values = np.random.default_rng(row).standard_normal((2, 3, 8)).astype(np.float32)
    vectors = {VISION_ONLY: np.full(6, row, np.float32), VISION_TOKEN: values[0], QUERY_TOKEN: values[1]}
    return Extracted(row, vectors, answer=f"answer {row} é")


def with_vectors(one: Extracted, **vectors: np.ndarray) -> Extracted:
    """The record with other vectors, by their short names, or with further ones."""
    return replace(one, vectors={**one.vectors, **{f"{name}_representation": one for name, one in vectors.items()}})


def commit(out: Path, records, interval: int = 4, rank: int = 0) -> None:
    run = read_run(out)
    with ShardWriter(
        out, f"launch{len(list(out.glob('shards/*')))}", rank, run, read_run_rows(out, run), interval
    ) as shard:
        shard.add(records)


def begin_run(tmp_path: Path, name: str = "q{}") -> Path:
    """An output folder whose run has begun and whose shards are empty."""
    table = tmp_path / "vqa.csv"
    lines = [f"{name.format(row)},image{row // 3}.jpg,question {row},truth {row}" for row in range(ROWS)]
    table.write_text("question_id,image_id,question,answer\n" + "\n".join(lines) + "\n")
    rows = read_table(table)
    run = random_run(ROWS, rows.fingerprint(), LAYERS, hidden_size=8, vision_size=6)
    run = replace(run, model="small", max_new_tokens=8, versions={"torch": "2.0"})
    folder = tmp_path / "out"
    check_run(folder, run)
    claim_run(folder, run)
    keep_rows(folder, lambda target: shutil.copy(table, target))
    return folder


def contents(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def coverage(out: Path) -> dict:
    return json.loads((out / "coverage.json").read_text())


def assert_right(out: Path, rows: set[int]) -> None:
    read = read_published(out)
    assert read.keys() == {f"q{row}" for row in rows}
    for row in rows:
        found, wanted = read[f"q{row}"], record(row)
        assert (found["answer"], found["question"]) == (wanted.answer, f"question {row}")
        assert (found["vision_only"] == wanted.vectors[VISION_ONLY]).all()
        for index, layer in enumerate(LAYERS):
            assert (found["vision_token"][layer] == wanted.vectors[VISION_TOKEN][index]).all()
            assert (found["query_token"][layer] == wanted.vectors[QUERY_TOKEN][index]).all()
