"""The pass that finds depthwise-separable convolutions in models: what it replaces, what it leaves alone and why, and
that Inductor runs it wherever it compiles.

Most tests have Dynamo trace a model, run the pass on the graph, and run what it made eagerly.
"""

from __future__ import annotations

import contextlib
import pathlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import inductor_vision
import pytest
import torch
import torch._inductor.lowering  # from here on this package is among its tables
import torch.nn.functional as F
from inductor_vision import fuse_depthwise_separable
from inductor_vision.lowering import depthwise_separable_pass, registry
from inductor_vision.lowering.depthwise_separable_pass import FuseDepthwiseSeparable
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import compile_and_run, run_python
from inductor_vision.tests.support.layouts import strides_of
from torch import Tensor, nn
from torch._inductor import codecache, config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.export import Dim

OP = torch.ops.inductor_vision.depthwise_separable_conv2d.default
NAME = "depthwise_separable_conv2d"


@pytest.fixture(scope="module")
def threads() -> int:
    return 1


class Rewritten:
    """What the pass made of a model.

    Attributes:
        result: what the rewritten graphs compute, run eagerly.
        calls: the operator's calls in them.
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


def rewrite(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """Run the pass on a graph; the operator's calls that are in it then."""
    FuseDepthwiseSeparable("tested")(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return [node for node in graph.graph.nodes if node.target is OP]


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

# What is replaced


class InvertedResidual(nn.Module):
    """The block of MobileNetV2: https://arxiv.org/abs/1801.04381."""

    def __init__(self) -> None:
        super().__init__()
        expand = [pointwise(8, 24), norm(24), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*expand, depthwise(24), norm(24), nn.ReLU6(inplace=True), pointwise(24, 8), norm(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class OneNumberInATuple(nn.Module):
    """For both axes, as aten's convolutions take it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = depthwise(), pointwise()

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.conv2d(x, self.first.weight, None, (2,), (1,), (1,), 8)
        return F.conv2d(hidden, self.second.weight, None, (1,), (0,))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "one_number_in_a_tuple": OneNumberInATuple,
    "convolutions": lambda: nn.Sequential(depthwise(), pointwise()),
    "biases": lambda: nn.Sequential(depthwise(bias=True), pointwise(bias=True)),
    "norms": block,
    "norms_and_biases": lambda: nn.Sequential(depthwise(bias=True), norm(8), pointwise(bias=True), norm(12)),
    "first_norm": lambda: nn.Sequential(depthwise(), norm(8), pointwise()),
    "last_norm": lambda: nn.Sequential(depthwise(), pointwise(), norm(12)),
    "norms_without_weights": lambda: nn.Sequential(depthwise(), norm(8, False), pointwise(), norm(12, False)),
    "epsilon": lambda: nn.Sequential(depthwise(), norm(8, eps=0.5), pointwise(), norm(12, eps=0.1)),
    "activation": lambda: nn.Sequential(depthwise(), nn.SiLU(), pointwise()),
    "mobilenet_v1": lambda: nn.Sequential(block(nn.ReLU()), nn.ReLU()),
    "mobilenet_v2": InvertedResidual,
    "mobilenet_v3": lambda: nn.Sequential(block(nn.Hardswish(inplace=True)), nn.Hardswish(inplace=True)),
    "stride": lambda: block(nn.ReLU6(), stride=2),
    "padding": lambda: block(nn.ReLU6(), padding=(0, 3), stride=(1, 2)),
    "dilation": lambda: block(nn.ReLU6(), dilation=(2, 1), padding=2),
    "same": lambda: block(nn.ReLU6(), kernel_size=(5, 3), padding="same", dilation=(1, 2)),
    "valid": lambda: block(nn.ReLU6(), kernel_size=(5, 3), padding="valid"),
    "multiplier": lambda: block(nn.ReLU6(), multiplier=2),
    "reflecting": lambda: block(nn.ReLU6(), padding_mode="reflect"),  # the padding stays in the graph
    "same_pointwise": lambda: nn.Sequential(depthwise(), pointwise(padding="same")),
}


@pytest.mark.parametrize("name", MODELS)
def test_fused(name):
    model = MODELS[name]().eval()
    with torch.no_grad():
        assert_fused(model, torch.randn(IMAGE))
        exported = torch.export.export(model, (torch.randn(IMAGE),)).module(check_guards=False)
        assert len(rewrite(exported)) == 1
        x = torch.randn(IMAGE)
        assert_close(exported(x), model(x), torch.float32)


ACTIVATIONS: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "relu": [
        F.relu,
        torch.relu,
        torch.relu_,
        lambda x: F.relu(x, inplace=True),
        lambda x: x.relu(),
        lambda x: x.relu_(),
        nn.ReLU(inplace=True),
    ],
    "relu6": [
        F.relu6,
        lambda x: F.relu6(x, True),
        lambda x: F.hardtanh(x, 0, 6),
        lambda x: F.hardtanh_(x, min_val=0.0, max_val=6.0),
        nn.Hardtanh(0, 6),
        nn.ReLU6(inplace=True),
    ],
    "leaky_relu": [F.leaky_relu, lambda x: F.leaky_relu_(x, 0.01), nn.LeakyReLU(inplace=True)],
    "hardsigmoid": [F.hardsigmoid, nn.Hardsigmoid(inplace=True)],
    "hardswish": [F.hardswish, nn.Hardswish(inplace=True)],
    "silu": [F.silu, nn.SiLU(inplace=True)],
    "gelu": [F.gelu, nn.GELU()],
    "identity": [lambda x: x, nn.Identity()],
}


class Activated(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.depthwise, self.norm, self.pointwise = depthwise(), norm(8), pointwise()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.activation(self.norm(self.depthwise(x))))


@pytest.mark.parametrize(
    ("name", "activation"), [(name, activation) for name, forms in ACTIVATIONS.items() for activation in forms]
)
@torch.no_grad()
def test_activations(name, activation):
    model = Activated(activation).eval()
    assert assert_fused(model, torch.randn(IMAGE)).activations == [name]
    exported = torch.export.export(model, (torch.randn(IMAGE),)).module(check_guards=False)
    assert [call.args[-1] for call in rewrite(exported)] == [name]


@pytest.mark.parametrize(
    "activation",
    [torch.sigmoid, torch.tanh, F.hardtanh, lambda x: F.leaky_relu(x, 0.2), lambda x: F.gelu(x, approximate="tanh"),
     lambda x: F.hardtanh(x, 0, 5), lambda x: x + 1, lambda x: x.mul_(2)],
)  # fmt: skip
@torch.no_grad()
def test_other_functions_between_are_left(activation):
    assert_left(Activated(activation).eval(), torch.randn(IMAGE), why="not by a pointwise convolution")


@torch.no_grad()
def test_pairs_in_a_row():
    """Each reads what the one before it made."""
    layers = [nn.Sequential(depthwise(), norm(8), pointwise(8, 8), norm(8)) for _ in range(3)]
    assert_fused(nn.Sequential(*layers).eval(), torch.randn(IMAGE), count=3)


@torch.no_grad()
def test_shared_weights():
    layer, mixing = depthwise(), pointwise(8, 8)
    assert_fused(nn.Sequential(layer, mixing, nn.ReLU(), layer, nn.ReLU(), mixing).eval(), torch.randn(IMAGE), count=2)


@pytest.mark.parametrize("dynamic", [None, True])
@torch.no_grad()
def test_images_of_any_size(dynamic):
    model, x = block(nn.ReLU(), stride=2), torch.randn(IMAGE)
    rewritten = Rewritten(model, x, dynamic=dynamic)  # with dynamic=True the norms' epsilons are inputs, too
    assert len(rewritten.calls) == 1
    assert_close(rewritten.result, model(x), torch.float32)
    free = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    exported = torch.export.export(model, (torch.randn(IMAGE),), dynamic_shapes=(free,)).module(check_guards=False)
    assert len(rewrite(exported)) == 1
    x = torch.randn(3, 8, 15, 6)
    assert_close(exported(x), model(x), torch.float32)


@pytest.fixture
def plain_processor(monkeypatch) -> None:
    """One that multiplies float32 and float64 alone, wherever the test runs."""
    known = {name: value for name, value in torch.cpu.get_capabilities().items() if not name.endswith(("bf16", "fp16"))}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("plain_processor")
@torch.no_grad()
def test_dtypes(dtype):
    assert_fused(block(nn.ReLU6()).to(dtype), torch.randn(IMAGE, dtype=dtype), dtype=dtype)


@pytest.mark.usefixtures("plain_processor")
@torch.no_grad()
def test_norms_in_float32_of_a_model_in_bfloat16():
    model = block(nn.ReLU6())
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            layer.bfloat16()
    rewritten = assert_fused(model, torch.randn(IMAGE, dtype=torch.bfloat16), dtype=torch.bfloat16)
    assert {argument.target for argument in rewritten.calls[0].args[1:5]} == {"to"}


@pytest.mark.parametrize("weights", ["contiguous", "channels_last"])
@pytest.mark.parametrize("image", ["contiguous", "channels_last"])
@torch.no_grad()
def test_memory_formats(image, weights):
    """Of convolutions the result is channels_last if input or weight is; what views follow may depend on it."""
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    model = block(nn.ReLU6()).to(memory_format=formats[weights])
    assert_fused(model, torch.randn(IMAGE).contiguous(memory_format=formats[image]))


def test_gradients():
    """In eval mode batch norms are constants, to which there may be gradients."""
    model, x = nn.Sequential(InvertedResidual(), nn.Hardswish()).eval(), torch.randn(IMAGE)
    rewritten = assert_fused(model, x)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    for gradient, wanted in zip(torch.autograd.grad(rewritten.result.square().sum(), parameters), expected):
        assert_close(gradient, wanted, torch.float32)


@pytest.mark.usefixtures("plain_processor")
@torch.no_grad()
def test_autocast():
    model, x = block(nn.ReLU6()), torch.randn(IMAGE)

    def outside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    for run in (outside, model):
        with torch.autocast("cpu", torch.bfloat16):
            rewritten = Rewritten(run, x)
        assert len(rewritten.calls) == 1
        assert rewritten.result.dtype == torch.bfloat16
        assert_close(rewritten.result, model(x), torch.bfloat16)


# What is left alone


def test_training_mode():
    assert_left(block(nn.ReLU6()).train(), torch.randn(IMAGE), why="its batch norm is in training mode")


def test_norms_without_statistics():
    model = nn.Sequential(depthwise(), norm(8, track_running_stats=False), pointwise()).eval()
    assert_left(model, torch.randn(IMAGE), why="its batch norm is in training mode")


def test_a_last_norm_in_training_mode_stays():
    model = block(nn.ReLU6())
    model[-1].train()
    rewritten = Rewritten(model, torch.randn(IMAGE))
    assert len(rewritten.calls) == 1
    assert [user.target for user in rewritten.calls[0].users] == [F.batch_norm]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_other_uses_of_the_intermediate_result(which):
    """Of the convolution's, the norm's or the activation's result."""
    layers = block(nn.ReLU6())

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        results = [x]
        for layer in layers:
            results.append(layer(results[-1]))
        return results[-1], results[1 + which] * 2

    assert_left(run, torch.randn(IMAGE), why="its result is not only the input of a pointwise convolution")


def test_an_intermediate_result_that_is_returned():
    first, second = depthwise(), pointwise()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = first(x)
        return hidden, second(hidden)

    assert_left(run, torch.randn(IMAGE), why="but of ")


class SqueezeExcitation(nn.Module):
    """As it stands between the two in EfficientNets."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True).sigmoid()


def test_squeeze_and_excitation():
    assert_left(Activated(SqueezeExcitation()).eval(), torch.randn(IMAGE), why="not only the input of a pointwise")


LEFT: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "grouped": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), pointwise()), None),
    "dense": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3), pointwise()), None),
    "pointwise_stride": (
        lambda: nn.Sequential(depthwise(), pointwise(stride=2)),
        "is not a plain 1 x 1 convolution",
    ),
    "pointwise_padding": (
        lambda: nn.Sequential(depthwise(), pointwise(padding=1)),
        "is not a plain 1 x 1 convolution",
    ),
    "pointwise_groups": (
        lambda: nn.Sequential(depthwise(), pointwise(groups=2)),
        "is not a plain 1 x 1 convolution",
    ),
    "not_pointwise": (
        lambda: nn.Sequential(depthwise(), nn.Conv2d(8, 12, 3)),
        "is not a plain 1 x 1 convolution",
    ),
    "transposed": (
        lambda: nn.Sequential(depthwise(), nn.ConvTranspose2d(8, 12, 1)),
        "not by a pointwise convolution",
    ),
    "one_sided_padding": (
        lambda: nn.Sequential(depthwise(kernel_size=4, padding="same"), pointwise()),
        "it pads one side more than the other",
    ),
    "activation_before_the_norm": (
        lambda: nn.Sequential(depthwise(), nn.ReLU(), norm(8), pointwise()),
        "not by a pointwise convolution",
    ),
    "nothing_follows": (depthwise, "its result is not only"),
}


@pytest.mark.parametrize("name", LEFT)
@torch.no_grad()
def test_left_alone(name):
    model, why = LEFT[name]
    assert_left(model().eval(), torch.randn(IMAGE), why=why)


@torch.no_grad()
def test_an_unbatched_image():
    assert_left(nn.Sequential(depthwise(), pointwise()), torch.randn(IMAGE[1:]), why="its input has no batch")


@torch.no_grad()
def test_other_devices():
    x = torch.randn(IMAGE, device="meta")
    assert_left(block().to("meta"), x, why="is on meta, and the kernel is for the CPU")


@torch.no_grad()
def test_no_kernel():
    with config.patch(cpu_backend="triton"):
        assert_left(block(nn.ReLU6()), torch.randn(IMAGE), why="torch._inductor.config.cpu_backend is 'triton'")


LOSES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "weight": (
        lambda: nn.Sequential(depthwise(512), pointwise(512, 512)),
        (4, 512, 14, 14),
        "its pointwise weight is too large",
    ),
    "stride": (
        lambda: nn.Sequential(depthwise(96, stride=2), pointwise(96, 24)),
        (8, 96, 112, 112),
        "most of the time goes into reading 36 MB of memory",
    ),
}


@pytest.mark.parametrize("name", LOSES)
@torch.no_grad()
def test_where_it_would_not_be_faster(name, monkeypatch):
    """It depends on the size of the image, on the machine, and on the number of images."""
    model, size, why = LOSES[name]
    monkeypatch.setattr(depthwise_separable_pass, "cache_bytes", lambda: 512 << 10)
    assert_left(model(), torch.randn(size), why=why)
    assert len(Rewritten(model(), torch.randn(1, *size[1:])).calls) == 1
    assert len(Rewritten(model(), torch.randn(size), dynamic=True).calls) == 0  # by the sizes that it is compiled with
    monkeypatch.setattr(depthwise_separable_pass, "cache_bytes", lambda: 4 << 20)
    assert len(Rewritten(model(), torch.randn(size)).calls) == 1


@pytest.mark.parametrize(("dtype", "has"), [(torch.bfloat16, "amx_bf16"), (torch.float16, "avx512_fp16")])
@torch.no_grad()
def test_processors_with_low_precision_products(dtype, has, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True})
    image = torch.randn(IMAGE)
    assert_left(block(nn.ReLU6()).to(dtype), image.to(dtype), why=f"multiplies {dtype} by itself")
    other = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}[dtype]
    assert len(Rewritten(block(nn.ReLU6()).to(other), image.to(other)).calls) == 1
    with torch.autocast("cpu", dtype):
        assert_left(block(nn.ReLU6()), image, why=f"multiplies {dtype} by itself")


@torch.no_grad()
def test_as_a_weight():
    """What goes into the convolution as its weight is not its input."""
    first = depthwise(8, kernel_size=1, padding=0)

    def run(x: Tensor) -> Tensor:
        return F.conv2d(x, first(x[:, :, :1, :1]))

    assert_left(run, torch.randn(8, 8, 4, 4), why="not by a pointwise convolution")


@torch.no_grad()
def test_weights_that_are_computed():
    """Those that are there when the depthwise convolution begins will do."""
    first, second = depthwise(), pointwise()

    def before(x: Tensor) -> Tensor:
        weight = second.weight * 2
        return F.conv2d(first(x), weight)

    def between(x: Tensor) -> Tensor:
        hidden = first(x)
        return F.conv2d(hidden, second.weight * 2)

    x = torch.randn(IMAGE)
    rewritten = Rewritten(before, x)
    assert len(rewritten.calls) == 1
    assert_close(rewritten.result, before(x), torch.float32)
    assert_left(between, x, why="is computed after it")


@torch.no_grad()
def test_an_input_that_is_changed_afterwards():
    """The pair is computed where the depthwise convolution was."""
    first, second = depthwise(), pointwise()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 2
        hidden = first(x)
        x.add_(1)
        return second(hidden), x

    x = torch.randn(IMAGE)
    rewritten = Rewritten(run, x)
    assert len(rewritten.calls) == 1
    assert_close(rewritten.result[0], run(x)[0], torch.float32)


@pytest.mark.parametrize("mode", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_not_across_a_change_of_mode(mode):
    first, second = depthwise(), pointwise()

    def run(x: Tensor) -> Tensor:
        with mode():
            hidden = first(x)
        return second(hidden.float() if mode is not torch.no_grad else hidden)

    rewritten = Rewritten(run, torch.randn(IMAGE))
    assert rewritten.calls == [] and len(rewritten.left) == 1
    assert rewritten.result.requires_grad


@torch.no_grad()
def test_weights_that_are_changed_in_between():
    first, second = depthwise(), pointwise()

    def run(x: Tensor, weight: Tensor) -> Tensor:
        hidden = first(x)
        weight.view(-1).mul_(2)
        return F.conv2d(hidden, weight)

    rewritten = Rewritten(run, torch.randn(IMAGE), second.weight.detach().clone())
    assert rewritten.calls == [] and "uses its weights" in rewritten.left[0]


@torch.no_grad()
def test_a_last_norm_with_parameters_of_its_own_time_stays():
    """The pair is fused without it; also where its input would be changed before all is there."""
    first, second, last = depthwise(), pointwise(), norm(12)

    def run(x: Tensor, scale: Tensor) -> Tensor:
        x = x * 2
        out = second(first(x))
        x.mul_(3)
        return F.batch_norm(out, last.running_mean, last.running_var, scale * 2, last.bias)

    inputs = torch.randn(IMAGE), torch.rand(12)
    rewritten = Rewritten(run, *inputs)
    assert len(rewritten.calls) == 1
    assert_close(rewritten.result, run(*inputs), torch.float32)


def test_a_last_norm_in_another_mode_stays():
    first, second, last = depthwise(), pointwise(), norm(12)

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            out = second(first(x))
        return last(out)

    rewritten = Rewritten(run, torch.randn(IMAGE))
    assert len(rewritten.calls) == 1
    assert rewritten.result.requires_grad


@torch.no_grad()
def test_groups_that_are_an_input():
    first, second = depthwise(), pointwise()

    def run(x: Tensor, groups: int) -> Tensor:
        return second(F.conv2d(x, first.weight, groups=groups))

    assert Rewritten(run, torch.randn(IMAGE), 8, dynamic=True).calls == []


@torch.no_grad()
def test_exported_weights_that_are_shared():
    layer, mixing = depthwise(), pointwise(8, 8)
    model, x = nn.Sequential(layer, mixing, nn.ReLU(), layer, mixing).eval(), torch.randn(IMAGE)
    graph = torch.export.export(model, (x,)).module(check_guards=False)
    assert len(rewrite(graph)) == 2  # which checks that the graph is in order
    assert_close(graph(x), model(x), torch.float32)


def test_limits_that_are_inputs():
    """What dynamic=True makes of the limits of a ReLU6."""
    rewritten = Rewritten(block(nn.ReLU6()), torch.randn(IMAGE), dynamic=True)
    assert rewritten.calls == [] and len(rewritten.left) == 1


def test_function_transforms():
    first, second = depthwise().weight, pointwise().weight
    mapped = torch.vmap(lambda x: F.conv2d(F.conv2d(x, first, groups=8), second))
    assert_left(lambda x: mapped(x), torch.randn(3, *IMAGE), why="torch.func")


# torchvision's classifiers


def classifier(torchvision: Any, name: str) -> nn.Module:
    model = getattr(torchvision.models, name)(weights=None).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
    return model


# Pairs that are fused, and depthwise convolutions behind which a squeeze-excitation stands.
CLASSIFIERS = {
    "mobilenet_v2": (17, 0),
    "mobilenet_v3_small": (2, 9),
    "mobilenet_v3_large": (7, 8),
    "efficientnet_b0": (0, 16),
    "shufflenet_v2_x1_0": (19, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_classifiers(torchvision, name):
    fused, left = CLASSIFIERS[name]
    model, x = classifier(torchvision, name), torch.randn(1, 3, 64, 64)
    rewritten = assert_fused(model, x, count=fused)
    assert len(rewritten.left) == left
    exported = torch.export.export(model, (x,)).module(check_guards=False)
    assert len(rewrite(exported)) == fused
    assert_close(exported(x), model(x), torch.float32)


def test_a_classifier_in_training_mode(torchvision):
    rewritten = Rewritten(classifier(torchvision, "mobilenet_v3_small").train(), torch.randn(2, 3, 64, 64))
    assert rewritten.calls == [] and len(rewritten.left) == 11


# The switch


@pytest.fixture
def switch(monkeypatch) -> Iterator[None]:
    """What the test switches on is undone."""
    monkeypatch.setattr(registry, "_fuse_depthwise_separable", False)
    with config.patch(pre_grad_custom_pass=None):
        yield


@pytest.fixture
def switched_on(switch) -> None:
    fuse_depthwise_separable()


class TheirPass(CustomGraphPass):
    """Of a user, who counts."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.graphs += 1

    def uuid(self) -> str:
        return "theirs"


def test_the_switch(switch):
    fuse_depthwise_separable()
    (ours,) = config.pre_grad_custom_pass
    assert isinstance(ours, FuseDepthwiseSeparable)
    fuse_depthwise_separable()
    assert config.pre_grad_custom_pass == [ours]


@pytest.mark.parametrize("given", [lambda theirs: theirs, lambda theirs: [theirs], lambda theirs: (theirs,)])
def test_other_passes_are_kept(switch, given):
    theirs = TheirPass()
    config.pre_grad_custom_pass = given(theirs)
    fuse_depthwise_separable()
    first, second = config.pre_grad_custom_pass
    assert first is theirs and isinstance(second, FuseDepthwiseSeparable)


def test_caches_know(switched_on):
    """The pass says which version of it ran; Inductor makes that part of its keys, and runs it on a miss alone."""
    (ours,) = config.pre_grad_custom_pass
    assert registry.TAG in ours.uuid()
    assert codecache.resolve_pre_grad_pass_timing() == "late"
    with_it = pickle.dumps(codecache.FxGraphHashDetails(torch.fx.GraphModule({}, torch.fx.Graph()), [], {}, []))
    with config.patch(pre_grad_custom_pass=None):
        without = pickle.dumps(codecache.FxGraphHashDetails(torch.fx.GraphModule({}, torch.fx.Graph()), [], {}, []))
    assert ours.uuid().encode() in with_it
    assert ours.uuid().encode() not in without


SWITCH = """
import sys
import inductor_vision
inductor_vision.fuse_depthwise_separable()
assert not [name for name in sys.modules if name.partition(".")[2].startswith("_inductor")]
import torch._inductor.lowering
from torch._inductor import config
print([type(each).__name__ for each in config.pre_grad_custom_pass])
"""


def test_the_switch_waits_for_inductor():
    assert run_python(SWITCH).strip() == "['FuseDepthwiseSeparable']"


def calls(compiled_paths: list[Any]) -> list[str]:
    return [path.kind for path in compiled_paths if path.op == NAME]


@pytest.mark.slow
def test_compiled(switched_on):
    """The operator is in the graph that Inductor compiles; frozen, batch norms leave no trace."""
    model, x = nn.Sequential(block(nn.ReLU6(), stride=2), nn.Hardswish()).eval(), torch.randn(IMAGE)
    with torch.no_grad():
        expected = model(x)
        for options in ({}, {"freezing": True}):
            compiled = compile_and_run(model, x, config=options)
            first, *rest = calls(compiled.paths)
            assert first == "fused" and len(rest) == 1
            assert_close(compiled.result, expected, torch.float32)
            assert ("rsqrt" in compiled.source) != bool(options)


@pytest.mark.slow
def test_compiled_with_gradients(switched_on):
    model, x = block(nn.ReLU6()), torch.randn(IMAGE)
    parameters = list(model.parameters())

    def step(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs).square().sum(), parameters)

    compiled = compile_and_run(model, x, run=step)
    assert calls(compiled.paths)[0] == "fused"
    for gradient, wanted in zip(compiled.result, step(model, x)):
        assert_close(gradient, wanted, torch.float32)


@pytest.mark.slow
def test_packaged(switched_on, tmp_path: pathlib.Path):
    model, x = nn.Sequential(block(nn.ReLU6()), nn.Hardswish()).eval(), torch.randn(IMAGE)
    exported = torch.export.export(model, (x,))
    with recorded_paths() as paths:
        torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    assert calls(paths)[0] == "fused"
    assert_close(torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))(x), model(x), torch.float32)


@torch.no_grad()
def test_explained(switched_on):
    text = str(
        inductor_vision.explain(nn.Sequential(depthwise(), pointwise(), nn.ReLU(), depthwise(12)), torch.randn(IMAGE))
    )
    fused, left, *_ = text.splitlines()
    assert "fused: " in fused and "(3 x 3, 8 channels) with " in fused and "(1 x 1, 12 channels)" in fused
    assert "left alone: " in left and "(3 x 3, 12 channels): its result is not only" in left


def test_nothing_happens_before_the_switch(switch):
    with contextlib.suppress(StopIteration), recorded_paths() as paths, torch.no_grad():
        torch.compile(block(nn.ReLU6()), backend="aot_eager")(torch.randn(IMAGE))
    assert paths == []
