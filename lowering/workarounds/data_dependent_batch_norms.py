"""Batch norms in eval mode, and instance norms, of as many images as data say cannot be traced or exported.

The fault, seen in torch 2.13 to 2.15: "Could not guard on data-dependent expression Eq(12544*u0, 0)". What they come
down to begins with the question whether its input is empty, which nobody can answer before there are data.

The way around: no answer is needed; they are their formula, which takes an empty input as well.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import DispatchKey

from ..common.sizes import depends_on_data


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """``aten::_batch_norm_impl_index``: with the result what its gradient needs."""
    statistics = running_mean, running_var, training, momentum, eps
    if not depends_on_data(*input.shape):
        return torch.ops.aten._batch_norm_impl_index.default._op_dk(
            DispatchKey.CompositeImplicitAutograd, input, weight, bias, *statistics, cudnn_enabled
        )
    channels = input.shape[1]
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, tensor in named.items():
        if tensor is not None and tensor.numel() != channels:
            raise RuntimeError(f"batch_norm: {name} must have {channels} elements, got {tensor.numel()}")
    from torch._decomp import decomposition_table  # as Inductor has it; aten's kernels fail where there is nothing

    results = decomposition_table[torch.ops.aten.native_batch_norm.default](input, weight, bias, *statistics)
    return *results, input.new_empty(0, dtype=torch.uint8), 0  # as without cuDNN, which would reserve memory
