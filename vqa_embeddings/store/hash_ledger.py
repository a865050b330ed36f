"""Which SHA-256 a part may have, and how that is known however a merge was ended.

    computed     while the part is written, from what is synced to the disk
    announced    in a line of `.<part>.sha256`, before the part gets its final name
    recorded     in `coverage.json`, once all parts are there
    withdrawn    the announcement is removed

A merge may be ended before or after the part got its name: which, nobody knows, so that its announcement stays valid,
also beside that of the next merge. A part of which nothing is recorded or announced was written by no merge.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vqa_embeddings.base.files import list_folder, publish_text, reading
from vqa_embeddings.errors import InputError, StorageError, one_line
from vqa_embeddings.store.run import COVERAGE_FILE
from vqa_embeddings.store.segments import CHECKSUM


def announced_path(path: Path) -> Path:
    """Where the hashes of a part lie, each from the moment before it is there until a merge has recorded it."""
    return path.with_name(f".{path.name}{CHECKSUM}")


def announce(path: Path, digest: str) -> None:
    """Leave the hash of a part that is about to get its final name, after those that were left before."""
    announced = announced_path(path)
    lines = [f"{before}  {path.name}\n" for before in [*_read_announced(announced), digest]]
    publish_text(announced, "".join(lines))


def possible_hashes(folder: Path) -> dict[str, set[str]]:
    """The SHA-256s that a part may have, by its file name; one that no merge has recorded or announced has none.

    They are the one that the last merge recorded, and those of merges since then that were ended.

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
            hashes[announced.name[1 : -len(CHECKSUM)]].update(_read_announced(announced))
    return dict(hashes)


def withdraw(paths: Iterable[Path], entries: Sequence[Mapping[str, Any]]) -> None:
    """Remove the announcements of parts that `coverage.json` has recorded by now.

    Args:
        entries: of each part, what is recorded of it.
    """
    for path, entry in zip(paths, entries, strict=True):
        announced = announced_path(path)
        with suppress(OSError, StorageError):
            if _read_announced(announced)[-1:] == [entry["sha256"]]:  # otherwise another merge is about to replace it
                announced.unlink()


def _read_announced(path: Path) -> list[str]:
    """What stands first in each line, the last announced last; nothing where there is no such file."""
    try:
        with reading(path):
            return [line.partition(" ")[0] for line in path.read_bytes().decode(errors="replace").splitlines()]
    except FileNotFoundError:
        return []
