"""What depthwise_separable_conv2d compiles to: which kernel takes a call, what it computes, what is fused into it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from inductor_vision import DepthwiseSeparableConv2d, depthwise_separable_conv2d, explain
from inductor_vision.lowering import depthwise_separable_conv2d as lowering
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import Compiled, compile_and_run, trace_and_run
from inductor_vision.tests.support.convolution import gradient_like
from inductor_vision.tests.support.depthwise_separable_conv2d import (
    CASES,
    TENSORS,
    Case,
    Network,
    Sample,
    oracle,
    sample,
)
from inductor_vision.tests.support.layouts import strides_of
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.cpu_vec_isa import pick_vec_isa

pytestmark = pytest.mark.usefixtures("optimized")

OP = torch.ops.inductor_vision.depthwise_separable_conv2d.default
BACKWARD = torch.ops.inductor_vision.depthwise_separable_conv2d_backward.default
NAME = "depthwise_separable_conv2d"
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# Each call costs the compiler a second, each other dtype and activation ten.
QUICK_NAMES = {
    FP32: [
        "plain", "stride_padding_dilation", "kernel_1x1", "kernel_2x3", "channels_1_to_5", "channels_300_to_33",
        "empty_batch", "width_130", "input_sliced", "then_prelu", "multiplier_channels_last", "strided_channels_last",
    ],
    BF16: ["channels_37_to_19"],
}  # fmt: skip


def hostile(tensor: str, dtype: torch.dtype = FP32, layout: str = "contiguous") -> Sample:
    """A call in which some numbers of a tensor are NaN or infinite: one in 40 of the input, few of a weight."""
    s = sample(Case(channels=18, first="relu6", layout=layout), dtype)
    values = s.tensors[tensor].clone()  # strides are kept
    flat = values.view(-1) if values.is_contiguous() else values.permute(0, 2, 3, 1).view(-1)
    places = torch.arange(3, flat.numel(), 40 if tensor == "input" else 70)
    flat[places] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype).repeat(len(places))[: len(places)]
    return s.replace(**{tensor: values})


QUICK = [sample(name, dtype) for dtype, names in QUICK_NAMES.items() for name in names]
HOSTILE = {
    "input": hostile("input"),
    "depthwise_weight_channels_last": hostile("depthwise_weight", layout="channels_last"),
}


def call_all(calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Tensor]:
    return [depthwise_separable_conv2d(*args, **kwargs) for args, kwargs in calls]


def compute(samples: Sequence[Sample], **options: Any) -> Compiled:
    """All samples in one graph and one source file, which takes little longer to compile than one of them."""
    with torch.no_grad():
        return compile_and_run(call_all, [(s.args, s.kwargs) for s in samples], config={"cpp_wrapper": True, **options})


def assert_takes_template(compiled: Compiled, count: int) -> None:
    assert compiled.templates == count
    assert [(path.op, path.kind) for path in compiled.paths] == [(NAME, "template")] * count
    assert all(path.detail.startswith("one pass, tiles of ") for path in compiled.paths)


def assert_right(result: Tensor, s: Sample) -> None:
    eager = depthwise_separable_conv2d(*s.args, **s.kwargs)
    assert result.dtype == s.args[0].dtype
    assert strides_of(result) == strides_of(eager), s.name
    exact = s.to(FP64)
    assert_close(result, depthwise_separable_conv2d(*exact.args, **exact.kwargs), result.dtype, s.name)


def assert_all_right(samples: Sequence[Sample], **options: Any) -> None:
    compiled = compute(samples, **options)
    assert_takes_template(compiled, len(samples))
    for result, s in zip(compiled.result, samples):
        assert_right(result, s)


@pytest.fixture(scope="module")
def quick() -> Compiled:
    return compute([*QUICK, *HOSTILE.values()])


def test_every_call_is_a_template(quick):
    assert_takes_template(quick, len(QUICK) + len(HOSTILE))


@pytest.mark.parametrize("i", range(len(QUICK)), ids=[f"{s.name}-{str(s.args[0].dtype)[6:]}" for s in QUICK])
def test_values(quick, i):
    assert_right(quick.result[i], QUICK[i])


@pytest.mark.parametrize("name", HOSTILE)
def test_nan_and_infinity_reach_what_they_are_multiplied_with(quick, name):
    """And nothing else: two convolutions may multiply them with the zeros of the padding, the oracle does not."""
    s, result = HOSTILE[name], quick.result[len(QUICK) + list(HOSTILE).index(name)]
    expected = oracle(*s.args, **s.kwargs)
    assert not expected.isfinite().all() and expected.isfinite().any()
    assert_close(result, expected, FP32)


FEW = (
    "plain", "both_activations", "channels_37_to_19", "channels_300_to_33", "multiplier_3_of_5", "stride_3x4",
    "width_130", "strided_channels_last",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
def test_values_of_all_other_cases():
    assert_all_right([sample(name) for name in CASES if name not in QUICK_NAMES[FP32]])


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("dtype", [FP64, BF16, FP16], ids=str)
def test_values_in_other_dtypes(dtype):
    activations = [f"then_{name}" for name in ("relu6", "leaky_relu(0.3)", "hardswish", "silu", "mish", "gelu")]
    assert_all_right([sample(name, dtype) for name in (*FEW, *activations)])


@contextlib.contextmanager
def vectors(simdlen: int, bits: int) -> Iterator[None]:
    with config.patch({"cpp.simdlen": simdlen}):
        isa = pick_vec_isa()
        assert (isa.bit_width() if isa else 0) == bits
        yield


@pytest.mark.slow
@pytest.mark.parametrize("simdlen,bits", [(256, 256), (1, 0)])
def test_narrow_or_no_vectors(simdlen, bits):
    with vectors(simdlen, bits):
        names = {FP32: FEW, FP64: FEW[:2], BF16: FEW[1:3], FP16: FEW[1:2]}
        assert_all_right([sample(name, dtype) for dtype in names for name in names[dtype]])


class Block(nn.Module):
    """Separable convolution with an activation of its own, batch norm, activation, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = DepthwiseSeparableConv2d(
            16, 16, 3, padding=1, depthwise_activation="relu6", pointwise_activation="hardswish"
        )
        self.norm = nn.BatchNorm2d(16).eval()
        for values in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.normal_(values)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu() + x

    def reference(self, x: Tensor) -> Tensor:
        return copy.deepcopy(self).double()(x.double())


