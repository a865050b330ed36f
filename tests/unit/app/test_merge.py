"""The merge: the same bytes every time, nothing damaged taken for good, nothing removed unasked."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.helpers.launching import merge
from tests.helpers.output_folders import (
    LAYERS,
    PART,
    PART_SIZE,
    ROWS,
    assert_right,
    begin_run,
    commit,
    contents,
    coverage,
    record,
)
from tests.helpers.published_reader import read_published
from vqa_embeddings import open_embeddings
from vqa_embeddings.app import merge as merging
from vqa_embeddings.base.files import sha256
from vqa_embeddings.cli.options import parse_merge
from vqa_embeddings.errors import InputError
from vqa_embeddings.records import Failed
from vqa_embeddings.schema import VISION_ONLY
from vqa_embeddings.store import part_writer
from vqa_embeddings.store.catalog import scan
from vqa_embeddings.store.hash_ledger import announce
from vqa_embeddings.store.run import read_run, read_run_rows

pytestmark = pytest.mark.slow  # nearly every test runs the program; test_embeddings merges in this process


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return begin_run(tmp_path)


def test_merging_again_changes_no_byte_and_merging_anew_gives_the_same(out):
    order = random.Random(1).sample(range(ROWS), ROWS)
    commit(out, [record(row) for row in order])
    assert merge(out, "--part-size", PART_SIZE).returncode == 0
    assert_right(out, set(range(ROWS)))
    before = contents(out)
    assert merge(out, "--part-size", PART_SIZE).returncode == 0
    assert contents(out) == before
    for path in [*out.glob("*.h5"), out / "coverage.json"]:
        path.unlink()
    time.sleep(1.1)  # a time stamp in a file would have a resolution of one second
    assert merge(out, "--part-size", PART_SIZE, "--jobs", 2).returncode == 0
    assert contents(out) == before


def test_a_part_does_not_depend_on_who_computed_its_rows(out):
    other = shutil.copytree(out, out.parent / "other")
    commit(out, [record(row) for row in range(ROWS)], interval=1000)
    for rank in range(3):
        commit(other, [record(row) for row in range(ROWS - 1, -1, -1) if row % 3 == rank], interval=2, rank=rank)
    for folder in (out, other):
        assert merge(folder, "--part-size", PART_SIZE).returncode == 0
    for number in range(1, 6):
        assert (out / PART.format(number)).read_bytes() == (other / PART.format(number)).read_bytes()


def test_parts_come_when_their_rows_are_accounted_for(out):
    commit(out, [record(row) for row in range(7)])
    assert merge(out, "--part-size", PART_SIZE).returncode == 3
    assert [path.name for path in sorted(out.glob("*.h5"))] == [PART.format(1)]
    missing = (out / "missing.csv").read_text().splitlines()
    assert missing[0] == "question_id,image_id,question,answer"
    assert missing[1:] == [f"q{row},image{row // 3}.jpg,question {row},truth {row}" for row in range(7, ROWS)]
    first = (out / PART.format(1)).read_bytes()
    commit(out, [record(row) for row in range(7, ROWS)])
    assert merge(out, "--part-size", PART_SIZE).returncode == 0
    assert (out / PART.format(1)).read_bytes() == first
    assert_right(out, set(range(ROWS)))
    assert [(part["first_row"], part["last_row"], part["samples"]) for part in coverage(out)["parts"]] == [
        (1, 5, 5),
        (6, 10, 5),
        (11, 15, 5),
        (16, 20, 5),
        (21, 23, 3),
    ]


def test_missing_and_failed_rows_are_listed_apart_and_in_order(out):
    commit(out, [Failed(row, "PictureNotFound", f"no picture {row}") for row in (20, 2)])
    commit(out, [record(row) for row in range(ROWS) if row not in (2, 3, 19, 20, 21)])
    assert merge(out, "--part-size", PART_SIZE).returncode == 3
    header = "question_id,image_id,question,answer"
    given = {row: f"q{row},image{row // 3}.jpg,question {row},truth {row}" for row in range(ROWS)}
    assert (out / "missing.csv").read_text().splitlines() == [header, given[3], given[19], given[21]]
    failed = [f"{given[row]},PictureNotFound,no picture {row}" for row in (2, 20)]
    assert (out / "failed.csv").read_text().splitlines() == [f"{header},error,message", *failed]


def test_copies_are_counted_and_one_of_them_is_taken(out):
    commit(out, [record(row) for row in range(ROWS)])
    commit(out, [record(row) for row in range(5, 12)], rank=1)
    assert merge(out).returncode == 0
    assert_right(out, set(range(ROWS)))
    assert coverage(out)["duplicates"] == 7


def test_a_row_that_failed_and_was_extracted_later_has_not_failed(out):
    commit(out, [record(row) for row in range(ROWS) if row != 8] + [Failed(8, "PictureNotFound", "it was not there")])
    assert merge(out, "--part-size", PART_SIZE).returncode == 4
    assert_right(out, set(range(ROWS)) - {8})
    assert "it was not there" in (out / "failed.csv").read_text()
    before = contents(out)
    commit(out, [record(8)])
    assert merge(out, "--part-size", PART_SIZE).returncode == 0
    assert_right(out, set(range(ROWS)))
    changed = {name for name, data in before.items() if contents(out)[name] != data}
    assert changed == {PART.format(2), "coverage.json", "failed.csv", "report.html"}


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "checksum lost"])
def test_a_damaged_segment_is_set_aside_and_its_rows_are_missing_again(out, damage):
    commit(out, [record(row) for row in range(ROWS)])
    victim = sorted(out.glob("shards/*/*.h5"))[1]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "checksum lost":
        victim.with_name(victim.name + ".sha256").unlink()
    else:
        victim.write_bytes({"flip": bytes(data), "truncate": bytes(data[:-1]), "empty": b""}[damage])
    merged = merge(out)
    assert merged.returncode == 3, merged.stderr
    found = coverage(out)
    assert (found["extracted"], found["missing"]) == (ROWS - 4, 4)
    assert [entry["path"] for entry in found["corrupt_segments"]] == [victim.relative_to(out).as_posix()]
    assert not victim.exists() and victim.with_name(victim.name + ".damaged").exists()
    commit(out, [record(row) for row in range(4, 8)])
    assert merge(out).returncode == 0
    assert_right(out, set(range(ROWS)))


def test_temporary_files_are_never_read(out):
    commit(out, [record(row) for row in range(ROWS - 1)])
    whole = next(iter(out.glob("shards/*/*.h5")))
    shutil.copy(whole, whole.with_name("00099-abcdef.h5.0123abcd.tmp"))
    shutil.copy(whole, out / (PART.format(1) + ".0123abcd.tmp"))
    assert merge(out).returncode == 3
    assert coverage(out)["extracted"] == ROWS - 1
    assert coverage(out)["duplicates"] == 0


def test_a_segment_of_another_run_is_not_used(out):
    commit(out, [record(row) for row in range(ROWS)])
    victim = sorted(out.glob("shards/*/*.h5"))[0]
    with h5py.File(victim, "r+") as file:
        file.attrs["run"] = "of another model"
    victim.with_name(victim.name + ".sha256").write_text(f"{sha256(victim)}  {victim.name}\n")
    assert merge(out).returncode == 3
    assert "another run" in coverage(out)["corrupt_segments"][0]["reason"]
    assert victim.exists(), "it is whole, so it stays"


def test_check_says_the_same_and_writes_nothing(out):
    commit(out, [record(row) for row in range(9)])
    before = contents(out)
    looked = merge(out, "--check")
    assert looked.returncode == 3
    assert f"rows: {ROWS}; extracted: 9; failed: 0; missing: 14" in looked.stdout
    assert contents(out) == before


def everything(out: Path) -> dict[Path, tuple[int, bytes]]:
    """All files and folders, each with its time and content."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in [out, *out.rglob("*")]
    }


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("segment", "part", "failed", "status", "to_write"),
    [
        (0, 5, [], 0, 1),  # what the one held, the other still holds
        (1, 2, [], 3, 0),
        (5, None, [12, 22], 4, 0),
    ],
)
def test_a_check_that_verifies_finds_what_a_merge_would_and_touches_nothing(
    out, monkeypatch, segment, part, failed, status, to_write
):
    monkeypatch.setattr(merging, "write_report", lambda *_: None)  # which takes longest
    commit(out, [record(row) for row in range(ROWS) if row not in failed])
    commit(out, [Failed(row, "PictureNotFound", "it was not there") for row in failed])
    asked = ["--output-dir", str(out), "--part-size", str(PART_SIZE), "--verify"]
    merging.merge(parse_merge(None, asked))
    paths = [*sorted(out.glob("shards/launch0-r0/*.h5")), *sorted(out.glob("*.h5"))]
    damaged = [paths[segment]] if segment is not None else []
    damaged += [out / PART.format(part)] if part else []
    for path in damaged:
        flip(path)
    before = everything(out)
    checked = merging.check(parse_merge(None, [*asked, "--check"]))
    assert everything(out) == before
    merged = merging.merge(parse_merge(None, asked))
    assert checked.status == merged.status == status
    assert checked.corrupt == merged.corrupt and [found.path for found in merged.corrupt] == damaged
    for flags in ("extracted", "failed", "missing"):
        assert np.array_equal(getattr(checked.coverage, flags), getattr(merged.coverage, flags))
    assert merged.written == to_write
    assert checked.shards[-1].endswith(f" parts were hashed; a merge would write {to_write} parts")


