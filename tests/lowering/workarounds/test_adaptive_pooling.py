"""Average pooling to sizes that change from call to call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inductor_vision.lowering.workarounds import adaptive_pooling
from inductor_vision.tests.support.compiled import caches_disabled
from torch import Tensor


def pooled(x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    size = like.shape[2:]
    return F.adaptive_avg_pool2d(x, size) + 1, F.interpolate(x, size=size, mode="area")


def call(*to: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 13, 17), torch.empty(1, 1, *to)


def test_values_for_all_sizes():
    with caches_disabled():
        compiled = torch.compile(pooled, fullgraph=True, dynamic=True)
        compiled(*call(5, 6))
        with torch.compiler.set_stance("fail_on_recompile"):
            for arguments in (call(5, 6), call(13, 4), call(20, 30)):
                torch.testing.assert_close(compiled(*arguments), pooled(*arguments))


def test_torch_still_needs_this(monkeypatch: pytest.MonkeyPatch):
    """Where this fails, Inductor compiles such calls, and the module can go."""
    monkeypatch.setattr(adaptive_pooling, "_would_stop", lambda output_size: False)
    with caches_disabled(), pytest.raises(Exception, match="cannot determine truth value of Relational"):
        torch.compile(pooled, fullgraph=True, dynamic=True)(*call(5, 6))
