"""What the command lines of the benchmarks and of the advisor have in common."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

from .spec import UserError


def positive(kind: type) -> Callable[[str], float]:
    """An argument's type: a number of that kind above 0."""

    def parse(text: str) -> float:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value" with it
    return parse


def check_outputs(*paths: Path | None, plot: Path | None = None) -> None:
    """What would make a long run end in an error is better said before it.

    Raises:
        UserError: a file cannot be written where it should be, or ``plot`` cannot be drawn.
    """
    for path in (*paths, plot):
        if path and not path.absolute().parent.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib, which is not installed")
