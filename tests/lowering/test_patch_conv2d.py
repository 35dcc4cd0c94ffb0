"""What patch_conv2d and its gradients compile to: which kernel takes a call, what it computes, what fuses into it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from inductor_vision import PatchConv2d, explain, patch_conv2d
from inductor_vision.lowering import patch_conv2d as lowering
from inductor_vision.ops.registry import OPS
from inductor_vision.tests.support import convolution_templates
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import Compiled, compile_and_run
from inductor_vision.tests.support.convolution_templates import (
    Blocks,
    assert_all_is_fused,
    assert_all_right,
    assert_same_errors,
    assert_takes_templates,
    compute,
    flat,
)
from inductor_vision.tests.support.patch_conv2d import (
    CASES,
    TENSORS,
    Case,
    Sample,
    gradient_oracle,
    oracle,
    sample,
)
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.cpu_vec_isa import pick_vec_isa

pytestmark = pytest.mark.usefixtures("optimized")

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
BACKWARD = OPS["patch_conv2d_backward"]
ORDERS = ("patches_first", "channels_first", "channels_last")

# Few of the narrow types, in one memory order: each of both costs the compiler dearly.
QUICK_FORWARD = {
    FP32: [
        "plain", "numbers", "padding_beyond_the_kernel", "channels_3_to_17", "channels_64_to_40", "groups_3_of_17",
        "no_patches", "patches_13", "batch_3_of_7", "input_channels_last", "input_stepped", "unbatched_channels_first",
    ],
    BF16: ["channels_last_strided"],
}  # fmt: skip
QUICK_BACKWARD = {FP32: ["plain", "numbers", "groups_3_of_17", "no_patches", "patches_13"]}


@dataclasses.dataclass(frozen=True)
class Call(convolution_templates.Call):
    """See the base.

    Attributes:
        bad: makes some elements of the result's gradient NaN or infinite.
    """

    function = staticmethod(patch_conv2d)
    gradients = BACKWARD
    oracle, gradient_oracle = staticmethod(oracle), staticmethod(gradient_oracle)

    bad: bool = False

    @property
    def grad(self) -> Tensor:
        grad = super().grad
        if self.bad:
            grad[0, 1, 2, 0, 1] = torch.inf
            grad[1, 0, 0, -1, -1] = torch.nan
        return grad

    @property
    def kernels(self) -> list[tuple[str, str]]:
        layout = self.sample.case.layout.removeprefix("sliced_")
        order = {"expanded": "channels_first", "patches_last": "channels_first"}.get(layout, layout)
        if order not in ORDERS or (self.sample.case.channels == 1 and order == "channels_last"):
            order = "patches_first"
        if self.wanted is None:
            return [("patch_conv2d", f"{order}, fused")]
        sums = [name for name in ("weight", "bias") if name in self.wanted and name in self.sample.tensors]
        kernels = [f"gradient of the input, {order}, fused"] if "input" in self.wanted else []
        kernels += [f"gradients of {', '.join(sums)}"] if sums else []
        return [("patch_conv2d_backward", kernel) for kernel in kernels]


def with_gradients(s: Sample) -> list[Call]:
    return [Call(s), Call(s, TENSORS)]


def bad_calls(layout: str) -> list[Call]:
    """With NaN and infinity in the input, the weight, or the gradient: what meets only padding is not multiplied."""
    s = sample(Case(channels=5, out_channels=3, padding=(3, 2), layout=layout))
    input, weight = s.args[0].clone(), s.args[1].clone()
    input[0, 1, 2, 0, 0], input[1, 4, 3, -1, -1] = torch.nan, torch.inf
    weight[:, :, 0, :], weight[2, 1, 2, 2] = torch.nan, -torch.inf
    return [Call(s.replace(input=input)), Call(s.replace(weight=weight)), Call(s, TENSORS, bad=True)]


QUICK = [
    *(Call(sample(name, dtype)) for dtype in QUICK_FORWARD for name in QUICK_FORWARD[dtype]),
    *(with_gradients(sample(name, dtype))[1] for dtype in QUICK_BACKWARD for name in QUICK_BACKWARD[dtype]),
    *bad_calls("patches_first"),
]


@pytest.fixture(scope="module")
def quick() -> Compiled:
    return compute(QUICK)


def test_every_call_is_a_template(quick):
    assert_takes_templates(quick, QUICK)


@pytest.mark.parametrize("i", range(len(QUICK)), ids=map(str, QUICK))
def test_values(quick, i):
    QUICK[i].assert_right(quick.result[i])


def test_what_meets_only_padding_is_not_multiplied(quick):
    """A weight of NaN makes NaN where its tap lies on the patch, and nowhere else."""
    _, weights, _ = range(len(QUICK) - 3, len(QUICK))
    nan = quick.result[weights].isnan()
    assert nan.any((1, 2)).any((0, 2)).tolist() == [False] * 3 + [True] * 4 + [False]


FEW = ["plain", "channels_37_to_19", "groups_2", "input_channels_first", "input_channels_last"]
OTHER = {
    "forward": lambda: [Call(sample(name)) for name in CASES if name not in (*QUICK_FORWARD[FP32], "depthwise")],
    "gradients": lambda: [
        Call(sample(name), TENSORS)
        for name in CASES
        if name not in (*QUICK_BACKWARD[FP32], "depthwise") and not name.startswith(("unbatched", "patch_", "weight"))
    ],
    "low-precision": lambda: [
        call for name in FEW for dtype in (BF16, FP16) for call in with_gradients(sample(name, dtype))
    ],
    "float64": lambda: [call for name in (*FEW, "depthwise") for call in with_gradients(sample(name, FP64))],
    "bad": lambda: [call for layout in ORDERS[1:] for call in bad_calls(layout)],
}


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("calls", OTHER.values(), ids=OTHER)
def test_all_other_cases_and_dtypes(calls):
    calls = calls()
    compiled = compute(calls)
    assert_takes_templates(compiled, calls)
    assert_all_right(compiled, calls)


@pytest.mark.slow
@pytest.mark.parametrize("simdlen,bits", [(256, 256), (1, 0)])
def test_narrow_or_no_vectors(simdlen, bits):
    names = ["plain", "channels_37_to_19", "input_channels_first", "groups_3_of_17"]
    samples = [*map(sample, names), *(sample("plain", dtype) for dtype in (FP64, BF16))]
    calls = [call for s in samples for call in with_gradients(s)]
    with config.patch({"cpp.simdlen": simdlen}):
        isa = pick_vec_isa()
        assert (isa.bit_width() if isa else 0) == bits
        compiled = compute(calls)
    assert_takes_templates(compiled, calls)
    assert_all_right(compiled, calls)


def few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of patches are cut into bands of rows and blocks of channels everywhere, as large ones are."""
    monkeypatch.setattr(lowering, "cache_bytes", lambda: 4096)


