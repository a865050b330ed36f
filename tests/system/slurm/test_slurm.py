"""On a real Slurm, with the shipped launch files as they are: preempted, requeued, cut off, and every row there."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.launching import COPIES, ROOT, TERMS, arguments_for, of_copies
from tests.helpers.output_folders import PART_SIZE, ROWS, begin_run, commit, contents, record
from tests.helpers.published_reader import read_published
from tests.helpers.tables import table_rows, write_table
from tests.system.slurm.cluster import NODES, Cluster, until, why_not
from tests.system.test_rows import assert_equal_to_reference
from vqa_embeddings.store.heartbeat import read_heartbeats

LAUNCH = ROOT / "launch" / "slurm"
START_SECONDS = 600  # until something has begun on a slow machine whose two cores run six ranks

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory):
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


class User:
    """Someone on the login host, in a folder of their own, with OUT in it."""

    def __init__(self, cluster: Cluster, folder: Path, arguments: list[object]) -> None:
        self.cluster, self.folder, self.arguments = cluster, folder, [*arguments, "--output-dir", "OUT"]
        self.out = folder / "OUT"

    def sbatch(self, *options: object, ranks: int = 1, script: str = "array.sbatch", arguments: object = None) -> str:
        command = ["sbatch", "--parsable", *options, LAUNCH / script, *(arguments or self.arguments)]
        return self.run(*command, ranks=ranks, VQA_EMBEDDINGS_HOME=str(ROOT)).strip()

    def submit(self, *options: object, ranks: int | None = 1) -> tuple[str, str]:
        """`submit.sh`: the numbers of the array and of the merge."""
        said = self.run("bash", LAUNCH / "submit.sh", *options, "--", *self.arguments, ranks=ranks)
        return re.fullmatch(r"array job (\d+)\nmerge job (\d+)\n", said).groups()

    def run(self, *command: object, ranks: int | None = None, status: int = 0, **environment: str) -> str:
        if ranks is not None:
            environment["NPROC"] = str(ranks)
        return self.cluster.run(*command, cwd=self.folder, status=status, HF_HUB_OFFLINE="1", **environment)

    def segments(self) -> int:
        return len(list(self.out.glob("shards/*/*.h5")))

    def merge(self, status: int = 0) -> dict[str, int]:
        """Merge into parts of one question's copies each, and return what is accounted for."""
        job = self.sbatch(script="merge.sbatch", arguments=["--output-dir", "OUT", "--part-size", COPIES])
        self.until_ended(job)
        assert self.cluster.facts(job)["ExitCode"] == f"{status}:0", self.log(job)
        return self.accounted()

    def accounted(self) -> dict[str, int]:
        """What the last merge has accounted for."""
        return json.loads((self.out / "coverage.json").read_text())

    def processes(self, job: str) -> list[psutil.Process]:
        """The ranks of a job that run, seen from outside its nodes."""
        number = self.cluster.facts(job)["JobId"]
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if "extract_dist.py" in " ".join(line[:2]) and process.environ().get("SLURM_JOB_ID") == number:
                    found.append(process)
        return found

    def nodes(self, job: str) -> list[str]:
        """The nodes that a job runs on."""
        return self.run("scontrol", "show", "hostnames", self.cluster.facts(job)["NodeList"]).split()

    def log(self, job: str) -> str:
        path = self.folder / f"slurm-{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def until_ended(self, *jobs: str, seconds: float = 900) -> None:
        numbers = {job.partition("_")[0] for job in jobs}

        def over() -> bool:
            return not any(job.partition("_")[0] in numbers for job in self.cluster.jobs())

        until(over, seconds, f"the end of {jobs}: {self.cluster.jobs()}")

    def until_at_work(self, *jobs: str, since: int = 0) -> None:
        """Until each job has more rows done than go into a segment, by what its log says from a place on."""

        def at_work(job: str) -> object:
            return re.search(r" [1-9]\d+/\d+ \[", self.log(job)[since:])

        until(lambda: all(map(at_work, jobs)), START_SECONDS, f"the work of {jobs}")

    def until_loading(self, job: str) -> None:
        """Until a run of the job has begun and none of its ranks has a model yet."""

        def begun() -> bool:
            return self.cluster.jobs().get(job) == "RUNNING" and bool(self.processes(job))

        until(begun, START_SECONDS, f"the beginning of {job}")

    def until_said(self, job: str, sentence: str, since: int = 0) -> None:
        until(lambda: sentence in self.log(job)[since:], START_SECONDS, f"{sentence!r} from {job}")


@pytest.fixture
def user(cluster, tmp_path, many_rows, checkpoint) -> User:
    settings = ["--checkpoint-interval", 8, "--batch-size", 1]
    return User(cluster, tmp_path, [*arguments_for(many_rows, checkpoint), *settings])


def assert_right(user: User, expected: dict[str, object]) -> int:
    """The rows in the parts have the values of an undisturbed run. Returns how many there are."""
    found = read_published(user.out)
    assert_equal_to_reference(found, of_copies(expected, found))
    return len(found)


