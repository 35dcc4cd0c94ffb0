"""The documents say what is so: docs/adding-an-op.md is followed to the letter in a copy of the package."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from inductor_vision.version import NEWEST_TORCH, OLDEST_TORCH

ROOT = pathlib.Path(__file__).parent.parent
STEP = re.compile(r"^## \d+\. .*?`(?P<path>[\w/.]+)`$(?P<text>.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```\w+\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_adding_an_op(tmp_path: pathlib.Path) -> None:
    package = tmp_path / "inductor_vision"
    for folder in ("ops", "integrations", "lowering"):
        shutil.copytree(ROOT / folder, package / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for module in ROOT.glob("*.py"):
        shutil.copy(module, package)

    steps = {
        match["path"]: CODE.search(match["text"])
        for match in STEP.finditer((ROOT / "docs/adding-an-op.md").read_text())
    }
    written = {path: code["code"] for path, code in steps.items() if code}
    assert {"ops/space_to_depth.py", "lowering/space_to_depth.py", "__init__.py"} < written.keys()
    for path, code in written.items():
        file = package / path
        file.parent.mkdir(parents=True, exist_ok=True)
        existing = file.read_text() if file.exists() else ""
        file.write_text(existing + code)

    test = package / "tests/lowering/test_space_to_depth.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", str(test)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 passed" in run.stdout


@pytest.mark.parametrize("document", ["README.md", "pyproject.toml"])
def test_tested_releases_of_torch_are_named_alike(document: str) -> None:
    (found,) = re.findall(r"[Tt]ested with (?:torch )?([\d.]+\d) to ([\d.]+\d)", (ROOT / document).read_text())
    assert found == (OLDEST_TORCH, NEWEST_TORCH)


def test_the_cross_section_for_other_torches_is_there() -> None:
    command = ["make", "--no-print-directory", "--eval", "show: ; @echo $(COMPAT)", "show"]
    named = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists(), name