def test_a_check_that_verifies_is_the_same_by_several_processes(out):
    commit(out, [record(row) for row in range(ROWS)])
    asked = ["--output-dir", str(out), "--part-size", str(PART_SIZE)]
    merging.merge(parse_merge(None, [*asked, "--prune"]))
    flip(out / PART.format(2))
    before = everything(out)
    quick, alone = (parse_merge(None, [*asked[:2], "--check"]), parse_merge(None, [*asked, "--check", "--verify"]))
    assert merging.check(quick).status == 0, "a look that is quick sees no flipped bit"
    several = merge(out, *asked[2:], "--check", "--verify", "--jobs", 2)
    assert several.returncode == merging.check(alone).status == 3
    assert several.stdout.splitlines() == list(merging.check(alone).sentences(alone))
    assert several.stdout.splitlines()[:2] == [
        f"not used: {out / PART.format(2)}: its SHA-256 is not the one that coverage.json recorded",
        "0 segments and 5 parts were hashed; a merge would write 0 parts",
    ]
    with pytest.raises(InputError, match="made with --part-size 5, found --part-size 1000 now"):
        merging.check(parse_merge(None, [*asked[:2], "--check", "--verify"]))
    assert everything(out) == before


@pytest.mark.parametrize("given", [["--check", "--prune"], ["--prune", "--verify", "--check"]])
def test_a_check_that_is_asked_to_prune_is_refused(given, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_merge(None, given)
    assert ended.value.code == 2
    assert "--prune would have no effect, as --check changes nothing" in capsys.readouterr().err


def test_pruning_removes_only_what_verified_parts_hold(out):
    commit(out, [record(row) for row in range(10)], interval=5)
    commit(out, [Failed(10, "PictureUnreadable", "torn"), *[record(row) for row in range(11, ROWS)]], interval=13)
    assert merge(out, "--part-size", PART_SIZE).returncode == 4
    before = contents(out)
    assert merge(out, "--part-size", PART_SIZE, "--prune").returncode == 4
    gone = {name for name in before if name not in contents(out)}
    assert len(gone) == 4 and all("launch0" in name for name in gone)  # two segments with their checksums
    assert merge(out, "--part-size", PART_SIZE).returncode == 4
    assert_right(out, set(range(ROWS)) - {10})
    # The part of a row that is extracted at last is written again, from what it held and the new segment.
    commit(out, [record(10)])
    assert merge(out, "--part-size", PART_SIZE, "--prune").returncode == 0
    assert not list(out.glob("shards/*/*.h5"))
    assert_right(out, set(range(ROWS)))
    assert merge(out, "--part-size", PART_SIZE, "--verify").returncode == 0


def test_a_damaged_part_is_found_and_made_anew(out):
    commit(out, [record(row) for row in range(ROWS)])
    assert merge(out, "--part-size", PART_SIZE).returncode == 0
    before = contents(out)
    part = out / PART.format(2)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 4
    part.write_bytes(data)
    assert merge(out, "--part-size", PART_SIZE, "--verify").returncode == 0
    assert contents(out)[part.name] == before[part.name]
    data = bytearray(before[part.name])
    data[data.index(read_run(out).key.encode())] ^= 1  # what says that the part is this run's
    for damaged in (bytes(data), b""):
        part.write_bytes(damaged)
        assert merge(out, "--part-size", PART_SIZE).returncode == 0
        assert contents(out)[part.name] == before[part.name]


def test_a_damaged_part_without_segments_is_set_aside_and_its_rows_are_missing_again(out):
    commit(out, [record(row) for row in range(ROWS)])
    assert merge(out, "--part-size", PART_SIZE, "--prune").returncode == 0
    part = out / PART.format(2)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 4
    part.write_bytes(data)
    for _ in range(2):  # and they stay missing
        merged = merge(out, "--part-size", PART_SIZE, "--verify")
        assert merged.returncode == 3, merged.stdout
        assert (coverage(out)["extracted"], coverage(out)["missing"]) == (ROWS - 5, 5)
    assert part.with_name(part.name + ".damaged").read_bytes() == data
    run = read_run(out)
    assert scan(out, run, read_run_rows(out, run)).coverage().missing.sum() == 5, "the extraction would not do them"
    commit(out, [record(row) for row in range(5, 10)])
    assert merge(out, "--part-size", PART_SIZE, "--verify").returncode == 0
    assert_right(out, set(range(ROWS)))


def test_no_damage_is_taken_over_from_a_part_into_the_one_that_replaces_it(out):
    """The rows that no segment holds any more come from the old part, whose hash is looked at first."""
    commit(out, [record(row) for row in range(ROWS) if row != 7] + [Failed(7, "PictureNotFound", "it was not there")])
    assert merge(out, "--part-size", PART_SIZE, "--prune").returncode == 4
    commit(out, [record(7)])
    part = out / PART.format(2)
    data = part.read_bytes()
    with h5py.File(part, "r+") as file:
        file["q6/vision_only_representation"][0] = 99
    assert merge(out, "--part-size", PART_SIZE).returncode == 3
    assert part.with_name(part.name + ".damaged").exists()
    assert_right(out, set(range(ROWS)) - {5, 6, 7, 8, 9})
    part.with_name(part.name + ".damaged").unlink()
    part.write_bytes(data)  # a good copy of the part, say
    assert merge(out, "--part-size", PART_SIZE).returncode == 0
    assert_right(out, set(range(ROWS)))


def test_a_merge_killed_after_it_replaced_a_part_leaves_no_stale_hash(out, monkeypatch):
    commit(out, [record(row) for row in range(ROWS) if row != 8])
    commit(out, [Failed(8, "PictureNotFound", "it was not there")])
    assert merge(out, "--part-size", PART_SIZE, "--prune").returncode == 4
    commit(out, [record(8)])

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "write_record", die)
    with pytest.raises(KeyboardInterrupt):
        merging.merge(parse_merge(None, ["--output-dir", str(out), "--part-size", str(PART_SIZE)]))
    assert merge(out, "--part-size", PART_SIZE, "--verify").returncode == 0
    assert merge(out, "--part-size", PART_SIZE, "--verify").returncode == 0
    assert_right(out, set(range(ROWS)))
    assert not list(out.rglob("*.damaged"))


