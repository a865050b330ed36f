"""The check for a GPU, as far as it runs without one."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from tests.helpers.launching import ROOT, run


def test_the_check_for_a_gpu_runs_whole_on_small_checkpoints():
    """Its small half, here. Where there is a GPU, check.sh without --quick does the rest."""
    done = check_gpu("--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " stages are right, 0 off, " in done.stdout
    assert "5 of 5 cases are right" in done.stdout or torch.cuda.is_available()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_check_for_a_gpu_says_in_a_sentence_what_it_lacks(tmp_path):
    alone = check_gpu("graphs")
    assert alone.returncode == 2
    assert re.fullmatch(r"error: found no CUDA GPU \(.*\); expected one; use .* --quick, .*\n", alone.stderr)
    (tmp_path / "h5py-3.0.dist-info").mkdir()
    (tmp_path / "h5py-3.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: h5py\nVersion: 3.0\n")
    old = check_gpu("--quick", PYTHONPATH=str(tmp_path))
    found = "error: found h5py 3.0; expected >=3.12.1; pip install 'h5py>=3.12.1'\n"
    assert (old.returncode, old.stdout, old.stderr) == (2, "", found)
    strange = check_gpu("--quick", "everything")
    assert strange.returncode == 2 and "found the stage everything; expected some of graphs, " in strange.stderr


def check_gpu(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "tests" / "gpu" / "check.sh"
    return run(["bash", str(script), *arguments], PYTHON=sys.executable, **environment)
