"""Strides, paddings and dilations of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def constant_geometry(*pairs: Sequence[Any]) -> str | None:
    """The refusal of kernels that are compiled for a stride, padding and dilation."""
    constant = all(isinstance(number, int) for pair in pairs for number in pair)
    return None if constant else "stride, padding and dilation must be constants"
