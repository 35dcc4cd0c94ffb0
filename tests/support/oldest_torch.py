"""Tests that a fault of torch is still there: only with the oldest torch that is served, which keeps what is worked
around, whatever a newer one has mended."""

from __future__ import annotations

import pytest
import torch
from inductor_vision.version import OLDEST_TORCH

with_oldest_torch = pytest.mark.skipif(
    torch.__version__.split(".")[:2] != OLDEST_TORCH.split("."),
    reason=f"workarounds are for torch {OLDEST_TORCH}: a newer one may have mended what is worked around",
)
