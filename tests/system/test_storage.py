"""Disks that fill up, fail or go away: one sentence, nothing committed is lost, and the same command goes on."""

from __future__ import annotations

import errno
import io
import os
import random
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.launching import COPIES, ROOT, arguments_for, begin, command, merge, of_copies, run, segments
from tests.helpers.output_folders import PART_SIZE, ROWS, assert_right, begin_run, commit, coverage, record
from tests.helpers.published_reader import read_published
from tests.helpers.running import Running, until
from tests.helpers.tables import table_rows, write_table
from tests.system.test_rows import assert_equal_to_reference
from vqa_embeddings.app import merge as merge_module
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.app.merge import merge as merge_here
from vqa_embeddings.base import files as files_module
from vqa_embeddings.base.files import copy_file, publish
from vqa_embeddings.base.process_pool import in_this_process
from vqa_embeddings.cli.options import parse_merge
from vqa_embeddings.cluster.messages import fail, say
from vqa_embeddings.cluster.world import World
from vqa_embeddings.errors import StorageError
from vqa_embeddings.records import Failed
from vqa_embeddings.schema import QUERY_TOKEN
from vqa_embeddings.store import parts as parts_module
from vqa_embeddings.store.run import read_run, read_run_rows
from vqa_embeddings.store.segments import ShardWriter, read_segments

DISKS = 20


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return begin_run(tmp_path)


def test_a_full_disk_at_any_moment_leaves_what_was_committed_and_room_lets_it_go_on(tmp_path, small_disk):
    chance = random.Random(9)
    filler = small_disk(1 << 20) / "filler"
    begun = begin_run(tmp_path)
    size = 16 << 20
    out = shutil.copytree(begun, small_disk(size) / "out")
    full = 0
    for _ in range(DISKS):
        free = shutil.disk_usage(out).free
        room = chance.choice([0, 4096, chance.randrange(200_000)])
        filler.write_bytes(bytes(max(0, free - room)))
        try:
            commit(out, [record(row) for row in chance.sample(range(ROWS), 8)])
        except StorageError as failure:
            full += 1
            assert "No space left on device" in str(failure)
        filler.unlink()
        assert read_segments(out, read_run(out), verify=in_this_process)[1] == []
        assert not list(out.rglob("*.tmp"))
    assert full > DISKS // 2
    commit(out, [record(row) for row in range(ROWS)])

    filler.write_bytes(bytes(shutil.disk_usage(out).free - 8192))
    merged = merge(out, "--part-size", PART_SIZE)
    assert merged.returncode == 1
    assert merged.stderr.startswith("error: ") and merged.stderr.count("\n") == 1, merged.stderr
    assert "No space left on device" in merged.stderr
    filler.unlink()
    assert merge(out, "--part-size", PART_SIZE).returncode == 0
    assert_right(out, set(range(ROWS)))
    assert not list(out.rglob("*.tmp"))


def test_a_run_on_a_disk_that_fills_up_says_so_and_goes_on_when_there_is_room(
    tmp_path, small_disk, many_rows, checkpoint, expected
):
    out = small_disk(3 << 20) / "out"
    inputs = [*arguments_for(many_rows, checkpoint), "--checkpoint-interval", 20, "--output-dir", out]
    ended = run(command(0, *inputs))
    assert ended.returncode == 1, ended.stderr
    errors = [line for line in ended.stderr.splitlines() if "rows/s" not in line and line.strip()]
    assert len(errors) == 1 and "No space left on device" in errors[0] and "the same command continues" in errors[0]
    assert "warning: little room" in ended.stdout
    committed = int(re.findall(r"(\d+) rows extracted, 0 failed, \d+ left", ended.stdout)[0])
    assert 0 < committed < 31 * COPIES
    assert f"{committed} rows extracted, 0 failed, {31 * COPIES - committed} left" in ended.stdout
    small_disk(1 << 30)
    assert f"extracted: {committed}; failed: 0" in merge(out, "--check").stdout
    done = run(command(0, *inputs))
    assert done.returncode == 0, done.stderr
    assert f"{31 * COPIES - committed} rows to do now" in done.stdout and "warning" not in done.stdout
    assert merge(out).returncode == 0
    rows = read_published(out)
    assert_equal_to_reference(rows, of_copies(expected, rows))
    assert len(rows) == 31 * COPIES


