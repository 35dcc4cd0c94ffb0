"""Indices with long formulas of sizes in them: Inductor's answers are those that it gives without our help."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any
from unittest.mock import patch

import pytest
import sympy
import torch._inductor.lowering  # noqa: F401  (first)
from inductor_vision.lowering.workarounds import long_sizes
from inductor_vision.lowering.workarounds.long_sizes import _hide_sizes
from inductor_vision.tests.support.oldest_torch import with_oldest_torch
from sympy.core.cache import clear_cache
from torch._inductor import sizevars
from torch.utils._sympy.functions import FloorDiv, IntTrueDiv, Min, ModularIndexing, ToFloat, TruncToInt

H, W = sympy.symbols("s27 s53", integer=True, positive=True)
X0, X1, X2 = sympy.symbols("x0 x1 x2", integer=True, nonnegative=True)
SCALE = Min(IntTrueDiv(800, Min(H, W)), IntTrueDiv(1333, sympy.Max(H, W)))
ROWS, COLUMNS = (-8 * FloorDiv(-TruncToInt(ToFloat(side) * SCALE), 32) for side in (H, W))

INDICES = {
    "contiguous": X0 * ROWS * COLUMNS + X1 * COLUMNS + X2,
    "channels_last": X2 + 256 * X1 + 256 * COLUMNS * X0,
    "flat": ModularIndexing(X2, 1, COLUMNS) + COLUMNS * ModularIndexing(X2, COLUMNS, ROWS),
    "divided": FloorDiv(X2, 32) + ModularIndexing(X2, 16, 64) + X2 * COLUMNS,
    "without the loop": X0 + COLUMNS,
    "numbers": 3 * X2 + 7,
}


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    for name in long_sizes.NAMES:
        monkeypatch.setattr(sizevars, name, getattr(sizevars, name))  # is undone
    long_sizes.install()


@contextlib.contextmanager
def not_installed() -> Iterator[None]:
    """Within this context Inductor computes with sizes as they are."""
    with patch.multiple(sizevars, **{name: getattr(sizevars, name).with_sizes for name in long_sizes.NAMES}):
        yield


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_strides(index):
    calls = [(X2, None), (X2, 16), (X1, 16)]
    with not_installed():
        sizevars.stride_at_vec_range.cache_clear()
        expected = [sizevars.stride_at_vec_range(index, *call) for call in calls]
    sizevars.stride_at_vec_range.cache_clear()
    ours = [sizevars.stride_at_vec_range(index, *call) for call in calls]
    for a, b in zip(ours, expected):
        assert sympy.simplify(a - b) == 0
        assert not a.has(sympy.Dummy)


def test_sizes_are_symbols():
    symbols: dict[sympy.Expr, sympy.Symbol] = {}
    hidden = _hide_sizes(INDICES["contiguous"], X2, symbols)
    assert not hidden.atoms(sympy.Function)
    assert hidden.xreplace({symbol: size for size, symbol in symbols.items()}) == INDICES["contiguous"]


def calls_of_functions(index: sympy.Expr) -> int:
    """How many functions Inductor and sympy call to find a stride, knowing nothing from before."""
    for function in (sizevars.stride_at_vec_range, sizevars.stride_at, sizevars.simplify_index_in_vec_range):
        function.cache_clear()
    clear_cache()
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        sizevars.stride_at_vec_range(index, X2, 16)
    finally:
        sys.setprofile(None)
    return calls


@with_oldest_torch
def test_torch_still_needs_this():
    """Where this fails, Inductor no longer rearranges sizes, and the module can go. Measured: 200,000 and 25,000."""
    index = INDICES["channels_last"]
    with not_installed():
        alone = calls_of_functions(index)
    ours = calls_of_functions(index)
    sizevars.stride_at_vec_range.cache_clear()
    assert alone > 4 * ours
