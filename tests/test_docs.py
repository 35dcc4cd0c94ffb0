"""The documents say what is so: their examples run, docs/adding-an-op.md to the letter in a copy of the package, and
their links lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
from types import ModuleType

import pytest
from inductor_vision.perf import __main__ as perf
from inductor_vision.version import NEWEST_TORCH, OLDEST_TORCH

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
STEP = re.compile(r"^## \d+\. .*?`(?P<path>[\w/.]+)`$(?P<text>.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```\w+\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What runs the program on its standard input, and prints the path that each operator's call took.
RUN = """
import sys
from inductor_vision.paths import recorded_paths

with recorded_paths() as paths:
    exec(compile(sys.stdin.read(), "the document", "exec"), {"__name__": "__main__"})
for path in paths:
    print(path.kind, path.op)
"""


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: pathlib.Path) -> None:
    """Modules that can be run and, of the benchmarks', the subcommands."""
    (subcommands,) = re.findall(r"{([a-z,]+)}", perf._parser().format_usage())
    for module, argument in re.findall(r"python -m (inductor_vision[\w.]*)(?: ([a-z]+))?", page.read_text()):
        program = importlib.util.find_spec(f"{module}.__main__") if (ROOT / module.partition(".")[2]).is_dir() else None
        assert program or importlib.util.find_spec(module), f"{page.name}: {module}"
        if module == "inductor_vision.perf" and argument:
            assert argument in subcommands.split(","), f"{page.name}: {module} {argument}"


def test_the_cross_section_for_other_torches_is_there() -> None:
    command = ["make", "--no-print-directory", "--eval", "show: ; @echo $(COMPAT)", "show"]
    named = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists(), name


def run_examples(code: str, folder: pathlib.Path) -> set[str]:
    """Run the examples of a document in a process of their own; the paths that calls took, as "template nms"."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-c", RUN]
    run = subprocess.run(command, cwd=folder, env=environment, input=code, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    return set(run.stdout.splitlines())


@pytest.mark.slow
def test_quickstart(torchvision_python: ModuleType, tmp_path: pathlib.Path) -> None:
    (code,) = PYTHON.findall((ROOT / "README.md").read_text())
    weights = 'detector = fasterrcnn_resnet50_fpn(weights="DEFAULT").eval()'  # would be downloaded
    assert weights in code and len(code.split("\n")) <= 12
    small = (
        "from inductor_vision.tests.support.detectors import small_detector\ndetector = small_detector('FasterRCNN')"
    )
    paths = run_examples(code.replace(weights, small) + "assert detections['boxes'].shape[1] == 4", tmp_path)
    assert {"template roi_align", "template nms"} <= paths


@pytest.mark.slow
def test_guide(tmp_path: pathlib.Path) -> None:
    code = "\n".join(PYTHON.findall((ROOT / "docs/guide.md").read_text()))
    operators = "deform_conv2d", "roi_align", "nms", "patch_conv2d", "depthwise_separable_conv2d"
    assert {f"template {name}" for name in operators} <= run_examples(code, tmp_path)


def anchors_of(page: pathlib.Path) -> set[str]:
    """What GitHub and the built pages make of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    for target, anchor in re.findall(r"\]\(((?!\w+:)[^)#]*)(?:#([^)]*))?\)", page.read_text()):
        there = page.parent / target if target else page
        assert there.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors_of(there), f"{page.name}: {target}#{anchor}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_everything_public_is_in_the_reference() -> None:
    documented = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    init = ast.parse((ROOT / "__init__.py").read_text())
    public = [alias.asname for node in init.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(documented) == sorted({*public} - {None, "__version__"})


def test_formulas_are_closed_on_their_line() -> None:
    """Sections of docstrings are split at the colon of a role that is not."""
    for file in [ROOT / "export.py", ROOT / "explain.py", *ROOT.glob("ops/*.py"), *ROOT.glob("integrations/*.py")]:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            assert not re.search(r":math:`[^`]*$", line), f"{file.name}:{number}"
