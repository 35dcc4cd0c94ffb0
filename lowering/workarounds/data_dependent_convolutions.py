"""Convolutions of as many images as data say, as of the boxes that a detector has found, stop with a wrong stride.

The fault, seen in torch 2.13 to 2.15: "expected size ... stride ...". Inductor runs convolutions channels_last. Of how
the result lies in memory it asks a convolution of fake tensors, which says contiguous where it does not know whether
there are any images; the compiled program then stops at the first result that is not.

The way around: such convolutions, in the mask head of a detector for one, are compiled contiguous. Images whose height
or width is not known would need more. Under freezing Inductor takes another way, without that fault.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

from ..common.sizes import depends_on_data


def install() -> None:
    """Wrap Inductor's lowering of convolutions."""
    from ..inductor.tables import lowerings

    convolution = torch.ops.aten.convolution.default
    lowerings[convolution] = _convolution(lowerings[convolution])


def _convolution(original: Any) -> Any:
    from ..inductor.tables import V, ir

    def lower(x: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        if x.get_device().type != "cpu" or not depends_on_data(x.get_size()[0]):
            return original(x, weight, *args, **kwargs)
        contiguous = ir.ExternKernel.require_contiguous_strides  # of 1 x 1 weights too: a convolution looks at these
        with patch.object(V.graph, "layout_opt", False):
            return original(contiguous(x), contiguous(weight), *args, **kwargs)

    return lower
