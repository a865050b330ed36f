"""Ranks that a real mpirun has started: they agree, share a merge, and the death of one costs the others nothing."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest

from tests.helpers.launching import ROOT, TERMS, arguments_for, kill, merge, processes, run, segments, settings_for_runs
from tests.helpers.output_folders import PART_SIZE, ROWS, begin_run, commit, contents, record
from tests.helpers.published_reader import read_published
from tests.helpers.running import Running, all_end, assert_complete, stop_at_random_moments, until
from tests.system.test_rows import assert_equal_to_reference
from vqa_embeddings.base.files import sha256
from vqa_embeddings.records import Failed

MERGE = (sys.executable, ROOT / "merge_shards.py", "--output-dir")
RANK = ("bash", ROOT / "launch/mpi/rank.sh")


@dataclass(frozen=True)
class Mpirun:
    """The launcher of one MPI, and what makes mpi4py load that MPI's library."""

    command: tuple[str, ...]
    settings: dict[str, str]

    def line(self, ranks: int, *command: object) -> list[str]:
        return [*self.command, "-n", str(ranks), *map(str, command)]

    def run(self, ranks: int, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return run(self.line(ranks, *command), **{**self.settings, **environment})

    def begin(self, ranks: int, *command: object) -> subprocess.Popen[str]:
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(self.line(ranks, *command), env=settings_for_runs(self.settings), **out)


def find_mpich() -> Mpirun:
    """pip's, beside this Python; mpi4py finds its library by itself."""
    return Mpirun((str(Path(sys.executable).with_name("mpiexec")),), {})


def find_open_mpi() -> Mpirun | None:
    candidates = [Path(folder) / name for folder in os.get_exec_path() for name in ("mpirun", "mpirun.openmpi")]
    for path in filter(Path.exists, candidates):
        if "Open MPI" in run([str(path), "--version"]).stdout:
            as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
            settings = {"MPI4PY_LIBMPI": "libmpi.so.40", **as_root}
            return Mpirun((str(path), "--oversubscribe", "--bind-to", "none"), settings)
    return None


@pytest.fixture(scope="module", params=["MPICH", "Open MPI"])
def mpirun(request: pytest.FixtureRequest) -> Mpirun:
    found = find_mpich() if request.param == "MPICH" else find_open_mpi()
    if found is None:
        pytest.skip("no Open MPI on the PATH; on Debian and Ubuntu: apt install openmpi-bin")
    return found


@pytest.fixture
def without(tmp_path: Path) -> Callable[..., str]:
    """Makes a PYTHONPATH with which the named modules are not to be had."""

    def hide(*names: str) -> str:
        for name in names:
            (tmp_path / "without" / name).mkdir(parents=True)
            (tmp_path / "without" / name / "__init__.py").write_text("raise ImportError('not here')")
        return str(tmp_path / "without")

    return hide


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder with every row in one of its segments."""
    folder = begin_run(tmp_path)
    for rank in range(3):
        commit(folder, [record(row) for row in range(ROWS) if row % 3 == rank], interval=2, rank=rank)
    return folder


def merged_alone(out: Path) -> dict[str, bytes]:
    """What one process makes of the same folder."""
    other = shutil.copytree(out, out.parent / "alone")
    merge(other, "--part-size", PART_SIZE)
    return contents(other)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_merge_to_the_bytes_of_one_process(out, mpirun, ranks):
    expected = merged_alone(out)
    merged = mpirun.run(ranks, *MERGE, out, "--part-size", PART_SIZE)
    assert merged.returncode == 0, merged.stderr
    assert merged.stdout.splitlines() == [
        f"rows: {ROWS}; extracted: {ROWS}; failed: 0; missing: 0",
        f"parts: 5 whole, 5 written now; {out}/coverage.json says which",
    ]
    assert contents(out) == expected


def test_ranks_list_what_is_missing_and_what_failed_as_one_process_does(tmp_path, mpirun):
    out = begin_run(tmp_path)
    commit(out, [record(row) for row in range(12)] + [Failed(20, "PictureNotFound", "it was not there")])
    expected = merged_alone(out)
    assert mpirun.run(2, *MERGE, out, "--part-size", PART_SIZE).returncode == 3
    assert contents(out) == expected


SHARE = """
import json, os, time
from collections import Counter
from pathlib import Path
from vqa_embeddings.cluster.rank_pool import gather_ranks
from vqa_embeddings.cluster.world import read_ranks

HERE = Path(__file__).parent

def begun(rank):
    return len(list(HERE.glob(f"begun-{rank}-*")))

def work(number):
    rank = os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK"))
    (HERE / f"begun-{rank}-{number}").touch()
    end = time.monotonic() + 120
    # In the first rounds none runs ahead, however slow another one is.
    while min(map(begun, "012")) < min(begun(rank), 7) and time.monotonic() < end:
        time.sleep(0.01)
    return number, rank

if __name__ == "__main__":
    with gather_ranks(read_ranks(), 1) as workers:
        if workers:
            numbers, ranks = zip(*workers(work, range(30)))
            assert numbers == tuple(range(30))
            print(json.dumps(Counter(ranks)))
"""


def test_every_rank_does_its_share_of_a_merge(tmp_path, mpirun):
    (tmp_path / "share.py").write_text(SHARE)
    done = mpirun.run(3, sys.executable, tmp_path / "share.py", PYTHONPATH=str(ROOT))
    shares = json.loads(done.stdout)
    assert shares.keys() == {"0", "1", "2"}, done.stderr
    assert min(shares.values()) >= 7, shares


def test_one_rank_merges_where_there_is_no_mpi4py_and_no_torch(out, mpirun, without):
    expected = merged_alone(out)
    merged = mpirun.run(3, *MERGE, out, "--part-size", PART_SIZE, PYTHONPATH=without("mpi4py", "torch"))
    assert merged.returncode == 0, merged.stderr
    assert merged.stdout.startswith("rank 0 works alone, without the other 2: mpi4py cannot be loaded (not here); pip")
    assert merged.stdout.count("rows: 23") == 1
    assert contents(out) == expected


def test_the_library_of_another_mpi_is_not_begun(out, mpirun):
    """MPICH's would end the whole launch under Open MPI's mpirun."""
    if find_open_mpi() is None:
        pytest.skip("no Open MPI on the PATH; on Debian and Ubuntu: apt install openmpi-bin")
    library = "libmpi.so.40" if mpirun == find_mpich() else f"{sys.prefix}/lib/libmpi.so.12"
    other = Mpirun(mpirun.command, {**mpirun.settings, "MPI4PY_LIBMPI": library})
    merged = other.run(2, *MERGE, out)
    assert merged.returncode == 0, merged.stderr
    assert "mpi4py has loaded" in merged.stdout
    assert merged.stdout.count("rows: 23") == 1


def test_a_refusal_ends_all_ranks_of_a_merge(out, mpirun):
    merge(out, "--part-size", PART_SIZE)
    before = contents(out)
    refused = mpirun.run(3, *MERGE, out, "--part-size", PART_SIZE + 1)
    assert refused.returncode == 2
    assert refused.stderr.count("error: ") == 1
    assert contents(out) == before
    refused = mpirun.run(3, *MERGE, out.parent)
    assert refused.returncode == 2
    assert refused.stderr.count("error: ") == 1


def test_an_error_in_one_rank_ends_all_ranks_of_a_merge(out, mpirun):
    segment = min(out.glob("shards/*-r0/*.h5"))  # of the first part, which another rank writes
    with h5py.File(segment, "r+") as file:
        del file["vision_only_representation"]
        file["vision_only_representation"] = np.zeros((2, 5), np.float32)
    segment.with_name(segment.name + ".sha256").write_text(f"{sha256(segment)}  {segment.name}\n")
    failed = mpirun.run(3, *MERGE, out, "--part-size", PART_SIZE)
    assert failed.returncode == 1
    assert f"error: rank 0: {segment} cannot be read, though its checksum holds (vision_only" in failed.stderr
    assert "vision_only_representation has vectors of the shape (5,), expected (6,)" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_only_one_rank_looks(out, mpirun):
    looked = mpirun.run(2, *MERGE, out, "--check")
    assert looked.returncode == 0
    assert looked.stdout.count("rows: 23") == 1


def test_ranks_share_a_check_that_verifies_and_say_what_they_do_not_heed(out, mpirun):
    merge(out, "--part-size", PART_SIZE)
    (out / "phi4_multimodal_embeddings_part_002.h5").write_bytes(b"torn")
    before = contents(out)
    checked = mpirun.run(2, *MERGE, out, "--part-size", PART_SIZE, "--check", "--verify", "--jobs", 2)
    assert checked.returncode == 0
    assert "2 ranks share the work, a process each; --jobs 2 is for one rank alone" in checked.stdout
    assert checked.stdout.count("12 segments and 4 parts were hashed; a merge would write 1 parts") == 1
    assert contents(out) == before


def shards(out: Path) -> set[str]:
    return {path.name for path in out.glob("shards/*-r*")}


def python_of(launch: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process of a rank behind its rank.sh."""
    for process in psutil.Process(launch.pid).children(recursive=True):
        environment = process.environ()
        number = environment.get("PMI_RANK", environment.get("OMPI_COMM_WORLD_RANK"))
        if number == str(rank) and str(ROOT / "extract_dist.py") in process.cmdline():
            return process
    raise AssertionError(f"rank {rank} is not there")


def test_a_rank_dies_the_others_finish_and_a_run_with_fewer_ranks_shares_the_rest(
    tmp_path, mpirun, photographs, expected
):
    arguments = [*photographs, "--output-dir", tmp_path]
    launch = mpirun.begin(3, *RANK, *arguments)
    said = ""
    while "this launch: 31 rows to do now, 3 ranks" not in said:
        said += (line := launch.stdout.readline())
        assert line, said
    python_of(launch, 1).kill()
    said += launch.communicate(timeout=300)[0]
    assert launch.returncode == 0, said
    assert said.count(" rows extracted, 0 failed, 0 left") == 2, said
    assert "rank 1 ended with status 137" in said
    first = shards(tmp_path)
    assert {name[-3:] for name in first} == {"-r0", "-r2"}

    # Two pictures are left. Ranks that had not agreed would share all five, and one of them would have both.
    done = mpirun.run(2, sys.executable, ROOT / "extract_dist.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert {name[-3:] for name in shards(tmp_path) - first} == {"-r0", "-r1"}
    assert merge(tmp_path).returncode == 0
    rows = read_published(tmp_path)
    assert rows.keys() == expected.keys()
    assert_equal_to_reference(rows, expected)
    assert json.loads((tmp_path / "coverage.json").read_text())["duplicates"] == 0


def test_ranks_extract_without_mpi4py(tmp_path, mpirun, photographs, without):
    arguments = [*photographs, "--output-dir", tmp_path / "out", "--max-new-tokens", 1]
    done = mpirun.run(3, sys.executable, ROOT / "extract_dist.py", *arguments, PYTHONPATH=without("mpi4py"))
    assert done.returncode == 0, done.stderr
    assert "a run that goes on is shared less evenly without MPI: mpi4py cannot be loaded" in done.stderr
    assert {name[-3:] for name in shards(tmp_path / "out")} == {"-r0", "-r1", "-r2"}
    merged = merge(tmp_path / "out")
    assert "rows: 31; extracted: 31; failed: 0; missing: 0" in merged.stdout


def test_ranks_stop_after_a_commit_when_mpirun_is_asked_to(tmp_path, mpirun, many_rows, checkpoint):
    arguments = arguments_for(many_rows, checkpoint)
    arguments += ["--output-dir", tmp_path / "out", "--batch-size", 1, "--checkpoint-interval", 2]
    launch = mpirun.begin(2, *RANK, *arguments)
    until(lambda: len({path.parent for path in segments(tmp_path / "out")}) == 2, launch)
    launch.send_signal(signal.SIGUSR1)
    said = launch.communicate(timeout=60)[0]
    assert launch.returncode == 0, said
    assert said.count("stopped by SIGUSR1 after a commit") == 2, said


def test_the_launch_files_extract_and_merge(tmp_path, mpirun, photographs):
    chosen = {**mpirun.settings, "MPIRUN": mpirun.command[0], "NPROC": "2"}
    folder = ["--output-dir", tmp_path]
    arguments = [*photographs, "--max-new-tokens", 1, *folder]
    extracted = run(["bash", str(ROOT / "launch/mpi/extract.sh"), *map(str, arguments)], **chosen)
    assert extracted.returncode == 0, extracted.stderr
    assert {name[-3:] for name in shards(tmp_path)} == {"-r0", "-r1"}
    merged = run(["bash", str(ROOT / "launch/mpi/merge.sh"), *map(str, folder)], **chosen)
    assert merged.returncode == 0, merged.stderr
    assert merged.stdout.count("rows: 31; extracted: 31; failed: 0; missing: 0") == 1


def test_term_to_the_launch_file_at_random_moments_loses_nothing_that_was_finished(
    tmp_path, mpirun, many_rows, checkpoint, expected
):
    out = tmp_path / "out"
    arguments = [*arguments_for(many_rows, checkpoint), "--batch-size", 1, "--output-dir", out]
    line = ["bash", str(ROOT / "launch/mpi/extract.sh"), *map(str, arguments)]
    chosen = {**mpirun.settings, "MPIRUN": mpirun.command[0], "NPROC": "2"}
    stop_at_random_moments((Running(line, out, tmp_path / f"log{n}", **chosen) for n in range(TERMS)), random.Random(7))
    line += ["--batch-size", "16"]  # the last run is to end soon
    done = run(line, **chosen)
    assert done.returncode == 0, done.stderr
    assert_complete(out, expected)


WAITING = """
import sys, time
from vqa_embeddings.cluster.world import read_ranks, read_world
if read_ranks().main:
    time.sleep(600)
read_world()
"""


LATE = """
import sys, time
from pathlib import Path
from vqa_embeddings.cluster.rank_pool import gather_ranks
from vqa_embeddings.cluster.world import read_ranks, read_world

deadline = time.monotonic() + 120  # after which nobody has heard it
while read_ranks().main and not (Path(__file__).parent / "come").exists() and time.monotonic() < deadline:
    time.sleep(0.01)
if sys.argv[1] == "merge":
    with gather_ranks(read_ranks(), 1):
        pass
else:
    assert read_world().launch_key
"""


@pytest.mark.parametrize("program", ["extraction", "merge"])
def test_a_rank_that_waits_for_the_others_says_so(tmp_path, mpirun, program):
    (tmp_path / "late.py").write_text(LATE)
    (tmp_path / "sitecustomize.py").write_text(
        "from vqa_embeddings.base import console\nconsole.PATIENCE_SECONDS = 0.1\n"
    )
    path = f"PYTHONPATH={tmp_path}:{ROOT}"
    launch = mpirun.begin(3, "env", path, sys.executable, tmp_path / "late.py", program)
    try:
        said = ""
        while not (line := launch.stdout.readline()).endswith("s for the other ranks of 3 to begin MPI\n"):
            said += line
            assert line, said
        assert line.startswith("rank 1: has waited ")
        (tmp_path / "come").touch()
        said = launch.communicate(timeout=60)[0]
        assert launch.returncode == 0 and "rank 2" not in said, said
    finally:
        kill(processes(launch))


def test_a_rank_that_ends_while_it_waits_for_the_others_leaves_nothing_behind(tmp_path, mpirun):
    """Its part of MPI would wait for them for good, and mpirun for it."""
    launch = mpirun.begin(2, "env", f"PYTHONPATH={ROOT}", sys.executable, "-c", WAITING)
    try:
        found: list[psutil.Process] = []

        def is_in_mpi() -> bool:
            with contextlib.suppress(psutil.Error):
                found[:] = [process for process in processes(launch) if "print_key" in " ".join(process.cmdline())]
                return any("libmpi" in file.path for process in found for file in process.memory_maps())
            return False

        until(is_in_mpi, launch)
        found[0].parent().kill()
        assert all_end(found, 60)
    finally:
        kill(processes(launch))
        launch.communicate()


def test_what_asks_mpi_for_a_key_ends_where_its_rank_is_gone_already():
    rank = subprocess.Popen(["true"])
    rank.wait()
    asking = f"from vqa_embeddings.cluster.mpi import print_key; print_key('MPICH', 0, 2, {rank.pid})"
    done = run([sys.executable, "-c", asking], PYTHONPATH=str(ROOT))
    assert done.returncode == -signal.SIGKILL


def test_a_rank_that_is_asked_to_stop_before_there_is_a_python_does_not_begin(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nkill -USR1 $PPID\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    done = run([*map(str, RANK), "--demo"], PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (done.returncode, done.stdout) == (0, "")


def test_a_rank_begins_whatever_the_environment_has_under_the_names_of_its_script():
    done = run([*map(str, RANK), "--help"], stopped="1", status="7")
    assert done.returncode == 0 and done.stdout.startswith("usage: extract_dist.py"), done.stderr


COMMIT = """
import os, signal, sys, time
from pathlib import Path

asked = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: asked.append(1))
file = Path(sys.argv[1]) / os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK"))
file.write_text("begun")
while not asked:
    time.sleep(0.05)
end = time.monotonic() + 3
while time.monotonic() < end:  # the rows in hand
    time.sleep(0.05)
file.write_text("committed")
"""


def test_ranks_have_time_for_a_commit_when_every_process_is_asked_to_stop_at_once(tmp_path, mpirun):
    (tmp_path / "commit.py").write_text(COMMIT)
    (tmp_path / "rank.sh").write_text(
        f"trap : TERM INT USR1 USR2; {sys.executable} {tmp_path}/commit.py {tmp_path}; exit 0"
    )
    supervised = [sys.executable, "-m", "vqa_embeddings.cli.supervise", *mpirun.line(2, "bash", tmp_path / "rank.sh")]
    environment = {**os.environ, **mpirun.settings, "PYTHONPATH": str(ROOT)}
    launch = subprocess.Popen([*supervised, "--", "--demo", "--output-dir", str(tmp_path / "out")], env=environment)
    files = [tmp_path / "0", tmp_path / "1"]
    until(lambda: all(map(Path.exists, files)), launch)
    for process in processes(launch):
        process.send_signal(signal.SIGTERM)
    assert launch.wait(timeout=60) == 0
    assert [file.read_text() for file in files] == ["committed", "committed"]
