"""What the gradients of deform_conv2d compile to: one kernel, for those that are asked for, and what it computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from inductor_vision import DeformConv2d, deform_conv2d
from inductor_vision.lowering import deform_conv2d as lowering
from inductor_vision.ops.registry import OPS
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import Compiled, compile_and_run
from inductor_vision.tests.support.deform_conv2d import (
    CASES,
    HOSTILE,
    TENSORS,
    Case,
    Sample,
    as_torchvision,
    gradient_like,
    sample,
)
from torch import Tensor
from torch._inductor import config
from torch._inductor.cpu_vec_isa import pick_vec_isa

pytestmark = pytest.mark.usefixtures("optimized")

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
BACKWARD = OPS["deform_conv2d_backward"]

# One call of the operator: the sample, and which gradients are wanted; None: of all tensors that it has.
Call = tuple[Sample, tuple[str, ...] | None]

QUICK_NAMES = {
    FP32: [
        "mask_bias", "neither", "numbers", "stride_padding_dilation", "kernel_1x1", "kernel_5x5", "channels_1_to_5",
        "channels_37", "channels_520", "out_channels_130", "groups_8", "groups_of_two_channels",
        "groups_of_150_channels", "offset_groups_of_37", "groups_across_offset_groups", "multiplier_offset_groups",
        "depthwise_every_channel_its_offsets", "depthwise_37", "depthwise_channels_last", "shared", "shared_37",
        "input_channels_last", "input_stepped", "input_expanded", "offset_channels_last", "offset_transposed",
        "weight_permuted", "empty_batch", "empty_batch_depthwise", "batch_5", "one_output_pixel", "one_input_pixel",
        "wide", "integers", "borders", "borders_depthwise", "far", "hostile", "hostile_depthwise",
    ],
    BF16: ["mask_bias", "channels_37", "depthwise_37", "hostile_channels_last"],
}  # fmt: skip
QUICK: list[Call] = [(sample(name, dtype), None) for dtype, names in QUICK_NAMES.items() for name in names]


def kernel_of(case: Case, dtype: torch.dtype) -> str:
    panel = 8 if dtype == FP64 else 16
    return "vector" if case.groups > 1 and case.channels // case.groups < panel else "GEMM"


def wanted_of(call: Call) -> list[bool]:
    s, names = call
    return [name in (s.tensors if names is None else names) for name in TENSORS]


def arguments_of(call: Call) -> tuple[Any, ...]:
    s, _ = call
    out = torch.empty(s.case.batch, s.case.out_channels, *s.case.out_size, dtype=s.args[0].dtype)
    return gradient_like(out), *s.positional, wanted_of(call)


def compute(calls: Sequence[Call], **options: Any) -> Compiled:
    """All calls in one graph and one source file."""

    def run(calls: Sequence[tuple[Any, ...]]) -> list[tuple[Tensor, ...]]:
        return [BACKWARD(*arguments) for arguments in calls]

    return compile_and_run(run, list(map(arguments_of, calls)), config={"cpp_wrapper": True, **options})


def assert_right(call: Call, results: Sequence[Tensor]) -> None:
    """Each is what the decomposition gives in float64, in the memory format that it has eagerly; what is not wanted is
    empty."""
    s, _ = call
    arguments = arguments_of(call)
    exact = [t.double() if isinstance(t, Tensor) else t for t in arguments]
    for name, want, result, expected, eager in zip(
        TENSORS, wanted_of(call), results, BACKWARD.decomposition(*exact), BACKWARD(*arguments)
    ):
        assert result.dtype == s.args[0].dtype
        assert result.stride() == eager.stride(), f"{s.name}: {name}"
        assert (result.numel() > 0) == (want and s.tensors[name].numel() > 0)
        assert_close(result, expected, result.dtype, f"{s.name}: gradient of {name}")


def assert_takes_template(compiled: Compiled, calls: Sequence[Call]) -> None:
    assert compiled.templates == len(calls)
    assert [(path.op, path.kind) for path in compiled.paths] == [("deform_conv2d_backward", "template")] * len(calls)
    for path, (s, names) in zip(compiled.paths, calls):
        of = ", ".join(name for name in TENSORS if name in (s.tensors if names is None else names))
        assert path.detail.startswith(f"{kernel_of(s.case, s.args[0].dtype)} kernel, gradients of {of}, "), s.name


@pytest.fixture(scope="module")
def quick() -> Compiled:
    return compute(QUICK)


def test_every_call_is_a_template(quick):
    assert_takes_template(quick, QUICK)


@pytest.mark.parametrize("i", range(len(QUICK)), ids=[f"{s.name}-{str(s.args[0].dtype)[6:]}" for s, _ in QUICK])
def test_gradients(quick, i):
    assert_right(QUICK[i], quick.result[i])


@pytest.mark.parametrize("i", [i for i, (s, _) in enumerate(QUICK) if s.args[0].dtype == FP32 and s.name in CASES])
def test_gradients_are_torchvisions(torchvision, quick, i):
    s, _ = QUICK[i]
    grad, *_ = arguments_of(QUICK[i])
    theirs = torch.ops.torchvision._deform_conv2d_backward(grad, *as_torchvision(s))
    for name, expected in zip(("input", "weight", "offset", "mask", "bias"), theirs):
        if name in s.tensors:
            assert_close(quick.result[i][TENSORS.index(name)], expected, FP32, f"{s.name}: gradient of {name}")


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
def test_gradients_of_all_other_cases_and_dtypes():
    names = [name for name in (*CASES, *HOSTILE) if name not in QUICK_NAMES[FP32]]
    few = ("mask_bias", "channels_37", "groups_8", "input_channels_last", "hostile", "depthwise_37")
    samples = [*map(sample, names), *(sample(name, dtype) for name in few for dtype in (FP64, FP16))]
    calls: list[Call] = [(s, None) for s in samples]
    compiled = compute(calls)
    assert_takes_template(compiled, calls)
    for call, results in zip(calls, compiled.result):
        assert_right(call, results)


SUBSETS = [*((name,) for name in TENSORS), ("input", "weight"), ("weight", "bias"), ("offset", "mask")]


def test_only_what_is_wanted():
    """Values are those of all gradients together, to the bit."""
    samples = [sample("groups_2"), sample("depthwise_37")]
    calls: list[Call] = [(s, names) for s in samples for names in (None, *SUBSETS)]
    compiled = compute(calls)
    assert_takes_template(compiled, calls)
    every = 1 + len(SUBSETS)
    for i, (call, results) in enumerate(zip(calls, compiled.result)):
        for want, result, together in zip(wanted_of(call), results, compiled.result[i - i % every]):
            assert torch.equal(result, together) if want else result.numel() == 0


def test_nothing_wanted():
    call: Call = (sample("mask_bias"), ())
    compiled = compute([call])
    assert compiled.templates == 0
    assert [result.shape for result in compiled.result[0]] == [(0,)] * 5


def test_what_nothing_reads_is_not_computed():
    """As where torchvision's operator, which always gives all gradients, is for a layer whose input needs none."""
    arguments = arguments_of((sample("mask_bias"), None))
    compiled = compile_and_run(lambda *arguments: BACKWARD(*arguments)[2], *arguments)
    assert compiled.templates == 1
    assert "kGradWeight>(" in compiled.source.replace("inductor_vision::", "").replace("\\n", "")
    assert_close(compiled.result, BACKWARD.decomposition(*arguments)[2], FP32)


