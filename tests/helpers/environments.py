"""Virtual environments as a user would have them, without a network: what they hold is linked from this one."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.helpers.launching import ROOT

PROGRAM = "#!{python}\nimport sys\nfrom {module} import {name}\nsys.exit({name}())\n"


def installed_by(extra: str | None) -> list[metadata.Distribution]:
    """The distributions that `pip install .[extra]` brings, or `pip install .`, of those of this environment."""
    found: dict[str, metadata.Distribution] = {}

    def bring(requirements: Iterable[str], extras: Iterable[str]) -> None:
        for requirement in map(Requirement, requirements):
            wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras))
            name = requirement.name.lower()
            if wanted and (name not in found or requirement.extras):
                found[name] = metadata.distribution(name)
                bring(found[name].requires or [], requirement.extras)

    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bring([*project["dependencies"], *(project["optional-dependencies"][extra] if extra else [])], [])
    return list(found.values())


def make_environment(folder: Path, extra: str | None, checkout: Path | None) -> None:
    """Make the virtual environment that pip would make, of what this one has: nothing else can be imported.

    Args:
        extra: of the project, that is installed too.
        checkout: what would be installed as it is; without one, only what the project requires is there.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    library = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for distribution in installed_by(extra):
        for file in distribution.files or []:
            top = library / file.parts[0]
            if file.parts[0] != ".." and not top.exists():
                top.symlink_to(distribution.locate_file(file.parts[0]))
        for program in distribution.entry_points.select(group="console_scripts"):
            path = folder / "bin" / program.name
            path.write_text(PROGRAM.format(python=folder / "bin" / "python", module=program.module, name=program.attr))
            path.chmod(0o755)
    if checkout is not None:
        (library / "checkout.pth").write_text(str(checkout))
