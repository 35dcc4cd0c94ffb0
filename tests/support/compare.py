"""How results are compared: one error measure, and one tolerance for each dtype."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest relative error, see `relative_error`, of a result in a dtype against the same inputs computed in float64.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``max |actual - expected| / max |expected|``; infinite where not the same elements are NaN or infinite."""
    actual, expected = actual.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    if not torch.allclose(actual[~finite], expected[~finite], equal_nan=True):
        return float("inf")
    actual, expected = actual[finite], expected[finite]
    if expected.numel() == 0:
        return 0.0
    error = (actual - expected).abs().max().item()
    if error != error:
        return float("inf")
    scale = expected.abs().max().item()
    return error / scale if scale > 0 else error


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "result") -> None:
    """Shapes agree, and the relative error is within what ``dtype`` allows."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = relative_error(actual, expected)
    assert error <= TOLERANCE[dtype], f"{what}: relative error {error:.3g}, allowed {TOLERANCE[dtype]:.3g}"
