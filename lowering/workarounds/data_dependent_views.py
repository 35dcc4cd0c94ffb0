"""Views of tensors whose sizes data decide may be compiled to silently wrong values.

The fault, seen in torch 2.13 to 2.15, with heads in ``nn.MultiheadAttention`` for one: to index ``[5, N, 8]`` as
``[5, 2 N, 4]`` Inductor multiplies sizes, from the last to the first, until both sides are equal. Where it goes too
far, as here, a check fails and it goes by way of the flat ``[40 N]`` instead. With N unknown, the check is put off
until there are data, and lost.

The way around: sizes that are not known to be equal fail the check.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

from ..common.sizes import depends_on_data


def install() -> None:
    """Wrap Inductor's view."""
    from ..inductor.tables import ir

    ir.View._dynamic_reshape_indexer = staticmethod(_reshape_indexer(ir.View._dynamic_reshape_indexer))


def _reshape_indexer(original: Any) -> Any:
    from ..inductor.tables import V

    def indexer(old_size: Sequence[Any], new_size: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        flat = len(old_size) == 1 or len(new_size) == 1  # where it cannot go too far
        if flat or not depends_on_data(*old_size, *new_size):
            return original(old_size, new_size, *args, **kwargs)
        sizes = V.graph.sizevars

        def check_equals(left: Any, right: Any) -> None:
            if not sizes.statically_known_equals(left, right):
                raise AssertionError(f"{left} and {right} may differ")  # Inductor then goes by way of the flat size

        with patch.object(sizes, "check_equals", check_equals):
            return original(old_size, new_size, *args, **kwargs)

    return indexer
