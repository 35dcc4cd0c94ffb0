"""Stock convolutions that kernels of this package compute: which of them, what results, and what is said of them."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import inductor_vision
import pytest
import torch
import torch._inductor.lowering  # from here on this package is among its tables
import torch.nn.functional as F
from inductor_vision import accelerate, fold_norms, use_winograd
from inductor_vision.lowering.common import cache_key
from inductor_vision.lowering.passes import convolution_kernels, convolution_times, convolutions
from inductor_vision.lowering.passes.convolution_kernels import Convolution, Winograd
from inductor_vision.lowering.passes.convolutions import ChooseConvolutions
from inductor_vision.perf.backends import Autocast
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import Traced, compile_and_run, run_python, trace_and_run
from torch import Tensor, nn
from torch._inductor import codecache, config

IMAGE = (2, 6, 9, 11)


@pytest.fixture
def free(monkeypatch):
    """Everything that a kernel can take is worth it: small models are enough."""
    monkeypatch.setattr(convolutions, "library_seconds", lambda convolution: 1.0)


def winograd(growth: float = math.inf, tile: int = 4) -> dict[str, Any]:
    return {"joint_custom_pre_pass": [ChooseConvolutions("tested", [Winograd(tile)], growth)]}


def trace(model: Callable[..., Any], *inputs: Any, frozen: bool = False, **options: Any) -> Traced:
    torch._dynamo.reset()
    settings = {"freezing": frozen, **winograd(**options.pop("settings", {}))}
    return trace_and_run(model, *inputs, config=settings, **options)


def taken(traced: Traced) -> int:
    nodes = [node for graph in traced.graphs for node in graph.nodes if "winograd_conv2d_prepacked" in str(node.target)]
    assert len(nodes) == [path.kind for path in traced.paths].count("replaced")
    return len(nodes)


def left(traced: Traced) -> list[str]:
    return [path.detail for path in traced.paths if path.kind == "left alone"]


def transformed_before(traced: Traced) -> int:
    """How many of those that are taken have a weight that was transformed when they were compiled."""
    return sum(path.kind == "replaced" and "in each call" not in path.detail for path in traced.paths)


# What is found


class Frozen(nn.Module):
    """As torchvision's FrozenBatchNorm2d."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(1, channels, 1, 1) + 0.5)
        self.register_buffer("shift", torch.randn(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def batch_norm(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm.eval()


class Functional(nn.Module):
    """Forms of one convolution, and its weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6, 3, 3)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, padding="same").relu()
        return torch.conv2d(input=x, weight=self.weight, padding=(2, 0))


def activated(torchvision: Any) -> nn.Module:
    return torchvision.ops.misc.Conv2dNormActivation(6, 8, 3, norm_layer=batch_norm)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "module": (lambda: nn.Conv2d(6, 8, 3, padding=1), 1),
    "functional": (Functional, 2),
    "groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), 1),
    "batch_norm": (lambda: nn.Sequential(nn.Conv2d(6, 8, 3, bias=False), batch_norm(8), nn.ReLU()), 1),
    "frozen_norm": (lambda: nn.Sequential(nn.Conv2d(6, 8, 3), Frozen(8), nn.ReLU(), nn.Conv2d(8, 4, 3)), 2),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_forms(free, name, frozen):
    make, count = MODELS[name]
    model, x = make().eval(), torch.randn(IMAGE)
    traced = trace(model, x, frozen=frozen)
    assert taken(traced) == count
    assert_close(traced.result, model(x), torch.float32)
    (graph,) = traced.graphs
    assert not any(node.target is torch.ops.aten.convolution.default for node in graph.nodes)
    if frozen:  # norms are part of weights, and these are transformed once
        maps = "aten.mul", "aten.add", "aten.rsqrt", "aten.einsum", "aten.bmm"
        assert not [node for node in graph.nodes if str(node.target).startswith(maps)]


@torch.no_grad()
def test_torchvisions_block(free, torchvision_python):
    model, x = activated(torchvision_python).eval(), torch.randn(IMAGE)
    traced = trace(model, x, frozen=True)
    assert taken(traced) == 1
    assert_close(traced.result, model(x), torch.float32)


def test_gradients(free):
    """The gradient by the input is a convolution too, and those of weight and bias are left to aten."""
    model, x = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3)), torch.randn(IMAGE)

    def step(function: Callable[..., Any], x: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(function(x).square().sum(), model.parameters()))

    expected = step(model, x)
    traced = trace(model, x, run=step)
    assert taken(traced) == 3  # of the first layer's input no gradient is wanted
    assert [path.detail for path in traced.paths][-1] == (
        "the gradient of the input of 2 (3 x 3, 6 to 8 channels, map 9 x 11) by winograd_conv2d(tile=4)"
    )
    masks = [
        node.args[-1]
        for graph in traced.graphs
        for node in graph.nodes
        if node.target is torch.ops.aten.convolution_backward.default
    ]
    assert masks == [[False, True, True]] * 2
    for found, right in zip(traced.result, expected):
        assert_close(found, right, torch.float32)


def test_the_gradient_of_an_input_alone(free):
    """Nothing else is left of the operator that computes all three."""
    model, x = nn.Conv2d(6, 8, 3, padding=1).requires_grad_(False), torch.randn(IMAGE, requires_grad=True)

    def step(function: Callable[..., Any], x: Tensor) -> Tensor:
        return torch.autograd.grad(function(x).square().sum(), x)[0]

    traced = trace(model, x, run=step)
    assert taken(traced) == 2
    nodes = [node for graph in traced.graphs for node in graph.nodes]
    assert not any(node.target is torch.ops.aten.convolution_backward.default for node in nodes)
    assert_close(traced.result, step(model, x), torch.float32)


@torch.no_grad()
def test_low_precision(free, monkeypatch):
    """It is left to oneDNN where the processor multiplies it."""
    model, x = nn.Sequential(nn.Conv2d(6, 8, 3, bias=False), batch_norm(8), nn.ReLU()).eval(), torch.randn(IMAGE)
    for multiplied in ([], [torch.bfloat16]):
        for module in (convolution_kernels, convolutions):
            monkeypatch.setattr(module, "multiplied_dtypes", lambda multiplied=multiplied: multiplied)
        traced = trace(Autocast(model), x, frozen=True)
        assert taken(traced) == (not multiplied)
        assert_close(traced.result, model(x), torch.bfloat16)
    assert "the processor multiplies torch.bfloat16 by itself" in left(traced)[-1]


@torch.no_grad()
def test_dynamic_sizes(free):
    """They are compiled for once, and decide nothing but by what they are then."""
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3)).eval()
    traced = trace(model, torch.randn(IMAGE), dynamic=True)
    assert taken(traced) == 2
    for size in ((2, 6, 9, 11), (4, 6, 7, 5), (3, 6, 17, 30)):
        x = torch.randn(size)
        assert_close(traced.function(x), model(x), torch.float32)
    assert len(traced.graphs) == 1


@torch.no_grad()
def test_a_number_of_images_that_data_decide(free):
    model = nn.Conv2d(6, 8, 3, padding=1).eval()

    def program(x: Tensor) -> Tensor:
        return model(x[x.mean((1, 2, 3)) > 0])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        traced = trace(program, x := torch.cat([torch.rand(3, 6, 9, 11), -torch.rand(2, 6, 9, 11)]))
    assert taken(traced) == 1
    assert_close(traced.result, program(x), torch.float32)


@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_memory_formats_stay(free, frozen):
    """A channels_last weight makes the result channels_last."""
    model, x = nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last), torch.randn(IMAGE)
    traced = trace(model, x, frozen=frozen)
    assert taken(traced) == 1 and traced.result.is_contiguous(memory_format=torch.channels_last)
    assert_close(traced.result, model(x), torch.float32)


# What is left alone


class Integers(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d((8 * x).long(), (64 * self.weight).long()).float()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "stride": (
        lambda: nn.Conv2d(6, 8, 3, stride=2),
        "0 (3 x 3, 6 to 8 channels, map 4 x 5): its stride is 2 x 2, not 1",
    ),
    "dilation": (lambda: nn.Conv2d(6, 8, 3, dilation=2), "its dilation is 2 x 2, not 1"),
    "kernel": (lambda: nn.Conv2d(6, 8, (3, 1)), "its kernel is 3 x 1, not 3 x 3"),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 3), "it is transposed"),
    "float64": (lambda: nn.Conv2d(6, 8, 3).double(), "it is of float64"),
    "integers": (lambda: Integers(6, 8, 3), "it is of torch.int64"),
    "1-D": (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(6, 8, 3)), "its kernel is 3, not 3 x 3"),
}


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_refused(free, name):
    make, reason = REFUSED[name]
    model = nn.Sequential(make())
    x = torch.randn(IMAGE, dtype=next(model.parameters()).dtype)
    traced = trace(model, x)
    (detail,) = left(traced)
    assert reason in detail and taken(traced) == 0
    assert_close(traced.result, model(x), x.dtype)


@torch.no_grad()
def test_what_gains_nothing():
    traced = trace(nn.Conv2d(256, 256, 3, padding=1).eval(), torch.randn(1, 256, 7, 7))
    assert re.fullmatch(r".*: winograd_conv2d\(tile=4\) is estimated to take \d\.\d\d of the time", *left(traced))


def _weights(*channels: tuple[int, int]) -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False) for inputs, outputs in channels))


@pytest.mark.parametrize(("growth", "count"), [(0.0, 0), (0.9, 0), (1.1, 1), (2.1, 2), (3.1, 3)])
@torch.no_grad()
def test_constants_grow_within_limits(free, growth, count):
    """Each of three equal weights takes another three of its size, which is one of all of them; or none, if it is
    transformed in each call."""
    model = _weights((6, 6), (6, 6), (6, 6)).eval()
    traced = trace(model, torch.randn(IMAGE), frozen=True, settings={"growth": growth})
    assert taken(traced) == 3 and transformed_before(traced) == count
    assert taken(trace(model, torch.randn(IMAGE), settings={"growth": 0.0})) == 3  # these are no constants


class Head(nn.Module):
    """One layer on several levels, as in an RPN, and another one."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.other = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, *levels: Tensor) -> list[Tensor]:
        return [self.shared(level) for level in levels] + [self.other(levels[-1])]


@torch.no_grad()
def test_a_weight_of_several_levels_is_transformed_once(free):
    levels = [torch.randn(1, 6, side, side) for side in (16, 8, 4)]
    traced = trace(Head().eval(), *levels, frozen=True, settings={"growth": 1.6})
    assert taken(traced) == 4 and transformed_before(traced) == 3
    (graph,) = traced.graphs
    calls = [node for node in graph.nodes if "winograd_conv2d_prepacked" in str(node.target)]
    assert len({node.args[1] for node in calls}) == 2


@pytest.mark.parametrize(("size", "before"), [((96, 96), True), ((98, 97), False)])  # 576 tiles, and 625
@torch.no_grad()
def test_of_a_large_map_no_weight_is_transformed_before(free, size, before):
    """The pass counts on what the operator does."""
    traced = trace(_weights((6, 6)).eval(), torch.randn(1, 6, *size), frozen=True)
    (graph,) = traced.graphs
    (call,) = [node for node in graph.nodes if "winograd_conv2d_prepacked" in str(node.target)]
    assert (call.args[1].meta["val"].dim() == 5) == before == (transformed_before(traced) == 1)


# What is estimated


# Two threads, constant weights: in and out channels, map, and how much faster than oneDNN's it was measured to be.
MEASURED = {
    256: [
        ((256, 256, 200, 272), 3.3),
        ((256, 256, 50, 68), 2.8),
        ((512, 512, 25, 34), 2.4),
        ((128, 128, 100, 136), 3.0),
        ((64, 64, 512, 512), 2.6),
        ((64, 64, 200, 272), 2.35),
        ((32, 32, 224, 224), 2.3),
    ],
    512: [
        ((256, 256, 200, 272), 3.2),
        ((256, 256, 50, 68), 2.8),
        ((512, 512, 25, 34), 2.1),
        ((128, 128, 100, 136), 2.5),
        ((64, 64, 512, 512), 2.5),
        ((64, 64, 200, 272), 2.1),
        ((32, 32, 224, 224), 1.95),
    ],
}


@pytest.mark.parametrize("bits", MEASURED)
def test_estimates_are_near_measurements(monkeypatch, bits):
    monkeypatch.setattr(convolution_kernels, "vector_bits", lambda: bits)
    for (channels, out_channels, *size), gain in MEASURED[bits]:
        convolution = Convolution(1, channels, out_channels, tuple(size), threads=2)
        best = min(choice.seconds for choice in Winograd(4).choices(convolution))
        assert convolution_kernels.library_seconds(convolution) / best == pytest.approx(gain, rel=0.25)


# The layers of a ResNet of which the weight is most of what is read, and stems: few channels.
LOSING = [(512, 512, 7, 7), (256, 256, 7, 7), (3, 64, 224, 224)]


@pytest.mark.parametrize("bits", MEASURED)
@pytest.mark.parametrize("shape", LOSING)
def test_what_loses(monkeypatch, bits, shape):
    monkeypatch.setattr(convolution_kernels, "vector_bits", lambda: bits)
    channels, out_channels, *size = shape
    faster, reason = convolutions._faster(
        Convolution(1, channels, out_channels, tuple(size), threads=2), [Winograd(4), Winograd(2)]
    )
    assert not faster and reason.count("is estimated to take") == 2


@pytest.mark.parametrize("bits", MEASURED)
@pytest.mark.parametrize(("channels", "size"), [(232, 7), (960, 7), (1152, 7), (96, 112)])
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_depthwise_convolutions_lose(monkeypatch, bits, channels, size, threads):
    monkeypatch.setattr(convolution_kernels, "vector_bits", lambda: bits)
    depthwise = Convolution(1, channels, channels, (size, size), groups=channels, threads=threads)
    faster, reason = convolutions._faster(depthwise, [Winograd(4), Winograd(2)])
    assert not faster and "is estimated to take" in reason


# The switch


def passes() -> list[Any]:
    return [each for each in config.joint_custom_pre_pass or [] if isinstance(each, ChooseConvolutions)]


def test_the_switch(switch):
    theirs = object()
    config.joint_custom_pre_pass = theirs
    use_winograd()
    before, ours = config.joint_custom_pre_pass
    assert before is theirs and ours.kernels == (Winograd(4),) and ours.growth == 0.5
    fold_norms()
    use_winograd()
    assert config.joint_custom_pre_pass[:2] == [theirs, ours] and passes() == [ours]
    use_winograd(tile=2, growth=math.inf)
    assert config.joint_custom_pre_pass[0] is theirs
    (other,) = passes()
    assert other.kernels == (Winograd(2),) and other.growth == math.inf
    none_else = dict.fromkeys(("torchvision", "transformers", "depthwise_separable", "norms", "sampling"), False)
    accelerate(winograd=True, **none_else)
    assert passes() == [other]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"tile": 3}, "tile must be 2 or 4, got 3"), ({"growth": -1}, "growth must not be negative, got -1")],
)
def test_errors(switch, arguments, message):
    with pytest.raises(ValueError, match=f"use_winograd: {message}"):
        use_winograd(**arguments)
    assert passes() == []


