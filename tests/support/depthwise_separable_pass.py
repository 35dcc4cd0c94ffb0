"""Models with depthwise-separable pairs, and what the pass that finds these makes of them.

Dynamo traces a model, the pass runs on the graph, and what it made is run eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.lowering  # from here on this package is among its tables
from inductor_vision.lowering.passes.depthwise_separable import FuseDepthwiseSeparable
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.layouts import strides_of
from torch import Tensor, nn

OPERATORS = (
    torch.ops.inductor_vision.depthwise_separable_conv2d.default,
    torch.ops.inductor_vision.inverted_residual_conv2d.default,
)


class Rewritten:
    """What the pass made of a model.

    Attributes:
        result: what the rewritten graphs compute, run eagerly.
        calls: the operators' calls in them.
        left: why depthwise convolutions were left alone.
    """

    def __init__(self, model: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> None:
        self.calls: list[torch.fx.Node] = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> torch.fx.GraphModule:
            self.calls += rewrite(graph)
            return graph

        torch._dynamo.reset()
        with recorded_paths() as paths:
            self.result = torch.compile(model, backend=backend, dynamic=dynamic)(*inputs)
        self.left = [path.detail for path in paths if path.kind == "left alone"]
        assert [path.kind for path in paths].count("fused") == len(self.calls)

    @property
    def activations(self) -> list[str]:
        return [node.args[-1] for node in self.calls]

    @property
    def expanded(self) -> list[bool]:
        """Whether each call has an expansion."""
        return [node.target is OPERATORS[1] for node in self.calls]


def rewrite(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """Run the pass on a graph; the operators' calls that are in it then."""
    FuseDepthwiseSeparable("tested")(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return [node for node in graph.graph.nodes if node.target in OPERATORS]


def assert_fused(model: nn.Module, *inputs: Tensor, count: int = 1, dtype: torch.dtype = torch.float32) -> Rewritten:
    """As many pairs are replaced, and the results are the model's."""
    rewritten = Rewritten(model, *inputs)
    expected = model(*inputs)
    assert len(rewritten.calls) == count, rewritten.left
    assert rewritten.result.dtype == expected.dtype
    assert strides_of(rewritten.result) == strides_of(expected)
    assert_close(rewritten.result, expected, dtype)
    return rewritten


def assert_left(model: Callable[..., Any], *inputs: Tensor, why: str | None) -> None:
    """Nothing is replaced; ``why`` is in what is said about it, None if there is nothing to be said."""
    rewritten = Rewritten(model, *inputs)
    assert rewritten.calls == []
    if why is None:
        assert rewritten.left == []
    else:
        (left,) = rewritten.left
        assert why in left


def norm(channels: int, affine: bool = True, **options: Any) -> nn.BatchNorm2d:
    """A batch norm that has seen something."""
    layer = nn.BatchNorm2d(channels, affine=affine, **options)
    if layer.track_running_stats:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.uniform_(layer.weight, -2, 2)
        nn.init.normal_(layer.bias)
    return layer


def depthwise(channels: int = 8, multiplier: int = 1, **options: Any) -> nn.Conv2d:
    options = {"kernel_size": 3, "padding": 1, "bias": False, **options}
    return nn.Conv2d(channels, channels * multiplier, groups=channels, **options)


def pointwise(channels: int = 8, out_channels: int = 12, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 1, **{"bias": False, **options})


def block(activation: nn.Module | None = None, **options: Any) -> nn.Sequential:
    """A depthwise-separable convolution with norms, as MobileNets have it."""
    first = depthwise(**options)
    layers = [first, norm(first.out_channels), activation, pointwise(first.out_channels), norm(12)]
    return nn.Sequential(*(layer for layer in layers if layer is not None)).eval()


IMAGE = (2, 8, 9, 11)


class Activated(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.depthwise, self.norm, self.pointwise = depthwise(), norm(8), pointwise()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.activation(self.norm(self.depthwise(x))))
