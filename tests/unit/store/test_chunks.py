"""Chunks read beside HDF5: the same rows as HDF5 reads, and no damage goes unseen."""

from __future__ import annotations

import random
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqa_embeddings.schema import VectorColumn
from vqa_embeddings.store import chunks, columnar
from vqa_embeddings.store.hdf5 import get_dataset, new_file, open_file

COLUMN = VectorColumn("depth", None, 5)


def write(path: Path, values: np.ndarray, compression: str = "none") -> None:
    """A file whose only column has these values."""
    path.unlink(missing_ok=True)
    column = COLUMN._replace(size=values.shape[1])
    vectors = {column: columnar.slices_of(values)}
    with new_file(path) as file:
        nothing = np.zeros(len(values), bool)
        columnar.write_columns(file, np.arange(len(values)), {}, nothing, vectors, compression)


def read(path: Path, places: np.ndarray, size: int, into: np.ndarray | None = None) -> np.ndarray:
    into = np.arange(len(places)) if into is None else into
    matrix = np.full((len(places), size), np.nan, np.float32)
    with open_file(path) as file:
        columnar.read_matrix(file, COLUMN._replace(size=size), places, matrix, into, chunks.Scratch())
    return matrix


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(columnar, "CHUNK_BYTES", 4 * 5 * 7)  # seven rows of five numbers


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_any_rows_in_any_order_come_as_hdf5_reads_them(tmp_path_factory, small_chunks, compression):
    path = tmp_path_factory.mktemp("any") / "file.h5"

    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 40), st.integers(1, 9), st.data())
    def check(count: int, size: int, data) -> None:
        values = np.random.default_rng(count).standard_normal((count, size)).astype(np.float32)
        write(path, values, compression)
        places = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=2 * count)))
        into = np.array(data.draw(st.permutations(range(len(places)))))
        found = read(path, places, size, into)
        assert np.array_equal(found[into], values[places])
        with open_file(path) as file:
            dataset = get_dataset(file, "depth")
            assert chunks.can_read(dataset) == (compression == "none")
            assert np.array_equal(dataset[:], values), "HDF5 itself reads something else"

    check()


def test_every_flipped_bit_of_a_chunk_is_seen(tmp_path, small_chunks):
    values = np.random.default_rng(1).standard_normal((20, 5)).astype(np.float32)
    path, chance = tmp_path / "file.h5", random.Random(3)
    write(path, values)
    good = path.read_bytes()
    with open_file(path) as file:
        places = [get_dataset(file, "depth").id.get_chunk_info(number).byte_offset for number in range(3)]
    for number, place in enumerate(places):
        rows = values[7 * number : 7 * number + 7]
        for _ in range(40):
            byte, bit = place + chance.randrange(rows.nbytes), chance.randrange(8)
            path.write_bytes(good[:byte] + bytes([good[byte] ^ 1 << bit]) + good[byte + 1 :])
            with pytest.raises(OSError, match=f"chunk {number} of /depth does not have the sum"):
                read(path, np.arange(20), 5)
            others = np.array([row for row in range(20) if row // 7 != number])
            assert np.array_equal(read(path, others, 5), values[others])
    path.write_bytes(good)
    assert np.array_equal(read(path, np.arange(20), 5), values)


def test_a_file_that_ends_early_is_seen(tmp_path, small_chunks):
    path = tmp_path / "file.h5"
    write(path, np.ones((20, 5), np.float32))
    with open_file(path) as file:
        dataset = get_dataset(file, "depth")
        end = max(dataset.id.get_chunk_info(number).byte_offset for number in range(3)) + 10
        with open(path, "r+b") as stream:
            stream.truncate(end)
        with pytest.raises(OSError, match="it ends in chunk 2 of /depth"):
            chunks.read_rows(dataset, np.arange(20), np.empty((20, 5), np.float32), np.arange(20), chunks.Scratch())


def test_a_column_that_is_not_as_it_was_written_is_refused(tmp_path, small_chunks):
    path = tmp_path / "file.h5"
    write(path, np.ones((20, 5), np.float32))
    for size, places, saying in ((4, [0], r"shape \(5,\), expected \(4,\)"), (5, [20], "has 20 rows, fewer")):
        with pytest.raises(ValueError, match=saying):
            read(path, np.array(places), size)
    with h5py.File(path, "r+") as file:
        file["depth"].attrs[chunks.CHUNK_SUMS] = np.zeros(1, np.uint64)
    with pytest.raises(OSError, match="chunk 1 of /depth does not have the sum"):
        read(path, np.arange(7, 20), 5)


@pytest.mark.parametrize("size", [1, 2, 3, 1152])
def test_the_sum_of_a_chunk_is_that_of_its_bytes(size):
    rows = np.random.default_rng(size).standard_normal((11, size)).astype(np.float32)
    data = rows.tobytes() + bytes(-rows.nbytes % 8)
    wanted = sum(int.from_bytes(data[place : place + 8], "little") for place in range(0, len(data), 8)) % (1 << 64)
    assert chunks.sum_chunk(rows) == wanted
    assert chunks.sum_chunk(np.concatenate([rows, np.zeros_like(rows)])) == wanted
