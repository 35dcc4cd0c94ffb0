"""Affine maps behind convolutions: what is folded into these, what is left alone, and how near to float64 it is."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import inductor_vision
import pytest
import torch
from inductor_vision import fold_norms
from inductor_vision.lowering.common import cache_key
from inductor_vision.lowering.passes.affine_maps import FoldAffineMaps
from inductor_vision.lowering.passes.flattened import FlattenAsItLies
from inductor_vision.lowering.passes.heads import JoinHeads
from inductor_vision.lowering.workarounds.repeated_constants import MergeConstants
from inductor_vision.perf.backends import Autocast
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import Traced, compile_and_run, run_python
from inductor_vision.tests.support.detectors import stock_detector
from inductor_vision.tests.support.frozen import (
    affine_maps_left,
    assert_norms_are_folded,
    casts,
    convolutions,
    freeze_and_run,
)
from inductor_vision.tests.support.layouts import strides_of
from torch import Tensor, nn
from torch._inductor import codecache, config
from torch.fx import Graph

IMAGE = (2, 6, 9, 11)


class FrozenBatchNorm(nn.Module):
    """As torchvision's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean"):
            self.register_buffer(name, torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (t.reshape(1, -1, 1, 1) for t in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class ScaleAndShift(nn.Module):
    """Parameters of three dimensions, and the shift first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.randn(channels, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.shift - x) / self.scale


def batch_norm(channels: int) -> nn.Module:
    layer = nn.BatchNorm2d(channels)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "frozen": FrozenBatchNorm,
    "batch_norm": batch_norm,
    "scale_and_shift": ScaleAndShift,
}


class Bottleneck(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(6, 8, 1, bias=False), norm(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 6, 3, padding=1), norm(6)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())) + x).relu()


def in_float64(model: nn.Module, *inputs: Tensor) -> Tensor:
    return copy.deepcopy(model).double()(*(x.double() for x in inputs))


def folded(traced: Traced) -> list[str]:
    return [path.kind for path in traced.paths if path.op == "convolution"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_norms_residuals_and_activations(norm, precision, layout):
    """What is left is a convolution, a sum and an activation, all in one dtype, which Inductor has oneDNN compute."""
    model = nn.Sequential(nn.Conv2d(6, 6, 1), Bottleneck(NORMS[norm]), Bottleneck(NORMS[norm]), nn.Conv2d(6, 4, 1))
    model, x = model.eval().to(memory_format=layout), torch.randn(IMAGE).contiguous(memory_format=layout)
    exact = in_float64(model, x)
    if precision == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    model = Autocast(model) if precision == "autocast" else model
    eager = model(x)
    traced = freeze_and_run(model, x)
    (graph,) = traced.graphs
    assert folded(traced) == ["fused"] * 4
    assert affine_maps_left(graph) == casts(graph) == []
    assert len(convolutions(graph)) == 6
    operators = [node for node in graph.nodes if node.op == "call_function" and "force_stride" not in str(node.target)]
    assert len(operators) == 6 + 2 * 3 + (
        precision == "autocast"
    )  # two activations and a sum in each; the input's cast
    assert (traced.result.dtype, strides_of(traced.result)) == (eager.dtype, strides_of(eager))
    assert_close(traced.result, exact, eager.dtype)


class Map(nn.Module):
    """A convolution, and a function of its result."""

    def __init__(self, convolution: nn.Module, function: Callable[..., Tensor], **constants: Tensor) -> None:
        super().__init__()
        self.convolution, self.function = convolution, function
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return self.function(self, self.convolution(x), *more)


def conv(**options) -> nn.Module:
    return nn.Conv2d(**{"in_channels": 6, "out_channels": 4, "kernel_size": 3, **options})


def scaled(m: Map, y: Tensor) -> Tensor:
    return (y * m.a - m.b) / 3 + 0.5


def vectors(*shape: int) -> dict[str, Tensor]:
    return {name: torch.rand(shape) + 0.5 for name in "ab"}


def of_channels(*numbers: float) -> Tensor:
    return torch.tensor(numbers)[:, None, None]


FOLDED: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "three dimensions": lambda: (Map(conv(), scaled, **vectors(4, 1, 1)), IMAGE),
    "four dimensions": lambda: (Map(conv(bias=False), scaled, **vectors(1, 4, 1, 1)), IMAGE),
    "tensors of one number": lambda: (Map(conv(bias=False), scaled, **vectors()), IMAGE),
    "one number, three dimensions": lambda: (Map(conv(), scaled, **vectors(1, 1, 1)), IMAGE),
    "one channel": lambda: (Map(conv(out_channels=1), scaled, **vectors(1, 1, 1, 1)), IMAGE),
    "numbers": lambda: (Map(conv(bias=False), lambda m, y: 2 - y * 0.3), IMAGE),
    "a number is added": lambda: (Map(conv(bias=False), lambda m, y: y + 1.5), IMAGE),
    "a number is multiplied": lambda: (Map(conv(), lambda m, y: 2 * y), IMAGE),
    "negative": lambda: (Map(conv(), lambda m, y: -(m.a - y), **vectors(4, 1, 1)), IMAGE),
    "weighted sums": lambda: (
        Map(conv(), lambda m, y: torch.sub(m.b, torch.add(y, m.a, alpha=2), alpha=3), **vectors(4, 1, 1)),
        IMAGE,
    ),
    "groups": lambda: (Map(conv(out_channels=9, groups=3), scaled, **vectors(9, 1, 1)), IMAGE),
    "depthwise": lambda: (Map(conv(out_channels=12, groups=6), scaled, **vectors(12, 1, 1)), IMAGE),
    "transposed": lambda: (Map(nn.ConvTranspose2d(6, 4, 3), scaled, **vectors(4, 1, 1)), IMAGE),
    "transposed, groups": lambda: (
        Map(nn.ConvTranspose2d(6, 4, 3, groups=2, stride=2), scaled, **vectors(4, 1, 1)),
        IMAGE,
    ),
    "transposed, one number": lambda: (
        Map(nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False), scaled, **vectors(1)),
        IMAGE,
    ),
    "one dimension": lambda: (Map(nn.Conv1d(6, 4, 3), scaled, **vectors(4, 1)), (2, 6, 11)),
    "volumes": lambda: (Map(nn.Conv3d(6, 4, 3), scaled, **vectors(4, 1, 1, 1)), (2, 6, 5, 6, 7)),
    "a zero": lambda: (
        Map(conv(), scaled, a=torch.tensor([[[0.0]], [[1]], [[2]], [[0]]]), b=torch.ones(4, 1, 1)),
        IMAGE,
    ),
    "NaN": lambda: (
        Map(conv(), scaled, a=torch.tensor([[[1.0]], [[1]], [[float("nan")]], [[0]]]), b=torch.ones(1)),
        IMAGE,
    ),
    "an infinite shift": lambda: (
        Map(conv(), scaled, a=torch.ones(4, 1, 1), b=torch.tensor([[[1.0]], [[1]], [[float("inf")]], [[0]]])),
        IMAGE,
    ),
}


class Rounded(nn.Module):
    """Rounds, as a convolution under autocast does what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16()


@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("name", FOLDED)
@torch.no_grad()
def test_folded(name, precision):
    model, shape = FOLDED[name]()
    x = torch.randn(shape)
    exact = in_float64(model, x)
    model = Autocast(nn.Sequential(model, Rounded())) if precision == "autocast" else model
    traced = freeze_and_run(model, x)
    assert folded(traced) == ["fused"]
    assert affine_maps_left(traced.graphs[0]) == []
    expected = model(x)
    assert traced.result.dtype == expected.dtype and strides_of(traced.result) == strides_of(expected)
    assert_close(traced.result, exact, torch.bfloat16 if precision == "autocast" else torch.float32)


@torch.no_grad()
def test_shared_weights():
    """A convolution that is applied twice, before one norm and before another."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.first, self.second = nn.Conv2d(6, 6, 1), batch_norm(6), batch_norm(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.convolution(self.second(self.convolution(self.first(self.convolution(x)))))

    model, x = Model().eval(), torch.randn(IMAGE)
    traced = freeze_and_run(model, x)
    assert folded(traced) == ["fused"] * 2
    assert affine_maps_left(traced.graphs[0]) == []
    assert_close(traced.result, in_float64(model, x), torch.float32)


SQUARE = (2, 6, 4, 4)
LEFT: dict[str, Callable[[], tuple[nn.Module, list[Tensor]]]] = {
    "of columns": lambda: (Map(conv(padding=1), scaled, **vectors(4)), [torch.randn(SQUARE)]),
    "of rows": lambda: (Map(conv(padding=1), scaled, **vectors(4, 1)), [torch.randn(SQUARE)]),
    "of pixels": lambda: (Map(conv(padding=1), scaled, **vectors(4, 4, 4)), [torch.randn(SQUARE)]),
    "more channels than the result": lambda: (
        Map(conv(out_channels=1), lambda m, y: y * m.a, **vectors(5, 1, 1)),
        [torch.randn(IMAGE)],
    ),
    "more dimensions": lambda: (Map(conv(), scaled, **vectors(1, 1, 4, 1, 1)), [torch.randn(IMAGE)]),
    "used twice": lambda: (Map(conv(), lambda m, y: (y * m.a).sin() + y, **vectors(4, 1, 1)), [torch.randn(IMAGE)]),
    "by itself": lambda: (Map(conv(), lambda m, y: y * y), [torch.randn(IMAGE)]),
    # A small image: the result is nearly the bias, and not nearly zero.
    "divisor": lambda: (Map(conv(), lambda m, y: m.a / y, **vectors(4, 1, 1)), [0.01 * torch.randn(IMAGE)]),
    "not constant": lambda: (
        Map(conv(), lambda m, y, a: y * a),
        [torch.randn(IMAGE), torch.rand(4, 1, 1)],
    ),
    "integers": lambda: (Map(conv(), lambda m, y: (y * 9).int() * 2), [torch.randn(IMAGE)]),
    "float64": lambda: (Map(conv(), lambda m, y: y.double() * m.a, **vectors(4, 1, 1)), [torch.randn(IMAGE)]),
    "hardsigmoid": lambda: (Map(conv(), lambda m, y: nn.functional.hardsigmoid(y)), [torch.randn(IMAGE)]),
}


def targets(graph: Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes]


@pytest.mark.parametrize("name", LEFT)
@torch.no_grad()
def test_left_alone(name):
    model, inputs = LEFT[name]()
    traced = freeze_and_run(model, *inputs)
    assert [kind for kind in folded(traced) if kind != "fused"] == []
    stock = freeze_and_run(model, *inputs, fold=False)
    if name != "integers":  # the factor 9 is folded
        assert folded(traced) == []
        assert targets(traced.graphs[0]) == targets(stock.graphs[0])
    else:
        assert folded(traced) == ["fused"]
    assert_close(traced.result.double(), model(*inputs).double(), torch.float32)


class DynamicWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = batch_norm(4)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.norm(nn.functional.conv2d(x, weight))


@torch.no_grad()
def test_weight_that_is_not_constant():
    model, x, weight = DynamicWeight().eval(), torch.randn(IMAGE), torch.randn(4, 6, 3, 3)
    traced = freeze_and_run(model, x, weight)
    (path,) = (path for path in traced.paths if path.op == "convolution")
    assert path.kind == "left alone"
    assert "(3 x 3, 4 channels) with sub, mul, mul, add: its weight is not a constant" in path.detail
    assert_close(traced.result, model(x, weight), torch.float32)


class Constants(nn.Module):
    """A convolution's result times what a buffer becomes."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.convolution, self.function = conv(), function
        self.register_buffer("scale", torch.tensor([0.5, 1.5, 2.7, 0])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x) * self.function(self.scale)


@pytest.mark.parametrize(
    "function",
    [
        lambda scale: scale.int(),
        lambda scale: scale.bool(),
        lambda scale: scale.to(torch.float8_e4m3fn).float(),
        lambda scale: scale.bfloat16().float(),  # rounds, and is computed as if it did not
    ],
)
@torch.no_grad()
def test_casts_of_constants(function):
    model, x = Constants(function), torch.randn(IMAGE)
    traced = freeze_and_run(model, x)
    assert folded(traced) == ["fused"]
    assert_close(
        traced.result, model(x), torch.bfloat16 if function(model.scale).dtype == torch.float32 else torch.float32
    )


class Heads(nn.Module):
    """Large shifts, in float32 under autocast, as of a head that returns places in pixels."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.convolution, self.other, self.residual = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), residual
        nn.init.normal_(self.convolution.weight, std=1e-3)
        self.register_buffer("scale", torch.full((6, 1, 1), 8.0))
        self.register_buffer("shift", torch.full((6, 1, 1), 600.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.convolution(x)
        y = y + x if self.residual else y * self.scale + self.shift
        return y, self.other(y)


@pytest.mark.parametrize("residual", [False, True])
@torch.no_grad()
def test_what_is_returned_in_float32_is_not_rounded(residual):
    model, x = Heads(residual), torch.randn(IMAGE)
    exact = copy.deepcopy(model).double()(x.double())[0]
    stock = Autocast(model)(x)[0]
    traced = freeze_and_run(Autocast(model), x)
    assert traced.result[0].dtype == torch.float32
    assert (traced.result[0] - exact).abs().max() <= 1.1 * (stock - exact).abs().max()


@torch.no_grad()
def test_a_weight_that_is_returned():
    """Freezing leaves it an input."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.scale = conv(), nn.Parameter(torch.rand(4, 1, 1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.convolution(x) * self.scale, self.convolution.weight.flatten(1)

    model, x = Model(), torch.randn(IMAGE)
    traced = freeze_and_run(model, x)
    assert folded(traced) == ["left alone"]
    assert_close(traced.result[0], model(x)[0], torch.float32)


@torch.no_grad()
def test_float16():
    """Products of weights and scales may leave its range: what Inductor does of itself is not changed."""
    model, x = Autocast(nn.Sequential(nn.Conv2d(6, 6, 1), batch_norm(6)).eval(), torch.float16), torch.randn(IMAGE)
    assert folded(freeze_and_run(model, x)) == []


class Counter(nn.Module):
    """Changes its shift at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(6, 4, 1)
        self.register_buffer("scale", torch.rand(4, 1, 1))
        self.register_buffer("shift", torch.zeros(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.shift.add_(1)
        return self.convolution(x) * self.scale + self.shift


@torch.no_grad()
def test_constants_that_are_changed_in_place():
    model, x = Counter(), torch.randn(IMAGE)
    reference = copy.deepcopy(model)
    traced = freeze_and_run(model, x)
    assert_close(traced.result, reference(x), torch.float32)
    assert_close(traced.function(x), reference(x), torch.float32)
    assert torch.equal(model.shift, reference.shift)


@torch.no_grad()
def test_branches_have_inputs_of_their_own():
    """The first inputs of a branch are not the model's parameters."""
    norms = nn.ModuleList([batch_norm(6), batch_norm(6)]).eval()
    convolution = nn.Conv2d(6, 6, 1)

    def model(x: Tensor) -> Tensor:
        branches = [lambda x, norm=norm: norm(convolution(x)) for norm in norms]
        return torch.cond(x.sum() > 0, *branches, (x,))

    for x in (torch.rand(IMAGE), -torch.rand(IMAGE)):
        traced = freeze_and_run(model, x)
        assert_close(traced.result, model(x), torch.float32)


def test_training_is_as_it_was():
    model, x = nn.Sequential(nn.Conv2d(6, 6, 1), batch_norm(6), nn.ReLU()).eval(), torch.randn(IMAGE)

    def gradients(function: Callable[..., Tensor], x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(x).square().sum(), list(model.parameters()))

    with config.patch(freezing=True, joint_custom_pre_pass=[FoldAffineMaps("tested")]):
        compiled = compile_and_run(model, x, run=gradients, config={"cpp_wrapper": True})
    assert compiled.paths == []
    for ours, expected in zip(compiled.result, gradients(model, x)):
        assert_close(ours, expected, torch.float32)


def test_nothing_happens_without_freezing():
    model, x = nn.Sequential(nn.Conv2d(6, 6, 1), batch_norm(6)).eval(), torch.randn(IMAGE)
    with torch.no_grad():
        compiled = compile_and_run(
            model, x, config={"cpp_wrapper": True, "joint_custom_pre_pass": [FoldAffineMaps("tested")]}
        )
    assert compiled.paths == []


# The switch


def test_the_switch(switch):
    theirs = object()
    config.joint_custom_pre_pass = theirs
    fold_norms()
    before, *ours = config.joint_custom_pre_pass
    assert before is theirs
    assert [type(each) for each in ours] == [MergeConstants, FoldAffineMaps, FlattenAsItLies, JoinHeads]
    assert all(cache_key.TAG in each.uuid() for each in ours)
    fold_norms()
    assert config.joint_custom_pre_pass == [theirs, *ours]


def test_caches_know(switch):
    def key() -> bytes:
        return pickle.dumps(codecache.FxGraphHashDetails(torch.fx.GraphModule({}, torch.fx.Graph()), [], {}, []))

    before = key()
    fold_norms()
    for ours in config.joint_custom_pre_pass:
        assert ours.uuid().encode() in key() and ours.uuid().encode() not in before


SWITCH = """
import sys
import inductor_vision
getattr(inductor_vision, sys.argv[1])()
import torch._inductor.lowering
from torch._inductor import config
print([type(each).__name__ for each in config.joint_custom_pre_pass])
"""


@pytest.mark.usefixtures("torchvision_python")
@pytest.mark.parametrize("call", ["fold_norms", "accelerate"])
def test_the_switch_waits_for_inductor(call):
    passes = ["MergeConstants", "FoldAffineMaps", "FlattenAsItLies", "JoinHeads"]
    assert run_python(SWITCH, call).strip() == str(passes)


@torch.no_grad()
def test_explained(switch):
    fold_norms()
    with config.patch(freezing=True):
        text = str(inductor_vision.explain(nn.Sequential(conv(), batch_norm(4)).eval(), torch.randn(IMAGE)))
    assert text == "convolution  fused: 0 (3 x 3, 4 channels) with sub, mul, mul, add"


# Whole models


def calibrated(name: str, norm: Callable[[int], nn.Module] | None = None) -> tuple[nn.Module, Tensor]:
    """A classifier whose norms have statistics of what they see, and the scales and shifts of trained ones."""
    from torchvision import models

    torch.manual_seed(0)
    model = getattr(models, name)(weights=None)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.3, 1.3)
            nn.init.normal_(layer.bias, std=0.3)
            layer.momentum = 1.0
    x = nn.functional.interpolate(torch.randn(4, 3, 16, 16), size=64, mode="bilinear") + 0.3 * torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        model.train()(x)
    return model.eval(), x


CLASSIFIERS = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "autocast") for name in CLASSIFIERS), ("resnet18", "bfloat16"), ("mobilenet_v3_small", "bfloat16")],
)
@torch.no_grad()
def test_classifiers(torchvision_python, name, precision):
    """No map is left, and the error against float64 does not grow."""
    model, x = calibrated(name)
    exact = in_float64(model, x)
    if precision == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    else:
        model = Autocast(model)
    errors = {}
    for fold in (True, False):
        traced = freeze_and_run(model, x, fold=fold)
        errors[fold] = (traced.result.double() - exact).norm() / exact.norm()
        if fold:
            assert set(folded(traced)) == {"fused"}
            assert [map for graph in traced.graphs for map in affine_maps_left(graph)] == []
    assert errors[True] <= 1.1 * errors[False]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("fasterrcnn_resnet50_fpn_v2", "autocast"),
        ("ssdlite320_mobilenet_v3_large", "autocast"),
        ("retinanet_resnet50_fpn_v2", "bfloat16"),
    ],
)
def test_detectors(torchvision, name, precision):
    """All twelve are in tests/stock_detectors.py. Inductor folds by itself in float32."""
    assert_norms_are_folded(*stock_detector(name), precision)
