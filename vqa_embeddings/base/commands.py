"""What the two programs are called: scripts of the checkout, or commands of an installed package.

The usage of both is written with the scripts' names. Where the package was installed, there are no scripts.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """A program under all of its names."""

    script: str  # in the checkout
    installed: str  # on the PATH
    module: str  # for `python -m`, and for launchers that start Python themselves


EXTRACT = Command("extract_dist.py", "vqa-extract", "vqa_embeddings.cli.extract")
MERGE = Command("merge_shards.py", "vqa-merge", "vqa_embeddings.cli.merge")
COMMANDS = (EXTRACT, MERGE)


def name_of(command: Command, program: str | None = None) -> str:
    """What a command was called as, for its usage: by default as the script.

    Args:
        program: what was started, by default `sys.argv[0]`.
    """
    started = Path(sys.argv[0] if program is None else program).name
    if started == command.installed:
        return started
    return f"python -m {command.module}" if started == _module_file(command) else command.script


def is_installed(program: str | None = None) -> bool:
    """Whether an installed command or a module was started, not a script of the checkout. Arguments as `name_of`."""
    started = Path(sys.argv[0] if program is None else program).name
    return any(started in (command.installed, _module_file(command)) for command in COMMANDS)


def with_names(text: str, program: str | None = None) -> str:
    """A text that names the scripts, with the names that this process's user has to type. Arguments as `name_of`."""
    if not is_installed(program):
        return text
    for command in COMMANDS:
        script = re.escape(command.script)
        text = re.sub(rf"(accelerate launch .*){script}", rf"\1-m {command.module}", text)
        text = re.sub(rf"(python )?{script}", command.installed, text)
    return text


def _module_file(command: Command) -> str:
    return f"{command.module.rpartition('.')[2]}.py"