def test_an_output_folder_that_goes_away_ends_the_run_and_is_not_made_anew(tmp_path):
    out = begin_run(tmp_path)
    commit(out, [record(0)])
    run = read_run(out)
    shard = ShardWriter(out, "late", 0, run, read_run_rows(out, run), 4)
    out.rename(tmp_path / "elsewhere")
    shard.add([record(1)])
    with pytest.raises(StorageError, match="No such file or directory"):
        shard.commit()
    assert not out.exists()


PICTURES = 120  # many more than are read ahead, so that the folder goes away while rows are left


@pytest.fixture
def many_pictures(tmp_path) -> tuple[Path, Path]:
    """A table with a picture a row, and their folder."""
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(DATA / "cat.jpg", images / "0.jpg")
    for number in range(1, PICTURES):
        os.link(images / "0.jpg", images / f"{number}.jpg")
    row = table_rows()[0]
    rows = [{**row, "question_id": f"q{number}", "image_id": f"{number}.jpg"} for number in range(PICTURES)]
    return write_table(tmp_path / "vqa.csv", rows), images


def begin_with(many_pictures: tuple[Path, Path], checkpoint: Path, out: Path) -> Running:
    table, images = many_pictures
    inputs = arguments_for(table, checkpoint, images)
    line = command(0, *inputs, "--output-dir", out, "--checkpoint-interval", 4, "--batch-size", 4)
    return Running(line, out, out.parent / "log")


def error_of(running: Running) -> str:
    """The one line that it has said beside its bar."""
    assert running.process.wait(60) == 1
    (line,) = (
        line for line in running.shown().replace("\r", "\n").splitlines() if line.strip() and "rows/s" not in line
    )
    return line


@pytest.mark.parametrize("early", [True, False])
def test_a_picture_folder_that_goes_away_ends_the_run_and_blames_no_row(tmp_path, many_pictures, checkpoint, early):
    out, (_, images) = tmp_path / "out", many_pictures
    running = begin_with(many_pictures, checkpoint, out)
    until(lambda: "to do now" in running.said() if early else segments(out), running.process)
    images.rename(tmp_path / "elsewhere")
    assert error_of(running).startswith(f"error: {images} is no longer the folder that it was")
    _, failed, left = running.reported()[0]
    assert failed == 0 and left > 0
    looked = merge(out, "--check").stdout if out.joinpath("rows.csv").exists() else "failed: 0"
    assert "failed: 0" in looked
    (tmp_path / "elsewhere").rename(images)
    again = begin_with(many_pictures, checkpoint, out)
    assert again.process.wait(300) == 0
    merged = merge(out)
    assert merged.returncode == 0, merged.stdout
    assert coverage(out)["duplicates"] == 0 and coverage(out)["extracted"] == PICTURES


def test_an_output_folder_that_goes_away_amid_a_run_ends_it(tmp_path, many_pictures, checkpoint):
    out = tmp_path / "out"
    running = begin_with(many_pictures, checkpoint, out)
    until(lambda: segments(out), running.process)
    before = running.bar()
    out.rename(tmp_path / "elsewhere")
    message = error_of(running)
    assert message.startswith(f"error: {out}/shards/") and "No such file or directory" in message
    assert not out.exists() and before < PICTURES
    (tmp_path / "elsewhere").rename(out)
    assert "failed: 0" in merge(out, "--check").stdout


LOSE_OUT = """
import os, sys

def lose(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("part_002.h5") and os.path.exists({out!r}):
        os.system("mv {out} {out}.elsewhere")

sys.addaudithook(lose)
"""


def test_an_output_folder_that_goes_away_amid_a_merge_ends_it(tmp_path, out):
    commit(out, [record(row) for row in range(ROWS)])
    staged = tmp_path / "staged"
    staged.mkdir()
    (staged / "sitecustomize.py").write_text(LOSE_OUT.format(out=str(out)))
    script = [str(ROOT / "merge_shards.py"), "--output-dir", str(out), "--part-size", str(PART_SIZE)]
    merged = run([sys.executable, *script], PYTHONPATH=str(staged))
    assert merged.returncode == 1
    assert merged.stderr.startswith("error: ") and merged.stderr.count("\n") == 1, merged.stderr
    assert "part_002.h5 cannot be written (No such file or directory)" in merged.stderr
    assert not out.exists()
    out.with_name("out.elsewhere").rename(out)
    assert merge(out, "--part-size", PART_SIZE).returncode == 0
    assert_right(out, set(range(ROWS)))


