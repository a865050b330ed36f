"""The ranks of a launch agree at start-up, whichever launcher has begun them, and whichever of them is late or dead."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from tests.helpers.launching import ROOT, begin, kill, processes
from vqa_embeddings.base import console
from vqa_embeddings.cluster import rendezvous
from vqa_embeddings.cluster.rendezvous import _publish_plan, from_rank_zero, name_ranks, put, take
from vqa_embeddings.cluster.world import World, read_ranks
from vqa_embeddings.errors import InputError


def test_ranks_without_a_store_agree_through_a_file(tmp_path: Path):
    main, other = (World("srun", rank, 2, rank, "job-0-0") for rank in (0, 1))
    plan = bytes(range(256))
    assert from_rank_zero(main, tmp_path, lambda: plan) == plan
    assert from_rank_zero(other, tmp_path, lambda: b"not asked") == plan


def test_of_the_ranks_that_wait_for_a_file_one_says_for_whom(tmp_path: Path, monkeypatch):
    """Rank 0 has its plan when that was said."""
    said, heard = [], threading.Event()
    monkeypatch.setattr(console, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(console, "print_line", lambda sentence, stream: (said.append(sentence), heard.set()))
    ranks = [World("srun", rank, 3, rank, "job-0-0") for rank in range(3)]
    make = {True: lambda: b"plan" if heard.wait(60) else b"", False: lambda: b"not asked"}
    taken: list[bytes] = []

    def begin_rank(rank: World) -> None:
        taken.append(from_rank_zero(rank, tmp_path / "out" / "shards", make[rank.main]))

    threads = [threading.Thread(target=begin_rank, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == [b"plan"] * 3
    assert said == [f"rank 1: has waited 0 s for rank 0, which reads what {tmp_path}/out holds before any rank begins"]


MEETING = """
import sys, time
from pathlib import Path
from vqa_embeddings.base import console
from vqa_embeddings.cluster.rendezvous import from_rank_zero
from vqa_embeddings.cluster.world import read_world

console.PATIENCE_SECONDS = console.REMINDER_SECONDS = 0.1

def until(word):
    deadline = time.monotonic() + 120  # after which nobody has heard it
    while not (Path(sys.argv[1]) / word).exists() and time.monotonic() < deadline:
        time.sleep(0.01)

world = read_world()
if world.rank == 2:
    until("come")
assert from_rank_zero(world, Path("OUT/shards"), lambda: until("planned") or b"plan") == b"plan"
"""


@pytest.mark.slow
def test_ranks_of_torchrun_say_for_whom_they_wait(tmp_path: Path):
    (tmp_path / "meeting.py").write_text(MEETING)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    line = [*torchrun, str(tmp_path / "meeting.py"), str(tmp_path)]
    launch = begin(line, stderr=subprocess.PIPE, PYTHONPATH=str(ROOT))
    try:
        said = []
        for event, sentence in [
            ("planned", "s for rank 0, which reads what OUT holds before any rank begins\n"),
            ("come", "s for rank 2 to begin\n"),
        ]:
            while not said or not said[-1].endswith(sentence):
                said.append(launch.stderr.readline().decode())
                assert said[-1], said
            assert said[-1].startswith(f"rank {1 if event == 'planned' else 0}: has waited ")
            (tmp_path / event).touch()
        rest = launch.communicate(timeout=60)[1].decode()
        assert launch.returncode == 0, rest
        assert "rank 2: " not in "".join(said) + rest
    finally:
        kill(processes(launch))


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ([], "the last ranks"),
        ([3], "rank 3"),
        ([3, 5], "ranks 3, 5"),
        (range(1, 1000), "ranks 1, 2, 3, 4, 5 and 994 more"),
    ],
)
def test_many_ranks_are_named_in_a_few_words(ranks, named):
    assert name_ranks(ranks) == named


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_nobody_meets_says_so_in_a_sentence(tmp_path, monkeypatch, rank):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", **place}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rendezvous, "START_UP_SECONDS", 1)
    with pytest.raises(InputError, match=rf"^rank {rank} has not met the other ranks of 2 \(.*and begin again$"):
        from_rank_zero(read_ranks(), tmp_path, lambda: b"plan")


def test_another_rank_makes_the_plan_where_rank_0_has_died(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "STAND_IN_SECONDS", 0.3)
    main, second, third = (World("srun", rank, 3, rank, "job-0-0") for rank in range(3))
    assert from_rank_zero(second, tmp_path, lambda: b"the second's plan") == b"the second's plan"
    for late in (main, third):
        assert from_rank_zero(late, tmp_path, lambda: b"not asked") == b"the second's plan"
    assert "rank 1: nothing has come for 0.3 s from the ranks before this one; it takes" in capsys.readouterr().out


def test_of_two_plans_the_first_counts_for_all(tmp_path: Path):
    main = World("srun", 0, 2, 0, "job-0-0")

    def slow_plan() -> bytes:
        _publish_plan(tmp_path / ".launch-job-0-0" / "plan-1", lambda: b"faster")
        return b"slower"

    assert from_rank_zero(main, tmp_path, slow_plan) == b"faster"


def test_ranks_that_run_the_program_again_in_one_step_do_not_take_the_old_plan(tmp_path: Path):
    main, other = (World("srun", rank, 2, rank, "job-0-0") for rank in (0, 1))
    for plan in (b"first", b"second"):
        from_rank_zero(main, tmp_path, lambda plan=plan: plan)
    assert [from_rank_zero(other, tmp_path, lambda: b"not asked") for _ in range(2)] == [b"first", b"second"]


@pytest.mark.parametrize("error", [InputError("the folder holds another run"), OSError("no such disk")])
def test_ranks_without_a_store_learn_that_there_will_be_no_plan(tmp_path: Path, error: Exception):
    main, other = (World("srun", rank, 2, rank, "job-0-0") for rank in (0, 1))

    def fail() -> bytes:
        raise error

    with pytest.raises(type(error)):
        from_rank_zero(main, tmp_path, fail)
    with pytest.raises(InputError, match=str(error)):
        from_rank_zero(other, tmp_path, lambda: b"not asked")
    for rank in (main, other):  # which try again, in the same job step
        assert from_rank_zero(rank, tmp_path, lambda: b"the plan") == b"the plan"


def test_a_plan_of_any_size_goes_through_the_store():
    """The flags of 100 million rows may be 12.5 MB; a value above 8 MiB ends the connection."""
    store = TCPStore("127.0.0.1", 0, 1, True)
    plan = bytes(range(256)) * 50_000
    put(store, plan)
    assert take(store) == plan
