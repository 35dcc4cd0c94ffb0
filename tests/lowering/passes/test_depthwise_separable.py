"""The pass that finds depthwise-separable convolutions in models: what it replaces, and where Inductor runs it."""

from __future__ import annotations

import contextlib
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import inductor_vision
import pytest
import torch
import torch.nn.functional as F
from inductor_vision import fuse_depthwise_separable
from inductor_vision.lowering.common import cache_key
from inductor_vision.lowering.passes import depthwise_separable
from inductor_vision.lowering.passes.depthwise_separable import FuseDepthwiseSeparable
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import compile_and_run, run_python
from inductor_vision.tests.support.depthwise_separable_pass import (
    IMAGE,
    Activated,
    Rewritten,
    assert_fused,
    block,
    depthwise,
    norm,
    pointwise,
    rewrite,
)
from torch import Tensor, nn
from torch._inductor import codecache, config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.export import Dim

NAME = "depthwise_separable_conv2d"


@pytest.fixture(scope="module")
def threads() -> int:
    return 1


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


# Expansions: pointwise convolutions before the depthwise one


class Expanded(nn.Module):
    """An inverted residual, with something between the expansion and the depthwise convolution."""

    def __init__(self, between: Callable[[Tensor], Tensor], first: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.between, self.rest = (
            first or pointwise(8, 24),
            between,
            nn.Sequential(depthwise(24), nn.ReLU()),
        )
        self.last = pointwise(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rest(self.between(self.first(x))))


EXPANDED: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v2": InvertedResidual,
    "nothing_between": lambda: Expanded(lambda x: x),
    "bias": lambda: Expanded(nn.Hardswish(), pointwise(8, 24, bias=True)),
    "written_out": lambda: Expanded(lambda x: x * torch.sigmoid(x)),
    "in_place": lambda: Expanded(nn.Sequential(norm(24), nn.ReLU(inplace=True))),
    "two": lambda: nn.Sequential(InvertedResidual(), InvertedResidual()),
}


@pytest.mark.parametrize("name", EXPANDED)
def test_an_expansion_is_part_of_the_kernel(name):
    model = EXPANDED[name]().eval()
    with torch.no_grad():
        count = 2 if name == "two" else 1
        assert assert_fused(model, torch.randn(IMAGE), count=count).expanded == [True] * count
        exported = torch.export.export(model, (torch.randn(IMAGE),)).module(check_guards=False)
        assert [node.target.__name__ for node in rewrite(exported)] == ["inverted_residual_conv2d.default"] * count
        x = torch.randn(IMAGE)
        assert_close(exported(x), model(x), torch.float32)


class ReadTwice(Expanded):
    def forward(self, x: Tensor) -> Tensor:
        expanded = self.between(self.first(x))
        return self.last(self.rest(expanded)) + expanded.mean()