@pytest.mark.parametrize("simdlen,bits", [(256, 256), pytest.param(1, 0, marks=pytest.mark.slow)])
def test_narrow_or_no_vectors(simdlen, bits):
    names = ["mask_bias", "channels_37", "groups_8", "input_channels_last", "depthwise_37"]
    calls: list[Call] = [(sample(name, dtype), None) for dtype in (FP32, BF16) for name in names]
    with config.patch({"cpp.simdlen": simdlen}):
        isa = pick_vec_isa()
        assert (isa.bit_width() if isa else 0) == bits
        compiled = compute(calls)
    assert compiled.templates == len(calls)
    for call, results in zip(calls, compiled.result):
        assert_right(call, results)


def test_every_number_of_threads_gives_the_same_bits(monkeypatch):
    """Gradients of images that are done in several phases."""

    def few_pixels(convolution, kind):
        return dataclasses.replace(blocking(convolution, kind), pixels=60, phase_bytes=1 << 18)

    blocking = lowering.default_backward_blocking
    monkeypatch.setattr(lowering, "default_backward_blocking", few_pixels)
    cases = [
        Case(batch=5, channels=48, out_channels=48, size=(13, 17)),  # several images at a time
        Case(batch=1, channels=80, out_channels=20, size=(37, 41), offset_groups=2),
        Case(batch=3, channels=40, out_channels=40, size=(37, 41), groups=40, layout="channels_last"),
    ]
    calls: list[Call] = [(sample(case), None) for case in cases]
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(compute(calls).result)
    for others in results[1:]:
        for first, other in zip(results[0], others):
            assert all(map(torch.equal, first, other))