def test_activation_norm_and_residual_are_fused():
    blocks = nn.ModuleList(Block() for _ in range(2))
    x = torch.randn(2, 16, 9, 13)
    calls = [x, x.contiguous(memory_format=torch.channels_last) + 1]

    def run(calls):
        return [block(call) for block, call in zip(blocks, calls)]

    with torch.no_grad():  # frozen: what packs weights runs at compile time
        compiled = compile_and_run(run, calls, config={"freezing": True, "cpp_wrapper": True})
        assert compiled.templates == compiled.fused == compiled.kernels == len(blocks)
        for block, call, result in zip(blocks, calls, compiled.result):
            assert_close(result, block.reference(call), FP32)
            assert result.stride() == call.stride()


def test_one_compilation_serves_all_sizes_and_weights():
    network = Network()
    with torch.no_grad():
        compiled = compile_and_run(network, Network.image(4, 7, 11), dynamic=True, config={"cpp_wrapper": True})
        assert_takes_template(compiled, 2)
        network.assert_right(compiled.result, Network.image(4, 7, 11))
        with torch.compiler.set_stance("fail_on_recompile"):
            for size in [(2, 12, 5), (5, 4, 3), (3, 20, 133)]:
                network.assert_right(compiled.function(Network.image(*size)), Network.image(*size))
            for parameter in network.parameters():
                parameter.mul_(1.5)
            network.assert_right(compiled.function(Network.image(2, 12, 5)), Network.image(2, 12, 5))


