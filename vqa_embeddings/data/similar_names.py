"""Files whose names resemble that of a missing picture. They are named in its error, and never used in its place."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from vqa_embeddings.base.file_names import from_disk, to_disk

# A run may miss a million pictures in a folder of millions on a slow server, and nobody reads a million hints.
MAX_SEARCHES = 100  # missing pictures of a process for which a similar name is searched
MAX_TRIED = 30  # names that are tried for each
MAX_ENTRIES = 1000  # entries of a folder that are listed, once a process
MAX_FOLDERS = 8  # folders in it whose entries are listed too

SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".webp", "")
PICTURE_SUFFIX = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?|avif)", re.IGNORECASE)
# COCO's number of a picture, by itself, in one of COCO's names, or as a float, as pandas may write it.
NUMBER = re.compile(r"(?:COCO_\w+_)?(\d{1,12})(?:\.0)?", re.ASCII)
NUMBERED_FILE = re.compile(r"(.*?)(\d{6,})(\.\w+)", re.ASCII)


class NumberFormat(NamedTuple):
    """How files are named by a number: what is before it, to how many digits it is padded, what is behind it."""

    prefix: str
    digits: int
    suffix: str

    def path(self, number: int) -> str:
        """The path of the file with this number."""
        return f"{self.prefix}{number:0{self.digits}}{self.suffix}"


COCO = NumberFormat("", 12, ".jpg")


@dataclass(frozen=True)
class Listing:
    """Some of what the picture folder holds: paths relative to it, as a table would have them."""

    files: dict[str, str] = field(default_factory=dict)  # by `fold`
    folders: list[str] = field(default_factory=list)
    number_formats: list[NumberFormat] = field(default_factory=list)


class SimilarNames:
    """Searches a folder for what the name of a missing picture may mean."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._searches_left = MAX_SEARCHES

    def find(self, name: str) -> str | None:
        """A file that is there and may be meant by `name`, relative to the folder; None if none is seen."""
        if self._searches_left <= 0:
            return None
        self._searches_left -= 1
        guesses = list(dict.fromkeys(guess_paths(name, self._listing)))
        listed = (self._listing.files.get(fold(guess)) for guess in guesses)
        tried = dict.fromkeys([*filter(None, listed), *guesses[:MAX_TRIED]])
        return next((path for path in tried if path != name and self._is_there(path)), None)

    @cached_property
    def _listing(self) -> Listing:
        return list_pictures(self._folder)

    def _is_there(self, path: str) -> bool:
        try:
            return os.path.isfile(self._folder / to_disk(path))
        except ValueError:  # a name that no file can have
            return False


def guess_paths(name: str, listing: Listing) -> Iterator[str]:
    """Paths that may be meant by the name of a missing picture, the likeliest first."""
    *folders, file = _split(name) or [""]
    if not file:
        return
    stem, suffix = os.path.splitext(file)
    if not PICTURE_SUFFIX.fullmatch(suffix):
        stem = file
    match = NUMBER.fullmatch(stem)
    numbered = [form.path(int(match[1])) for form in (*listing.number_formats, COCO)] if match else []
    yield from numbered
    depth = len(folders)
    places = [folders[start:] for start in dict.fromkeys((0, 1, 2, depth - 1, depth)) if 0 <= start <= depth]
    places += [[folder, *folders] for folder in listing.folders]
    for spelling in (file, *numbered[-1:], *(stem + other for other in SUFFIXES), file.lower()):
        yield from ("/".join([*place, spelling]) for place in places)


def _split(name: str) -> list[str]:
    """The folders and the file of a name, also of one from Windows; without all up to its last `..`."""
    components = name.strip().replace("\\", "/").split("/")
    last_climb = max((place for place, component in enumerate(components) if component == ".."), default=-1)
    return [component for component in components[last_climb + 1 :] if component not in ("", ".")]


def fold(path: str) -> str:
    """The same text for all paths that differ only in upper and lower case, or in their Unicode form."""
    return unicodedata.normalize("NFC", path).casefold()


def list_pictures(folder: Path) -> Listing:
    """List the first entries of the folder and of the first folders in it. What cannot be read is left out."""
    listing = Listing()
    _list_into(listing, folder, "")
    for name in listing.folders[:]:
        _list_into(listing, folder / to_disk(name), f"{name}/")
    matches = filter(None, map(NUMBERED_FILE.fullmatch, listing.files.values()))
    counts = Counter(NumberFormat(match[1], len(match[2]), match[3]) for match in matches)
    listing.number_formats.extend(form for form, _ in counts.most_common(3))
    return listing


def _list_into(listing: Listing, folder: Path, prefix: str) -> None:
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in islice(entries, MAX_ENTRIES):
            name = from_disk(entry.name)
            if name.startswith("."):
                continue
            # By the suffix first: many entries may be links, and is_dir() asks the server about each.
            if PICTURE_SUFFIX.search(name) or not entry.is_dir():
                listing.files.setdefault(fold(prefix + name), prefix + name)
            elif not prefix and len(listing.folders) < MAX_FOLDERS:
                listing.folders.append(name)
