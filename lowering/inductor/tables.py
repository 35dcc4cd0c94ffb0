"""Inductor's tables and settings, and what their entries are made of. See ``__init__.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch._inductor import config, custom_graph_pass, ir, sizevars
from torch._inductor.codegen import common as codegen_common
from torch._inductor.decomposition import decompositions, fast_random_decomps, select_decomp_table
from torch._inductor.lowering import (
    fallback_handler,
    fallbacks,
    lowerings,
    needs_realized_inputs,
    register_lowering,
)
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def current_decompositions() -> Mapping[Any, Callable[..., Any]]:
    """The table of decompositions that the graph at hand is traced with; empty, if none is."""
    mode = get_proxy_mode()
    return {} if mode is None else mode.decomposition_table


__all__ = [
    "V",
    "codegen_common",
    "config",
    "current_decompositions",
    "custom_graph_pass",
    "decompositions",
    "fallback_handler",
    "fallbacks",
    "fast_random_decomps",
    "ir",
    "lowerings",
    "needs_realized_inputs",
    "register_lowering",
    "select_decomp_table",
    "sizevars",
]
