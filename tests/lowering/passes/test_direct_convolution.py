"""Stock convolutions that direct_conv2d computes: which of them, what results, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import inductor_vision
import pytest
import torch
import torch._inductor.lowering  # from here on this package is among its tables
from inductor_vision.lowering.passes import (
    convolution_kernels,
    convolution_times,
    convolutions,
    direct_convolution,
)
from inductor_vision.lowering.passes.convolution_kernels import Convolution, Winograd, library_seconds
from inductor_vision.lowering.passes.convolutions import ChooseConvolutions
from inductor_vision.lowering.passes.direct_convolution import DirectConvolution
from inductor_vision.perf.backends import Autocast
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import Traced, compile_and_run, trace_and_run
from torch import nn
from torch._inductor import config

IMAGE = (2, 6, 9, 11)


@pytest.fixture
def free(monkeypatch):
    """Everything that the kernel can take is worth it: small models are enough."""
    monkeypatch.setattr(convolutions, "library_seconds", lambda convolution: 1.0)


def trace(model: Callable[..., Any], *inputs: Any, frozen: bool = True, **options: Any) -> Traced:
    torch._dynamo.reset()
    passes = [ChooseConvolutions("tested", [DirectConvolution()], 0.0)]
    with torch.no_grad():
        return trace_and_run(model, *inputs, config={"freezing": frozen, "joint_custom_pre_pass": passes}, **options)


def taken(traced: Traced) -> int:
    nodes = [node for graph in traced.graphs for node in graph.nodes if "direct_conv2d_prepacked" in str(node.target)]
    assert len(nodes) == [path.kind for path in traced.paths].count("replaced")
    return len(nodes)


def left(traced: Traced) -> list[str]:
    return [path.detail for path in traced.paths if path.kind == "left alone"]


def batch_norm(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm.eval()


def inverted_residual() -> nn.Module:
    """As in a MobileNetV3: pointwise, depthwise, squeeze-excitation, pointwise."""
    from torchvision.ops import SqueezeExcitation

    layers = [nn.Conv2d(6, 20, 1, bias=False), batch_norm(20), nn.Hardswish()]
    layers += [nn.Conv2d(20, 20, 5, 2, 2, groups=20, bias=False), batch_norm(20), nn.Hardswish()]
    layers += [SqueezeExcitation(20, 8, scale_activation=nn.Hardsigmoid), nn.Conv2d(20, 7, 1, bias=False)]
    return nn.Sequential(*layers, batch_norm(7)).eval()


def test_all_of_a_block_is_taken_with_its_norms(free):
    model, x = inverted_residual(), torch.randn(IMAGE)
    traced = trace(model, x)
    assert taken(traced) == 5 and not left(traced)
    assert_close(traced.result, model(x), torch.float32)
    (graph,) = traced.graphs
    maps = "aten.convolution", "aten.rsqrt", "aten.sub", "aten.constant_pad_nd"
    assert not [node for node in graph.nodes if str(node.target).startswith(maps)]


@pytest.mark.parametrize("wrapper", [False, True])
def test_a_block_compiled_and_switched_on(switch, free, wrapper):
    """By the public call; each convolution is one kernel, and nothing calls a library."""
    inductor_vision.use_direct_convolutions()
    model, x = inverted_residual(), torch.randn(IMAGE)
    with torch.no_grad():
        compiled = compile_and_run(model, x, config={"freezing": True, "cpp_wrapper": wrapper})
    assert compiled.templates == 5 and "mkldnn" not in compiled.source
    # Hardswish and ReLU. What both a mean and a product read is computed by each of them, of the convolution's result.
    assert compiled.fused == 2
    assert_close(compiled.result, model(x), torch.float32)
    assert compiled.result.is_contiguous()


@pytest.mark.slow
@pytest.mark.usefixtures("switch", "unoptimized", "torchvision_python")
@torch.no_grad()
def test_a_map_that_is_overwritten_later(monkeypatch):
    """oneDNN adds in place to what the first convolution of the block reads: it must run later, and reads nothing of
    that convolution's, whose result is not kept beside what is fused with it."""
    from torchvision.models import resnet50

    for module in (convolution_kernels, direct_convolution):
        monkeypatch.setattr(module, "vector_bits", lambda: 512)
    inductor_vision.fold_norms()
    inductor_vision.use_direct_convolutions()
    resnet, x = resnet50(weights=None), torch.randn(1, 3, 224, 224)
    layers = resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool, resnet.layer1[0]
    model = nn.Sequential(*layers).eval()
    compiled = compile_and_run(model, x, config={"freezing": True})
    assert compiled.templates == compiled.fused == 1
    assert_close(compiled.result, model(x), torch.float32)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), "it has 2 groups of more than a channel"),
    "multiplier": (lambda: nn.Conv2d(6, 12, 3, groups=6), "it has 6 groups of more than a channel"),
    "dilation": (lambda: nn.Conv2d(6, 8, 3, dilation=2), "its kernel is dilated"),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 3), "it is transposed"),
    "1-D": (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(6, 8, 3)), "it is not two-dimensional"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(free, name):
    make, reason = REFUSED[name]
    model, x = nn.Sequential(make()).eval(), torch.randn(IMAGE)
    traced = trace(model, x)
    (detail,) = left(traced)
    assert reason in detail and taken(traced) == 0
    assert_close(traced.result, model(x), x.dtype)


