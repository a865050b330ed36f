"""HDF5 files that identical data make identical: without time stamps, in a format that older readers know."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import h5py
from h5py import h5f, h5g, h5o, h5p, h5t

# From HDF5 1.8 (metadata with checksums) to 1.10; what "latest" of HDF5 2 writes, 1.14 cannot read.
OLDEST, NEWEST = h5f.LIBVER_V18, h5f.LIBVER_V110
MEMORY_STEP = 1 << 20  # bytes by which a file in memory grows


def new_file(path: Path) -> h5py.File:
    """A new, empty file. h5py's own way stamps the root group with the time, up to version 3.14."""
    creation = h5p.create(h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    return h5py.File(h5f.create(os.fsencode(path), h5f.ACC_EXCL, creation, _access()))


def new_memory_file() -> h5py.File:
    """A new, empty file that lives in memory alone."""
    access = _access()
    access.set_fapl_core(MEMORY_STEP, backing_store=False)
    name = f"memory-{secrets.token_hex(8)}"  # HDF5 tells open files apart by name, those in memory too
    return h5py.File(h5f.create(name.encode(), h5f.ACC_TRUNC, fapl=access))


def _access() -> h5p.PropFAID:
    access = h5p.create(h5p.FILE_ACCESS)
    access.set_libver_bounds(OLDEST, NEWEST)
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    return access


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
