"""Is a result right?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def tensors(output: Any) -> list[Tensor]:
    """What a contender returned, as tensors: torch's or NumPy's, alone or in a sequence or mapping."""
    if isinstance(output, Tensor):
        return [output.detach()]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, Sequence):
        return [tensor for item in output for tensor in tensors(item)]
    return [torch.as_tensor(output)]


def relative_error(output: Any, reference: Any) -> float:
    """max |a - b| / max |b|, the largest over all outputs; infinite for wrong shapes, for NaN, for wrong integers."""
    ours, right = tensors(output), tensors(reference)
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in right]:
        return math.inf
    return max((_error(a, b) for a, b in zip(ours, right)), default=math.inf)


def _error(a: Tensor, b: Tensor) -> float:
    if b.numel() == 0:
        return 0.0
    if not b.is_floating_point():
        return 0.0 if torch.equal(a, b) else math.inf
    a, b = a.double(), b.double()
    error = ((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(torch.float32).tiny)).item()
    return error if math.isfinite(error) else math.inf
