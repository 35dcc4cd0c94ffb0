"""What the processes of a test run share."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[pathlib.Path], object]) -> pathlib.Path:
    """A folder that ``make`` fills in one of the processes of pytest-xdist, while the others wait, for all of them."""
    run = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        run = run.parent  # each process has a folder of its own in that of the run
    folder, unfinished = run / name, run / f"{name}.unfinished"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished.mkdir(exist_ok=True)
            make(unfinished)
            unfinished.rename(folder)
    return folder
