"""Runs examples/cpp, the C++ program that runs packages."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

_BUILD = pathlib.Path(__file__).parents[2] / "examples" / "cpp" / "build.sh"


def build(path: pathlib.Path) -> None:
    if not shutil.which(os.environ.get("CXX", "g++")) or not shutil.which("bash"):
        pytest.skip("needs g++ and bash")
    subprocess.run([_BUILD, path], check=True, env={**os.environ, "PYTHON": sys.executable})


def run(program: pathlib.Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def run_on(
    program: pathlib.Path, package: pathlib.Path, image: Tensor, folder: pathlib.Path, threads: int
) -> tuple[dict[str, Tensor], str]:
    """The program's outputs for an image, by name, each of them flat and float32, and what it printed."""
    image.numpy().tofile(folder / "input")
    shape = "x".join(map(str, image.shape))
    files = ("--input", folder / "input", "--output", folder / "outputs")
    result = run(program, package, "--shape", shape, *files, "--threads", threads, "--runs", 3)
    assert result.returncode == 0, result.stderr
    outputs = sorted((folder / "outputs").iterdir())
    return {file.name: torch.from_numpy(np.fromfile(file, dtype=np.float32)) for file in outputs}, result.stdout


def detections_of(outputs: dict[str, Tensor], names: Sequence[str], size: Sequence[int]) -> dict[str, Tensor]:
    """Outputs with these names as a detector returns them for an image of this size."""
    shapes = {"scores": (-1,), "labels": (-1,), "boxes": (-1, 4), "masks": (-1, 1, *size)}
    found = {name: outputs[name].view(shapes[name]) for name in names}
    return {**found, "labels": found["labels"].long()}
