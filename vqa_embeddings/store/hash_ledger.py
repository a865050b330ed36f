"""Which SHA-256 a part may have, and how that is known however a merge was ended.

    computed     while the part is written, from what is synced to the disk
    announced    in `.<part>.sha256`, before the part gets its final name
    recorded     in `coverage.json`, once all parts are there
    withdrawn    the announcement is removed

A part whose hash is neither recorded nor announced was written by no merge of this folder.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vqa_embeddings.base.files import list_folder, publish_text, reading
from vqa_embeddings.errors import InputError, one_line
from vqa_embeddings.store.run import COVERAGE_FILE
from vqa_embeddings.store.segments import CHECKSUM


def announced_path(path: Path) -> Path:
    """Where the hash of a part lies from the moment before it is there until a merge has recorded it."""
    return path.with_name(f".{path.name}{CHECKSUM}")


def announce(path: Path, digest: str) -> None:
    """Leave the hash of a part that is about to get its final name."""
    publish_text(announced_path(path), f"{digest}  {path.name}\n")


def recorded_hashes(folder: Path) -> dict[str, set[str]]:
    """The SHA-256 that a part may have, by its file name; of one that no merge has recorded or announced, nothing.

    It is the one that the last merge recorded, or that of a part which a merge has written since, and was then ended.

    Raises:
        InputError: the record is not what a merge wrote: without it, damage would go unseen.
        StorageError: it cannot be read.
    """
    hashes: defaultdict[str, set[str]] = defaultdict(set)
    path = folder / COVERAGE_FILE
    try:
        with reading(path):
            entries = json.loads(path.read_bytes())["parts"]
        for entry in entries:
            hashes[str(entry["file"])].add(str(entry["sha256"]))
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not what a merge has written ({one_line(error)}); restore it, or remove it: "
            "the parts are then taken as they are"
        ) from None
    for announced in list_folder(folder):
        if announced.name.startswith(".") and announced.name.endswith(f".h5{CHECKSUM}"):
            with suppress(FileNotFoundError), reading(announced):
                digest = announced.read_bytes().decode(errors="replace").partition(" ")[0]
                hashes[announced.name[1 : -len(CHECKSUM)]].add(digest)
    return dict(hashes)


def withdraw(paths: Iterable[Path], entries: Sequence[Mapping[str, Any]]) -> None:
    """Remove the announcements of parts that `coverage.json` has recorded by now.

    Args:
        entries: of each part, what is recorded of it.
    """
    for path, entry in zip(paths, entries, strict=True):
        announced = announced_path(path)
        with suppress(OSError):
            if announced.read_bytes().startswith(entry["sha256"].encode()):
                announced.unlink()