def test_merges_killed_before_and_after_a_new_name_leave_the_hash_of_what_is_there(out, monkeypatch):
    """The part of the one is on the disk while the other has told of its successor: no row of it is in a segment."""
    commit(out, [record(row) for row in range(ROWS) if row not in (7, 8)])
    commit(out, [Failed(row, "PictureNotFound", "it was not there") for row in (7, 8)])
    assert merge(out, "--part-size", PART_SIZE, "--prune").returncode == 4
    options = parse_merge(None, ["--output-dir", str(out), "--part-size", str(PART_SIZE), "--jobs", "1"])

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    def announce_and_die(path: Path, digest: str) -> None:
        announce(path, digest)
        die()

    for row, where, step in ((7, merging, "write_record"), (8, part_writer, "announce")):
        commit(out, [record(row)])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(where, step, announce_and_die if step == "announce" else die)
            merging.merge(options)
    assert merge(out, "--part-size", PART_SIZE).returncode == 0
    assert_right(out, set(range(ROWS)))
    assert not list(out.rglob("*.damaged")) and not list(out.glob(".*.sha256"))


def test_the_last_reason_of_a_failure_is_the_one_that_is_told(out):
    commit(out, [Failed(8, "PictureNotFound", "it was not there")])
    commit(out, [Failed(8, "PictureUnreadable", "it is torn")], rank=1)
    merge(out)
    assert "it is torn" in (out / "failed.csv").read_text()
    assert "it was not there" not in (out / "failed.csv").read_text()


