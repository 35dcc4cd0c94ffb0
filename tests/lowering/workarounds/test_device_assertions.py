"""Assertions in Triton code for the CPU. That they raise is in tests/lowering/triton/test_compiled.py."""

from __future__ import annotations

import pytest
import torch
from inductor_vision.lowering.workarounds import device_assertions
from inductor_vision.tests.support.compiled import caches_disabled
from inductor_vision.tests.support.oldest_torch import with_oldest_torch
from inductor_vision.tests.support.triton import active
from torch import Tensor
from torch._inductor import config
from torch._inductor.utils import run_and_get_code


def asserting(x: Tensor) -> Tensor:
    torch._assert_async((x > 0).all(), "x must be positive")
    return x * 2


def generated(backend: str) -> str:
    settings = {"cpu_backend": "triton", "compile_threads": 1, "triton.autotune_pointwise": False}
    with active(backend), config.patch(settings), caches_disabled():
        _, (code,) = run_and_get_code(torch.compile(asserting, fullgraph=True), torch.rand(8) + 1)
    return code


@with_oldest_torch
@pytest.mark.parametrize("backend", ["interpreter", "triton-cpu"])
def test_torch_still_needs_this(backend: str, monkeypatch: pytest.MonkeyPatch):
    """Where this fails, Inductor makes no ``tl.device_assert`` of an assertion on the CPU, and the module can go."""
    worked_around = generated(backend)
    assert "device_assert" not in worked_around and "assert_async" in worked_around
    monkeypatch.setattr(device_assertions, "_would_abort", lambda device: False)
    torch._dynamo.reset()
    assert "tl.device_assert" in generated(backend)