@pytest.mark.slow
def test_every_number_of_threads_gives_the_same_bits():
    samples = [
        sample(Case(channels=48, out_channels=40, size=(37, 41), first="relu6", layout=layout), dtype)
        for layout, dtype in (("contiguous", FP32), ("channels_last", FP32), ("channels_last", BF16))
    ]
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        compiled = compute(samples)  # the compiled C++ is the first one's
        assert_takes_template(compiled, len(samples))
        results.append(compiled.result)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


# Gradients


@dataclasses.dataclass(frozen=True)
class Backward:
    """A call of the operator that computes gradients.

    Attributes:
        wanted: which gradients; those of tensors that there are not are empty.
    """

    sample: Sample
    wanted: tuple[str, ...] = TENSORS

    @property
    def args(self) -> tuple[Any, ...]:
        case = self.sample.case
        grad = gradient_like(
            torch.empty(case.batch, case.out_channels, *case.out_size, dtype=self.sample.args[0].dtype)
        )
        return (grad, *self.sample.positional, [name in self.wanted for name in TENSORS])

    @property
    def kernel(self) -> str:
        """What is said of the kernel: the pointwise convolution's gradients are products of matrices."""
        own = ("input", "depthwise_weight", "depthwise_bias", "slope")
        said = [f"gradient of {name}" for name in own if name in self.wanted and name in self.sample.tensors]
        return ", ".join([*said, *(["hidden channels"] if "pointwise_weight" in self.wanted else [])])

    def assert_right(self, result: Sequence[Tensor]) -> None:
        """What the decomposition gives in float64, laid out as that in eager mode."""
        exact = BACKWARD(*Backward(self.sample.to(FP64), self.wanted).args)
        eager = BACKWARD(*self.args)
        for name, values, expected, like in zip(TENSORS, result, exact, eager):
            assert values.dtype == self.sample.args[0].dtype
            assert values.shape == like.shape and strides_of(values) == strides_of(like), f"{self.sample.name}: {name}"
            tensor = self.sample.tensors.get(name)
            assert values.shape == ((0,) if tensor is None or name not in self.wanted else tensor.shape)
            assert_close(values, expected, values.dtype, f"{self.sample.name}: gradient of {name}")


def differentiate(calls: Sequence[Backward], **options: Any) -> Compiled:
    """All calls in one graph; each takes its kernel."""

    def run(arguments: list[Any]) -> list[Any]:
        return [BACKWARD(*args) for args in arguments]

    with torch.no_grad():
        compiled = compile_and_run(run, [call.args for call in calls], config={"cpp_wrapper": True, **options})
    expected = [(f"{NAME}_backward", "template", call.kernel) for call in calls]
    assert [(path.op, path.kind, path.detail) for path in compiled.paths] == expected
    assert compiled.templates == len(calls)
    return compiled


def assert_right_gradients(calls: Sequence[Backward], **options: Any) -> None:
    for call, result in zip(calls, differentiate(calls, **options).result):
        call.assert_right(result)


QUICK_GRADIENTS = ["then_silu", "then_prelu", "multiplier_3_of_5", "strided_channels_last"]


def test_gradients():
    assert_right_gradients([Backward(sample(name)) for name in QUICK_GRADIENTS])


