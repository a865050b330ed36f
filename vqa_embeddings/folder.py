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


def _numbers(*names: str) -> set[int]:
    return {getattr(errno, name) for name in names if hasattr(errno, name)}


# What says something about the one file that was asked for.
OF_THE_FILE = _numbers("ENOENT", "ENOTDIR", "ENAMETOOLONG", "ELOOP", "EISDIR", "EINVAL")
# What is answered for every file alike once a file server, a disk, a right to read, or the machine's room has gone.
GONE = _numbers(
    *("ESTALE", "ENOTCONN", "ESHUTDOWN", "EHOSTDOWN", "EHOSTUNREACH", "ENETUNREACH", "ECONNREFUSED", "ECONNRESET"),
    *("ECONNABORTED", "ETIMEDOUT", "ENODEV", "ENXIO", "EREMOTEIO", "ECOMM", "ENOLINK", "ENONET", "ENOKEY"),
    *("EKEYEXPIRED", "EKEYREVOKED", "EKEYREJECTED", "EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "EAGAIN"),
)
# All others, such as EIO and EACCES, may come from one file or from all. So many in a row, and it is seen whether the
# last picture that was read can still be read; where none was, more of them are needed to tell.
IN_A_ROW, IN_A_ROW_AT_FIRST = 3, 20
LONGEST_SHOWN = 300  # characters of a name in a message
LONGEST_NAME = 4096  # bytes: no system takes a longer path


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
        # As long as it is open, its numbers belong to no other folder. It may be one whose names must not be listed.
        self._held = os.open(path, getattr(os, "O_PATH", os.O_RDONLY))
        self._devices: dict[str, int] = {}  # of folders in which a picture was read, and of those above them
        self._errors = 0  # that may come from all files alike, since a picture was read
        self._last: Path | None = None  # picture that was read
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
        self._errors, self._last = 0, path
        self._remember(os.path.dirname(os.path.realpath(path)))
        return opened

    def _see_whether_all_is_there(self, path: Path, number: int) -> None:
        self._errors += number not in OF_THE_FILE
        if number in GONE or self._has_all_gone(number):
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

    def _has_all_gone(self, number: int) -> bool:
        if number in OF_THE_FILE:
            return False
        if self._last is None:
            return number == errno.EIO and self._errors >= IN_A_ROW_AT_FIRST
        return self._errors >= IN_A_ROW and not _can_be_read(self._last)

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
    shown = repr(name) if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]!r}…"
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise PictureNotFound(f"{shown} is too long; expected a path of {LONGEST_NAME} bytes at most, rename it")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise PictureOutsideFolder(
            f"{shown} leads out of the picture folder; expected a relative path below --images-dir, rename it"
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
        f"{shown} cannot be found ({found}); expected a picture below --images-dir, put one there", number
    )


def _can_be_read(path: Path) -> bool:
    """Whether the disk still gives a file, and not only the machine's memory."""
    try:
        with open(path, "rb", buffering=0) as stream:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return bool(stream.read())
    except OSError:
        return False


def _with_parents(folder: str) -> Iterator[str]:
    while folder != (parent := os.path.dirname(folder)):
        yield folder
        folder = parent


def _device(folder: str) -> int | None:
    try:
        return os.stat(folder).st_dev
    except OSError:
        return None
