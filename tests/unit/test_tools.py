"""What no other test runs, as it takes a GPU or hours: at least its imports hold, whatever is renamed."""

from __future__ import annotations

import importlib

import pytest

from tests.helpers.launching import ROOT

TOOLS = [path for folder in ("benchmarks", "gpu", "helpers") for path in sorted((ROOT / "tests" / folder).glob("*.py"))]


@pytest.mark.parametrize("path", TOOLS, ids=[f"{path.parent.name}.{path.stem}" for path in TOOLS])
def test_a_tool_can_be_imported(path):
    if path.stem != "__main__":
        importlib.import_module(f"tests.{path.parent.name}.{path.stem}")
