"""Names of files: as tables and records have them, in UTF-8, and as system calls take them, whatever the locale.

Under another locale (C, POSIX, ISO-8859-1), Python would look for a file whose name has other bytes, or refuse it.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path


def to_disk(name: str) -> str:
    """The name as system calls take it: that of the file whose name is this one in UTF-8.

    Raises:
        ValueError: no file can have this name.
    """
    return os.fsdecode(name.encode(errors="surrogateescape"))


def from_disk(name: str | Path) -> str:
    """The inverse of `to_disk`. Bytes that are not UTF-8 stay in it as Python's surrogate escapes."""
    return os.fsencode(name).decode(errors="surrogateescape")


@cache
def for_libraries(folder: Path) -> Path:
    """The folder under a name that also libraries find which read every name as UTF-8. It stays open to the end."""
    try:
        if str(folder).encode() == os.fsencode(folder):
            return folder
    except UnicodeEncodeError:
        pass
    return Path(f"/proc/self/fd/{os.open(folder, os.O_RDONLY | os.O_DIRECTORY)}")
