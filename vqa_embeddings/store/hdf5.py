"""HDF5 files that identical data make identical: without time stamps, in a format that older readers know.

They are written through an object of ours: on a full disk the library itself ends the process (SIGSEGV, HDF5 2.0).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
from h5py import h5d, h5f, h5fd, h5g, h5l, h5o, h5p, h5t

from vqa_embeddings.errors import SAME_COMMAND, StorageError, one_line

# From HDF5 1.8 (metadata with checksums) to 1.10; what "latest" of HDF5 2 writes, 1.14 cannot read.
OLDEST, NEWEST = h5f.LIBVER_V18, h5f.LIBVER_V110
# What a file raises that is not what its name says.
UNUSABLE = (OSError, KeyError, ValueError, RuntimeError, AttributeError, TypeError, IndexError)
MEMORY_STEP = 1 << 20  # bytes by which a file in memory grows


@contextmanager
def new_file(path: Path) -> Iterator[h5py.File]:
    """A new, empty file. h5py's own way stamps the root group with the time, up to version 3.14.

    Raises:
        OSError: at the end, the first that the disk has raised; the file is then none.
    """
    disk = _Disk(path)
    try:
        with _create_on(disk) as file:
            yield file
    except Exception:
        if disk.failure is None:  # otherwise the library has met what the disk left undone
            raise
    finally:
        disk.close()
    if disk.failure is not None:
        raise OSError(*disk.failure)


def _create_on(disk: _Disk) -> h5py.File:
    access = _access()  # which must not outlive the interpreter, as what an exception's frames hold may
    access.set_fileobj_driver(h5fd.fileobj_driver, disk)
    creation = h5p.create(h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    return h5py.File(h5f.create(_new_name(), h5f.ACC_TRUNC, creation, access))


def new_memory_file() -> h5py.File:
    """A new, empty file that lives in memory alone."""
    access = _access()
    access.set_fapl_core(MEMORY_STEP, backing_store=False)
    return h5py.File(h5f.create(_new_name(), h5f.ACC_TRUNC, fapl=access))


@contextmanager
def open_file(path: Path) -> Iterator[h5py.File]:
    """A file to read. Without a lock: none is ever written to under this name, and some file systems have no locks.

    h5py's own way takes four times as long.
    """
    access = h5p.create(h5p.FILE_ACCESS)
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    access.set_file_locking(False, True)
    file = h5f.open(os.fsencode(path), h5f.ACC_RDONLY, access)
    opened = h5py.File(file)
    try:
        yield opened
    finally:
        opened.id.close()  # which counts its references apart from `file`
        file.close()


def stamp_of(file: h5py.File) -> tuple[int, int, int]:
    """What tells an open file from one that takes its place under the same name."""
    found = os.fstat(file.id.get_vfd_handle())
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def open_verified(path: Path) -> Iterator[h5py.File]:
    """A file whose hash is right: where it still cannot be read, the disk fails, or somebody has forged both.

    Raises:
        StorageError: it cannot.
    """
    try:
        with open_file(path) as file:
            yield file
    except UNUSABLE as error:
        raise misread(path, error) from error


def misread(path: Path, error: Exception) -> StorageError:
    """What is raised about a file whose hash is right, and which cannot be read."""
    return StorageError(
        f"{path} cannot be read, though its checksum holds ({one_line(error)}); "
        f"repair the disk, or move the file away, and {SAME_COMMAND}"
    )


def get_dataset(parent: h5py.Group, name: str) -> h5py.Dataset:
    """The dataset of this name, whose values lie in the file itself.

    Raises:
        KeyError: there is none.
        ValueError: it leads to another place: what can write one file could have any other read through it.
    """
    found = _follow(parent.id, name)
    if not isinstance(found, h5d.DatasetID):
        raise ValueError(f"{name} is no dataset")
    creation = found.get_create_plist()
    if creation.get_layout() == h5d.VIRTUAL or creation.get_external_count():
        raise ValueError(f"{name} has its values in another file")
    return h5py.Dataset(found)


def get_group(parent: h5py.Group, name: str) -> h5py.Group:
    """The group of this name. Raises as `get_dataset`."""
    found = _follow(parent.id, name)
    if not isinstance(found, h5g.GroupID):
        raise ValueError(f"{name} is no group")
    return h5py.Group(found)


def _follow(place: Any, name: str) -> Any:
    """What lies at a path, by no link to another place. Low-level, as every row of a part comes here."""
    for step in name.encode().split(b"/"):
        if not isinstance(place, h5g.GroupID):
            raise ValueError(f"{name} lies in no group")
        if place.links.get_info(step).type != h5l.TYPE_HARD:
            raise ValueError(f"{name} is a link to another place")
        place = h5o.open(place, step)
    return place


def text_of(attribute: object) -> str:
    """An attribute of fixed or variable length as text.

    What is read before a file has been hashed has a fixed length: a flipped bit in the heap of the others, which has no
    checksum, can keep the library (HDF5 2.0) reading for ever.
    """
    return attribute.decode() if isinstance(attribute, bytes) else str(attribute)


def _access() -> h5p.PropFAID:
    access = h5p.create(h5p.FILE_ACCESS)
    access.set_libver_bounds(OLDEST, NEWEST)
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    return access


def _new_name() -> bytes:
    return f"file-{secrets.token_hex(8)}".encode()  # HDF5 tells open files apart by name


class _Disk:
    """A file as h5py's driver for Python objects wants it. It keeps the first error, and takes what follows for done.

    The library must not notice: a file that it cannot close it closes again at the end of the process, which it ends.
    """

    def __init__(self, path: Path) -> None:
        self.failure: tuple[int | None, str | None] | None = None  # number and words of the first error
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._place = self._size = 0

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        self._place = place if whence == os.SEEK_SET else place + (self._size if whence == os.SEEK_END else self._place)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, room: Any) -> int:
        got = self._attempt(os.preadv, self._descriptor, [room], self._place)
        self._place += got
        return got

    def write(self, data: Any) -> int:
        size = len(data)
        written = self._attempt(os.pwrite, self._descriptor, data, self._place)
        while written < size and self.failure is None:
            written += self._attempt(os.pwrite, self._descriptor, data[written:], self._place + written)
        self._place += size
        if self._place > self._size:
            self._size = self._place
        return size

    def truncate(self, size: int | None = None) -> None:
        self._size = self._place if size is None else size
        self._attempt(os.ftruncate, self._descriptor, self._size)

    def flush(self) -> None:
        """What `publish` does, for the whole file."""

    def close(self) -> None:
        os.close(self._descriptor)

    def _attempt(self, call: Any, *arguments: Any) -> int:
        try:
            return call(*arguments) or 0
        except OSError as error:
            self.failure = self.failure or (error.errno, error.strerror)
            return 0


class Groups:
    """Makes and copies groups through the low-level interface."""

    def __init__(self) -> None:
        self._links = h5p.create(h5p.LINK_CREATE)
        self._links.set_char_encoding(h5t.CSET_UTF8)
        self._creation = h5p.create(h5p.GROUP_CREATE)
        self._creation.set_obj_track_times(False)

    def new(self, parent: h5g.GroupID, name: str) -> h5g.GroupID:
        """A new group of this name, without a time stamp."""
        return h5g.create(parent, name.encode(), lcpl=self._links, gcpl=self._creation)

    def copy(self, group: h5g.GroupID, parent: h5g.GroupID, name: str) -> None:
        """A copy of `group`, and of all that is in it, under this name in `parent`, which may be in another file."""
        h5o.copy(group, b".", parent, name.encode(), lcpl=self._links)