def failing(number: int, name: str):
    """What `open` is where the disk does not let files of this name be read."""

    def open_(path, *arguments, **settings):
        if str(path).endswith(name):
            raise OSError(number, os.strerror(number), str(path))
        return open(path, *arguments, **settings)

    return open_


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_a_disk_that_does_not_let_a_segment_be_read_is_no_damage(out, monkeypatch, number):
    commit(out, [record(row) for row in range(ROWS)])
    monkeypatch.setattr(files_module, "open", failing(number, ".h5"), raising=False)
    with pytest.raises(StorageError, match=r"h5 cannot be read .* the same command continues"):
        merge_here(parse_merge(None, ["--output-dir", str(out)]))
    assert not list(out.rglob("*.damaged"))
    monkeypatch.undo()
    assert merge(out).returncode == 0


def unreadable(path):
    raise OSError("Unable to synchronously open file")


@pytest.mark.parametrize("for_all", [True, False])
def test_a_disk_that_does_not_let_a_part_be_read_is_no_damage(out, monkeypatch, for_all):
    """Neither where no program can read it, nor where HDF5 alone had no luck."""
    commit(out, [record(row) for row in range(ROWS)])
    assert merge(out).returncode == 0
    monkeypatch.setattr(parts_module, "open_file", unreadable)
    if for_all:
        monkeypatch.setattr(files_module, "open", failing(errno.EIO, "part_001.h5"), raising=False)
    with pytest.raises(StorageError, match=r"h5 cannot be read"):
        merge_here(parse_merge(None, ["--output-dir", str(out)]))
    assert not list(out.rglob("*.damaged"))


def test_a_checksum_that_is_gone_or_no_text_is_damage(out):
    commit(out, [record(row) for row in range(ROWS)])
    first, second, *_ = sorted(out.glob("shards/*/*.sha256"))
    first.unlink()
    second.write_bytes(b"\xff\xfe\0")
    assert merge(out).returncode == 3
    assert {path.name for path in out.rglob("*.h5.damaged")} == {
        path.name.replace(".sha256", ".damaged") for path in (first, second)
    }


@pytest.mark.parametrize("named", ["OUT/file", None])
def test_whatever_the_system_says_is_one_sentence(capsys, named):
    assert fail(OSError(errno.EIO, os.strerror(errno.EIO), named), World()) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {named or 'a file or a pipe'} fails (Input/output error)") and said.count("\n") == 1


def test_a_source_that_cannot_be_read_is_not_called_a_target_that_cannot_be_written(tmp_path):
    with pytest.raises(StorageError, match=r"gone.csv cannot be read \(No such file"):
        publish(tmp_path / "rows.csv", lambda target: copy_file(tmp_path / "gone.csv", target))


def test_a_log_on_a_full_disk_does_not_end_a_run(tmp_path, photographs):
    out = tmp_path / "out"
    with open("/dev/full", "wb") as full:
        launch = begin(command(0, *photographs, "--output-dir", out), full, full)
        assert launch.wait(120) == 0
    assert merge(out).returncode == 0


