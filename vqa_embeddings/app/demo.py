"""The demo: a small random checkpoint made on the spot, and the photographs and questions that the package ships.

The checkpoint is the real thing but for its size and its weights: made by the library's own classes, with the real
special tokens and a `vision-lora/`, and loaded by the same code as a downloaded one. Its answers are noise.
"""

from __future__ import annotations

import secrets
import shutil
from dataclasses import replace
from pathlib import Path

from vqa_embeddings._version import __version__
from vqa_embeddings.app.options import ExtractOptions
from vqa_embeddings.errors import InputError, one_line
from vqa_embeddings.models.hub import MODEL_CACHE
from vqa_embeddings.models.registry import default_family

DATA = Path(__file__).parents[1] / "demo_data"
NOTICE = "demo: the weights are random, so the answers are noise; the photographs and the path of the data are real"


def demo_options(options: ExtractOptions) -> ExtractOptions:
    """The options with the demo's table, pictures and model wherever none was named."""
    return replace(
        options,
        vqa_dataset=options.vqa_dataset or DATA / "vqa.csv",
        images_dir=options.images_dir or DATA,
        model=options.model or str(_cached_checkpoint(options.cache_dir or MODEL_CACHE)),
    )


def _cached_checkpoint(cache_dir: Path) -> Path:
    """The demo's checkpoint below `cache_dir`, made there by whichever rank comes first."""
    from safetensors import SafetensorError
    from transformers import __version__ as library

    folder = cache_dir / f"demo-{__version__}-transformers-{library}"
    if not folder.exists():
        aside = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
        try:
            default_family().write_random_checkpoint(aside)
            aside.rename(folder)
        except (OSError, SafetensorError) as error:
            if not folder.exists():  # otherwise another rank was first, with the same bytes
                raise InputError(f"{folder} cannot be made ({one_line(error)}); choose another --cache-dir") from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder
