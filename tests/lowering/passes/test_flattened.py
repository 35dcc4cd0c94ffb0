"""Linear layers behind convolutions: which read the map as it lies in memory, and that nothing is copied then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inductor_vision.lowering.passes import convolutions
from inductor_vision.lowering.passes.convolution_kernels import Winograd
from inductor_vision.lowering.passes.convolutions import ChooseConvolutions
from inductor_vision.lowering.passes.direct_convolution import DirectConvolution
from inductor_vision.lowering.passes.flattened import FlattenAsItLies
from inductor_vision.perf.backends import Autocast
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import compile_and_run, trace_and_run
from torch import Tensor, nn
from torch.fx import Graph

aten = torch.ops.aten
FROZEN = {"freezing": True, "joint_custom_pre_pass": [FlattenAsItLies("tested")]}


class Head(nn.Module):
    """A convolution, something, and a linear layer, on the regions that have a score."""

    def __init__(self, *between: nn.Module, pixels: int = 6 * 5, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), *between)
        self.linear = nn.Linear(16 * pixels, 12, bias=bias)

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        return self.linear(self.layers(x[scores > 0]).flatten(1))


class Scale(nn.Module):
    """A frozen norm."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(9, 4, 6, 5), torch.arange(-4.0, 5.0)


def takes_pixels(graph: Graph) -> bool:
    """Whether a map is flattened pixel by pixel."""
    permuted = [node for node in graph.nodes if node.target is aten.permute.default]
    return any(node.args[1] == [0, 2, 3, 1] for node in permuted)


@torch.no_grad()
def check(module: nn.Module, *args: Tensor, found: list[str], config: dict[str, Any] = FROZEN) -> None:
    """That these layers take maps as they lie, and results stay the same."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        traced = trace_and_run(module, *args, config=config)
    assert [path.detail for path in traced.paths] == found
    assert [takes_pixels(graph) for graph in traced.graphs] == [bool(found)]
    expected = module(*args)
    assert_close(traced.result, expected, expected.dtype)


TAKEN: dict[str, Callable[[], nn.Module]] = {
    "nothing between": Head,
    "norm": lambda: Head(Scale(), nn.ReLU()),
    "pool": lambda: Head(nn.ReLU(), nn.MaxPool2d(2), pixels=3 * 2),
    "channels_last": lambda: Head(nn.ReLU()).to(memory_format=torch.channels_last),
    "autocast": lambda: Autocast(Head(nn.ReLU())),
    "no bias": lambda: Head(nn.ReLU(), bias=False),
}


@pytest.mark.parametrize("name", TAKEN)
def test_weights_are_permuted(name):
    layer = "module.linear" if name == "autocast" else "linear"
    size = "3 x 2" if name == "pool" else "6 x 5"
    check(TAKEN[name](), *inputs(), found=[f"{layer} (16 x {size} to 12) takes a channels_last map"])


class Returned(Head):
    """The flattened map is wanted itself."""

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        flat = self.layers(x).flatten(1)
        return self.linear(flat) + flat[:, :12]


class Averaged(Head):
    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        return self.linear(self.layers(x).mean((2, 3)))


class Unconvolved(Head):
    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        return self.linear(x.repeat(1, 4, 1, 1).flatten(1))


class Computed(Head):
    """The weight is not a constant."""

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        return nn.functional.linear(self.layers(x).flatten(1), self.linear.weight * scores.sum())


LEFT: dict[str, Callable[[], nn.Module]] = {
    "returned": Returned,
    "averaged": lambda: Averaged(pixels=1),
    "one pixel": lambda: Head(nn.MaxPool2d((6, 5)), pixels=1),
    "not of a convolution": Unconvolved,
    "computed weight": Computed,
}


@pytest.mark.parametrize("name", LEFT)
def test_others_are_left_alone(name):
    check(LEFT[name](), *inputs(), found=[])


def test_nothing_happens_without_freezing():
    check(Head(nn.ReLU()), *inputs(), found=[], config={**FROZEN, "freezing": False})


@pytest.mark.parametrize("kernel", [DirectConvolution(), Winograd(4)], ids=str)
@torch.no_grad()
def test_behind_a_kernel_of_this_package(monkeypatch, kernel):
    """Whichever pass runs first."""
    monkeypatch.setattr(convolutions, "library_seconds", lambda convolution: 1.0)
    passes = [ChooseConvolutions("tested", [kernel], 9.0), FlattenAsItLies("tested")]
    head, (x, _) = Head(nn.ReLU()), inputs()
    for order in (passes, passes[::-1]):
        torch._dynamo.reset()
        config = {"freezing": True, "joint_custom_pre_pass": order}
        traced = trace_and_run(lambda x: head.linear(head.layers(x).flatten(1)), x, config=config)
        assert sorted(path.kind for path in traced.paths if path.op in ("conv2d", "linear")) == ["fused", "replaced"]
        assert_close(traced.result, head.linear(head.layers(x).flatten(1)), torch.float32)


@torch.no_grad()
@pytest.mark.usefixtures("unoptimized")
def test_nothing_is_copied():
    """Without the pass there is a loop between the convolution and the product."""
    head, (x, _) = Head(nn.ReLU()), inputs()
    x = x.contiguous(memory_format=torch.channels_last)
    loops = []
    for config in (FROZEN, {"freezing": True, "joint_custom_pre_pass": None}):
        torch._dynamo.reset()
        compiled = compile_and_run(lambda x: head.linear(head.layers(x).flatten(1)), x, config=config)
        assert_close(compiled.result, head.linear(head.layers(x).flatten(1)), torch.float32)
        loops.append(compiled.kernels)
    assert loops[1] == loops[0] + 1
