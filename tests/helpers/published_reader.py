"""A reader written from the published layout alone: an h5py user's ten lines, nothing of the package."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np


def read_published(folder: Path) -> dict[str, dict]:
    """Every question of all parts, in the layout's own terms."""
    rows: dict[str, dict] = {}
    for path in sorted(folder.glob("phi4_multimodal_embeddings_part_*.h5")):
        with h5py.File(path, "r") as file:
            assert file.attrs["model_type"] == "phi-4-multimodal"
            assert file.attrs["num_samples"] == len(file.keys())
            assert all(file.attrs[name] for name in ("model_name", "device", "dtype", "created_at"))
            for question_id, group in file.items():
                assert question_id not in rows, f"{question_id} lies in two parts"
                row = {}
                for name in ("image_id", "question", "ground_truth_answer", "answer"):
                    row[name] = group[name][()].decode("utf-8")
                row["vision_only"] = group["vision_only_representation"][:]
                for name in ("vision_token", "query_token"):
                    layers = group[f"{name}_representation"]
                    row[name] = {int(key.removeprefix("layer_")): layers[key][:] for key in layers}
                vectors = [row["vision_only"], *row["vision_token"].values(), *row["query_token"].values()]
                assert all(vector.dtype == np.float32 and vector.ndim == 1 for vector in vectors)
                rows[question_id] = row
    return rows
