"""Sizes that are dynamic, or known only when there are data."""

from __future__ import annotations

from typing import Any

import torch


def depends_on_data(*sizes: Any) -> bool:
    """Whether one of the sizes is known only when there are data."""
    if all(isinstance(size, int) for size in sizes):
        return False
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(sizes))


def likely(size: int | torch.SymInt) -> int | None:
    """A size, or that which a dynamic one has now; None where data decide about it."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else None
