"""From a picture's name in the table to its file below the picture folder. A name may not lead out of the folder."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from vqa_embeddings.base.environment import working_folder
from vqa_embeddings.base.file_names import from_disk, to_disk
from vqa_embeddings.errors import PictureNotFound, PictureOutsideFolder, quoted

LONGEST_NAME = 4096  # bytes: no system accepts a longer path


def locate(folder: Path, name: str) -> Path:
    """The file of the picture `name` below `folder`. Links in the folder are followed, wherever they lead.

    Raises:
        PictureOutsideFolder: as `candidate_paths`.
        PictureNotFound: as `candidate_paths`; or there is no such file.
    """
    return find_file(candidate_paths(folder, absolute_names(folder), name), name)


def candidate_paths(folder: Path, folder_names: Sequence[str], name: str) -> list[Path]:
    """The paths at which the picture `name` may lie below `folder`: the name as it is, then its other Unicode forms.

    macOS writes a letter and its accent as two characters, in archives too, and shows them as one.

    Args:
        folder: the picture folder.
        folder_names: `absolute_names(folder)`.
        name: of a picture, as the table has it.
    Raises:
        PictureOutsideFolder: the name has a `..`, or is absolute and does not begin with a name of the folder.
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
    relative = _relative_to(folder_names, name) if name.startswith("/") else name
    if relative is None:
        raise PictureOutsideFolder(
            f"{quoted(name)} is an absolute path that does not begin with {from_disk(folder.absolute())}; "
            "expected one below --images-dir, rename it, or give --images-dir as the table has it"
        )
    forms = [relative] if relative.isascii() else [relative, *(normalize(form, relative) for form in ("NFC", "NFD"))]
    try:
        return [folder / to_disk(form) for form in dict.fromkeys(forms)]
    except ValueError as error:
        raise _not_found(name, str(error)) from None


def find_file(paths: Sequence[Path], name: str) -> Path:
    """The first of the paths that is a regular file.

    Raises:
        PictureNotFound: none is; with the number of the error, where the system has answered one.
    """
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


def absolute_names(folder: Path) -> list[str]:
    """The absolute paths of a folder: seen from the working directory, from the shell's (PWD), and without links."""
    in_the_shell = os.path.normpath(os.path.join(working_folder(), folder))
    candidates = os.path.abspath(folder), in_the_shell, os.path.realpath(folder)
    return [from_disk(name) for name in candidates if _is_same(name, folder)]


def _not_found(name: str, found: str, number: int | None = None) -> PictureNotFound:
    return PictureNotFound(
        f"{quoted(name)} cannot be found ({found}); expected a picture below --images-dir, put one there", number
    )


def _relative_to(folder_names: Sequence[str], name: str) -> str | None:
    """An absolute name relative to the folder; None where it leads elsewhere."""
    path = PurePosixPath("/" + name.lstrip("/"))
    return next((str(path.relative_to(folder)) for folder in folder_names if path.is_relative_to(folder)), None)


def _is_same(name: str, folder: Path) -> bool:
    try:
        return os.path.samefile(name, folder)
    except OSError:
        return False