ALONE: dict[str, Callable[[], nn.Module]] = {
    "its_result_is_read_elsewhere": lambda: ReadTwice(nn.ReLU()),
    "of_3_x_3": lambda: Expanded(nn.ReLU(), nn.Conv2d(8, 24, 3)),
    "of_groups": lambda: Expanded(nn.ReLU(), pointwise(8, 24, groups=2)),
    "slope": lambda: Expanded(nn.PReLU()),
    "norm_behind_the_activation": lambda: Expanded(nn.Sequential(nn.ReLU(), norm(24))),
    "norm_in_training": lambda: Expanded(norm(24).train()),
    "no_convolution": lambda: Expanded(nn.ReLU(), nn.Sequential(nn.ZeroPad2d(1), norm(8), nn.Upsample(scale_factor=2))),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_pair_without_what_is_no_expansion(name):
    model = ALONE[name]()
    for layer in model.modules():
        if layer is not getattr(model, "between", None):
            layer.training = False
    if name == "no_convolution":
        model.rest[0], model.last = depthwise(8), pointwise(8, 8)
    with torch.no_grad():
        assert assert_fused(model, torch.randn(IMAGE)).expanded == [False]


def fused_paths(model: nn.Module, x: Tensor) -> list[str]:
    with recorded_paths() as paths:
        Rewritten(model, x)
    return [path.detail for path in paths if path.kind == "fused"]


def test_it_is_said_why_an_expansion_is_left_apart(monkeypatch):
    model, x = InvertedResidual().eval(), torch.randn(IMAGE)
    apart = "without layers.0 (1 x 1, 24 channels): "
    (path,) = fused_paths(model, x)
    assert path.endswith(f"{apart}gradients are wanted, and the operator has none")
    with torch.no_grad():
        (path,) = fused_paths(model, x)
        assert path.startswith("layers.0 (1 x 1, 24 channels) and layers.3 ") and "without" not in path
        monkeypatch.setattr(torch, "get_num_threads", lambda: 16)  # 8 for each image, of 9 rows
        (path,) = fused_paths(model, x)
        assert path.endswith(f"{apart}16 threads would repeat 156% of the rows that are expanded")
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # an image each
        assert assert_fused(model, x).expanded == [True]
        monkeypatch.setattr(depthwise_separable, "cache_bytes", lambda: 2 * 3 * 11 * 24 * 4 - 1)
        (path,) = fused_paths(model, x)
        assert path.endswith(f"{apart}the 3 rows of its input that are read at once do not stay in the cache")


def test_an_image_that_is_changed_behind_the_expansion():
    """All is computed where the expansion was."""

    class Changing(Expanded):
        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            expanded = self.between(self.first(x))
            x.mul_(2)
            return self.last(self.rest(expanded)) + x.mean()

    with torch.no_grad():
        assert assert_fused(Changing(nn.ReLU()), torch.randn(IMAGE)).expanded == [True]


def test_a_weight_that_is_changed_behind_the_expansion():
    class Changing(Expanded):
        def forward(self, x: Tensor) -> Tensor:
            expanded = self.between(self.first(x))
            self.rest[0].weight.mul_(0.5)
            return self.last(self.rest(expanded))

    with torch.no_grad():
        model = Changing(nn.ReLU())
        weight, x = model.rest[0].weight.clone(), torch.randn(IMAGE)
        rewritten = Rewritten(model, x)
        model.rest[0].weight.copy_(weight)
        assert rewritten.expanded == [False]  # the pair, where the weight is what it is then
        assert_close(rewritten.result, model(x), torch.float32)


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
    "leaky_relu(0.2)": [
        lambda x: F.leaky_relu(x, 0.2),
        lambda x: F.leaky_relu_(x, negative_slope=0.2),
        nn.LeakyReLU(0.2, inplace=True),
    ],
    "leaky_relu(-0.5)": [nn.LeakyReLU(-0.5)],
    "hardtanh": [F.hardtanh, F.hardtanh_, nn.Hardtanh(inplace=True)],
    "hardtanh(-2.0, 0.5)": [lambda x: F.hardtanh(x, -2, 0.5), lambda x: F.hardtanh_(x, max_val=0.5, min_val=-2)],
    "hardtanh(0.0, 5.0)": [nn.Hardtanh(0, 5)],
    "hardtanh(0.0, inf)": [nn.Hardtanh(0, float("inf"))],
    "elu": [F.elu, nn.ELU(inplace=True), torch.ops.aten.elu.default],
    "elu(0.5)": [lambda x: F.elu(x, 0.5), lambda x: F.elu_(x, 0.5), nn.ELU(0.5)],
    "selu": [
        F.selu,
        torch.selu_,
        nn.SELU(inplace=True),
        lambda x: torch.ops.aten.elu.default(x, 1.6732632423543772, 1.0507009873554805),
    ],
    "celu": [F.celu, torch.celu_, nn.CELU(inplace=True)],
    "celu(0.5)": [lambda x: F.celu(x, 0.5), nn.CELU(0.5), lambda x: torch.ops.aten.elu.default(x, 0.5, 1, 2.0)],
    "softplus": [F.softplus, nn.Softplus()],
    "softplus(2.0, 10.0)": [lambda x: F.softplus(x, 2, 10), nn.Softplus(2, 10)],
    "sigmoid": [torch.sigmoid, F.sigmoid, lambda x: x.sigmoid_(), nn.Sigmoid()],
    "tanh": [torch.tanh, torch.tanh_, lambda x: x.tanh(), nn.Tanh()],
    "mish": [F.mish, nn.Mish(inplace=True)],
    "softsign": [F.softsign, nn.Softsign()],
    "hardsigmoid": [
        F.hardsigmoid,
        nn.Hardsigmoid(inplace=True),
        lambda x: F.relu6(x + 3) / 6,
        lambda x: torch.div(F.relu6(3.0 + x, inplace=True), 6.0),
    ],
    "hardswish": [
        F.hardswish,
        nn.Hardswish(inplace=True),
        lambda x: x * F.relu6(x + 3) / 6,
        lambda x: x * (F.relu6(x + 3, inplace=True) / 6),
        lambda x: F.hardtanh(x.add(3), 0, 6).mul(x).div(6),
        lambda x: F.hardsigmoid(x) * x,
    ],
    "silu": [
        F.silu,
        nn.SiLU(inplace=True),
        lambda x: x * torch.sigmoid(x),
        lambda x: x.sigmoid().mul(x),
    ],
    "gelu": [F.gelu, nn.GELU()],
    "gelu_tanh": [lambda x: F.gelu(x, approximate="tanh"), nn.GELU(approximate="tanh")],
    "identity": [lambda x: x, nn.Identity()],
}


