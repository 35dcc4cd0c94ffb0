"""Puts in place what is worked around while torch traces: in ``torch.compile`` and ``torch.export``, of any model."""

from __future__ import annotations

import torch
from torch._C import DispatchKey

from ...paths import logger
from ...version import tested_torch
from .data_dependent_attention import attention
from .data_dependent_batch_norms import batch_norm

# Operators of aten's, and what computes them.
_TRACED = {"_batch_norm_impl_index": batch_norm, "scaled_dot_product_attention": attention}


def install_for_tracing() -> None:
    """Have Python compute what batch norms come down to, and attention, where torch traces with its dispatcher in
    Python: in ``torch.compile`` and ``torch.export``, of whichever model, so only for those who ask for it.

    Where torch, or somebody else, has done so already, that stays; where torch has no such operator, a warning says so.
    """
    for name, function in _TRACED.items():
        try:
            op = getattr(torch.ops.aten, name).default
            if DispatchKey.CompositeImplicitAutograd not in op.py_kernels:
                op.py_impl(DispatchKey.CompositeImplicitAutograd)(function)
        except AttributeError as error:
            logger.warning("layers of as many regions as data say are left to torch: %s (%s)", error, tested_torch())