def key() -> bytes:
    return pickle.dumps(codecache.FxGraphHashDetails(torch.fx.GraphModule({}, torch.fx.Graph()), [], {}, []))


def test_caches_know(switch):
    """What is compiled with it is no answer without it, with other settings, or for another number of threads."""
    keys = [key()]
    for arguments in ({}, {"tile": 2}, {"growth": 1.0}):
        use_winograd(**arguments)
        keys.append(key())
    torch.set_num_threads(torch.get_num_threads() + 1)
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert cache_key.TAG in passes()[0].uuid()


SWITCH = """
import inductor_vision
inductor_vision.use_winograd()
import torch._inductor.lowering
from torch._inductor import config
print([type(each).__name__ for each in config.joint_custom_pre_pass])
"""


def test_the_switch_waits_for_inductor():
    assert run_python(SWITCH).strip() == "['ChooseConvolutions']"


@torch.no_grad()
def test_nothing_changes_without_the_call(switch):
    model, x = nn.Conv2d(64, 64, 3, padding=1).eval(), torch.randn(1, 64, 96, 96)
    traced = trace_and_run(model, x)
    assert traced.paths == [] and torch.equal(traced.result, model(x))


CACHED = """
import sys
import torch
import inductor_vision

if sys.argv[1:]:
    inductor_vision.use_winograd()
torch.manual_seed(0)
model, x = torch.nn.Conv2d(64, 64, 3, padding=1).eval(), torch.randn(1, 64, 96, 96)
with torch.no_grad():
    print(torch.compile(model)(x).view(torch.int32).sum().item())
"""


