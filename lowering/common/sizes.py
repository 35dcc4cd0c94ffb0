"""Sizes that are known only when there are data."""

from __future__ import annotations

from typing import Any


def depends_on_data(*sizes: Any) -> bool:
    """Whether one of the sizes is known only when there are data."""
    if all(isinstance(size, int) for size in sizes):
        return False
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(sizes))