def assert_complete(user: User, expected: dict[str, object]) -> dict[str, int]:
    """Every row is in a part once, with the values of an undisturbed run. Returns what the merge accounts for."""
    assert assert_right(user, expected) == 31 * COPIES
    coverage = user.accounted()
    assert (coverage["extracted"], coverage["missing"], coverage["corrupt_segments"]) == (31 * COPIES, 0, [])
    return coverage


def asked_to_stop(process: psutil.Process) -> bool:
    """Whether a TERM waits for a process that is suspended."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    pending = [int(found, 16) for found in re.findall(r"(?:SigPnd|ShdPnd):\s*(\w+)", status)]
    return any(mask >> (signal.SIGTERM - 1) & 1 for mask in pending)


def test_an_array_of_three_nodes_and_the_merge_after_it(user, expected):
    array, merge = user.submit("--tasks", 3, "--gres=gpu:2", ranks=None)
    user.until_ended(array, merge)
    for task in range(3):
        assert user.cluster.facts(f"{array}_{task}")["ExitCode"] == "0:0"
        assert "2 ranks (by torchrun)" in user.log(f"{array}_{task}"), "one rank for each of the two GPUs"
    nodes = {user.cluster.facts(f"{array}_{task}")["BatchHost"] for task in range(3)}
    assert nodes == set(NODES)
    assert user.cluster.facts(merge)["ExitCode"] == "0:0"
    assert assert_complete(user, expected)["duplicates"] == 0


def test_tasks_preempted_requeued_and_out_of_time_continue(user, expected):
    array, merge = user.submit("--tasks", 3, "--exclusive", "--partition=low")
    tasks = preempted, requeued, late = [f"{array}_{number}" for number in range(3)]
    user.until_at_work(*tasks)
    ranks = user.processes(late)
    for rank in ranks:  # so that it has not ended by the time that its time is over
        rank.suspend()
    # Slurm looks at the times every 30 s and warns up to 50 s before the end: so at one of its looks it warns, and only
    # at a later one could it end the task, which would wake the ranks.
    user.run("scontrol", "update", f"JobId={late}", "EndTime=now+45")
    user.run("scontrol", "requeue", requeued)
    node = user.cluster.facts(preempted)["BatchHost"]
    user.run("sbatch", "--partition=high", f"--nodelist={node}", "--exclusive", "--wrap=sleep 3")
    until(lambda: "USR2" in user.log(late) or all(map(asked_to_stop, ranks)), 120, "the end of the time limit")
    for rank in ranks:
        rank.resume()
    user.until_ended(array, merge)
    for task in tasks:
        facts = user.cluster.facts(task)
        assert (facts["Restarts"], facts["ExitCode"]) == ("1", "0:0"), user.log(task)
    assert "put back into the queue" in user.log(late)
    assert user.cluster.facts(merge)["ExitCode"] == "0:0"
    assert assert_complete(user, expected)["duplicates"] == 0


def test_a_task_requeues_itself_as_often_as_it_gets_on_and_gives_up_where_it_does_not(user):
    task = user.sbatch("--array=0", "--partition=grace") + "_0"
    seen = 0
    for run in range(3):
        user.until_at_work(task, since=seen)
        if run == 0:  # preempted where preemption cancels: the signal comes a minute before
            node = user.nodes(task)[0]
            user.run("sbatch", "--partition=high", f"--nodelist={node}", "--exclusive", "--wrap=true")
        else:
            user.run("scancel", "--batch", "--signal=USR2", task)
        user.until_said(task, "put back into the queue", since=seen)
        seen = len(user.log(task))
    for said in ("put back into the queue", "given up"):
        user.until_loading(task)
        user.run("scancel", "--batch", "--signal=USR2", task)
        user.until_said(task, said, since=seen)
        seen = len(user.log(task))
    user.until_ended(task)
    assert "2 runs in a row were stopped before they had committed anything" in user.log(task)
    assert user.cluster.facts(task)["ExitCode"] == "1:0"


def test_a_cancelled_array_goes_on_with_other_tasks_and_ranks_under_the_eyes_of_merges(user, expected):
    array, merge = user.submit("--tasks", 2)
    user.run("scancel", merge)
    user.until_at_work(f"{array}_0", f"{array}_1")
    user.run("scancel", array)
    user.until_ended(array)
    assert {user.cluster.facts(f"{array}_{task}")["JobState"] for task in range(2)} == {"CANCELLED"}
    before = user.merge(status=3)
    assert before["extracted"] > 0

    array = user.sbatch("--array=0-2", ranks=2)
    user.until_at_work(*(f"{array}_{task}" for task in range(3)))
    during = user.merge(status=3)
    assert during["extracted"] > before["extracted"]
    assert_right(user, expected)
    user.until_ended(array)
    assert user.merge()["duplicates"] == 0
    assert_complete(user, expected)


def test_a_job_that_loses_a_node_goes_on_with_another(user, expected):
    job = user.sbatch("--nodes=2", "--exclusive", script="multinode.sbatch")
    user.until_at_work(job)
    lost = user.nodes(job)[1]
    committed = user.segments()
    user.cluster.power_off(lost)
    try:
        until(lambda: user.cluster.facts(job)["Restarts"] == "1", START_SECONDS, "the requeue")
        until(lambda: user.cluster.jobs().get(job) == "RUNNING", START_SECONDS, "the second run, without the node")
        assert user.segments() >= committed
    finally:
        user.cluster.power_on(lost)
    user.until_ended(job)
    assert user.cluster.facts(job)["ExitCode"] == "0:0", user.log(job)
    user.merge()
    assert_complete(user, expected)


def test_two_copies_of_a_task_at_once_do_no_harm(user, expected):
    """A node whose slurmd dies is lost to Slurm, which starts its task again; on the node the first copy goes on."""
    task = user.sbatch("--array=0") + "_0"
    user.until_at_work(task)
    node = user.nodes(task)[0]
    first = user.processes(task)
    for rank in first:  # until the second copy is at work
        rank.suspend()
    seen = len(user.log(task))
    user.cluster.kill_slurmd(node)
    try:
        until(lambda: user.cluster.facts(task)["Restarts"] == "1", START_SECONDS, "the requeue")
        until(lambda: user.cluster.facts(task)["JobState"] == "RUNNING", START_SECONDS, "the second copy")
        user.until_at_work(task, since=seen)
        for rank in first:
            rank.resume()
        user.until_ended(task)
        until(lambda: not any(rank.is_running() for rank in first), START_SECONDS, "the end of the first copy")
    finally:
        user.cluster.start_slurmd(node)
    assert user.cluster.facts(task)["Restarts"] == "1", "the first copy has put the second back into the queue"
    assert user.merge()["duplicates"] > 0, "they did not run at once"
    assert_complete(user, expected)


def test_tasks_and_ranks_without_a_row_end_well(user, tmp_path, expected):
    rows = write_table(tmp_path / "two.csv", table_rows()[:2])
    user.arguments += ["--vqa-dataset", rows]
    array, merge = user.submit("--tasks", 3, ranks=2)
    user.until_ended(array, merge)
    assert {user.cluster.facts(job)["ExitCode"] for job in (*(f"{array}_{n}" for n in range(3)), merge)} == {"0:0"}
    assert user.accounted()["extracted"] == 2


def test_ranks_of_srun_share_a_merge(cluster, tmp_path):
    out = begin_run(tmp_path)
    commit(out, [record(row) for row in range(ROWS)])
    merge = [sys.executable, ROOT / "merge_shards.py", "--part-size", PART_SIZE, "--output-dir"]
    alone = shutil.copytree(out, tmp_path / "alone")
    cluster.run(*merge, alone)
    said = cluster.run("srun", "--mpi=pmi2", "--nodes=1", "--ntasks=3", *merge, out)
    assert said.startswith(f"rows: {ROWS}; extracted: {ROWS}"), "rank 0 has worked alone"
    assert contents(out) == contents(alone)


def test_term_through_srun_at_random_moments(user, expected):
    chance = random.Random(5)
    user.arguments += ["--checkpoint-interval", 1000]
    # By itself srun keeps the bar, which has no line ends, until a kilobyte of it is there.
    command = ["srun", "--unbuffered", "-n2", sys.executable, ROOT / "extract_dist.py", *user.arguments]
    said = ""
    starting = 0.0  # seconds that a start takes here
    for _ in range(TERMS):
        begun, before = time.monotonic(), len(read_heartbeats(user.out))
        step = user.cluster.start(*command, cwd=user.folder)
        if starting and chance.random() < 0.25:
            until(lambda: "RUNNING" in user.cluster.jobs().values(), START_SECONDS, "the start of a step")
            time.sleep(chance.uniform(0, starting))
        else:
            bar = ""
            while not re.search(r" [1-9]\d*/\d+ ", bar):
                bar += (more := step.stderr.read(1))
                assert more, "the run ended before it could be stopped"
            # The bar may count rows while the other rank still loads its model.
            until(lambda before=before: len(read_heartbeats(user.out)) == before + 2, START_SECONDS, "the other rank")
            starting = starting or time.monotonic() - begun
            time.sleep(chance.uniform(0, 0.5))
        user.run("scancel", "--signal=TERM", *user.cluster.jobs())  # to the ranks: srun itself would kill them
        asked = time.monotonic()
        said += step.communicate(timeout=60)[0]
        assert time.monotonic() - asked < 20
    said += user.run(*command, "--batch-size", 16)  # the last run is to end soon
    assert said.count("stopped by SIGTERM after a commit") >= TERMS, "too few came while there was something to lose"
    assert sum(map(int, re.findall(r"(\d+) rows extracted, 0 failed, \d+ left", said))) == 31 * COPIES
    assert user.merge()["duplicates"] == 0
    assert_complete(user, expected)
