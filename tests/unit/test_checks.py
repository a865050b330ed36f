"""What is checked before a commit is what CI checks."""

from __future__ import annotations

import re

import pytest

from tests.helpers.launching import ROOT


def test_the_hooks_before_a_commit_are_the_checks_of_ci():
    yaml = pytest.importorskip("yaml")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    named = [hook for repository in hooks for hook in repository["hooks"]]
    script = (ROOT / "launch" / "test.sh").read_text()
    assert [hook["entry"] for hook in named] == re.findall(r"^((?:ruff|mypy)\b.*)$", script, re.M)
    for hook in named:  # with the versions of the environment, on all files
        assert hook["language"] == "system" and hook["pass_filenames"] is False