def test_one_compilation_serves_all_sizes():
    def call(batch: int, *size: int) -> Call:
        return sample(Case(batch=batch, channels=16, out_channels=24, size=size)), None

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        *others, mask = tensors
        return BACKWARD(*others, *([[1, 1]] * 3), mask, [True] * 5)

    def tensors_of(call: Call) -> list[Tensor]:
        return [argument for argument in arguments_of(call) if isinstance(argument, Tensor)]

    first = call(4, 7, 11)
    compiled = compile_and_run(run, *tensors_of(first), dynamic=True)
    assert compiled.templates == 1
    assert_right(first, compiled.result)
    with torch.compiler.set_stance("fail_on_recompile"):
        for sizes in [(2, 12, 5), (40, 5, 3), (3, 20, 33)]:
            other = call(*sizes)
            assert_right(other, compiled.function(*tensors_of(other)))


def train(layer: DeformConv2d, x: Tensor, offset: Tensor, mask: Tensor) -> list[Tensor]:
    tensors = [x, offset, mask, *layer.parameters()]
    return list(torch.autograd.grad(layer(x, offset, mask).square().sum(), tensors))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_autograd_of_compiled_code(layout):
    s = sample(Case(channels=16, out_channels=16, layout=layout)).requiring_grad()
    tensors = s.args[0], s.args[1], s.kwargs["mask"]
    layer = DeformConv2d(16, 16, 3, padding=1).to(memory_format=torch.channels_last)
    compiled = compile_and_run(
        layer, *tensors, run=lambda layer, *tensors: train(layer, *tensors), config={"cpp_wrapper": True}
    )
    assert {(path.op, path.kind) for path in compiled.paths} == {
        ("deform_conv2d", "template"),
        ("deform_conv2d_backward", "template"),
    }
    for actual, expected in zip(compiled.result, train(layer, *tensors)):
        assert_close(actual, expected, FP32)
        assert actual.stride() == expected.stride()


def test_nan_of_the_gradient_stays_where_it_is():
    """Lanes without a channel are multiplied with it too, 0 * inf being NaN, and so are corners without a share."""
    s = sample(Case(channels=5, out_channels=3, offsets="integers"))
    grad, *rest = arguments_of((s, None))
    grad[0, 1, 2, 3] = torch.inf
    grad[1, 0, 0, 0] = torch.nan
    compiled = compile_and_run(lambda *arguments: BACKWARD(*arguments), grad, *rest)
    for actual, expected in zip(compiled.result, BACKWARD.decomposition(grad, *rest)):
        assert torch.equal(actual.isfinite(), expected.isfinite())
        assert_close(actual, expected, FP32)


def test_wrong_arguments_are_the_same_error_as_in_eager_mode():
    grad, *rest = arguments_of((sample("mask_bias"), None))
    wrong = (grad[:, :-1], *rest)
    with pytest.raises(RuntimeError, match="deform_conv2d_backward: grad must have shape") as eager:
        BACKWARD(*wrong)
    with pytest.raises(RuntimeError) as compiled:
        compile_and_run(lambda *arguments: BACKWARD(*arguments), *wrong)
    assert str(eager.value) in str(compiled.value)


def test_double_backward_is_an_error():
    s = sample("mask_bias").requiring_grad()
    function = torch.compile(deform_conv2d, fullgraph=True)
    (gradient,) = torch.autograd.grad(function(*s.args, **s.kwargs).square().sum(), s.args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()
