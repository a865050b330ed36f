"""`--self-check` by the real command: what it says, what it leaves, and that a fault stops a run before it begins."""

from __future__ import annotations

import html
import json
from pathlib import Path

import h5py
import pytest

from tests.helpers.launching import ROOT, command, merge, run, segments
from vqa_embeddings.store.run import read_run

WITHOUT_LORA = """
from vqa_embeddings.models.phi4mm import lora
merge = lora._merge
lora._merge = lambda layers, dtype: merge(dict(list(layers.items())[:1]), dtype)
"""
WITH_STAND_IN = """
from vqa_embeddings.models import registry
registry.FAMILIES.append("tests.helpers.stand_in_family:FAMILY")
"""


def planted(tmp_path: Path, code: str) -> dict[str, str]:
    (tmp_path / "site").mkdir(exist_ok=True)
    (tmp_path / "site" / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"}


def checks(out: Path) -> dict:
    return json.loads((out / "run.json").read_text()).get("self_check", {})


def test_a_fault_ends_the_launch_before_anything_is_stored_and_without_it_the_same_command_passes(
    tmp_path, photographs
):
    out = tmp_path / "out"
    inputs = [*photographs, "--output-dir", out, "--self-check", 3]
    failed = run(command(0, *inputs), **planted(tmp_path, WITHOUT_LORA))
    assert failed.returncode == 1, failed.stdout + failed.stderr
    (sentence,) = [line for line in failed.stderr.splitlines() if line]
    assert sentence.startswith("error: the self-check against transformers ") and "of its largest value" in sentence
    assert "--attn-implementation eager" in sentence
    assert not (out / "run.json").exists() and not segments(out)
    assert [path.name for path in out.iterdir()] == ["shards"]

    done = run(command(0, *inputs))
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "largest error" in line]
    assert line.startswith("self-check: 3 rows against transformers ") and line.endswith(", 3 of 3 answers equal")
    assert done.stdout.index(line) < done.stdout.index("31 rows extracted, 0 failed, 0 left")
    check = checks(out)
    assert check["passed"] and len(check["rows"]) == 3 and check["dtype"] == "float32" and check["device"] == "CPU"
    assert merge(out).returncode == 0
    shown = (out / "report.html").read_text()
    assert "<h2>Self-check</h2>" in shown
    assert f"Passed: {line.removeprefix('self-check: ')}.</p>" in html.unescape(shown)
    assert shown.count("<td>query_token layer ") == 5
    with h5py.File(next(out.glob("*.h5"))) as part:
        assert "self_check" not in part.attrs, "a part does not depend on it"

    before = (out / "run.json").read_bytes()
    again = run(command(0, *photographs, "--output-dir", out))
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert (out / "run.json").read_bytes() == before, "a launch that asks for none leaves it"
    failed = run(command(0, *inputs), **planted(tmp_path, WITHOUT_LORA))
    assert failed.returncode == 1 and not checks(out)["passed"], "an earlier one would say that all is well"
    merged = merge(out)
    assert merged.returncode == 0 and '<p class="warning">Failed: 3 rows' in (out / "report.html").read_text()
    lines = merged.stdout.splitlines()
    (place,) = [index for index, line in enumerate(lines) if line.startswith("rows: 31; ")]
    assert lines[place + 1] == f"warning: the last self-check has failed: {checks(out)['fault']}"
    afterwards = run(command(0, *inputs))
    assert afterwards.returncode == 0 and "3 of 3 answers equal" in afterwards.stdout
    assert "warning" not in merge(out).stdout
    assert checks(out)["passed"] and len(list((out / "shards").iterdir())) == 1, "nothing else was done"


def test_a_run_without_one_can_be_checked_afterwards_and_its_identity_stays(tmp_path, photographs):
    out = tmp_path / "out"
    assert run(command(0, *photographs, "--output-dir", out)).returncode == 0
    key = read_run(out).key
    assert not checks(out) and merge(out).returncode == 0
    assert "<h2>Self-check</h2>" not in (out / "report.html").read_text()
    planned = run(command(0, *photographs, "--output-dir", out, "--self-check", 2, "--plan"))
    assert "self-check: 2 rows against transformers " in planned.stdout and not checks(out)
    assert run(command(0, *photographs, "--output-dir", out, "--self-check", 2)).returncode == 0
    assert len(checks(out)["rows"]) == 2 and read_run(out).key == key
    assert merge(out).returncode == 0 and "<h2>Self-check</h2>" in (out / "report.html").read_text()


def test_of_two_ranks_the_main_one_checks(tmp_path, photographs):
    out = tmp_path / "out"
    done = run(command(2, *photographs, "--output-dir", out, "--self-check", 2, "--lora", "adapter"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" answers equal") == 1 and checks(out)["passed"]
    assert merge(out).returncode == 0


@pytest.mark.parametrize("plan", [[], ["--plan"]])
def test_a_family_without_a_reference_is_refused_before_any_work(tmp_path, plan):
    from tests.helpers.stand_in_family import FAMILY
    from vqa_embeddings.app.demo import DATA

    FAMILY.write_random_checkpoint(tmp_path / "checkpoint")
    inputs = ["--vqa-dataset", DATA / "vqa.csv", "--images-dir", DATA, "--model", tmp_path / "checkpoint"]
    inputs += ["--output-dir", tmp_path / "out", "--self-check", 1, *plan]
    refused = run(command(0, *inputs), **planted(tmp_path, WITH_STAND_IN))
    assert refused.returncode == 2 and "no library has the stand-in; leave it out" in refused.stderr
    assert not (tmp_path / "out").exists()