@pytest.mark.parametrize(
    ("name", "activation"), [(name, activation) for name, forms in ACTIVATIONS.items() for activation in forms]
)
@torch.no_grad()
def test_activations(name, activation):
    model = Activated(activation).eval()
    assert assert_fused(model, torch.randn(IMAGE)).activations == [name]
    exported = torch.export.export(model, (torch.randn(IMAGE),)).module(check_guards=False)
    assert [call.args[-1] for call in rewrite(exported)] == [name]


@torch.no_grad()
def test_an_exported_slope():
    """Exported parameters are constants."""
    model, x = Activated(nn.PReLU(init=0.375)).eval(), torch.randn(IMAGE)
    exported = torch.export.export(model, (x,)).module(check_guards=False)
    assert [call.args[-1] for call in rewrite(exported)] == ["leaky_relu(0.375)"]
    assert_close(exported(x), model(x), torch.float32)


def test_an_exported_slope_that_may_be_trained():
    """It is no constant."""
    model, x = Activated(nn.PReLU(init=0.375)).eval(), torch.randn(IMAGE)
    exported = torch.export.export(model, (x,)).module(check_guards=False)
    assert [call.args[-1] for call in rewrite(exported)] == ["prelu"]
    exported(x).square().sum().backward()
    model(x).square().sum().backward()
    expected = dict(model.named_parameters())
    for name, parameter in exported.named_parameters():
        assert_close(parameter.grad, expected[name].grad, torch.float32)


@pytest.mark.parametrize("dynamic", [None, True])
@torch.no_grad()
def test_a_slope_that_is_an_input(dynamic):
    """As all parameters are of what Dynamo traces."""
    model, x = Activated(nn.PReLU(init=0.375)).eval(), torch.randn(IMAGE)
    rewritten = Rewritten(model, x, dynamic=dynamic)
    assert rewritten.activations == ["prelu"]
    assert_close(rewritten.result, model(x), torch.float32)


@pytest.mark.parametrize("trained", [True, False])
def test_gradients_of_a_slope(trained):
    model, x = Activated(nn.PReLU(init=0.375)).eval(), torch.randn(IMAGE, requires_grad=True)
    model.activation.weight.requires_grad_(trained)
    rewritten = assert_fused(model, x)
    wanted = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad} | {"input": x}
    assert ("activation.weight" in wanted) == trained
    expected = torch.autograd.grad(model(x).square().sum(), list(wanted.values()))
    actual = torch.autograd.grad(rewritten.result.square().sum(), list(wanted.values()))
    for name, gradient, right in zip(wanted, actual, expected):
        assert_close(gradient, right, torch.float32, name)


