"""Sizes that are long formulas take Inductor long to compute with.

The fault, seen in torch 2.13: to know how a kernel's memory accesses move with a loop, Inductor has sympy
simplify their indices. A detector's sizes are formulas of the image's height and width, a line long each, and sympy
rearranges every one of them, over and over: three quarters of the time that such a model takes to compile.

The way around: sizes are symbols there, with which the answers are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import sympy

_REMEMBERED = 4096  # indices: more than a detector has
NAMES = ("stride_at", "simplify_index_in_vec_range")  # of Inductor's functions


def _hide_sizes(index: sympy.Expr, loop: sympy.Symbol, symbols: dict[sympy.Expr, sympy.Symbol]) -> sympy.Expr:
    """The index with symbols for the functions in it that do not depend on the loop; which, is noted in ``symbols``."""
    if not index.args:
        return index
    if not (index.is_Add or index.is_Mul or index.is_Pow or index.has(loop)):
        return symbols.setdefault(index, sympy.Dummy(integer=True))
    return index.func(*(_hide_sizes(part, loop, symbols) for part in index.args))


def _with_sizes_hidden(function: Callable[..., sympy.Expr]) -> Callable[..., sympy.Expr]:
    @functools.lru_cache(_REMEMBERED)
    def call(index: sympy.Expr, loop: sympy.Symbol, *args: Any) -> sympy.Expr:
        symbols: dict[sympy.Expr, sympy.Symbol] = {}
        result = function(_hide_sizes(index, loop, symbols), loop, *args)
        return result.xreplace({symbol: size for size, symbol in symbols.items()})

    return call


def install() -> None:
    """Have Inductor compile what has such sizes several times as fast."""
    from ..inductor.tables import sizevars

    for name in NAMES:
        function = getattr(sizevars, name)
        if not hasattr(function, "with_sizes"):
            hidden = _with_sizes_hidden(function)
            hidden.with_sizes = function  # type: ignore[attr-defined]  # functions take any attribute
            setattr(sizevars, name, hidden)
