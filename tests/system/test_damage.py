"""Full disks, flipped bits, bad pictures, kills inside a commit: nothing committed is lost, nothing stored is false."""

from __future__ import annotations

import csv
import fcntl
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.helpers.launching import ROOT, arguments_for, command, merge, run
from tests.helpers.odd_pictures import bad, lay
from tests.helpers.output_folders import PART_SIZE, ROWS, assert_right, begin_run, commit, coverage, record
from tests.helpers.published_reader import read_published
from tests.helpers.tables import table_rows, write_table
from tests.system.test_failures import read_csv
from tests.system.test_rows import assert_equal_to_reference
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.base.files import sha256
from vqa_embeddings.base.process_pool import in_this_process
from vqa_embeddings.data.csv_reader import FIELD_CHARACTERS
from vqa_embeddings.data.table import Table
from vqa_embeddings.records import Failed
from vqa_embeddings.store.hash_ledger import possible_hashes
from vqa_embeddings.store.run import read_run
from vqa_embeddings.store.segments import find_damage, read_failures, read_segments, write_segment

FLIPS, KILLS, DISKS = 1000, 200, 20


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return begin_run(tmp_path)


def damages(data: bytes, chance: random.Random) -> bytes:
    """The data with one bit flipped."""
    place, bit = chance.randrange(len(data)), chance.randrange(8)
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def test_every_flipped_bit_and_every_lost_or_added_byte_is_found(out):
    commit(out, [record(row) for row in range(ROWS)])
    assert merge(out, "--part-size", PART_SIZE).returncode == 0
    known = possible_hashes(out)
    files = [*out.glob("shards/*/*.h5"), *(out / name for name in known)]
    assert len(files) == 6 + 5
    chance = random.Random(6)

    def found(path: Path) -> bool:
        return sha256(path) not in known[path.name] if path.name in known else find_damage(path) is not None

    assert not any(map(found, files))
    for number in range(FLIPS):
        path = files[number % len(files)]
        data = path.read_bytes()
        path.write_bytes(damages(data, chance))
        assert found(path), f"a flipped bit in {path.name}"
        path.write_bytes(data)
    for path in files:
        data = path.read_bytes()
        for damaged in (data[: chance.randrange(len(data))], data + b"\0", b""):
            path.write_bytes(damaged)
            assert found(path)
        path.write_bytes(data)


FUZZ = """
import os, random, signal, sys
from pathlib import Path
from vqa_embeddings.store.parts import _read_part
from vqa_embeddings.store.run import read_run, read_run_rows
from vqa_embeddings.store.segments import _read_index

out, path = Path(sys.argv[1]), Path(sys.argv[1]) / "damaged"
run = read_run(out)
table = read_run_rows(out, run)
chance = random.Random(10)
segment, part = min(out.glob("shards/*/*.h5")).read_bytes(), min(out.glob("*.h5")).read_bytes()
read_part = lambda: _read_part(path, "grouped", 1, run, table, True)
for data, read in ((segment, lambda: _read_index(path, run)), (part, read_part)):
    for number in range(200):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 1, 8])):
            damaged[chance.randrange(len(data) // 4)] ^= 1 << chance.randrange(8)  # where the structure lies
        path.write_bytes(damaged)
        if not os.fork():
            signal.alarm(10)
            try:
                read()
            except (OSError, KeyError, ValueError, RuntimeError):
                pass
            os._exit(0)
        status = os.wait()[1]
        assert status == 0, f"number {number} of {len(data)} bytes: {status}"
"""


