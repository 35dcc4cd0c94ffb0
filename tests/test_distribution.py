"""The wheel and the sdist hold the whole package: they are built, installed outside of the tree, and used there."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "inductor_vision"
IGNORED = [line.strip("/\n") for line in (ROOT / ".gitignore").open()]
NOT_INSTALLED = {"docs", "examples", "tests", *IGNORED}


def files_of_the_package() -> set[str]:
    """Code that an installed package should have, as it is named in a wheel."""
    tops = [path for path in ROOT.iterdir() if path.name not in NOT_INSTALLED and not path.name.startswith(".")]
    found = [file for top in tops for file in (top.rglob("*") if top.is_dir() else [top])]
    return {f"{PACKAGE}/{file.relative_to(ROOT)}" for file in found if file.suffix in (".py", ".h", ".typed")}


def run(*command: str | os.PathLike[str], **environment: str) -> None:
    variables = {**os.environ, **environment}
    variables.pop("PYTHONPATH", None)
    result = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=600)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """The wheel of the tree, which ``pip install .`` installs, and that of the sdist, which ``make dist`` makes; both
    built in a copy, without what is left of earlier builds."""
    folder = tmp_path_factory.mktemp("distribution")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*IGNORED, ".git"))
    wheels = {}
    for source, options in (("tree", ["--wheel"]), ("sdist", [])):
        run(sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", folder / source, tree)
        (wheels[source],) = (folder / source).glob("*.whl")
    return wheels


@pytest.mark.slow
@pytest.mark.parametrize("source", ["tree", "sdist"])
def test_no_file_is_forgotten(wheels: dict[str, pathlib.Path], source: str) -> None:
    expected = files_of_the_package()
    assert {f"{PACKAGE}/__init__.py", f"{PACKAGE}/ops/nms.py", f"{PACKAGE}/lowering/cpp/nms.h"} < expected
    with zipfile.ZipFile(wheels[source]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == expected


@pytest.mark.slow
def test_the_sdist_has_what_is_tested(wheels: dict[str, pathlib.Path]) -> None:
    """Besides the package: documents, examples, results of benchmarks, and tests."""
    (sdist,) = wheels["sdist"].parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = [file for top in ("docs", "examples", "perf", "tests") for file in (ROOT / top).rglob("*.*")]
    assert {str(file.relative_to(ROOT)) for file in files if file.is_file() and file.suffix != ".pyc"} <= names


USE = """
import importlib
import pathlib
import sys

import torch
import inductor_vision

assert pathlib.Path(inductor_vision.__file__).is_relative_to(sys.prefix), inductor_vision.__file__
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:  # Triton, torchvision and the like need not be installed
        assert not error.name.startswith("inductor_vision"), f"{module}: {error}"

boxes, scores = torch.tensor([[0.0, 0, 4, 4], [1, 0, 5, 4], [6, 6, 9, 9]]), torch.tensor([0.5, 0.7, 0.2])
(path,) = inductor_vision.explain(lambda *args: inductor_vision.nms(*args, 0.5, max_detections=3), boxes, scores).paths
assert path.kind == "template", path
compiled = torch.compile(inductor_vision.nms, fullgraph=True)
assert compiled(boxes, scores, 0.5).tolist() == [1, 2]
"""


@pytest.mark.slow
def test_an_installed_wheel_works_outside_of_the_tree(wheels: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheels["sdist"])
    # torch and the like are those of this environment. Its own .pth files, such as that of an installation from the
    # tree, do not count when it is named in one.
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "environment.pth").write_text("\n".join(here))
    modules = {
        name.removesuffix(".py").removesuffix("/__init__") for name in files_of_the_package() if name.endswith(".py")
    }
    names = sorted(name.replace("/", ".") for name in modules if not name.endswith("__main__"))
    environment = {"AOT_INDUCTOR_DEBUG_COMPILE": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    run(python, "-c", USE, *names, **environment)
