"""Weights of convolutions are packed for oneDNN when a model is frozen, whatever sizes maps have, and once each."""

from __future__ import annotations

import contextlib

import pytest
import torch
from inductor_vision.lowering.workarounds.unpacked_weights import weights_packed
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import Traced, trace_and_run
from inductor_vision.tests.support.frozen import is_called
from inductor_vision.tests.support.oldest_torch import with_oldest_torch
from torch import Tensor, nn
from torch.fx import Node

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")


class Levels(nn.Module):
    """A layer for two maps, and one for the mean of all channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.alone = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(1, 16, 1)

    def forward(self, fine: Tensor, coarse: Tensor) -> list[Tensor]:
        fine, coarse = self.shared(fine), self.shared(coarse)
        return [fine, coarse, self.alone(fine.mean(1, keepdim=True))]


def maps(height: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(1, 16, height, width), torch.randn(1, 16, height + 3, width + 3)


@torch.no_grad()
def frozen(dynamic: bool, packed: bool = True) -> tuple[Traced, list[Node]]:
    """The traced model, which must compute what the model does, and the weights of its convolutions."""
    model, inputs = Levels(), maps(9, 11)
    torch._dynamo.reset()
    with weights_packed() if packed else contextlib.nullcontext():
        traced = trace_and_run(model, *inputs, dynamic=dynamic, config={"freezing": True})
    for ours, expected in zip(traced.result, model(*inputs)):
        assert_close(ours, expected, torch.float32)
    (graph,) = traced.graphs
    return traced, [node.args[1] for node in graph.nodes if is_called(node, "mkldnn._convolution_pointwise")]


def is_packed(weight: Node) -> bool:
    return getattr(weight.graph.owning_module, weight.target).is_mkldnn


@torch.no_grad()
def test_dynamic_sizes():
    traced, weights = frozen(dynamic=True)
    fine, coarse, alone = weights
    assert fine is coarse and is_packed(fine)
    assert not is_packed(alone)  # Inductor would not know whether its result is contiguous
    others = maps(40, 5)
    for ours, expected in zip(traced.function(*others), Levels()(*others)):
        assert_close(ours, expected, torch.float32)


def test_static_sizes():
    _, (fine, coarse, alone) = frozen(dynamic=False)
    assert fine is coarse and is_packed(fine) and is_packed(alone)


@with_oldest_torch
def test_torch_still_needs_this():
    """Where this fails, Inductor packs weights for dynamic sizes, or one for all levels: the module can be less."""
    _, weights = frozen(dynamic=True, packed=False)
    assert not any(map(is_packed, weights))
    _, (fine, coarse, _) = frozen(dynamic=False, packed=False)
    assert fine is not coarse