def test_no_damage_ends_a_reader_or_keeps_it_busy(out):
    """Files are opened before they are hashed where a run goes on, and where somebody looks how far it is."""
    commit(out, [record(row) for row in range(ROWS)])
    assert merge(out, "--part-size", PART_SIZE).returncode == 0
    done = run([sys.executable, "-c", FUZZ, str(out)], PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    for path in out.rglob("*.h5"):
        with h5py.File(path) as file:
            kind = file.attrs.get_id("run").dtype.kind
            assert kind == "S", "a text of variable length has no checksum, and damage there can keep HDF5 busy"


def test_damage_costs_extracting_its_rows_again_and_nothing_else(out):
    """A flipped bit in every second file, by the programs themselves: set aside, missing, and right the next time."""
    records = [record(row) for row in range(ROWS)]
    commit(out, records)
    assert merge(out, "--part-size", PART_SIZE).returncode == 0
    chance = random.Random(7)
    for path in [*sorted(out.glob("shards/*/*.h5"))[::2], *sorted(out.glob("*.h5"))[::2]]:
        path.write_bytes(damages(path.read_bytes(), chance))
    status = merge(out, "--part-size", PART_SIZE, "--verify").returncode
    assert status == 3
    missing = [int(row["question_id"][1:]) for row in read_csv(out / "missing.csv")]
    assert 0 < len(missing) < ROWS
    assert_right(out, {row for row in range(ROWS) if row in rows_in_parts(out)})
    commit(out, [records[row] for row in missing])
    assert merge(out, "--part-size", PART_SIZE, "--verify").returncode == 0
    assert_right(out, set(range(ROWS)))


def rows_in_parts(out: Path) -> set[int]:
    return {int(identity[1:]) for identity in read_published(out)}


def test_files_are_read_without_locks(out):
    """Which some network file systems do not have. Here somebody else holds them all."""
    commit(out, [record(row) for row in range(ROWS)])
    assert merge(out, "--part-size", PART_SIZE).returncode == 0
    (out / "coverage.json").unlink()
    with ExitStack() as held:
        for path in out.rglob("*.h5"):
            fcntl.flock(held.enter_context(open(path, "rb")), fcntl.LOCK_EX)
        assert merge(out, "--part-size", PART_SIZE).returncode == 0
        assert "missing: 0" in merge(out, "--check").stdout


# Commits segment after segment, and says after each which rows are safe. The n-th step on the disk kills it: before
# something is synced, renamed, linked, removed or a folder made, or in the middle of writing a checksum or a segment.
STORM = """
import os, random, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
from tests.helpers.output_folders import ROWS, record
from vqa_embeddings.store.run import read_run, read_run_rows
from vqa_embeddings.store.segments import ShardWriter

out, kills = Path({out!r}), {kills}
run = read_run(out)
table = read_run_rows(out, run)
records = [record(row) for row in range(ROWS)]

def commit_until(step, said):
    left, chance = step, random.Random(os.getpid())

    def strike():
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sync, write, write_piece, pieces = os.fsync, Path.write_bytes, os.pwrite, 0

    def write_half(path, data):
        with open(path, "wb") as stream:
            stream.write(data[: len(data) // 2])
        strike()
        return write(path, data)

    def write_some(*piece):
        nonlocal pieces
        pieces += 1
        if pieces % 16 == 0:  # a segment has some dozens
            strike()
        return write_piece(*piece)

    os.pwrite = write_some
    os.fsync = lambda descriptor: (strike(), sync(descriptor))
    Path.write_bytes = write_half
    sys.addaudithook(lambda event, _: strike() if event in ("os.rename", "os.remove", "os.mkdir", "os.link") else None)
    with ShardWriter(out, f"storm{{step}}-{{os.getpid()}}", 0, run, table, ROWS) as shard:
        while True:
            some = chance.sample(records, 3)
            shard.add(some)
            shard.commit()
            os.write(said, "".join(f"{{one.row}} " for one in some).encode())

STEPS = 25  # a commit has about ten
for number in range(kills):
    ear, mouth = os.pipe()
    child = os.fork()
    if not child:
        os.close(ear)
        commit_until(1 + number % STEPS, mouth)
    os.close(mouth)
    safe = b""
    while more := os.read(ear, 4096):
        safe += more
    os.close(ear)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    print(f"storm{{1 + number % STEPS}}-{{child}}", safe.decode(), flush=True)
"""


def test_kills_amid_a_commit_tear_no_file_and_lose_no_committed_row(out):
    script = STORM.format(tests=str(ROOT / "tests"), root=str(ROOT), out=str(out), kills=KILLS)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == KILLS
    segments, corrupt = read_segments(out, read_run(out), verify=in_this_process)
    assert corrupt == [], "a file is torn"
    held: dict[str, list[int]] = {}
    for segment in segments:
        held.setdefault(segment.path.parent.name, []).extend(segment.rows.tolist())
    committed = 0
    for line in lines:
        launch, *safe = line.split()
        found = held.get(f"{launch}-r0", [])
        committed += len(safe)
        assert not Counter(map(int, safe)) - Counter(found), "a row that was committed is lost"
        assert len(found) in (len(safe), len(safe) + 3), "more than the segment in hand came to the disk"
    assert committed > KILLS, "too few rows to lose"
    assert merge(out, "--part-size", PART_SIZE).returncode == 0
    assert_right(out, set(range(ROWS)))
    assert coverage(out)["duplicates"] > 0


STAGED = """
import os, signal, sys, time
if ".decode_worker" in " ".join(sys.orig_argv):  # stage what no file does to every version of a decoder
    from PIL import Image
    whole = Image.open

    def open(stream, *arguments, **settings):
        if stream.getvalue().endswith(b"crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if stream.getvalue().endswith(b"hang"):
            time.sleep(600)
        return whole(stream, *arguments, **settings)

    Image.open = open
else:
    import vqa_embeddings.data.decode_pool
    vqa_embeddings.data.decode_pool.OPEN_SECONDS = 5
"""


def test_one_good_row_among_fifty_bad_ones_comes_out_right(tmp_path, checkpoint, expected):
    images, staged = tmp_path / "images", tmp_path / "staged"
    images.mkdir()
    staged.mkdir()
    (staged / "sitecustomize.py").write_text(STAGED)
    worst = bad()
    for name, (content, _) in worst.items():
        lay(images, name, content)
    shutil.copy(DATA / "cat.jpg", images)
    shutil.copy(DATA / "cat.jpg", tmp_path / "secret.jpg")
    good = next(row for row in table_rows() if row["image_id"] == "cat.jpg")
    rows = [{**good, "question_id": f"bad {number}", "image_id": name} for number, name in enumerate(worst)]
    rows.insert(20, good)
    long = {**good, "question_id": "long", "question": "Is there a cat? " * 65_536}
    out = tmp_path / "out"
    inputs = arguments_for(write_table(tmp_path / "vqa.csv", [*rows, long]), checkpoint, images)
    done = run(command(0, *inputs, "--output-dir", out), PYTHONPATH=f"{staged}:{ROOT}")
    assert done.returncode == 0, done.stderr
    assert len(worst) >= 50
    assert f"1 rows extracted, {len(worst) + 1} failed, 0 left" in done.stdout
    assert merge(out).returncode == 4
    extracted = read_published(out)
    assert extracted.keys() == {good["question_id"]}
    assert_equal_to_reference(extracted, expected)
    csv.field_size_limit(FIELD_CHARACTERS)  # the long question lies in one field
    failed = read_csv(out / "failed.csv")
    assert {row["image_id"]: row["error"] for row in failed[:-1]} == {name: error for name, (_, error) in worst.items()}
    assert failed[-1]["error"] == "PromptTooLong"
    messages = {row["image_id"]: row["message"] for row in failed}
    assert "ends the process that opens it (SIGSEGV)" in messages["crash.jpg"]
    assert "has not been opened within 5 s" in messages["hang.jpg"]
    assert all(len(message.split()) > 4 for message in messages.values())
    assert json.loads((out / "coverage.json").read_text())["missing"] == 0
    assert not list(tmp_path.rglob("*ran_code*"))


def links_away(file: h5py.File, name: str, secret: Path) -> None:
    file[name] = h5py.ExternalLink(str(secret), "values")


def links_within(file: h5py.File, name: str, secret: Path) -> None:
    file[f"{name}_elsewhere"] = h5py.ExternalLink(str(secret), "values")
    file[name] = h5py.SoftLink(f"/{name}_elsewhere")


def stores_away(file: h5py.File, name: str, secret: Path) -> None:
    file.create_dataset(name, (ROWS, 6), np.float32, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])