def ended_before_it_recorded(out: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """A merge that has written its parts, and ends before it can say so."""

    def ends(*arguments):
        raise StorageError("the disk is full")

    monkeypatch.setattr(merge_module, "write_record", ends)
    with pytest.raises(StorageError):
        merge_here(parse_merge(None, ["--output-dir", str(out), *arguments]))
    monkeypatch.undo()


def flip(path: Path) -> bytes:
    """Flip a bit in a vector of the part. Returns what it was."""
    good = path.read_bytes()
    value = record(2).vectors[QUERY_TOKEN][1].tobytes()
    place = good.index(value) + 3
    path.write_bytes(good[:place] + bytes([good[place] ^ 64]) + good[place + 1 :])
    return good


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_part_is_verified_by_its_hash_also_after_a_merge_that_could_not_record_it(
    out, monkeypatch, replaced, damaged
):
    """Before, the hash of the old part was forgotten: damage then went on into the new one."""
    commit(out, [*(record(row) for row in range(ROWS - 1)), Failed(ROWS - 1, "PictureNotFound", "gone")])
    assert merge(out, "--prune").returncode == 4
    (part,) = out.glob("*.h5")
    for path in out.glob("shards/*/*.h5*"):
        path.unlink()
    commit(out, [record(ROWS - 1)])
    if replaced:
        ended_before_it_recorded(out, monkeypatch)
        assert len(list(out.glob(".*.sha256"))) == 1
    else:
        full = run_merge_on_a_full_disk(out)
        assert full.returncode == 1 and "File too large" in full.stderr, full.stderr
    if damaged:
        flip(part)
    merged = merge(out, "--verify")
    assert merged.returncode == (3 if damaged else 0), merged.stdout
    assert bool(list(out.glob("*.damaged"))) == damaged
    if not damaged:
        assert_right(out, set(range(ROWS)))
        assert not list(out.glob(".*.sha256")), "what was announced is recorded"


def run_merge_on_a_full_disk(out: Path):
    limit = (
        "import resource, runpy, signal, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); del sys.argv[0];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return run([sys.executable, "-c", limit, str(ROOT / "merge_shards.py"), "--output-dir", str(out)])


@pytest.mark.parametrize("damaged", [False, True])
def test_a_part_that_waits_keeps_its_hash(out, damaged):
    """One of its rows has come since, and another one has become missing: its rows are taken over later."""
    failed = [Failed(row, "PictureNotFound", "gone") for row in (ROWS - 2, ROWS - 1)]
    commit(out, [*(record(row) for row in range(ROWS - 2)), *failed])
    assert merge(out).returncode == 4
    (part,) = out.glob("*.h5")
    for path in out.glob("shards/*/*.h5*"):
        path.unlink()
    commit(out, [record(ROWS - 2)])
    assert merge(out).returncode == 3
    assert [entry["file"] for entry in coverage(out)["parts"]] == [part.name]
    if damaged:
        flip(part)
    assert merge(out, "--verify").returncode == 3
    assert bool(list(out.glob("*.damaged"))) == damaged
    commit(out, [record(ROWS - 1)])
    assert merge(out).returncode == (3 if damaged else 0)
    if not damaged:
        assert_right(out, set(range(ROWS)))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"parts": 3}', b'{"parts": [{}]}', b"\xff"])
def test_a_record_that_is_broken_is_refused_and_not_taken_for_none(out, content):
    commit(out, [record(row) for row in range(ROWS)])
    assert merge(out, "--prune").returncode == 0
    (out / "coverage.json").write_bytes(content)
    merged = merge(out, "--verify")
    assert merged.returncode == 2 and merged.stderr.count("\n") == 1
    assert merged.stderr.startswith(f"error: {out}/coverage.json is not what a merge has written (")
    (out / "coverage.json").unlink()
    assert merge(out, "--verify").returncode == 0


def test_a_record_that_cannot_be_read_is_not_taken_for_none(out, monkeypatch):
    commit(out, [record(row) for row in range(ROWS)])
    assert merge(out, "--prune").returncode == 0

    def read_bytes(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(StorageError, match=r"coverage.json cannot be read \(Input/output error\)"):
        merge_here(parse_merge(None, ["--output-dir", str(out), "--verify"]))


def test_an_error_that_passes_costs_a_part_that_nobody_has_recorded_nothing(out, monkeypatch):
    commit(out, [record(row) for row in range(ROWS)])
    assert merge(out, "--prune").returncode == 0
    (out / "coverage.json").unlink()
    opened, times = parts_module.open_file, []

    def open_file(path):
        times.append(path)
        return unreadable(path) if len(times) == 1 else opened(path)

    monkeypatch.setattr(parts_module, "open_file", open_file)
    outcome = merge_here(parse_merge(None, ["--output-dir", str(out)]))
    assert outcome.status == 0 and outcome.corrupt == [] and len(times) >= 2


@pytest.mark.parametrize("hidden", ["shards", "launch0-r0", "out"])
def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(out, monkeypatch, hidden):
    commit(out, [record(row) for row in range(ROWS)])
    names = os.listdir

    def listdir(path):
        if Path(path).name == hidden:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return names(path)

    monkeypatch.setattr(files_module.os, "listdir", listdir)
    with pytest.raises(StorageError, match=rf"{hidden} cannot be read \(Permission denied\)"):
        merge_here(parse_merge(None, ["--output-dir", str(out)]))


def test_the_report_reads_no_part_that_nobody_has_verified(out):
    """A bit that is flipped in a heap of texts can keep HDF5 reading for ever, or make it say something."""
    commit(out, [record(row) for row in range(ROWS)])
    assert merge(out, "--prune").returncode == 0
    (part,) = out.glob("*.h5")
    flip(part)
    (out / "report.html").unlink()
    assert merge(out).returncode == 0
    assert "question 3" not in (out / "report.html").read_text()
    assert merge(out, "--verify").returncode == 3


def test_a_sentence_is_said_in_any_encoding(capsys, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    say(World(), "12ab… \udcff é")
    stream.seek(0)
    assert stream.buffer.getvalue().decode("latin-1") == "12ab\\u2026 \\udcff é\n"
    monkeypatch.setattr(sys, "stdout", None)
    say(World(), "nobody listens")