@pytest.mark.slow
def test_work_that_is_cut_into_blocks(monkeypatch):
    few_bytes(monkeypatch)
    names = ["plain", "stride_padding_dilation", "padding_beyond_the_kernel", "kernel_5x5", "channels_37_to_19",
             "channels_64_to_40", "groups_4_of_16", "batch_3_of_7", "patch_17x13", "channels_first_strided",
             "channels_last_strided"]  # fmt: skip
    calls = [call for name in names for call in with_gradients(sample(name))]
    compiled = compute(calls)
    assert compiled.source.count("PatchBlocking{.group_bytes = 2048}") >= len(calls)
    assert_takes_templates(compiled, calls)
    assert_all_right(compiled, calls)


@pytest.mark.slow
def test_only_what_is_wanted():
    """Values are those of all gradients together, to the bit."""
    every = [("input",), ("weight",), ("bias",), ("input", "bias"), ("weight", "bias")]
    s = sample("patches_13")
    calls = [Call(s, wanted) for wanted in (TENSORS, *every)]
    compiled = compute(calls)
    assert_takes_templates(compiled, calls)
    for i, call in enumerate(calls):
        for name, result, together in zip(TENSORS, compiled.result[i], compiled.result[0]):
            assert torch.equal(result, together) if name in call.wanted else result.numel() == 0


