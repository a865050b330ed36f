"""What GitHub and git read: the hooks check what CI checks, and the form for problems asks for what is needed."""

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


def test_the_form_for_problems_asks_for_the_plan_and_what_was_printed():
    yaml = pytest.importorskip("yaml")
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "problem.yml").read_text())
    assert {"name", "description", "body"} <= form.keys()
    asked = {field["id"]: field for field in form["body"] if field["type"] != "markdown"}
    assert list(asked) == ["command", "plan", "expected", "printed", "versions"]
    assert all(field["attributes"]["label"] and field["validations"]["required"] for field in asked.values())
    assert "--plan" in asked["plan"]["attributes"]["description"]
