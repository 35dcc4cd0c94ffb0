"""Memory formats as Inductor sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .inductor import V

_MKLDNN_CONVOLUTION = "mkldnn._convolution"  # what freezing makes of convolutions; always channels_last


def channels_last_strides(strides: Sequence[Any], size: Sequence[Any]) -> bool:
    """Whether the channels of a pixel are neighbours, and columns are not."""
    same = V.graph.sizevars.statically_known_equals
    return same(strides[1], 1) and not (same(strides[3], 1) and not same(size[3], 1))


def feeds_channels_last_convolution(node: torch.fx.Node) -> bool:
    """Whether the result of ``node`` reaches, directly or through other operators, a convolution that Inductor runs
    channels_last."""

    def is_one(user: torch.fx.Node) -> bool:
        if user.target is torch.ops.aten.convolution.default:
            return V.graph.layout_opt
        return str(user.target).startswith(_MKLDNN_CONVOLUTION)

    seen, pending = set(), [node]
    while pending:
        for user in pending.pop().users:
            if is_one(user):
                return True
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return False
