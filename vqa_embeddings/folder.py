"""The folder of pictures: where one lies, and whose fault it is where it cannot be read, the row's or the disk's."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from vqa_embeddings.errors import PictureNotFound, PictureOutsideFolder, PictureUnreadable, Refused, StorageFailed

T = TypeVar("T")

# What is answered for every file alike once a file server, a disk or the right to read it has gone.
GONE = {
    getattr(errno, name)
    for name in (
        *("ESTALE", "ENOTCONN", "ESHUTDOWN", "EHOSTDOWN", "EHOSTUNREACH", "ENETUNREACH", "ECONNREFUSED", "ECONNRESET"),
        *("ETIMEDOUT", "ENODEV", "ENXIO", "EREMOTEIO", "EKEYEXPIRED", "EKEYREVOKED", "EKEYREJECTED"),
    )
    if hasattr(errno, name)
}
DISK_ERRORS = 3  # EIO may come from a bad block below one picture; for so many in a row it comes from the disk


class PictureFolder:
    """The folder of pictures, which has to stay what it is: what is missing then would not be the rows' fault."""

    def __init__(self, path: Path) -> None:
        """Take `path` for the folder.

        Raises:
            Refused: it is none.
        """
        if not path.is_dir():
            found = "is a file" if path.exists() else "is not there"
            raise Refused(f"{path} {found}; expected the folder of pictures, check --images-dir")
        self.path = path
        self._held = os.open(path, os.O_RDONLY)  # as long as it is open, its numbers belong to no other folder
        self._devices: dict[str, int] = {}  # of folders in which a picture was read, and of those above them
        self._disk_errors = 0  # since a picture was read
        self._remember(os.path.realpath(path))

    def read(self, name: str, open_picture: Callable[[Path], T]) -> T:
        """What `open_picture` makes of the picture `name`.

        Raises:
            RowFailed: there is no such picture, or it is none.
            StorageFailed: what it lies on has gone, or no longer works.
        """
        try:
            path = locate(self.path, name)
            opened = open_picture(path)
        except (PictureNotFound, PictureUnreadable) as failure:
            if failure.errno is not None:
                self._see_whether_all_is_there(self.path / name, failure.errno)
            raise
        self._disk_errors = 0
        self._remember(os.path.dirname(os.path.realpath(path)))
        return opened

    def _see_whether_all_is_there(self, path: Path, number: int) -> None:
        self._disk_errors += number == errno.EIO
        if number in GONE or self._disk_errors >= DISK_ERRORS:
            raise StorageFailed(
                f"{path} cannot be read ({os.strerror(number)}), which is not the picture's fault; "
                "mend the file server or the disk, and the same command continues"
            )
        changed = self._find_change(path)
        if changed:
            raise StorageFailed(
                f"{changed} is no longer the folder that it was when this run began; "
                "mount it again, and the same command continues"
            )

    def _find_change(self, path: Path) -> str | None:
        """The folder on the way to `path` that is gone, or lies on another device than before."""
        try:
            if not os.path.samestat(os.fstat(self._held), os.stat(self.path)):
                return str(self.path)
        except OSError:
            return str(self.path)
        for folder in _with_parents(os.path.dirname(os.path.realpath(path))):
            if folder in self._devices and self._devices[folder] != _device(folder):
                return folder
        return None

    def _remember(self, folder: str) -> None:
        for unknown in _with_parents(folder):
            if unknown in self._devices:
                return
            device = _device(unknown)
            if device is not None:
                self._devices[unknown] = device


def locate(folder: Path, name: str) -> Path:
    """Where the picture `name` lies below `folder`. Links inside the folder are followed, wherever they lead.

    Raises:
        PictureOutsideFolder: the name is absolute, or has a `..`.
        PictureNotFound: the name is empty, or no file is there.
    """
    if not name.strip():
        raise PictureNotFound("the row names no picture; expected a file name below --images-dir, name one")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise PictureOutsideFolder(
            f"{name!r} leads out of the picture folder; expected a relative path below --images-dir, rename it"
        )
    path = folder / name
    number, found = None, "it is not a file"
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path
    except OSError as error:  # not there, a name too long, no permission, a broken disk
        number, found = error.errno, error.strerror or str(error)
    except ValueError as error:  # a name that no file can have
        found = str(error)
    raise PictureNotFound(
        f"{name!r} cannot be found ({found}); expected a picture below --images-dir, put one there", number
    )


def _with_parents(folder: str) -> Iterator[str]:
    while folder != (parent := os.path.dirname(folder)):
        yield folder
        folder = parent


def _device(folder: str) -> int | None:
    try:
        return os.stat(folder).st_dev
    except OSError:
        return None
