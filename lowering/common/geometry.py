"""Kernels, strides, paddings and dilations of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def by_axis(**pairs: Sequence[Any]) -> dict[str, Any]:
    """Name pairs as the kernels' structs do: ``stride=(1, 2)`` is ``stride_height=1, stride_width=2``."""
    return {f"{name}_{axis}": n for name, pair in pairs.items() for axis, n in zip(("height", "width"), pair)}


def constant_geometry(*pairs: Sequence[Any]) -> str | None:
    """The refusal of kernels that are compiled for a stride, padding and dilation."""
    constant = all(isinstance(number, int) for pair in pairs for number in pair)
    return None if constant else "stride, padding and dilation must be constants"