# Activations, and shapes that make a difference to the depthwise convolution; aten's gradient of hardsigmoid in eager
# mode has a sixth in float32, so that it is not compared in float64.
ACTIVATIONS = [
    *("then_relu", "then_relu6", "then_leaky_relu(0.3)", "then_hardtanh(-0.5, 2)", "then_elu(0.3)", "then_hardswish"),
    *("then_sigmoid", "then_tanh", "then_silu", "then_mish", "then_gelu", "then_gelu_tanh"),
    *("then_selu", "then_celu(0.5)", "then_softplus(2, 1)", "then_softsign"),
]
GEOMETRY = (
    "plain", "no_biases", "numbers", "stride_3x4", "no_padding", "padding_beyond_the_kernel", "stride_padding_dilation",
    "kernel_1x1", "kernel_5x5", "kernel_2x3", "kernel_1x4", "channels_1_to_5", "channels_17_to_8", "channels_300_to_33",
    "multiplier_channels_last", "empty_batch_relu", "batch_5", "one_input_pixel", "one_column", "width_130",
    "input_sliced", "input_sliced_channels_last", "input_expanded", "input_transposed", "input_stepped",
    "input_images_in_rows", "weight_shared",
)  # fmt: skip
OTHER_GRADIENTS = {
    "float32": lambda: [sample(name) for name in ("then_hardsigmoid", *GEOMETRY)],
    "float64": lambda: [sample(name, FP64) for name in (*ACTIVATIONS, "multiplier_3_of_5")],
    "bfloat16": lambda: [
        sample(name, BF16) for name in (*FEW, "input_sliced_channels_last", "then_gelu", "then_prelu")
    ],
    "float16": lambda: [sample(name, FP16) for name in FEW],
}


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("samples", OTHER_GRADIENTS.values(), ids=OTHER_GRADIENTS)
def test_gradients_of_all_other_cases_and_dtypes(samples):
    assert_right_gradients([Backward(s) for s in samples()])


@pytest.mark.slow
@pytest.mark.parametrize("simdlen,bits", [(256, 256), (1, 0)])
def test_gradients_with_narrow_or_no_vectors(simdlen, bits):
    with vectors(simdlen, bits):
        samples = [*map(sample, FEW), *(sample("then_silu", dtype) for dtype in (FP64, BF16))]
        assert_right_gradients([Backward(s) for s in samples])


@pytest.mark.slow
def test_gradients_of_few_channels_at_a_time(monkeypatch):
    """As where images are wide; rows are cut into bands where they are many."""
    monkeypatch.setattr(lowering, "cache_bytes", lambda: 4096)
    large = Case(channels=37, size=(45, 20), stride=(2, 1), first="silu")
    samples = [sample(dataclasses.replace(large, layout=layout)) for layout in ("contiguous", "channels_last")]
    assert_right_gradients([Backward(s) for s in (*samples, sample("channels_300_to_33"))])


@pytest.mark.slow
def test_only_gradients_that_are_wanted():
    """Values are those of all together, to the bit."""
    s = sample("both_activations")
    wanted = [("input",), ("depthwise_weight",), ("pointwise_weight",), ("depthwise_bias", "pointwise_bias")]
    calls = [Backward(s, names) for names in (TENSORS, *wanted)]
    together, *others = differentiate(calls).result
    for call, result in zip(calls[1:], others):
        for name, values, of_all in zip(TENSORS, result, together):
            assert torch.equal(values, of_all) if name in call.wanted else values.numel() == 0


@pytest.mark.slow
@pytest.mark.parametrize("read,left_out", [((0,), 4), ((1, 4), 4), ((2, 3), 3)], ids=str)
def test_gradients_without_users(read, left_out):
    """They are asked for, but nothing reads them: the kernel leaves them out."""
    call = Backward(sample("both_activations"))
    eager = BACKWARD(*call.args)

    def run(args: tuple[Any, ...]) -> list[Tensor]:
        results = BACKWARD(*args)
        return [results[i] for i in read]

    with torch.no_grad():
        compiled = compile_and_run(run, call.args)
    assert compiled.templates == 1
    (gradients,) = re.findall(r"SeparableGradients<float>\{(.*?)\};", compiled.source)
    assert gradients.count("nullptr") == left_out
    for i, result in zip(read, compiled.result):
        assert_close(result, eager[i], FP32, TENSORS[i])