def test_a_segment_without_its_checksum_is_not_committed(out):
    commit(out, [record(row) for row in range(9)], interval=9)
    next(iter(out.glob("shards/*/*.sha256"))).unlink()
    assert "extracted: 0;" in merge(out, "--check").stdout


def test_another_part_size_is_refused(out):
    commit(out, [record(row) for row in range(ROWS)])
    assert merge(out, "--part-size", PART_SIZE).returncode == 0
    before = contents(out)
    refused = merge(out, "--part-size", PART_SIZE + 1)
    assert refused.returncode == 2
    assert "--part-size 5" in refused.stderr
    assert contents(out) == before


def test_no_row_leaves_anything_in_the_next(out):
    """The rows of a part go through one group in memory."""
    answers = ["long " * 30_000, "", "\N{SNOWMAN} and more", "a", "", "longer again", *["same"] * (ROWS - 6)]
    commit(out, [replace(record(row), answer=answer) for row, answer in enumerate(answers)])
    assert merge(out).returncode == 0
    read = read_published(out)
    assert [read[f"q{row}"]["answer"] for row in range(ROWS)] == answers
    for row in range(ROWS):
        assert (read[f"q{row}"]["vision_only"] == record(row).vectors[VISION_ONLY]).all()


def test_vectors_of_another_size_are_never_written(out):
    commit(out, [record(row) for row in range(20)], interval=20)
    commit(out, [record(row) for row in range(20, ROWS)])
    segment = sorted(out.glob("shards/*/*.h5"))[-1]
    with h5py.File(segment, "r+") as file:
        del file["vision_only_representation"]
        file["vision_only_representation"] = np.zeros((3, 5), np.float32)
    segment.with_name(segment.name + ".sha256").write_text(f"{sha256(segment)}  {segment.name}\n")
    merged = merge(out)
    assert merged.returncode == 1
    assert merged.stderr.startswith(f"error: {segment} cannot be read, though its checksum holds (vision_only")
    assert "vision_only_representation has vectors of the shape (5,), expected (6,)" in merged.stderr
    assert merged.stderr.count("\n") == 1
    assert merge(out, "--layout", "columnar").returncode == 1
    assert not list(out.glob("*.h5*"))


