"""Names of files: as tables and records have them, in UTF-8, and as system calls take them, whatever the locale.

Where the locale is another one (C, POSIX, ISO-8859-1), Python would look for a file of other bytes, or refuse the name.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path


def to_disk(name: str) -> str:
    """A name for system calls: of the file that has it in UTF-8.

    Raises:
        ValueError: no file can have it.
    """
    return os.fsdecode(name.encode(errors="surrogateescape"))


def from_disk(name: str | Path) -> str:
    """The inverse of `to_disk`. Bytes that are no UTF-8 stay in it as Python's escapes."""
    return os.fsencode(name).decode(errors="surrogateescape")


@cache
def for_libraries(folder: Path) -> Path:
    """The folder under a name that such libraries find too as take every name for UTF-8; it stays open to the end."""
    try:
        if str(folder).encode() == os.fsencode(folder):
            return folder
    except UnicodeEncodeError:
        pass
    return Path(f"/proc/self/fd/{os.open(folder, os.O_RDONLY | os.O_DIRECTORY)}")
