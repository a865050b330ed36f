"""The fixtures that the tests share: one small checkpoint, the values of the reference, a small disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.launching import COPIES, ROOT, TOKENS, arguments_for
from tests.helpers.sharing import locked
from tests.helpers.tables import table_rows, write_table
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.models.phi4mm.random_checkpoint import make_checkpoint

# A busy machine makes an example slow, not wrong.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


# These files take minutes each: begun before the other launches, they leave no process with one of them at the end.
LONG_FILES = ("test_signals.py", "test_resume.py", "test_mpi.py", "test_gpu_check.py", "test_storage.py")


@pytest.hookimpl(tryfirst=True)  # before -m chooses by the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of whole launches are slow, and come after the others."""
    for item in items:
        if "system" in item.path.relative_to(ROOT).parts:
            item.add_marker(pytest.mark.slow)
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    """Where a test stands in the order of all."""
    if "slurm" in item.path.parts:  # which takes longest, and mostly waits: of several processes one begins with it
        return 0 if "PYTEST_XDIST_WORKER" in os.environ else 4
    if "system" not in item.path.relative_to(ROOT).parts:
        return 1
    return 2 if item.path.name in LONG_FILES else 3


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
def reference(checkpoint: Path, shared_folder: Path, pytestconfig: pytest.Config):
    """The reference on the small checkpoint. Its values outlast this run, unless pytest runs without its cache."""
    from tests.helpers.kept_reference import KeptReference

    cache = getattr(pytestconfig, "cache", None)
    return KeptReference(checkpoint, cache.mkdir("reference") if cache else shared_folder / "reference")


@pytest.fixture(scope="session")
def expected(reference) -> dict[str, object]:
    """The reference's values for all 31 questions of the photographs, by question id."""
    from tests.helpers.kept_reference import Asked

    rows = {row["question_id"]: Asked(DATA / row["image_id"], row["question"], TOKENS) for row in table_rows()}
    return reference.rows(rows)


@pytest.fixture(scope="session")
def photographs(checkpoint: Path) -> list[object]:
    """The arguments of an extraction of the photographs with the small checkpoint, less the output folder."""
    return arguments_for(DATA / "vqa.csv", checkpoint)


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