def test_nothing_wanted():
    compiled = compute([Call(sample("plain"), ())])
    assert compiled.templates == 0
    assert [result.shape for result in compiled.result[0]] == [(0,)] * 3


# What no template takes


def test_depthwise_convolutions_are_left_to_aten():
    s = sample("depthwise").requiring_grad("input", "weight")
    paths = explain(lambda *args: patch_conv2d(*args, **s.kwargs), *s.args).paths
    assert [(path.op, path.kind) for path in paths] == [
        ("patch_conv2d", "decomposition"),
        ("patch_conv2d_backward", "decomposition"),
    ]
    assert all("a depthwise convolution has one output for each input channel" in path.detail for path in paths)


@pytest.mark.parametrize(
    "name,dtype,taken",
    [
        ("depthwise", FP32, False),
        ("depthwise", FP64, True),
        ("depthwise", BF16, True),
        ("depthwise_multiplier", FP32, True),
        ("groups_of_one_channel", FP32, True),
        ("groups_of_one_output", FP32, True),
        ("channels_1_to_1", FP32, True),
    ],
)
def test_which_groups_a_template_takes(name, dtype, taken):
    """In float64 and bfloat16 aten has no fast depthwise convolution either."""
    call = Call(sample(name, dtype), TENSORS)
    assert (lowering._refusal(*call.sample.positional) is None) == taken
    assert (lowering._refusal_backward(*call.backward) is None) == taken


# Neighbours


class Block(nn.Module):
    """Convolution, batch norm, activation, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = PatchConv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm3d(16).eval()  # of [B, C, N, H, W]
        for values in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.normal_(values)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution's own result, and the block's."""
        own = self.conv(x)
        return own, self.norm(own.transpose(1, 2)).transpose(1, 2).relu() + x

    def reference(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return copy.deepcopy(self).double()(x.double())


def test_bias_norm_activation_and_residual_are_fused():
    inputs = {layout: sample(Case(channels=16, out_channels=16, layout=layout)).args[0] for layout in ORDERS}
    assert_all_is_fused(Blocks(Block, inputs))


def nearest_other_order(x: Tensor) -> Tensor:
    """Twice the values, written with neighbouring channels."""
    return (2 * x).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


EPILOGUES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "batch": lambda y, x: y.flatten(0, 1).relu(),
    "flatten": lambda y, x: y.flatten(2).relu(),
    "permute": lambda y, x: y.permute(0, 2, 1, 3, 4).relu(),
    "permute_contiguous": lambda y, x: y.permute(0, 2, 1, 3, 4).contiguous() + 1,
    "last_contiguous": lambda y, x: y.permute(0, 1, 3, 4, 2).contiguous() + 1,
    "slice": lambda y, x: y[:, 1:4, 2:].relu(),
    "broadcast": lambda y, x: y[:, :, :, None] * torch.ones(1, 1, 1, 3, 1, 1),
    "gate": lambda y, x: y * x.mean((3, 4), keepdim=True).sigmoid(),
    "convert": lambda y, x: y.sigmoid().double(),
    "in_place": lambda y, x: y.add_(x).relu_().mul_(2),
    "fan": lambda y, x: (y, y.relu(), y.relu() * x, y.mean((3, 4))),
    "flip": lambda y, x: y + y.flip(3),
    "pool": lambda y, x: nn.functional.avg_pool2d(y.flatten(0, 1).relu(), 2),
    "cat": lambda y, x: torch.cat([y, x], 2),
    "residual_of_another_order": lambda y, x: (y + nearest_other_order(x)).relu(),
    "fold": lambda y, x: y.relu().permute(0, 2, 1, 3, 4).reshape(2, 16, 25, 4).sum(2),
}


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
def test_epilogues_of_all_shapes():
    keys = [(name, layout) for name in EPILOGUES for layout in ORDERS]
    samples = {key: sample(Case(channels=16, out_channels=16, layout=key[1])) for key in keys}
    # Each call's input is its own, or all calls would be one.
    calls = [(*key, (s.args[0] * (i + 1), *s.args[1:])) for i, (key, s) in enumerate(samples.items())]

    def run(calls):
        return [flat(EPILOGUES[name](patch_conv2d(*args, padding=1), args[0])) for name, _, args in calls]

    compiled = compile_and_run(run, calls, config={"cpp_wrapper": True})
    assert compiled.templates == len(calls)
    assert compiled.fused > len(EPILOGUES)
    for (name, layout, args), results in zip(calls, compiled.result):
        expected = EPILOGUES[name](oracle(samples[name, layout].replace(input=args[0])), args[0].double())
        for result, values in zip(results, flat(expected)):
            assert_close(result, values, FP32, f"{name}, {layout}")


