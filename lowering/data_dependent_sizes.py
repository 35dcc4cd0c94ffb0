"""Layers of as many regions as data say, as of the boxes that a detector has found: faults of torch 2.13.

* *Convolutions* stop with "expected size ... stride ...". Inductor runs them channels_last. Of how the result lies in
  memory it asks a convolution of fake tensors, which says contiguous where it does not know whether there are any
  images; the compiled program then stops at the first result that is not. Such convolutions, in the mask head of a
  detector for one, are compiled contiguous here. Images whose height or width is not known would need more. Under
  freezing Inductor takes another way, without that fault.
* *Batch norms* in eval mode, and instance norms, cannot be traced: "Could not guard on data-dependent expression
  Eq(12544*u0, 0)". What they come down to begins with the question whether its input is empty, which nobody can answer
  before there are data. No answer is needed: here they are their formula, which takes an empty input as well.
* *Attention* of no regions ends the process: the CPU's kernel divides by their number. In eager mode it is not called
  then; in a graph it is, where the number is not known. Here such attention is its formula.
* *Views* may be compiled to silently wrong values, those of heads in ``nn.MultiheadAttention`` for one. To index
  ``[5, N, 8]`` as ``[5, 2 N, 4]`` Inductor multiplies sizes, from the last to the first, until both sides are equal.
  Where it goes too far, as here, a check fails and it goes by way of the flat ``[40 N]`` instead. With N unknown, the
  check is put off until there are data, and lost. Here sizes that are not known to be equal fail it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._C import DispatchKey

from ..paths import logger
from ..version import tested_torch

_COMPOSITE = DispatchKey.CompositeImplicitAutograd


def depends_on_data(*sizes: Any) -> bool:
    """Whether one of the sizes is known only when there are data."""
    if all(isinstance(size, int) for size in sizes):
        return False
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(sizes))


def install() -> None:
    """Wrap Inductor's lowering of convolutions, and its view."""
    from torch._inductor import ir
    from torch._inductor.lowering import lowerings

    convolution = torch.ops.aten.convolution.default
    lowerings[convolution] = _convolution(lowerings[convolution])
    ir.View._dynamic_reshape_indexer = staticmethod(_reshape_indexer(ir.View._dynamic_reshape_indexer))


def install_for_tracing() -> None:
    """Have Python compute what batch norms come down to, and attention, where torch traces with its dispatcher in
    Python: in ``torch.compile`` and ``torch.export``, of whichever model, so only for those who ask for it.

    Where torch, or somebody else, has done so already, that stays; where torch has no such operator, a warning says so.
    """
    for name, function in _TRACED.items():
        try:
            op = getattr(torch.ops.aten, name).default
            if _COMPOSITE not in op.py_kernels:
                op.py_impl(_COMPOSITE)(function)
        except AttributeError as error:
            logger.warning("layers of as many regions as data say are left to torch: %s (%s)", error, tested_torch())


def _convolution(original: Any) -> Any:
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    def lower(x: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        if x.get_device().type != "cpu" or not depends_on_data(x.get_size()[0]):
            return original(x, weight, *args, **kwargs)
        contiguous = ir.ExternKernel.require_contiguous_strides  # of 1 x 1 weights too: a convolution looks at these
        with patch.object(V.graph, "layout_opt", False):
            return original(contiguous(x), contiguous(weight), *args, **kwargs)

    return lower


def _reshape_indexer(original: Any) -> Any:
    from torch._inductor.virtualized import V

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


def _batch_norm(
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
            _COMPOSITE, input, weight, bias, *statistics, cudnn_enabled
        )
    channels = input.shape[1]
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, tensor in named.items():
        if tensor is not None and tensor.numel() != channels:
            raise RuntimeError(f"batch_norm: {name} must have {channels} elements, got {tensor.numel()}")
    from torch._decomp import decomposition_table  # as Inductor has it; aten's kernels fail where there is nothing

    results = decomposition_table[torch.ops.aten.native_batch_norm.default](input, weight, bias, *statistics)
    return *results, input.new_empty(0, dtype=torch.uint8), 0  # as without cuDNN, which would reserve memory


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """``aten::scaled_dot_product_attention``."""
    args: tuple[Any, ...] = query, key, value, attn_mask, dropout_p, is_causal
    if query.device.type != "cpu" or not depends_on_data(*query.shape, *key.shape):
        return torch.ops.aten.scaled_dot_product_attention.default._op_dk(_COMPOSITE, *args, **options)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -math.inf)
    args = query, key, value, attn_mask, dropout_p, is_causal
    return torch.ops.aten._scaled_dot_product_attention_math.default(*args, **options)[0]


# Operators of aten's, and what computes them.
_TRACED = {"_batch_norm_impl_index": _batch_norm, "scaled_dot_product_attention": _attention}
