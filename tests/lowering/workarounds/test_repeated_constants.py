"""Constants that several nodes of a frozen graph read."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.lowering  # from here on this package is among its tables
from inductor_vision.lowering.workarounds.repeated_constants import MergeConstants
from inductor_vision.tests.support.oldest_torch import with_oldest_torch
from torch._inductor import config
from torch._inductor.constant_folding import constant_fold
from torch.fx import Graph, GraphModule


@pytest.fixture
def module() -> GraphModule:
    """``x * c + (c + c)``, where what is folded has a node of its own for c."""
    graph = Graph()
    x, ours, folded = graph.placeholder("x"), graph.get_attr("c"), graph.get_attr("c")
    product = graph.call_function(torch.ops.aten.mul.Tensor, (x, ours))
    double = graph.call_function(torch.ops.aten.add.Tensor, (folded, folded))
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (product, double)))
    return GraphModule({"c": torch.arange(3.0)}, graph)


@with_oldest_torch
def test_torch_still_needs_this(module):
    with pytest.raises(RuntimeError, match="nonexistent attribute c"):
        constant_fold(module)


def test_merged(module):
    expected = module(torch.ones(3))
    with config.patch(freezing=True):
        MergeConstants("tested")(module.graph)
    constant_fold(module)
    assert len(module.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)) == 1
    assert torch.equal(module(torch.ones(3)), expected)
