"""Average pooling to a size that changes from call to call stops the compilation.

The fault, seen in torch 2.13: "TypeError: cannot determine truth value of Relational". Inductor's lowering of
``adaptive_avg_pool2d``, which ``interpolate`` calls for "area", decides by how many pixels are averaged, and that is a
formula where the size of the output is not known.

The way around: such calls run as they do eagerly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def install() -> None:
    """Wrap Inductor's lowering of the average pooling."""
    from ..inductor.tables import lowerings

    pooling = torch.ops.aten._adaptive_avg_pool2d.default
    lowerings[pooling] = _eager_where_it_would_stop(pooling, lowerings[pooling])


def _would_stop(output_size: Sequence[Any]) -> bool:
    return not all(isinstance(length, int) or length.is_number for length in output_size)


def _eager_where_it_would_stop(overload: torch._ops.OpOverload, original: Any) -> Any:
    from ..inductor.tables import fallback_handler

    def lower(x: Any, output_size: Sequence[Any]) -> Any:
        if not _would_stop(output_size):
            return original(x, output_size)
        return fallback_handler(overload, add_to_fallback_set=False)(x, output_size)

    return lower
