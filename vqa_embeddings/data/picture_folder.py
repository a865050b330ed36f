"""The folder of pictures: reads one by its name, and tells a row's own error from a disk or server that has failed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from vqa_embeddings.data.picture_paths import absolute_names, candidate_paths, find_file
from vqa_embeddings.data.similar_names import SimilarNames
from vqa_embeddings.errors import (
    SAME_COMMAND,
    InputError,
    PictureNotFound,
    PictureOutsideFolder,
    PictureUnreadable,
    RowError,
    StorageError,
    quoted,
)

T = TypeVar("T")
F = TypeVar("F", bound=RowError)


def _numbers(*names: str) -> set[int]:
    return {getattr(errno, name) for name in names if hasattr(errno, name)}


# Errors that concern only the file that was asked for.
NOT_THERE = _numbers("ENOENT", "ENOTDIR")
OF_THE_FILE = NOT_THERE | _numbers("ENAMETOOLONG", "ELOOP", "EISDIR", "EINVAL")
# Errors that every file gives once a file server, a disk, a permission or the machine's memory is gone.
GONE = _numbers(
    *("ESTALE", "ENOTCONN", "ESHUTDOWN", "EHOSTDOWN", "EHOSTUNREACH", "ENETUNREACH", "ECONNREFUSED", "ECONNRESET"),
    *("ECONNABORTED", "ETIMEDOUT", "ENODEV", "ENXIO", "EREMOTEIO", "ECOMM", "ENOLINK", "ENONET", "ENOKEY"),
    *("EKEYEXPIRED", "EKEYREVOKED", "EKEYREJECTED", "EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "EAGAIN"),
)
# All others, such as EIO and EACCES, may come from one file or from all. After so many in a row, the last picture that
# was read is read again to tell. Before any picture was read, more are needed.
IN_A_ROW, IN_A_ROW_AT_FIRST = 3, 20


class PictureFolder:
    """The folder of pictures. It must stay the same folder: if it is unmounted, missing files are no row's error."""

    def __init__(self, path: Path) -> None:
        """Open `path`.

        Raises:
            InputError: it is not a folder.
        """
        if not path.is_dir():
            found = "is a file" if path.exists() else "is not there"
            raise InputError(f"{path} {found}; expected the folder of pictures, check --images-dir")
        self.path = path
        # Kept open, so that no other folder gets its inode number. O_PATH: it may not be allowed to list its names.
        self._descriptor = os.open(path, getattr(os, "O_PATH", os.O_RDONLY))
        self._devices: dict[str, int] = {}  # of the folders in which a picture was read, and of their parents
        self._errors = 0  # that may come from all files alike, since the last picture was read
        self._last_read: Path | None = None
        self._remember_devices(os.path.realpath(path))
        self._similar = SimilarNames(path)
        self._names = absolute_names(path)  # now, while it is there

    def read(self, name: str, open_picture: Callable[[Path], T]) -> T:
        """What `open_picture` returns for the file of the picture `name`.

        Raises:
            RowError: there is no such picture, or it cannot be opened.
            StorageError: the disk or the server that it lies on is gone, or no longer works.
        """
        try:
            paths = candidate_paths(self.path, self._names, name)
        except PictureOutsideFolder as failure:
            raise self._with_hint(failure, name) from None
        try:
            path = find_file(paths, name)
            opened = open_picture(path)
        except (PictureNotFound, PictureUnreadable) as failure:
            if failure.errno is not None:
                self._check_storage(paths, failure.errno)
            if isinstance(failure, PictureNotFound) and failure.errno in NOT_THERE:
                raise self._with_hint(failure, name) from None
            raise
        self._errors, self._last_read = 0, path
        self._remember_devices(os.path.dirname(os.path.realpath(path)))
        return opened

    def find(self, name: str) -> Path | None:
        """The file of the picture `name`; None if there is none."""
        try:
            return find_file(candidate_paths(self.path, self._names, name), name)
        except RowError:
            return None

    def hint(self, name: str) -> str | None:
        """A file that may be meant by the name of a missing picture, as half a sentence; None if none is seen."""
        found = self._similar.find(name)
        return found and f"there is {quoted(found)}"

    def _with_hint(self, failure: F, name: str) -> F:
        """The same failure with a hint. Only for failures that are known to be the row's own."""
        hint = self.hint(name)
        message = f"{failure}; {hint}: if that is meant, correct the table or --images-dir" if hint else str(failure)
        return type(failure)(message, failure.errno)

    def _check_storage(self, paths: Sequence[Path], number: int) -> None:
        """Raise StorageError if the error `number` is not the fault of the picture that was looked for at `paths`."""
        self._errors += number not in OF_THE_FILE
        if number in GONE or self._all_files_fail(number):
            raise StorageError(
                f"{paths[0]} cannot be read ({os.strerror(number)}), which is not the picture's fault; "
                f"repair the file server or the disk, and {SAME_COMMAND}"
            )
        changed = next(filter(None, map(self._find_change, paths)), None)
        if changed:
            raise StorageError(
                f"{changed} is no longer the folder that it was when this run began; mount it again, and {SAME_COMMAND}"
            )

    def _all_files_fail(self, number: int) -> bool:
        if number in OF_THE_FILE:
            return False
        if self._last_read is None:
            return number == errno.EIO and self._errors >= IN_A_ROW_AT_FIRST
        return self._errors >= IN_A_ROW and not _can_be_read(self._last_read)

    def _find_change(self, path: Path) -> str | None:
        """The folder on the way to `path` that is gone, or lies on another device than before; None if none is."""
        try:
            if not os.path.samestat(os.fstat(self._descriptor), os.stat(self.path)):
                return str(self.path)
        except OSError:
            return str(self.path)
        for folder in _with_parents(os.path.dirname(os.path.realpath(path))):
            if folder in self._devices and self._devices[folder] != _device(folder):
                return folder
        return None

    def _remember_devices(self, folder: str) -> None:
        for unknown in _with_parents(folder):
            if unknown in self._devices:
                return
            device = _device(unknown)
            if device is not None:
                self._devices[unknown] = device


def _can_be_read(path: Path) -> bool:
    """Whether the disk still delivers a file; its copy in the page cache does not count."""
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