def test_gradients_of_the_last_convolutions_bias_alone_take_no_kernel():
    with torch.no_grad():
        compiled = compile_and_run(lambda args: BACKWARD(*args), Backward(sample("plain"), ("pointwise_bias",)).args)
    assert compiled.templates == 0
    assert [result.numel() for result in compiled.result] == [0, 0, 0, 0, 6, 0]


@pytest.mark.slow
def test_every_number_of_threads_gives_the_same_gradients():
    """The gradients of the depthwise convolution, that is. The others are products of matrices, whose sums aten cuts;
    what the kernel gets from one has sums of 6 terms, which aten does not cut."""
    calls = [
        Backward(sample(Case(batch=batch, channels=48, size=(37, 41), first="silu", layout=layout), dtype))
        for batch, layout, dtype in ((3, "contiguous", FP32), (1, "channels_last", FP32), (2, "channels_last", BF16))
    ]
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        results.append(differentiate(calls, **{"cpp.dynamic_threads": True}).result)  # one compiled C++ for all
    for result in results[1:]:
        for first, other in zip(results[0], result):
            assert all(torch.equal(first[i], other[i]) for i in (0, 1, 3))


@pytest.mark.slow
def test_training_compiles_once_for_all_sizes():
    """Forward and backward pass of a module, with the gradients of its parameters."""
    network = Network()

    def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        loss = sum(result.square().sum() for result in module(x))
        return list(torch.autograd.grad(loss, [x, *network.parameters()]))

    torch._dynamo.reset()
    with recorded_paths() as paths:
        compiled = torch.compile(network, dynamic=True)
        gradients(compiled, Network.image(4, 7, 11))
    kernels = [(path.op, path.kind) for path in paths]
    assert kernels == [(NAME, "template")] * 2 + [(f"{NAME}_backward", "template")] * 2
    exact = copy.deepcopy(network).double()
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in [(4, 7, 11), (2, 12, 5), (3, 20, 133)]:
            actual, x = gradients(compiled, Network.image(*size)), Network.image(*size).double().requires_grad_()
            loss = sum(result.square().sum() for result in exact(x))
            expected = torch.autograd.grad(loss, [x, *exact.parameters()])
            for got, want in zip(actual, expected):
                assert (got - want).abs().max() <= 1e-5 * want.abs().max(), size


@pytest.mark.slow
def test_autocast_computes_in_the_lower_precision():
    s = sample("both_activations")
    with torch.autocast("cpu", BF16):
        compiled = compute([s])
    assert_takes_template(compiled, 1)
    (result,) = compiled.result
    assert result.dtype == BF16
    assert_right(result, s.to(BF16))


@pytest.mark.slow
def test_explain_says_which_kernel():
    s = sample("plain")
    with torch.no_grad():
        (path,) = explain(lambda *args: depthwise_separable_conv2d(*args, **s.kwargs), *s.args).paths
    assert (path.op, path.kind) == (NAME, "template")


def test_a_stride_that_is_not_a_constant_is_refused():
    s = sample("plain")

    def run(x: Tensor, stride: int) -> Tensor:
        return OP(x, *s.args[1:], None, [stride, stride], [1, 1], [1, 1], "identity")

    with torch.no_grad():
        traced = trace_and_run(run, s.args[0], 2, dynamic=True)
        assert_close(traced.result, oracle(*s.args, 2, 1), FP32)
        assert_close(traced.function(s.args[0], 3), oracle(*s.args, 3, 1), FP32)
    (path,) = traced.paths
    assert (path.kind, path.detail) == ("decomposition", "stride, padding and dilation must be constants")


def test_wrong_shapes_are_the_same_error_as_in_eager_mode():
    right = sample("plain")
    wrong = right.replace(pointwise_weight=right.args[2][:, :-1])
    with pytest.raises(RuntimeError) as eager:
        depthwise_separable_conv2d(*wrong.args, **wrong.kwargs)
    with pytest.raises(RuntimeError) as compiled:
        compute([wrong])
    assert str(eager.value).startswith(f"{NAME}: ")
    assert str(eager.value) in str(compiled.value)