def shows_another_file(file: h5py.File, name: str, secret: Path) -> None:
    layout = h5py.VirtualLayout((ROWS, 6), np.float32)
    layout[:] = h5py.VirtualSource(str(secret), "values", (ROWS, 6))
    file.create_virtual_dataset(name, layout)


@pytest.mark.parametrize("lead", [links_away, links_within, stores_away, shows_another_file])
@pytest.mark.parametrize("victim", ["segment", "part"])
def test_nothing_in_a_segment_or_a_part_makes_the_merge_read_another_file(out, lead, victim):
    """Also where a checksum was made for it: those who share OUT need not be able to read the same files."""
    secret = out.parent / "secret"
    with h5py.File(secret, "w") as file:
        file["values"] = np.full((ROWS, 6), 12345, np.float32)
    commit(out, [record(row) for row in range(ROWS)], interval=ROWS)
    if victim == "segment":
        (path,) = out.glob("shards/*/*.h5")
        name = "vision_only_representation"
    else:
        assert merge(out).returncode == 0
        (path,) = out.glob("*.h5")
        name = "q3/vision_only_representation"
    with h5py.File(path, "r+") as file:
        del file[name]
        lead(file, name, secret)
        assert np.all(file[name][:] == 12345) or lead is stores_away
    if victim == "segment":
        path.with_name(path.name + ".sha256").write_text(f"{sha256(path)}  {path.name}\n")
    else:  # which is replaced, as one of its rows has come since
        shutil.rmtree(next(out.glob("shards/*/")))
        with h5py.File(path, "r+") as file:
            del file["q0"]
        told = coverage(out)
        told["parts"][0]["sha256"] = sha256(path)
        (out / "coverage.json").write_text(json.dumps(told))
        commit(out, [record(0)])
    merged = merge(out)
    assert merged.returncode == 1
    assert merged.stderr.startswith(f"error: {path} cannot be read, though its checksum holds ("), merged.stderr
    assert "another file" in merged.stderr or "a link to another place" in merged.stderr
    assert merged.stderr.count("\n") == 1
    if victim == "segment":
        assert not list(out.glob("*.h5"))


