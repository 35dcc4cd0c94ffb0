"""Attention of no regions ends the process, where it depends on data how many there are.

The fault, seen in torch 2.13 to 2.15: the CPU's kernel divides by their number. In eager mode it is not called then; in
a graph it is, where the number is not known.

The way around: such attention is its formula.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..common.sizes import depends_on_data


def attention(
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
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        return torch.ops.aten.scaled_dot_product_attention.default._op_dk(composite, *args, **options)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -math.inf)
    args = query, key, value, attn_mask, dropout_p, is_causal
    return torch.ops.aten._scaled_dot_product_attention_math.default(*args, **options)[0]
