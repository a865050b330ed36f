"""The form of segments and columnar parts, as docs/file-formats.md specifies it; and files of another form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.helpers.launching import command, merge, run
from tests.helpers.output_folders import LAYERS, PART_SIZE, ROWS, begin_run, commit, contents, record
from vqa_embeddings import open_embeddings
from vqa_embeddings.base.files import sha256
from vqa_embeddings.errors import InputError, StorageError
from vqa_embeddings.records import Failed
from vqa_embeddings.store import columnar, segments
from vqa_embeddings.store.catalog import scan
from vqa_embeddings.store.hdf5 import open_file
from vqa_embeddings.store.row_sources import find_sources, read_values
from vqa_embeddings.store.run import read_run, read_run_rows
from vqa_embeddings.store.segments import LARGEST, ShardWriter, choose_length, read_segments

VECTORS = [
    "vision_only_representation",
    *(f"{name}_representation/layer_{layer}" for name in ("vision_token", "query_token") for layer in LAYERS),
]
COLUMNS = "phi4_multimodal_columns_part_001.h5"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = begin_run(tmp_path)
    commit(
        folder, [*(record(row) for row in range(ROWS - 2, -1, -1)), Failed(ROWS - 1, "PictureNotFound", "gone")], ROWS
    )
    return folder


def segment_of(out: Path) -> Path:
    (path,) = out.glob("shards/*/*.h5")
    return path


def datasets(file: h5py.File) -> Iterator[h5py.Dataset]:
    found: list[h5py.Dataset] = []
    file.visititems(lambda _, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
    return iter(found)


@pytest.mark.parametrize("kind", ["segment", "columns"])
def test_every_dataset_has_chunks_of_whole_rows_with_a_checksum_and_text_of_fixed_length(out, kind):
    if kind == "columns":
        assert merge(out, "--layout", "columnar").returncode == 4
    with h5py.File(out / COLUMNS if kind == "columns" else segment_of(out)) as file:
        assert file.attrs["format"] == f"vqa_embeddings {kind} 2".encode()
        texts = ["question_id", "image_id", "answer"]
        texts += ["question", "ground_truth_answer"] if kind == "columns" else []
        failed = {f"failed/{name}" for name in ("row", "question_id", "image_id", "error", "message")}
        expected = {"row", *texts, *VECTORS, *(failed if kind == "segment" else ())}
        assert {dataset.name[1:] for dataset in datasets(file)} == expected
        for dataset in datasets(file):
            assert dataset.fletcher32 and dataset.compression is None, dataset.name
            assert (
                dataset.chunks[1:] == dataset.shape[1:] and np.prod(dataset.chunks) * dataset.dtype.itemsize <= 1 << 20
            )
            if (text := h5py.check_string_dtype(dataset.dtype)) is not None:
                assert text.encoding == "utf-8" and text.length is not None
            status = h5py.h5o.get_info(dataset.id)
            assert status.mtime == 0 or not dataset.id.get_create_plist().get_obj_track_times()
        for path in VECTORS:
            assert file[path].dtype == np.dtype("<f4") and file[path].attrs["chunk_sums"].dtype == np.dtype("<u8")
        assert file["row"][:].tolist() == list(range(ROWS - 1))
        assert file["answer"].asstr()[5] == record(5).answer


def test_chunks_share_the_rows_evenly():
    assert [columnar.choose_chunk(count, 4 * 3072) for count in (1, 85, 86, 1000)] == [1, 85, 43, 84]
    assert columnar.choose_chunk(3, 2 << 20) == 1 and columnar.choose_chunk(10, 8) == 10


def test_a_long_text_costs_the_others_no_room_and_keeps_its_checksum(tmp_path, monkeypatch):
    out = begin_run(tmp_path)
    answers = ["é" * 1_000_000 if row == 3 else "no" for row in range(ROWS)]
    commit(out, [replace(record(row), answer=answers[row]) for row in range(ROWS)], ROWS)
    assert merge(out, "--layout", "columnar").returncode == 0
    for path in (segment_of(out), out / COLUMNS):
        assert path.stat().st_size < 3 << 20
        with h5py.File(path) as file:
            assert h5py.check_string_dtype(file["answer"].dtype).length == 2_000_000
            assert file["answer"].fletcher32 and file["answer"].chunks == (1,)
            assert file["question_id"].compression is None
    assert open_embeddings(out).answers == answers
    segment_of(out).unlink()
    monkeypatch.setattr(columnar, "LONGEST_COLUMN", 4_000_000)  # a few rows at a time
    assert open_embeddings(out)[2:].answers == answers[2:]


def name_another_format(path: Path) -> None:
    """Make it a file that another version has written, its checksum included."""
    with h5py.File(path, "r+") as file:
        file.attrs["format"] = np.bytes_("vqa_embeddings segment 1")
    path.with_name(path.name + ".sha256").write_text(f"{sha256(path)}  {path.name}\n")


def test_a_folder_with_a_segment_of_another_format_is_refused_whole_by_both_programs(tmp_path, photographs):
    out = tmp_path / "out"
    assert run(command(0, *photographs, "--output-dir", out, "--checkpoint-interval", 16)).returncode == 0
    victim = max(out.glob("shards/*/*.h5"))
    name_another_format(victim)
    other = min(out.glob("shards/*/*.h5"))
    other.write_bytes(other.read_bytes()[:-1])  # damage, which a merge would set aside
    before = contents(out)
    told = f"error: {victim} is written as 'vqa_embeddings segment 1', expected 'vqa_embeddings segment 2': use the"
    for ranks in (0, 2):
        refused = run(command(ranks, *photographs, "--output-dir", out))
        assert told in refused.stderr and refused.returncode == (1 if ranks else 2), refused.stderr
        assert contents(out) == before
    for arguments in ([], ["--check"], ["--verify"], ["--check", "--verify"]):
        refused = merge(out, *arguments)
        assert (refused.returncode, refused.stdout) == (2, "") and refused.stderr.startswith(told), refused.stderr
        assert contents(out) == before
    with pytest.raises(ValueError, match="is written as 'vqa_embeddings segment 1'"):
        open_embeddings(out)


def test_a_folder_with_a_columnar_part_of_another_format_is_refused_too(out):
    assert merge(out, "--layout", "columnar").returncode == 4
    with h5py.File(out / COLUMNS, "r+") as file:
        del file.attrs["format"]
    (out / "coverage.json").unlink()  # as if this were what was recorded
    before = contents(out)
    for arguments in ([], ["--check"], ["--layout", "columnar"]):
        refused = merge(out, *arguments)
        assert (
            refused.returncode == 2
            and "is written as 'no format', expected 'vqa_embeddings columns 2'" in refused.stderr
        )
    with pytest.raises(ValueError, match="'no format'"):
        open_embeddings(out)
    assert contents(out) == before


def test_a_format_that_a_flipped_bit_has_changed_is_damage(out):
    path = segment_of(out)
    data = path.read_bytes()
    place = data.index(b"vqa_embeddings segment 2") + 23
    path.write_bytes(data[:place] + b"3" + data[place + 1 :])
    run_ = read_run(out)
    assert read_segments(out, run_, verify=None)[1][0].path == path, "the header's own checksum finds it"
    with pytest.MonkeyPatch.context() as patch:  # where it does not, the file's does
        patch.setattr(columnar, "check_format", lambda *_: (_ for _ in ()).throw(columnar.OtherFormat("another")))
        [damaged] = read_segments(out, run_, verify=None)[1]
        assert damaged.path == path and "SHA-256" in damaged.reason
        path.write_bytes(data)
        with pytest.raises(InputError, match="another"):
            read_segments(out, run_, verify=None)


def test_damage_in_a_vector_is_seen_when_it_is_read_without_a_hash(out):
    path = segment_of(out)
    data = path.read_bytes()
    place = data.index(record(7).vectors["query_token_representation"][1].tobytes())
    path.write_bytes(data[: place + 2] + bytes([data[place + 2] ^ 1]) + data[place + 3 :])
    e = open_embeddings(out)
    assert len(e.query_token(LAYERS[0])) == ROWS - 1
    with pytest.raises(OSError, match=r"cannot be read \(chunk 0 of .*layer_2 does not have the sum .* --verify finds"):
        e.query_token(LAYERS[1])


def test_a_segment_is_committed_when_it_has_512_mb(tmp_path, monkeypatch):
    out = begin_run(tmp_path)
    run_ = read_run(out)
    assert LARGEST == 512_000_000 and run_.row_bytes == 4 * (6 + 2 * 3 * 8)
    assert choose_length(run_, 1000) == 1000
    wide = replace(run_, layers=list(range(32)), hidden_size=3072, vision_size=1152)
    assert choose_length(wide, 1000) == 512_000_000 // (4 * (1152 + 64 * 3072)) == 647
    assert choose_length(replace(wide, hidden_size=10**8), 1000) == 1
    monkeypatch.setattr(segments, "LARGEST", 5 * run_.row_bytes)
    with ShardWriter(out, "launch", 0, run_, read_run_rows(out, run_), 1000) as shard:
        shard.add(record(row) for row in range(12))
        shard.begin_commit()
        assert shard.committed >= 5, "the rows before were not committed on their way"
    assert [len(segment.rows) for segment in read_segments(out, run_, verify=None)[0]] == [5, 5, 2]
    assert merge(out, "--part-size", PART_SIZE).returncode == 3


def test_rows_that_no_file_has_are_never_made_up(out):
    run_, rows = read_run(out), np.arange(ROWS - 1)
    catalog = scan(out, run_, read_run_rows(out, run_))
    sources = find_sources(catalog.segments, [], catalog.coverage(), rows)
    ids = catalog.table.ids.__getitem__
    assert read_values(sources, run_.vectors, rows, ids).answers == [record(row).answer for row in range(ROWS - 1)]
    fewer = [
        replace(source, rows=source.rows[1:], places=source.places[1:], into=source.into[1:]) for source in sources
    ]
    with pytest.raises(StorageError, match="row 1 is no longer in the files that had it: the same command continues"):
        read_values(fewer, run_.vectors, rows, ids)


def test_a_file_is_closed_when_its_block_ends(out):
    with open_file(segment_of(out)) as file:
        dataset = file["row"]
    assert not file and not dataset
    with h5py.File(segment_of(out)) as file:  # which HDF5 refuses while the same file is open in another way
        assert len(file["row"]) == ROWS - 1
