"""Small pictures for the report, opened like all others by a process of its own."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path

from vqa_embeddings.data.decode_options import DecodeOptions
from vqa_embeddings.data.decode_pool import DecodePool
from vqa_embeddings.data.picture_paths import locate
from vqa_embeddings.errors import RowError, StorageError

SIDE = 160  # pixels of the longer side
QUALITY = 75  # of the JPEG


def make_thumbnails(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The pictures as `data:` addresses, by name; those that cannot be read here are left out."""
    made: dict[str, str] = {}
    if not folder.is_absolute() or not folder.is_dir():  # an output folder from before this was recorded, or elsewhere
        return made
    open_picture = DecodePool(DecodeOptions(show_truncated=True))  # they belong to rows that were extracted
    for name in sorted(names):
        try:
            picture = open_picture(locate(folder, name))
        except RowError:
            continue
        except StorageError:  # nor would the next one be
            break
        picture.thumbnail((SIDE, SIDE))
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=QUALITY)
        made[name] = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
    return made
