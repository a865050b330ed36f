"""What the two programs are called, in their usage and in what they say."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.launching import ROOT
from vqa_embeddings.base.commands import COMMANDS, EXTRACT, MERGE, is_installed, name_of, with_names

LAUNCH = "accelerate launch --num_processes 8 extract_dist.py --demo"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_name_that_a_command_is_called_by_stands_in_its_usage(command):
    assert name_of(command, f"/home/me/{command.script}") == command.script
    assert name_of(command, f"/usr/bin/{command.installed}") == command.installed
    module = f"/lib/{command.module.replace('.', '/')}.py"
    assert name_of(command, module) == f"python -m {command.module}"
    assert name_of(command, "/lib/vqa_embeddings/cli/supervise.py") == command.script


def test_the_scripts_of_a_checkout_are_named_unchanged():
    for program in ("extract_dist.py", "/x/merge_shards.py", "-c", "pytest"):
        assert not is_installed(program)
        assert with_names(LAUNCH, program) == LAUNCH


@pytest.mark.parametrize("program", ["/bin/vqa-extract", "/bin/vqa-merge", "/lib/vqa_embeddings/cli/extract.py"])
def test_where_there_are_no_scripts_the_commands_are_named(program):
    assert is_installed(program)
    assert with_names(LAUNCH, program) == f"accelerate launch --num_processes 8 -m {EXTRACT.module} --demo"
    assert with_names("srun python extract_dist.py --demo", program) == "srun vqa-extract --demo"
    assert with_names("the same extract_dist.py command", program) == "the same vqa-extract command"
    assert with_names("mpirun -n 8 python merge_shards.py", program) == "mpirun -n 8 vqa-merge"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_script_and_the_module_show_one_usage_each_with_its_own_name(command):
    def shown(*call: str) -> str:
        done = subprocess.run([sys.executable, *call, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    script, module = shown(command.script), shown("-m", command.module)
    assert script.startswith(f"usage: {command.script} [") and f"python {command.script}" in script
    assert module.startswith(f"usage: python -m {command.module} [") and f"{command.installed} " in module
    assert not any(other.script in module for other in COMMANDS)
    assert MERGE.installed not in script and EXTRACT.installed not in script
    options = [text[text.index("options:") :].split() for text in (script, module)]
    assert options[0] == options[1]
