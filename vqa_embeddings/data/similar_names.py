"""What lies near the place where a picture was looked for. It is said, and never taken for the picture."""

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

from vqa_embeddings.base.file_names import from_disk, to_disk

# A run may miss a million pictures in a folder of millions on a slow server, and nobody reads a million hints.
LOOKS = 100  # pictures of a process that are looked for a second time
TRIED = 30  # names that are tried for each
LISTED = 1000  # entries of a folder that are read, once a process
FOLDERS = 8  # folders in it of which the same is read

SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".webp", "")
OF_A_PICTURE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?|avif)", re.IGNORECASE)
NUMBER = re.compile(r"(?:COCO_\w+_)?(\d{1,12})(?:\.0)?", re.ASCII)  # COCO's, or as pandas writes it beside missing ones
NUMBERED = re.compile(r"(.*?)(\d{6,})(\.\w+)", re.ASCII)
USUAL = "", 12, ".jpg"  # how COCO names its files: what is before the number, its digits, what is behind


@dataclass(frozen=True)
class Listing:
    """Some of what the folder of pictures holds: paths below it, as a table would have them."""

    files: dict[str, str] = field(default_factory=dict)  # by `folded`
    folders: list[str] = field(default_factory=list)
    numbered: list[tuple[str, int, str]] = field(default_factory=list)  # the forms of names, as in USUAL


class Nearby:
    """Looks for what a table may have meant."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._left = LOOKS

    def find(self, name: str) -> str | None:
        """A file that is there and may be meant by `name`, as a path below the folder; None where none is seen."""
        if self._left <= 0:
            return None
        self._left -= 1
        guessed = list(dict.fromkeys(guesses(name, self._listing)))
        listed = (self._listing.files.get(folded(guess)) for guess in guessed)
        tried = dict.fromkeys([*filter(None, listed), *guessed[:TRIED]])
        return next((path for path in tried if path != name and self._is_there(path)), None)

    @cached_property
    def _listing(self) -> Listing:
        return list_pictures(self._folder)

    def _is_there(self, guess: str) -> bool:
        try:
            return os.path.isfile(self._folder / to_disk(guess))
        except ValueError:  # a name that no file can have
            return False


def guesses(name: str, listing: Listing) -> Iterator[str]:
    """Paths that may be meant by a name that is not there, the likeliest first."""
    *above, file = _parts(name) or [""]
    if not file:
        return
    stem, suffix = os.path.splitext(file)
    if not OF_A_PICTURE.fullmatch(suffix):
        stem = file
    number = NUMBER.fullmatch(stem)
    forms = [*listing.numbered, USUAL] if number else []
    numbers = [f"{before}{int(number[1]):0{digits}}{behind}" for before, digits, behind in forms] if number else []
    yield from numbers
    last = len(above)
    places = [above[start:] for start in dict.fromkeys((0, 1, 2, last - 1, last)) if 0 <= start <= last]
    places += [[folder, *above] for folder in listing.folders]
    for spelling in (file, *numbers[-1:], *(stem + other for other in SUFFIXES), file.lower()):
        yield from ("/".join([*place, spelling]) for place in places)


def _parts(name: str) -> list[str]:
    """Folders and file that a name may mean, where it was written on another system, or climbs first."""
    parts = name.strip().replace("\\", "/").split("/")
    climbed = max((place for place, part in enumerate(parts) if part == ".."), default=-1)
    return [part for part in parts[climbed + 1 :] if part not in ("", ".")]


def folded(path: str) -> str:
    """What paths have in common that differ in the case of letters, or in their Unicode form."""
    return unicodedata.normalize("NFC", path).casefold()


def list_pictures(folder: Path) -> Listing:
    """The first entries of the folder and of the first folders in it. What cannot be read is left out."""
    listing = Listing()
    _list(folder, "", listing)
    for name in listing.folders[:]:
        _list(folder / to_disk(name), f"{name}/", listing)
    forms = (NUMBERED.fullmatch(path) for path in listing.files.values())
    counts = Counter((form[1], len(form[2]), form[3]) for form in forms if form)
    listing.numbered.extend(form for form, _ in counts.most_common(3))
    return listing


def _list(folder: Path, before: str, listing: Listing) -> None:
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in islice(entries, LISTED):
            name = from_disk(entry.name)
            if name.startswith("."):
                continue
            if OF_A_PICTURE.search(name) or not entry.is_dir():  # of which many may be links, each a look by itself
                listing.files.setdefault(folded(before + name), before + name)
            elif not before and len(listing.folders) < FOLDERS:
                listing.folders.append(name)