def test_a_weight_that_is_no_constant(free):
    traced = trace(nn.Conv2d(6, 8, 1).eval(), torch.randn(IMAGE), frozen=False)
    assert taken(traced) == 0 and "its weight is not a constant" in left(traced)[0]


def test_low_precision(free, monkeypatch):
    """It is left to oneDNN where the processor multiplies it."""
    model, x = nn.Conv2d(6, 8, 3).eval(), torch.randn(IMAGE)
    for multiplied in ([], [torch.bfloat16]):
        for module in (direct_convolution, convolutions):
            monkeypatch.setattr(module, "multiplied_dtypes", lambda multiplied=multiplied: multiplied)
        traced = trace(Autocast(model), x)
        assert taken(traced) == (not multiplied)
        assert_close(traced.result, model(x), torch.bfloat16)


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("groups", [1, 6])
@torch.no_grad()
def test_what_is_measured_computes_the_same(groups):
    """Under max_autotune."""
    convolution = Convolution(1, 6, 6, (5, 6), stride=(2, 1), padding=(1, 2), dilation=(2, 1), groups=groups)
    library, direct = convolution_times._calls(convolution, DirectConvolution().choices(convolution)).values()
    expected = library()
    assert expected.shape == (1, 6, 5, 6)
    assert_close(direct(), expected, torch.float32)


def test_a_measurement_is_of_what_there_was_to_choose_from(monkeypatch):
    """It is remembered for other processes, which may have switched on something else."""
    problems = []
    monkeypatch.setattr(convolution_times, "fastest", lambda problem, *_: problems.append(problem))
    convolution = Convolution(1, 6, 6, (5, 6))
    for kernels in ([Winograd(4)], [Winograd(2)], [Winograd(4), DirectConvolution()]):
        choices = [choice for kernel in kernels for choice in kernel.choices(convolution)]
        convolution_times.fastest_choice(convolution, choices)
    assert len(set(problems)) == 3


def test_each_gets_what_is_fastest(monkeypatch):
    """Small maps a direct convolution, 3 x 3 on large ones Winograd's algorithm, where both are switched on."""
    for module in (convolution_kernels, direct_convolution):
        monkeypatch.setattr(module, "vector_bits", lambda: 512)
    passes = [ChooseConvolutions("tested", [DirectConvolution(), Winograd(4)], 9.0)]
    model, x = nn.Sequential(nn.Conv2d(6, 64, 1), nn.Conv2d(64, 64, 3, padding=1)), torch.randn(1, 6, 100, 100)
    torch._dynamo.reset()
    with torch.no_grad():
        traced = trace_and_run(model.eval(), x, config={"freezing": True, "joint_custom_pre_pass": passes})
    kernels = [path.detail.rpartition(" by ")[2] for path in traced.paths if path.kind == "replaced"]
    assert kernels[0] == "direct_conv2d" and kernels[1].startswith("winograd_conv2d")


def test_estimates():
    """Small layers gain what a call of the library costs."""
    kernel = DirectConvolution()
    for channels, out_channels, size in ((160, 960, 7), (64, 384, 14), (24, 144, 56)):
        pointwise = Convolution(1, channels, out_channels, (size, size), (1, 1), padding=(0, 0), threads=2)
        (choice,) = kernel.choices(pointwise)
        assert choice.growth == 0 and choice.seconds < 0.9 * library_seconds(pointwise)


@config.patch(cpu_backend="triton")
def test_no_kernel_for_other_backends():
    assert DirectConvolution().refusal(Convolution(1, 8, 8, (9, 9))) == "direct_conv2d has no kernel here"


# How many convolutions models have, at 224 x 224, and how many of them are taken with AVX-512 and two threads. The
# others are large for what they compute, as the first ones are, or have groups.
MODELS = {
    "torchvision": {
        "mobilenet_v2": (52, 48),
        "mobilenet_v3_large": (62, 60),
        "efficientnet_b0": (81, 77),
        "shufflenet_v2_x1_0": (56, 55),
    },
    "timm": {
        "mobilenetv4_conv_small": (46, 45),
        "fastvit_t8": (68, 59),
        "mobileone_s1": (65, 62),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("library,name", [(library, name) for library in MODELS for name in MODELS[library]])
def test_models(library, name, monkeypatch):
    module = pytest.importorskip(library)
    model = module.create_model(name) if library == "timm" else getattr(module.models, name)(weights=None)
    for other in (convolution_kernels, direct_convolution):
        monkeypatch.setattr(other, "vector_bits", lambda: 512)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        traced = trace(model.eval(), torch.randn(1, 3, 224, 224))
    finally:
        torch.set_num_threads(before)
    assert (taken(traced) + len(left(traced)), taken(traced)) == MODELS[library][name]
