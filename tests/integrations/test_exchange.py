"""What stands in the place of a library's functions."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from inductor_vision.integrations.exchange import Library, always
from inductor_vision.tests.support.compiled import trace_and_run
from torch import Tensor

SOURCE = """
def scaled(x, factor=2.0, *, plus=0.0):
    return x * factor + plus
"""


@pytest.fixture
def module(monkeypatch):
    made = ModuleType("a_library")
    exec(SOURCE, made.__dict__)
    monkeypatch.setitem(sys.modules, "a_library", made)
    return made


def shifted(x: Tensor, factor: float = 2.0, *, plus: float = 0.0) -> Tensor:
    return x + factor - plus


def test_a_function_that_dynamo_has_traced_before(module):
    """With defaults: what Dynamo remembers of its parameters is not that of what takes its place."""
    x = torch.ones(3)

    def model(x: Tensor) -> Tensor:
        return module.scaled(x, plus=1.0)

    assert torch.equal(trace_and_run(model, x).result, torch.full((3,), 3.0))
    Library("a_library", "1.0").exchange("scaled", module, shifted, always)
    torch._dynamo.reset()
    assert torch.equal(trace_and_run(model, x).result, torch.full((3,), 2.0))
    assert torch.equal(model(x), torch.full((3,), 2.0))
