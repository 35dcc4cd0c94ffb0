"""torch.tensor makes constants of sizes that are symbols, where torch.export traces without Dynamo."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class sizes_in_tensors(TorchFunctionMode):  # a context, as its neighbours are
    """Have tensors of numbers, some of them symbols, be made number by number within this context."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        numbers = args[0] if args else kwargs.get("data")
        if func in (torch.tensor, torch.as_tensor) and isinstance(numbers, (list, tuple)):
            leaves = tree_leaves(numbers)
            if any(isinstance(leaf, torch.SymInt) for leaf in leaves) and not any(
                isinstance(leaf, Tensor) for leaf in leaves
            ):
                dtype = args[1] if len(args) > 1 else kwargs.get("dtype")
                return _stacked(numbers, dtype or torch.int64, kwargs.get("device"))
        return func(*args, **kwargs)


def _stacked(numbers: Any, dtype: torch.dtype, device: Any) -> Tensor:
    if isinstance(numbers, (list, tuple)):
        return torch.stack([_stacked(number, dtype, device) for number in numbers])
    return torch.full((), numbers, dtype=dtype, device=device)
