"""The package as pip installs it, away from the checkout: its commands, and all that they need beside the code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.environments import make_environment
from tests.helpers.launching import ROOT
from vqa_embeddings.base.commands import EXTRACT, MERGE

ALL_ROWS = "rows: 31; extracted: 31; failed: 0; missing: 0"
# What pip reads to build a wheel, besides what git has of the package: a copy, as setuptools leaves a folder behind.
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "vqa_embeddings")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z", *BUILT_FROM], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*build, "--wheel-dir", target, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """An environment in which the wheel is installed, and what it requires is linked from this one."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    make_environment(folder, None, None)
    install = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index"]
    done = subprocess.run([*install, wheel], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def user(installed, tmp_path_factory):
    """Runs commands of the environment in an empty folder, with an empty home. Returns what they print."""
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("work")
    settings = {"HOME": str(home), "PATH": f"{installed / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"}
    settings |= {"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def call(*arguments: str) -> str:
        done = subprocess.run(arguments, cwd=folder, env=settings, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"vqa_embeddings", info}
    listed = subprocess.run(["git", "ls-files", "-z", "vqa_embeddings"], cwd=ROOT, capture_output=True, check=True)
    expected = {name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).exists()}
    assert {name for name in names if name.startswith("vqa_embeddings/")} == expected
    assert {"vqa_embeddings/py.typed", "vqa_embeddings/demo_data/vqa.csv"} <= names
    assert "vqa_embeddings/report/templates/report.html" in names


def test_the_commands_extract_and_merge_away_from_the_checkout(user):
    said = user(EXTRACT.installed, "--demo", "--output-dir", "OUT")
    assert "31 rows extracted, 0 failed, 0 left" in said
    assert ALL_ROWS in user(MERGE.installed, "--output-dir", "OUT")
    assert "next: vqa-merge --output-dir OUT" in user(EXTRACT.installed, "--demo", "--output-dir", "OUT")
    where = "import vqa_embeddings; print(vqa_embeddings.__file__)"
    assert str(ROOT) not in user("python", "-c", where)


def test_accelerate_starts_the_module_on_two_ranks(user, tmp_path):
    config = shutil.copy(ROOT / "launch" / "accelerate" / "cpu.yaml", tmp_path)
    launch = ["accelerate", "launch", "--config_file", str(config), "-m", EXTRACT.module]
    assert "31 rows to do now, 2 ranks (by torchrun)" in user(*launch, "--demo", "--output-dir", "TWO")
    assert ALL_ROWS in user("python", "-m", MERGE.module, "--output-dir", "TWO")


@pytest.mark.parametrize("command", [EXTRACT, MERGE])
def test_the_usage_names_the_installed_command(user, command):
    said = user(command.installed, "--help")
    assert said.startswith(f"usage: {command.installed} [")
    assert EXTRACT.script not in said and MERGE.script not in said
