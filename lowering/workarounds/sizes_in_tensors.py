"""torch.as_tensor and torch.linspace make constants of sizes, where torch.export traces for any.

The fault, seen in torch 2.13: as_tensor, unlike torch.tensor, is made of what numbers are in the example, and how many
linspace makes is no symbol for aten. So the program is for the size of the example alone, which torch.export refuses.

The way around: such tensors are put together from numbers that aten takes as symbols, or computed from indices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class sizes_in_tensors(TorchFunctionMode):  # a context, as its neighbours are
    """Have tensors of numbers, some of them symbols, be made number by number within this context, and those of evenly
    spaced numbers, as many of them as a symbol says, from their indices."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.as_tensor:
            numbers = args[0] if args else kwargs.get("data")
            if isinstance(numbers, (list, tuple)):
                leaves = tree_leaves(numbers)
                if any(isinstance(leaf, torch.SymInt) for leaf in leaves) and not any(
                    isinstance(leaf, Tensor) for leaf in leaves
                ):
                    whole = all(isinstance(leaf, (int, torch.SymInt)) for leaf in leaves)
                    return _stacked(numbers, torch.int64 if whole else torch.get_default_dtype(), *args[1:], **kwargs)
        if func is torch.linspace and len(args) == 3 and isinstance(args[2], torch.SymInt):
            return _spaced(*args, **kwargs)
        return func(*args, **kwargs)


def _stacked(
    numbers: Any, usual: torch.dtype, dtype: torch.dtype | None = None, device: Any = None, *, data: Any = None
) -> Tensor:
    """``usual``: the dtype where none is wanted."""
    if isinstance(numbers, (list, tuple)):
        return torch.stack([_stacked(number, usual, dtype, device) for number in numbers])
    return torch.full((), numbers, dtype=dtype or usual, device=device)


def _spaced(start: Any, end: Any, steps: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    """What aten computes: the second half from the end."""
    dtype = dtype or torch.get_default_dtype()
    index = torch.arange(steps, dtype=torch.promote_types(dtype, torch.float32), device=device)
    step = (end - start) / torch.sym_max(steps - 1, 1)
    from_start, from_end = start + step * index, end - step * (steps - 1 - index)
    return torch.where(index < torch.sym_max(steps // 2, 1), from_start, from_end).to(dtype)
