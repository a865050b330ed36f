"""What the tests share: one small checkpoint, the reference's values, and real launches."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from subprocess import DEVNULL
from typing import IO

import psutil
import pytest
from hypothesis import HealthCheck, settings

from vqa_embeddings.app.demo import DATA, make_checkpoint

# A busy machine makes an example slow, not wrong.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

ROOT = Path(__file__).parent.parent
TOKENS = 12  # of an answer, in all tests that compare answers
TERMS = int(os.environ.get("TERMS", "4"))  # to a launch, at random moments
COPIES = max(20, 5 * TERMS)  # of each of the 31 questions, so that a run outlasts what is done to it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests on a real Slurm, which take longest, come last."""
    items.sort(key=lambda item: "slurm" in item.path.parts)


def table_rows(path: Path = DATA / "vqa.csv") -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def command(ranks: int, *arguments: object) -> list[str]:
    """`accelerate launch` of the extraction; `ranks=0` runs it alone, without a launcher."""
    script = [str(ROOT / "extract_dist.py"), *map(str, arguments)]
    if ranks == 0:
        return [sys.executable, *script]
    several = ["--multi_gpu"] if ranks > 1 else []
    settings = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(ranks), *settings]
    return launcher + script


def settings_for_runs(environment: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}


def begin(
    arguments: list[str],
    stdout: int | IO[bytes] = DEVNULL,
    stderr: int | IO[bytes] | None = DEVNULL,
    **environment: str,
) -> subprocess.Popen:
    return subprocess.Popen(arguments, stdout=stdout, stderr=stderr, env=settings_for_runs(environment))


def run(arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    settings = settings_for_runs(environment)
    return subprocess.run(arguments, capture_output=True, text=True, env=settings, timeout=600)


def merge(out: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, str(ROOT / "merge_shards.py"), "--output-dir", str(out), *map(str, arguments)])


def processes(launch: subprocess.Popen) -> list[psutil.Process]:
    """The launcher and all that it started; torchrun's ranks lead sessions of their own."""
    try:
        return [psutil.Process(launch.pid), *psutil.Process(launch.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(victims: list[psutil.Process]) -> None:
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()


def segments(out: Path) -> list[Path]:
    return sorted(out.glob("shards/*/*.h5"))


def of_copies(expected: dict[str, object], rows: Iterable[str]) -> dict[str, object]:
    """What the reference expects of rows of `many_rows`."""
    return {key: expected[key.rpartition("-")[0]] for key in rows}


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file among the processes of this run of the tests, or say that another one holds it."""
    with open(path, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def compute_together(folder: Path, keys: Sequence[str], compute: Callable[[str], object]) -> dict[str, object]:
    """`compute(key)` by key; of several processes that ask for them at once, each computes those that no other has."""
    for wait in (False, True):
        for key in keys:
            path = folder / key
            with locked(folder / f"{key}.lock", wait) as ours:
                if ours and not path.exists():
                    path.with_suffix(".tmp").write_bytes(pickle.dumps(compute(key)))
                    path.with_suffix(".tmp").rename(path)
    return {key: pickle.loads((folder / key).read_bytes()) for key in keys}


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run of the tests share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def checkpoint(shared_folder: Path) -> Path:
    folder = shared_folder / "checkpoint"
    with locked(shared_folder / "checkpoint.lock"):
        if not folder.exists():
            make_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def original(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint in the original layout."""
    from tests.helpers.original_layout import write_original

    return write_original(checkpoint, tmp_path_factory.mktemp("original") / "checkpoint")


@pytest.fixture(params=["native", "original"])
def copy(request: pytest.FixtureRequest, checkpoint: Path, original: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint in each layout, to be changed."""
    return shutil.copytree(original if request.param == "original" else checkpoint, tmp_path / request.param)


@pytest.fixture(scope="session")
def reference(checkpoint: Path):
    from tests.helpers.reference import Reference

    return Reference(checkpoint)


@pytest.fixture(scope="session")
def expected(shared_folder: Path, request: pytest.FixtureRequest) -> dict[str, object]:
    """The reference's values for all 31 questions of the photographs, by question id."""
    rows = {row["question_id"]: row for row in table_rows()}

    def compute(key: str) -> object:
        picture = DATA / rows[key]["image_id"]
        return request.getfixturevalue("reference").row(picture, rows[key]["question"], TOKENS)

    (shared_folder / "expected").mkdir(exist_ok=True)
    return compute_together(shared_folder / "expected", list(rows), compute)


@pytest.fixture(scope="session")
def photographs(checkpoint: Path) -> list[object]:
    """The arguments of an extraction of the photographs with the small checkpoint, less the output folder."""
    return arguments_for(DATA / "vqa.csv", checkpoint)


def arguments_for(table: Path, checkpoint: Path, images: Path = DATA) -> list[object]:
    inputs = ["--vqa-dataset", table, "--images-dir", images, "--model", checkpoint]
    return [*inputs, "--max-new-tokens", TOKENS, "--dtype", "float32"]


@pytest.fixture(scope="session")
def many_rows(tmp_path_factory) -> Path:
    copies = [{**row, "question_id": f"{row['question_id']}-{copy}"} for row in table_rows() for copy in range(COPIES)]
    return write_table(tmp_path_factory.mktemp("many") / "many.csv", copies)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of so many bytes, or changes the size of the one that is there."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size: int) -> Path:
        options = f"size={size},mode=755"
        again = ["-o", f"remount,{options}"] if os.path.ismount(folder) else ["-o", options]
        subprocess.run(["mount", "-t", "tmpfs", *again, "tmpfs", str(folder)], check=True)
        return folder

    tried = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if tried.returncode:
        pytest.skip(f"no small disk can be mounted: {tried.stderr.decode().strip()}; run the tests as root")
    yield resize
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)  # which the test may have done
