"""The README as a newcomer follows it: every block that needs no GPU, no queue and no network works unchanged."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.helpers.launching import ROOT, run

PACKAGE = ROOT / "vqa_embeddings"
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", README, re.M | re.S)
# What is not run here, and why: this suite, a queue, a network.
LEFT_OUT = ("launch/test.sh", "submit.sh", "hf download")
PROGRAM = "#!{python}\nimport sys\nfrom {module} import {name}\nsys.exit({name}())\n"


def installed_by(extra: str) -> list[metadata.Distribution]:
    """The distributions that `pip install .[extra]` brings, of those of this environment."""
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
    bring([*project["dependencies"], *project["optional-dependencies"][extra]], [])
    return list(found.values())


def make_environment(folder: Path, extra: str) -> None:
    """Make the virtual environment that `launch/demo.sh` makes, of what this one has: nothing else can be imported."""
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
    (library / "checkout.pth").write_text(str(folder.parent))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what git has, and the environment that `launch/demo.sh` would make in it, as if it had done so."""
    folder = tmp_path_factory.mktemp("newcomer") / "checkout"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0")[:-1]:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    [extra] = re.findall(r"^install_environment (\w+)$", (folder / "launch" / "demo.sh").read_text(), re.M)
    make_environment(folder / ".venv", extra)
    installed = hashlib.sha256((folder / "pyproject.toml").read_bytes()).hexdigest()
    (folder / ".venv" / "installed").write_text(f"{installed}  - {extra}\n")
    return folder


def test_every_block_works_pasted_one_after_another(checkout, tmp_path):
    run_here = [(kind, code) for kind, code in BLOCKS if not any(name in code for name in LEFT_OUT)]
    assert len(run_here) >= 10
    script = []
    for number, (kind, code) in enumerate(run_here):
        if kind == "python":
            code = f"python - <<'END OF BLOCK'\n{code}END OF BLOCK\n"
        script.append(f"{code}echo @@ {number} $?\n")
    path = os.pathsep.join([str(Path(sys.base_prefix) / "bin"), "/usr/bin", "/bin"])
    environment = {"HOME": str(tmp_path), "PATH": path, "HF_HUB_OFFLINE": "1", "LANG": "C.UTF-8"}
    environment["MPIRUN"] = shutil.which("mpirun") or "mpirun"  # which is the cluster's
    done = subprocess.run(
        ["bash"], input="\n".join(script), cwd=checkout, env=environment, capture_output=True, text=True, timeout=900
    )
    ended = {int(number): int(status) for number, status in re.findall(r"^@@ (\d+) (\d+)$", done.stdout, re.M)}
    for number, (_, code) in enumerate(run_here):
        assert ended.get(number) == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    demo = done.stdout.partition("@@")[0]
    assert "installing into .venv" not in demo and "extracted: 31; failed: 0; missing: 0" in demo
    for name in ("run.json", "rows.csv", "coverage.json", "phi4_multimodal_embeddings_part_001.h5", "-r0/", "-r1/"):
        assert name in demo
    assert "31 rows to do now, 2 ranks (by torchrun)" in done.stdout
    assert "rows: 31; extracted: 31; failed: 0; missing: 0" in done.stdout
    assert len(re.findall(r"layer \d: accuracy \d\.\d\d, majority", done.stdout)) == 5
    assert "<31 of 31 rows in OUT, layers [0, 2, 4, 6, 7]>" in done.stdout
    report = (checkout / "OUT" / "report.html").read_text(encoding="utf-8")
    assert report.count("<svg") == 1 + 2 + 2 * 5, "the strip, throughput and norms, two maps a layer"
    made = {path.name for path in (checkout / "OUT").iterdir()}
    assert made == {
        *("run.json", "rows.csv", "shards", "coverage.json", "missing.csv", "failed.csv", "report.html"),
        *("phi4_multimodal_embeddings_part_001.h5", "phi4_multimodal_columns_part_001.h5"),
    }


@pytest.mark.parametrize("script", ["extract_dist.py", "merge_shards.py"])
def test_the_option_tables_have_every_option_with_its_default(script):
    shown = run([sys.executable, str(ROOT / script), "--help"]).stdout
    options = set(re.findall(r"^  (--[a-z-]+)", shown, re.M))
    table = README[README.index(f"| {script} | |") :].partition("\n\n")[0]
    named = set(re.findall(r"`(--[a-z-]+)", table))
    assert named == options
    for option, default in re.findall(r"`(--[a-z-]+) ([^`/ ]+)`", table):
        if not default.isupper():
            entry = re.search(rf"  {option} .*?(?=\n  --|\Z)", shown, re.S)
            assert f"({default})" in " ".join(entry[0].split()), f"{option} {default}"


def test_the_files_and_folders_that_it_names_are_there():
    for name in re.findall(r"\b((?:tests|launch|vqa_embeddings)/[\w./]*\w)", README):
        assert (ROOT / name).exists(), name


def modules(room: str) -> set[str]:
    return {path.stem for path in (PACKAGE / room).glob("*.py")} - {"__init__", "_version"}


def test_the_index_of_modules_names_every_one_and_nothing_else():
    """The README's table, and for a module that it does not name the docstring of its room."""
    section = README[README.index("## The code") : README.index("## Citing")]
    table = dict(re.findall(r"^\| `([\w/]+)` \| [^|]+ \| ([^|]+) \|$", section, re.M))
    assert table.keys() == {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("*/**/__init__.py")}
    for room, cell in table.items():
        named = set(re.findall(r"`(\w+)`", cell))
        assert named <= modules(room), room
        face = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))) or ""
        assert modules(room) - named <= set(re.findall(r"\w+", face)), room
    text = set(re.findall(r"`(\w+)`", re.sub(r"^\|.*\n", "", section, flags=re.M)))
    assert modules(".") <= text <= modules(".") | table.keys()


def test_the_citation_can_be_read():
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    from vqa_embeddings import __version__

    assert cited["version"] == __version__
