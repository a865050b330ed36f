"""The rooms of the package and the rule between them, read from the imports themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.launching import ROOT

PACKAGE = ROOT / "vqa_embeddings"
# What each room may import beside itself, the files of the package's own floor and what lies outside the package.
MAY_IMPORT = {
    "base": set(),
    "data": {"base"},
    "layers": {"base"},
    "models": {"base", "data", "layers"},
    "engine": {"base", "layers", "models.base"},
    "store": {"base", "data"},
    "cluster": {"base"},
    "report": {"base", "data", "store"},
    "app": {"base", "data", "layers", "models", "engine", "store", "cluster", "report"},
    "cli": {"base", "data", "models", "store", "cluster", "app"},
}
GROUND = {"_version", "errors", "records", "schema"}  # below all rooms
FACE = "__init__"
FAMILIES = {path.parent.name for path in (PACKAGE / "models").glob("*/__init__.py")}
READS_ENVIRONMENT = {"base.environment", "cluster.world"}
WITHOUT_TORCH = ("store", "report", "cluster", "data", "cli", "base")


def name_of(path: Path) -> str:
    """The module without the package's name, "store.run"; the face of a room is the room itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == FACE and len(parts) > 1 else parts)


@cache
def modules() -> dict[str, ast.Module]:
    paths = [path for path in PACKAGE.rglob("*.py") if "demo_data" not in path.parts]
    return {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(paths)}


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """What a module imports of the package, also inside of functions, and whether for its types alone."""
    typed = {
        id(inner)
        for node in ast.walk(modules()[module])
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports by a relative name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            head, _, tail = name.partition(".")
            if head == PACKAGE.name:
                known = tail if tail in modules() else tail.rpartition(".")[0]
                yield known or FACE, id(node) in typed


def room(module: str) -> str:
    return module.partition(".")[0]


def family(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "models" and len(parts) > 1 and parts[1] in FAMILIES else None


def is_allowed(module: str, imported: str) -> bool:
    if imported in GROUND:
        return True
    if family(imported) is not None and family(module) != family(imported):
        return module == "models.registry"
    if family(module) is not None and imported == "models.registry":
        return False
    if module in GROUND or imported == FACE:
        return False
    if module == FACE or room(imported) == room(module):
        return True
    return bool(MAY_IMPORT[room(module)] & {room(imported), imported})


def test_every_module_has_a_room_and_every_room_its_rule():
    assert {room(module) for module in modules()} == {*MAY_IMPORT, *GROUND, FACE}
    assert FAMILIES, "no family was found"


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_module_imports_what_its_room_may_not(module):
    strange = sorted({imported for imported, _ in imports(module) if not is_allowed(module, imported)})
    assert not strange, f"{module} imports {', '.join(strange)}"


def test_the_rule_finds_an_arrow_that_runs_back():
    assert not is_allowed("data.pictures", "cli.options")
    assert not is_allowed("engine.scheduler", "models.phi4mm.model")
    assert not is_allowed("engine.scheduler", "models.checkpoint")
    assert not is_allowed("app.extract", "models.phi4mm.model")
    assert not is_allowed("models.phi4mm.weights", "models.registry")
    assert is_allowed("models.registry", "models.phi4mm")
    assert is_allowed("engine.runner", "models.base")


def test_no_module_imports_itself_by_way_of_others():
    arrows = {module: {name for name, _ in imports(module)} for module in modules()}
    left = dict(arrows)
    while free := [module for module, names in left.items() if not names & left.keys() - {module}]:
        for module in free:
            del left[module]
    assert not left, f"in circles: {', '.join(left)}"


@pytest.mark.parametrize("module", sorted(set(modules()) - READS_ENVIRONMENT))
def test_the_environment_is_read_in_one_place_for_launchers_and_one_for_all_else(module):
    read = [
        node.lineno
        for node in ast.walk(modules()[module])
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and ast.unparse(node.value) == "os"
    ]
    assert not read, f"{module} reads the environment in lines {read}"


def test_what_needs_no_torch_does_not_load_it():
    light = [module for module in modules() if room(module) in WITHOUT_TORCH and module != FACE]
    script = "import importlib, sys\n"
    script += "".join(f"importlib.import_module('vqa_embeddings.{module}')\n" for module in light)
    script += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