def test_every_recorded_hash_is_that_of_the_file(out):
    commit(out, [record(row) for row in range(ROWS)])
    for jobs in (1, 2):
        assert merge(out, "--part-size", PART_SIZE, "--jobs", jobs).returncode == 0
        for entry in coverage(out)["parts"]:
            assert entry["sha256"] == sha256(out / entry["file"])
            (out / entry["file"]).unlink()


def test_vectors_are_contiguous_and_texts_variable_length(out):
    commit(out, [record(row) for row in range(ROWS)])
    assert merge(out).returncode == 0
    with h5py.File(out / PART.format(1)) as file:
        for group in (file["q0"], file["q22"]):
            datasets: list[h5py.Dataset] = []
            group.visititems(lambda _, found, into=datasets: into.append(found) if hasattr(found, "dtype") else None)
            assert len(datasets) == 4 + 1 + 2 * len(LAYERS)
            assert {dataset.id.get_create_plist().get_layout() for dataset in datasets} == {h5py.h5d.CONTIGUOUS}
            for dataset in datasets:
                text = h5py.check_string_dtype(dataset.dtype)
                assert dataset.dtype == "<f4" if text is None else (text.encoding, text.length) == ("utf-8", None)


def test_gzip_is_as_published_and_reads_the_same(out):
    commit(out, [record(row) for row in range(ROWS)])
    assert merge(out, "--compression", "gzip").returncode == 0
    assert_right(out, set(range(ROWS)))
    with h5py.File(out / PART.format(1)) as file:
        for name in ("vision_only_representation", "vision_token_representation/layer_2"):
            assert file["q0"][name].compression == file["q22"][name].compression == "gzip"
            assert file["q22"][name].id.get_storage_size() != file["q22"][name].nbytes
    before = contents(out)
    for path in [*out.glob("*.h5"), out / "coverage.json"]:
        path.unlink()
    assert merge(out, "--compression", "gzip", "--jobs", 2).returncode == 0
    assert contents(out) == before


@pytest.mark.parametrize("layout", ["columnar", "grouped"])
def test_a_part_that_another_merge_replaces_meanwhile_gives_every_row_its_own_values(out, monkeypatch, layout):
    """Its rows lie elsewhere in the new part than where they were found."""
    options = ["--output-dir", str(out), "--layout", layout]
    commit(out, [record(row) for row in range(1, ROWS - 1)], ROWS)
    commit(out, [Failed(row, "PictureNotFound", "gone") for row in (0, ROWS - 1)])
    assert merging.merge(parse_merge(None, [*options, "--prune"])).status == 4
    assert len(list(out.glob("shards/*/*.h5"))) == 1, "otherwise nothing is read of the part"
    commit(out, [record(0)])
    write_parts = merging._write_parts

    def after_another(*given):
        monkeypatch.undo()
        assert merging.merge(parse_merge(None, options)).status == 4
        return write_parts(*given)

    monkeypatch.setattr(merging, "_write_parts", after_another)
    assert merging.merge(parse_merge(None, options)).status == 4
    e = open_embeddings(out)
    for row in range(ROWS - 1):
        assert np.array_equal(e[f"q{row}"]["vision_only"], record(row).vectors[VISION_ONLY]), row
        assert e[f"q{row}"]["answer"] == record(row).answer
