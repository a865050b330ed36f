"""HDF5 files that identical data make identical: without time stamps, in a format that older readers know."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
from h5py import h5f, h5g, h5p, h5t

# From HDF5 1.8 (metadata with checksums) to 1.10; what "latest" of HDF5 2 writes, 1.14 cannot read.
OLDEST, NEWEST = h5f.LIBVER_V18, h5f.LIBVER_V110


def new_file(path: Path) -> h5py.File:
    """A new, empty file. h5py's own way stamps the root group with the time, up to version 3.14."""
    creation = h5p.create(h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    access = h5p.create(h5p.FILE_ACCESS)
    access.set_libver_bounds(OLDEST, NEWEST)
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    return h5py.File(h5f.create(os.fsencode(path), h5f.ACC_EXCL, creation, access))


class Groups:
    """Makes groups through the low-level interface."""

    def __init__(self) -> None:
        self._links = h5p.create(h5p.LINK_CREATE)
        self._links.set_char_encoding(h5t.CSET_UTF8)
        self._creation = h5p.create(h5p.GROUP_CREATE)
        self._creation.set_obj_track_times(False)

    def new(self, parent: h5g.GroupID, name: str) -> h5g.GroupID:
        """A new group of this name, without a time stamp."""
        return h5g.create(parent, name.encode(), lcpl=self._links, gcpl=self._creation)