@pytest.mark.slow
def test_compiled_with_and_without_in_one_cache(tmp_path):
    """Winograd's algorithm rounds in another way: a result from the cache would show."""
    without, winograd, *again = [
        run_python(CACHED, *arguments, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)).strip()
        for arguments in ([], ["winograd"], [], ["winograd"])
    ]
    assert [without, winograd] == again and without != winograd


# Compiled


class Bottleneck(nn.Module):
    """As in a ResNet: what is around the convolution that is taken stays with oneDNN. Of vectors of up to eight numbers
    Inductor would make code."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.convolve, self.expand = (
            nn.Conv2d(24, 12, 1),
            nn.Conv2d(12, 12, 3, padding=1),
            nn.Conv2d(12, 24, 1),
        )
        self.norms = nn.ModuleList([batch_norm(12), batch_norm(12), batch_norm(24)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.reduce(x)).relu()
        y = self.norms[1](self.convolve(y)).relu()
        return (self.norms[2](self.expand(y)) + x).relu()


@torch.no_grad()
def test_nothing_is_copied_around_it(free):
    """All is channels_last: beside the kernel, in whose store norm and activation are, nothing is generated."""
    model = nn.Sequential(Bottleneck(), Bottleneck()).eval()
    x = torch.randn(2, 24, 9, 11).contiguous(memory_format=torch.channels_last)
    compiled = compile_and_run(model, x, config={"cpp_wrapper": True, "freezing": True, **winograd()})
    assert [path.kind for path in compiled.paths if path.op == "conv2d"].count("replaced") == 2
    assert (compiled.templates, compiled.kernels) == (2, 2)
    assert_close(compiled.result, model(x), torch.float32)


@torch.no_grad()
def test_explained(free, switch):
    use_winograd(growth=math.inf)
    model = nn.Sequential(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3))
    with config.patch(freezing=True):
        text = str(inductor_vision.explain(model.eval(), torch.randn(IMAGE)))
    assert text.splitlines()[:2] == [
        "conv2d           left alone: 0 (1 x 1, 6 to 8 channels, map 9 x 11): its kernel is 1 x 1, not 3 x 3",
        "conv2d           replaced: 1 (3 x 3, 8 to 8 channels, map 7 x 9) by winograd_conv2d(tile=4)",
    ]
    assert "winograd_conv2d  template: " in text


# Measured


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("best", ["conv2d", "winograd_conv2d(tile=4), its weight transformed in each call"])
@torch.no_grad()
def test_measured_under_max_autotune(monkeypatch, tmp_path, best):
    """What was measured counts, whatever is estimated."""
    problems = []

    def fastest(problem: str, candidates: Any, prepare: Callable[[], Callable[[str], None]]) -> str:
        if not problems:
            prepare()(best)  # compiled within a compilation
        problems.append(problem)
        return best

    monkeypatch.setattr(convolution_times, "fastest", fastest)
    model, x = _weights((6, 6), (6, 6)).eval(), torch.randn(IMAGE)
    settings = {"freezing": True, "max_autotune": True, **winograd()}
    torch._dynamo.reset()
    traced = trace_and_run(model, x, config=settings)
    assert taken(traced) == (0 if best == "conv2d" else 2) and len(set(problems)) == 1
    assert len(left(traced)) == 2 - taken(traced)
    assert all("oneDNN's was measured to be faster" in detail for detail in left(traced))
    assert_close(traced.result, model(x), torch.float32)


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("constant", [False, True])
@torch.no_grad()
def test_what_is_measured_computes_the_same(constant):
    convolution = Convolution(1, 6, 8, (9, 11), padding=(1, 2), constant=constant)
    calls = convolution_times._calls(convolution, Winograd(4).choices(convolution))
    assert len(calls) == 2 + constant
    expected, *results = [call() for call in calls.values()]
    for result in results:
        assert_close(result, expected, torch.float32)
