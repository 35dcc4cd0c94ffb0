"""Convolutions of as many images as data say, which torch 2.13 compiles wrongly.

Inductor runs convolutions channels_last. Of how the result lies in memory it asks a convolution of fake tensors, which
says contiguous where it does not know whether there are any images; the compiled program then stops with "expected size
... stride ..." at the first result that is not. Such convolutions, in the mask head of a detector for one, are compiled
contiguous here. Images whose height or width is not known would need more. Under freezing Inductor takes another way,
without that fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch


def depends_on_data(size: Sequence[Any]) -> bool:
    """Whether the number of images does."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(size[0]))


def install() -> None:
    """Wrap Inductor's lowering of convolutions."""
    from torch._inductor import ir
    from torch._inductor.lowering import lowerings
    from torch._inductor.virtualized import V

    convolution = torch.ops.aten.convolution.default
    original = lowerings[convolution]

    def lower(x: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        if x.get_device().type != "cpu" or not depends_on_data(x.get_size()):
            return original(x, weight, *args, **kwargs)
        contiguous = ir.ExternKernel.require_contiguous_strides  # of 1 x 1 weights too: a convolution looks at these
        with patch.object(V.graph, "layout_opt", False):
            return original(contiguous(x), contiguous(weight), *args, **kwargs)

    lowerings[convolution] = lower