@torch.no_grad()
def test_a_pair_that_cannot_be_looked_at_is_left_alone(monkeypatch):
    def fail(*args):
        raise AttributeError("something of torch's has moved")

    monkeypatch.setattr(depthwise_separable, "find_pair", fail)
    rewritten = Rewritten(Activated(nn.ReLU()).eval(), torch.randn(IMAGE))
    assert rewritten.calls == []
    (reason,) = rewritten.left
    assert reason.endswith("it could not be looked at: AttributeError: something of torch's has moved")


# Channels and strides of the backbone of RetinaFace with a quarter of MobileNet's channels, in facexlib and elsewhere.
RETINAFACE = [(8, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)]
RETINAFACE += [(128, 128, 1)] * 5 + [(128, 256, 2), (256, 256, 1)]


@torch.no_grad()
def test_a_detector_of_faces():
    """Its activations have a slope of 0.1."""
    layers = []
    for channels, out_channels, stride in RETINAFACE:
        layers += [depthwise(channels, stride=stride), norm(channels), nn.LeakyReLU(0.1, inplace=True)]
        layers += [pointwise(channels, out_channels), norm(out_channels), nn.LeakyReLU(0.1, inplace=True)]
    rewritten = assert_fused(nn.Sequential(*layers).eval(), torch.randn(1, 8, 64, 64), count=13)
    assert rewritten.activations == ["leaky_relu(0.1)"] * 13


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
    """A convolution's result is channels_last if input or weight is; what views follow may depend on it."""
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


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.PReLU])
@pytest.mark.usefixtures("plain_processor")
@torch.no_grad()
def test_autocast(activation):
    model, x = block(activation()), torch.randn(IMAGE)

    def outside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    for run in (outside, model):
        with torch.autocast("cpu", torch.bfloat16):
            rewritten = Rewritten(run, x)
        assert len(rewritten.calls) == 1
        assert rewritten.result.dtype == torch.bfloat16
        assert_close(rewritten.result, model(x), torch.bfloat16)


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
def test_classifiers(torchvision_python, name):
    fused, left = CLASSIFIERS[name]
    model, x = classifier(torchvision_python, name), torch.randn(1, 3, 64, 64)
    rewritten = assert_fused(model, x, count=fused)
    assert len(rewritten.left) == left
    exported = torch.export.export(model, (x,)).module(check_guards=False)
    assert len(rewrite(exported)) == fused
    assert_close(exported(x), model(x), torch.float32)


def test_a_classifier_in_training_mode(torchvision_python):
    rewritten = Rewritten(classifier(torchvision_python, "mobilenet_v3_small").train(), torch.randn(2, 3, 64, 64))
    assert rewritten.calls == [] and len(rewritten.left) == 11


# The switch


class TheirPass(CustomGraphPass):
    """A user's pass, which counts graphs."""

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
    assert cache_key.TAG in ours.uuid()
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
@torch.no_grad()
def test_a_slope_that_changes(switched_on):
    """It is read at each call, and from a constant where the model is frozen."""
    model, x = block(nn.PReLU()), torch.randn(IMAGE)
    compiled = compile_and_run(model, x, config={"cpp_wrapper": True})
    assert calls(compiled.paths) == ["fused", "template"]
    for slope in (0.25, -1.5):
        model[2].weight.fill_(slope)
        assert_close(compiled.function(x), model(x), torch.float32)
    frozen = compile_and_run(model, x, config={"cpp_wrapper": True, "freezing": True})
    assert calls(frozen.paths) == ["fused", "template"]
    assert_close(frozen.result, model(x), torch.float32)


@pytest.mark.slow
def test_compiled_with_gradients(switched_on):
    model, x = block(nn.PReLU()), torch.randn(IMAGE)
    parameters = list(model.parameters())

    def step(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs).square().sum(), parameters)

    compiled = compile_and_run(model, x, run=step, config={"cpp_wrapper": True})
    assert calls(compiled.paths)[0] == "fused"
    for gradient, wanted in zip(compiled.result, step(model, x)):
        assert_close(gradient, wanted, torch.float32)


@pytest.mark.slow
def test_packaged(switched_on, tmp_path: pathlib.Path):
    model, x = nn.Sequential(block(nn.PReLU(init=0.1)), nn.Hardswish()).eval(), torch.randn(IMAGE)
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