# Training


class Network(nn.Module):
    """Two layers, each of patches in another memory order."""

    def __init__(self) -> None:
        super().__init__()
        self.first = PatchConv2d(3, 16, 3, padding=1)
        self.second = PatchConv2d(16, 16, 3, stride=2, padding=1, groups=2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x).relu(), self.second(y).relu()


def patches(batch: int, number: int, *size: int) -> tuple[Tensor, Tensor]:
    kinds = (3, "patches_first"), (16, "channels_last")
    x, y = (sample(Case(batch, number, channels, 16, size, layout=layout)).args[0] for channels, layout in kinds)
    return x, y


def train(network: Callable[..., tuple[Tensor, Tensor]], parameters: Sequence[Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    one, other = network(*leaves)
    return list(torch.autograd.grad(one.square().sum() + other.sin().sum(), [*leaves, *parameters]))


def test_one_compilation_serves_all_sizes_in_training():
    network = Network()
    parameters = list(network.parameters())

    def assert_right(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        exact = copy.deepcopy(network).double()
        expected = train(exact, list(exact.parameters()), *(x.double() for x in inputs))
        for result, values in zip(results, expected):
            assert_close(result, values, FP32, f"{tuple(inputs[0].shape)}")
            assert result.stride() == values.stride()

    def run(network: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
        return train(network, parameters, *inputs)

    compiled = compile_and_run(network, *patches(4, 5, 7, 6), dynamic=True, run=run, config={"cpp_wrapper": True})
    assert {(path.op, path.kind) for path in compiled.paths} == {
        ("patch_conv2d", "template"),
        ("patch_conv2d_backward", "template"),
    }
    assert compiled.templates == 6  # for each layer one forward and two backward
    assert_right(compiled.result, patches(4, 5, 7, 6))
    with torch.compiler.set_stance("fail_on_recompile"):
        for sizes in [(2, 7, 5, 3), (3, 13, 8, 8), (5, 2, 4, 3)]:
            assert_right(run(compiled.function, *patches(*sizes)), patches(*sizes))


@pytest.mark.slow
def test_double_backward_is_an_error():
    s = sample("plain").requiring_grad()
    function = torch.compile(patch_conv2d, fullgraph=True)
    (gradient,) = torch.autograd.grad(function(*s.args, **s.kwargs).square().sum(), s.args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_autocast_computes_in_lower_precision():
    s = sample("channels_last_strided")
    with torch.autocast("cpu", BF16), torch.no_grad():
        compiled = compile_and_run(lambda: patch_conv2d(*s.args, **s.kwargs))
    assert compiled.kinds == ["template"]
    assert compiled.result.dtype == BF16
    assert_close(compiled.result, oracle(s), BF16)


@pytest.mark.slow
def test_gradients_of_many_patches_are_accurate():
    """Sums of 20480 x 16 products, in float32."""
    s = sample(Case(batch=1, patches=20480, channels=32, out_channels=64, size=(4, 4)))
    call = Call(s, TENSORS)
    compiled = compute([call])
    assert_takes_templates(compiled, [call])
    exact = BACKWARD(*(t.double() if isinstance(t, Tensor) else t for t in call.backward))
    for name, result, expected in zip(TENSORS, compiled.result[0], exact):
        assert_close(result, expected, FP32, f"gradient of {name}")


def test_wrong_shapes_are_the_same_error_as_in_eager_mode():
    right = sample("plain")
    assert_same_errors(
        patch_conv2d, [right.replace(input=right.args[0][:, :, 1:]), right.replace(bias=right.args[2][:-1])]
    )
