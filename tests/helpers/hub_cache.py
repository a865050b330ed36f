"""A cache of the hub, filled without a network."""

from __future__ import annotations

import shutil
from pathlib import Path

from vqa_embeddings.models.phi4mm import MODEL, NATIVE_REVISION

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(cache: Path, checkpoint: Path, revision: str = NATIVE_REVISION, commit: str = COMMIT) -> Path:
    """Lay a checkpoint into a cache as the hub's library does. Returns its snapshot."""
    repository = cache / f"models--{MODEL.replace('/', '--')}"
    ref = repository / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)
    return Path(shutil.copytree(checkpoint, repository / "snapshots" / commit))