def row_is_a_group(file: h5py.File) -> None:
    del file["row"]
    file.create_group("row")


def row_is_text(file: h5py.File) -> None:
    del file["row"]
    file["row"] = np.array([b"1", b"2"])


def row_is_endless(file: h5py.File) -> None:
    del file["row"]
    file.create_dataset("row", (1 << 45,), np.int64, chunks=(1024,))


def failed_is_a_dataset(file: h5py.File) -> None:
    del file["failed"]
    file["failed"] = np.zeros(3)


@pytest.mark.parametrize("forge", [row_is_a_group, row_is_text, row_is_endless, failed_is_a_dataset])
def test_a_segment_that_is_none_is_not_used_and_stops_nothing(out, forge):
    commit(out, [record(row) for row in range(ROWS)], interval=20)
    path = max(out.glob("shards/*/*.h5"))
    with h5py.File(path, "r+") as file:
        forge(file)
    path.with_name(path.name + ".sha256").write_text(f"{sha256(path)}  {path.name}\n")
    merged = merge(out, "--part-size", PART_SIZE)
    assert merged.returncode == 3 and "Traceback" not in merged.stderr, merged.stderr
    assert f"not used: {path}: " in merged.stdout


def test_one_very_long_name_costs_the_others_no_room(out):
    run = read_run(out)
    table = Table(["a", "b" * 100_000], ["c.jpg", "d" * 20_000_000], ["", ""], ["", ""])
    records = [record(0), Failed(1, "PictureNotFound", "e" * 20_000_000)] * 400
    path = next(out.glob("shards")) / "launch0-r0" / "00001-abcdef.h5"
    path.parent.mkdir()
    write_segment(path, records, run, table)
    assert path.stat().st_size < 20 << 20
    assert read_failures(path)[0].message == "e" * 4096
