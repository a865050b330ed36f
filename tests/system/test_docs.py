"""The documentation as a newcomer follows it: every block that needs no GPU, queue or network works unchanged."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.environments import make_environment
from tests.helpers.launching import ROOT, run
from tests.unit.test_rooms import MAY_IMPORT

PACKAGE = ROOT / "vqa_embeddings"
DOCS = ROOT / "docs"
README = ROOT / "README.md"
# In the order in which the README names them, which is that of a newcomer.
PAGES = [
    README,
    *dict.fromkeys(ROOT / name for name in re.findall(r"\((docs/\w[\w-]*\.md)[#)]", README.read_text("utf-8"))),
]
WRITTEN = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
# What is not run here, and why: this suite, a queue, a network.
LEFT_OUT = ("launch/test.sh", "submit.sh", "hf download")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks() -> list[tuple[str, str]]:
    """The commands and examples of all pages, one after another."""
    found = [block for page in PAGES for block in FENCE.findall(text_of(page))]
    return [(kind, code) for kind, code in found if kind in ("bash", "python")]


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
    make_environment(folder / ".venv", extra, folder)
    installed = hashlib.sha256((folder / "pyproject.toml").read_bytes()).hexdigest()
    (folder / ".venv" / "installed").write_text(f"{installed}  - {extra}\n")
    return folder


def test_every_block_works_pasted_one_after_another(checkout, tmp_path):
    run_here = [(kind, code) for kind, code in blocks() if not any(name in code for name in LEFT_OUT)]
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
    page = text_of(DOCS / "options.md")
    table = page[page.index(f"| {script} | |") :].partition("\n\n")[0]
    named = set(re.findall(r"`(--[a-z-]+)", table))
    assert named == options
    for option, default in re.findall(r"`(--[a-z-]+) ([^`/ ]+)`", table):
        if not default.isupper():
            entry = re.search(rf"  {option} .*?(?=\n  --|\Z)", shown, re.S)
            assert f"({default})" in " ".join(entry[0].split()), f"{option} {default}"


def test_every_page_of_the_documentation_is_named_in_the_readme():
    assert set(PAGES) - {README} == set(DOCS.glob("*.md"))


def test_the_readme_is_short():
    assert 900 <= len(text_of(README).split()) <= 1100


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_the_files_and_folders_that_it_names_are_there(page):
    for name in re.findall(r"\b((?:tests|launch|docs|vqa_embeddings)/[\w./-]*\w)", text_of(page)):
        assert (ROOT / name).exists(), name


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page):
    text = FENCE.sub("", text_of(page))
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'\bsrc(?:set)?="([^"]+)"', text)
    assert links or page.name == "CHANGELOG.md"
    for link in links:
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def modules(room: str) -> set[str]:
    return {path.stem for path in (PACKAGE / room).glob("*.py")} - {"__init__", "_version"}


def test_the_index_of_modules_names_every_one_and_nothing_else():
    """The table, and for a module that it does not name the docstring of its room."""
    page = text_of(DOCS / "architecture.md")
    section = page[page.index("## The rooms") : page.index("## What a room may import")]
    table = dict(re.findall(r"^\| `([\w/]+)` \| [^|]+ \| ([^|]+) \|$", section, re.M))
    assert table.keys() == {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("*/**/__init__.py")}
    for room, cell in table.items():
        named = set(re.findall(r"`(\w+)`", cell))
        assert named <= modules(room), room
        face = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))) or ""
        assert modules(room) - named <= set(re.findall(r"\w+", face)), room
    text = set(re.findall(r"`(\w+)`", re.sub(r"^\|.*\n", "", section, flags=re.M)))
    assert modules(".") <= text <= modules(".") | table.keys()


def test_the_rule_of_the_rooms_is_the_one_that_is_tested():
    page = text_of(DOCS / "architecture.md")
    section = page[page.index("## What a room may import") : page.index("Further rules")]
    said: dict[str, set[str]] = {}
    for rooms, cell in re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|$", section, re.M):
        names = {name.removesuffix(".py").replace("/", ".") for name in re.findall(r"`([\w/.]+)`", cell)}
        said.update(dict.fromkeys(re.findall(r"`(\w+)`", rooms), names))
    assert said == MAY_IMPORT


def test_the_citation_can_be_read():
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    from vqa_embeddings import __version__

    assert cited["version"] == __version__
