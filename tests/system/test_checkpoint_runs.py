"""Runs on checkpoints as users have them, of both layouts: the same parts, and a refusal in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np

from tests.helpers.hub_cache import COMMIT, fill_cache
from tests.helpers.launching import arguments_for, command, merge, run
from tests.helpers.original_layout import edit_weights, weights_of
from tests.helpers.tables import table_rows, write_table
from tests.system.test_refusals import refused
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.models.phi4mm import MODEL, NATIVE_REVISION

ABSENT = {"image_id": "missing.jpg"}  # so that a run needs no time
PART = "phi4_multimodal_embeddings_part_001.h5"


def contents(part: Path) -> dict[str, tuple]:
    """All of a part but its attributes: names, types, shapes, and the values' bytes."""
    found = {}

    def see(name: str, item: h5py.Group | h5py.Dataset) -> None:
        found[name] = (item.dtype, item.shape, np.asarray(item[()]).tobytes()) if isinstance(item, h5py.Dataset) else ()

    with h5py.File(part) as file:
        file.visititems(see)
    return found


def test_both_layouts_of_a_checkpoint_give_the_same_parts(tmp_path, checkpoint, original):
    for name, folder in (("native", checkpoint), ("original", original)):
        done = run(command(0, *arguments_for(DATA / "vqa.csv", folder), "--output-dir", tmp_path / name))
        assert done.returncode == 0, done.stderr
        assert merge(tmp_path / name).returncode == 0
    parts = [contents(tmp_path / name / PART) for name in ("native", "original")]
    assert len(parts[0]) > 31 * 15
    assert parts[0] == parts[1]
    with h5py.File(tmp_path / "original" / PART) as part:
        assert (part.attrs["layout"], part.attrs["model_name"]) == ("original", str(original))


def test_the_hub_model_is_taken_at_the_revision_with_the_native_layout(tmp_path, checkpoint):
    """From a cache that was filled before, as on a cluster's nodes without a network."""
    fill_cache(tmp_path / "cache", checkpoint)
    rows = [{**row, **ABSENT} for row in table_rows()[:1]]
    inputs = ["--vqa-dataset", write_table(tmp_path / "vqa.csv", rows), "--images-dir", DATA]
    inputs += ["--cache-dir", tmp_path / "cache", "--output-dir", tmp_path / "out"]
    done = run(command(0, *inputs))
    assert done.returncode == 0, done.stderr
    assert "crops: 36 a picture at most, by processor_config.json (image_processor); " in done.stdout
    assert "; end tokens: <|endoftext|> (512), <|end|> (516)\n" in done.stdout
    described = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (described["model"], described["revision"], described["layout"]) == (MODEL, COMMIT, "native")
    held = f"looked in {tmp_path / 'cache'} (which has {NATIVE_REVISION}); --revision takes one"
    refused(*inputs, "--revision", "main", saying=held)


def test_without_cache_dir_the_hubs_own_cache_is_used_and_named_where_it_lacks_the_model(
    tmp_path, checkpoint, monkeypatch
):
    """The real command, on a node without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hugging face"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    hubs = tmp_path / "hugging face" / "hub"
    rows = [{**row, **ABSENT} for row in table_rows()[:1]]
    inputs = ["--vqa-dataset", write_table(tmp_path / "vqa.csv", rows), "--images-dir", DATA]
    fill_cache(hubs, checkpoint, "main", COMMIT[::-1])
    refused(*inputs, saying=f"looked in model_cache and in {hubs} (which has main); --revision takes one")
    fill_cache(hubs, checkpoint)
    done = run(command(0, *inputs, "--plan"))
    assert done.returncode == 0, done.stderr
    assert f"model: {MODEL} (native layout, " in done.stdout
    assert not (tmp_path / "model_cache").exists()


def asked_of(folder: Path) -> list[object]:
    return [*arguments_for(DATA / "vqa.csv", folder), "--output-dir", folder.parent / "out"]


def test_truncated_weights_are_refused(copy):
    weights = weights_of(copy)[-1]
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(*asked_of(copy), saying="not a whole safetensors file")


def test_a_tensor_too_few_is_refused(copy):
    edit_weights(copy, lambda tensors: {name: t for name, t in tensors.items() if name != "model.norm.weight"})
    refused(*asked_of(copy), saying="lacks 1 tensors of the model, the first model.norm.weight")
