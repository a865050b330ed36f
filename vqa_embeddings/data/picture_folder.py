"""The folder of pictures: where one lies, and whose fault it is where it cannot be read, the row's or the disk's."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar
from unicodedata import normalize

from vqa_embeddings.base.environment import working_folder
from vqa_embeddings.base.file_names import from_disk, to_disk
from vqa_embeddings.data.similar_names import Nearby
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


# What says something about the one file that was asked for.
NOT_THERE = _numbers("ENOENT", "ENOTDIR")
OF_THE_FILE = NOT_THERE | _numbers("ENAMETOOLONG", "ELOOP", "EISDIR", "EINVAL")
# What is answered for every file alike once a file server, a disk, a right to read, or the machine's room has gone.
GONE = _numbers(
    *("ESTALE", "ENOTCONN", "ESHUTDOWN", "EHOSTDOWN", "EHOSTUNREACH", "ENETUNREACH", "ECONNREFUSED", "ECONNRESET"),
    *("ECONNABORTED", "ETIMEDOUT", "ENODEV", "ENXIO", "EREMOTEIO", "ECOMM", "ENOLINK", "ENONET", "ENOKEY"),
    *("EKEYEXPIRED", "EKEYREVOKED", "EKEYREJECTED", "EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "EAGAIN"),
)
# All others, such as EIO and EACCES, may come from one file or from all. So many in a row, and it is seen whether the
# last picture that was read can still be read; where none was, more of them are needed to tell.
IN_A_ROW, IN_A_ROW_AT_FIRST = 3, 20
LONGEST_NAME = 4096  # bytes: no system takes a longer path


class PictureFolder:
    """The folder of pictures, which has to stay what it is: what is missing then would not be the rows' fault."""

    def __init__(self, path: Path) -> None:
        """Take `path` for the folder.

        Raises:
            InputError: it is none.
        """
        if not path.is_dir():
            found = "is a file" if path.exists() else "is not there"
            raise InputError(f"{path} {found}; expected the folder of pictures, check --images-dir")
        self.path = path
        # As long as it is open, its numbers belong to no other folder. It may be one whose names must not be listed.
        self._held = os.open(path, getattr(os, "O_PATH", os.O_RDONLY))
        self._devices: dict[str, int] = {}  # of folders in which a picture was read, and of those above them
        self._errors = 0  # that may come from all files alike, since a picture was read
        self._last: Path | None = None  # picture that was read
        self._remember(os.path.realpath(path))
        self._nearby = Nearby(path)
        self._names = absolute_names(path)  # while it is there

    def read(self, name: str, open_picture: Callable[[Path], T]) -> T:
        """What `open_picture` makes of the picture `name`.

        Raises:
            RowError: there is no such picture, or it is none.
            StorageError: what it lies on has gone, or no longer works.
        """
        try:
            paths = places(self.path, self._names, name)
        except PictureOutsideFolder as failure:
            raise self._with_hint(failure, name) from None
        try:
            path = _find(paths, name)
            opened = open_picture(path)
        except (PictureNotFound, PictureUnreadable) as failure:
            if failure.errno is not None:
                self._see_whether_all_is_there(paths, failure.errno)
            if isinstance(failure, PictureNotFound) and failure.errno in NOT_THERE:
                raise self._with_hint(failure, name) from None
            raise
        self._errors, self._last = 0, path
        self._remember(os.path.dirname(os.path.realpath(path)))
        return opened

    def find(self, name: str) -> Path | None:
        """Where the picture `name` lies; None where it does not."""
        try:
            return _find(places(self.path, self._names, name), name)
        except RowError:
            return None

    def hint(self, name: str) -> str | None:
        """What else is there that may be meant by the name of a picture that is not, in half a sentence."""
        found = self._nearby.find(name)
        return found and f"there is {quoted(found)}"

    def _with_hint(self, failure: F, name: str) -> F:
        """The same failure, and what may be meant: only said where the failure is known to be the row's own."""
        hint = self.hint(name)
        said = f"{failure}; {hint}: if that is meant, correct the table or --images-dir" if hint else str(failure)
        return type(failure)(said, failure.errno)

    def _see_whether_all_is_there(self, paths: Sequence[Path], number: int) -> None:
        self._errors += number not in OF_THE_FILE
        if number in GONE or self._has_all_gone(number):
            raise StorageError(
                f"{paths[0]} cannot be read ({os.strerror(number)}), which is not the picture's fault; "
                f"mend the file server or the disk, and {SAME_COMMAND}"
            )
        changed = next(filter(None, map(self._find_change, paths)), None)
        if changed:
            raise StorageError(
                f"{changed} is no longer the folder that it was when this run began; mount it again, and {SAME_COMMAND}"
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
    """Where the picture `name` of a table lies below `folder`. Links in the folder are followed, wherever they lead.

    Raises:
        PictureOutsideFolder: as `places`.
        PictureNotFound: as `places`; or no file is there.
    """
    return _find(places(folder, absolute_names(folder), name), name)


def places(folder: Path, names: Sequence[str], name: str) -> list[Path]:
    """Where the picture `name` of a table may lie below `folder`: under this name, or under its other Unicode form.

    A Mac writes the letters and the accents of names apart, in archives too, and shows them as one.

    Args:
        names: the folder's own, `absolute_names`.
    Raises:
        PictureOutsideFolder: the name has a `..`, or is absolute and does not lead to the folder.
        PictureNotFound: no file can have the name.
    """
    if not name.strip():
        raise PictureNotFound("the row names no picture; expected a file name below --images-dir, name one")
    if len(name.encode(errors="replace")) > LONGEST_NAME:
        raise PictureNotFound(f"{quoted(name)} is too long; expected a path of {LONGEST_NAME} bytes at most, rename it")
    if ".." in PurePosixPath(name).parts:
        raise PictureOutsideFolder(
            f"{quoted(name)} has a '..', which may lead out of the picture folder; "
            "expected a path below --images-dir without one, rename it"
        )
    below = _below(names, name) if name.startswith("/") else name
    if below is None:
        raise PictureOutsideFolder(
            f"{quoted(name)} is an absolute path that does not begin with {from_disk(folder.absolute())}; "
            "expected one below --images-dir, rename it, or give --images-dir as the table has it"
        )
    forms = [below] if below.isascii() else [below, *(normalize(form, below) for form in ("NFC", "NFD"))]
    try:
        return [folder / to_disk(form) for form in dict.fromkeys(forms)]
    except ValueError as error:
        raise _not_found(name, str(error)) from None


def _find(paths: Sequence[Path], name: str) -> Path:
    """The first of the paths at which a file is."""
    for path in paths:
        number, found = None, "it is not a file"
        try:
            if stat.S_ISREG(path.stat().st_mode):
                return path
        except OSError as error:  # not there, a name too long, no permission, a broken disk
            number, found = error.errno, error.strerror or str(error)
        except ValueError as error:  # a name that no file can have
            found = str(error)
        if number != errno.ENOENT:
            break
    raise _not_found(name, found, number)


def _not_found(name: str, found: str, number: int | None = None) -> PictureNotFound:
    return PictureNotFound(
        f"{quoted(name)} cannot be found ({found}); expected a picture below --images-dir, put one there", number
    )


def _below(names: Sequence[str], name: str) -> str | None:
    """What of an absolute name follows one of a folder's names; None where it leads elsewhere."""
    path = PurePosixPath("/" + name.lstrip("/"))
    return next((str(path.relative_to(base)) for base in names if path.is_relative_to(base)), None)


def absolute_names(folder: Path) -> list[str]:
    """A folder's names: as it was given, from where the process is or the shell believes to be; and as it lies."""
    in_the_shell = os.path.normpath(os.path.join(working_folder(), folder))
    candidates = os.path.abspath(folder), in_the_shell, os.path.realpath(folder)
    return [from_disk(name) for name in candidates if _is_same(name, folder)]


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


def _is_same(name: str, folder: Path) -> bool:
    try:
        return os.path.samefile(name, folder)
    except OSError:
        return False


def _device(folder: str) -> int | None:
    try:
        return os.stat(folder).st_dev
    except OSError:
        return None
