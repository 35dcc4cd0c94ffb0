"""What upsample_bilinear2d and upsample_bicubic2d compile to."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from inductor_vision import explain
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import compile_and_run, trace_and_run
from inductor_vision.tests.support.layouts import arrange
from inductor_vision.tests.support.upsample2d import CASES, MODES, Case, oracle
from torch import Tensor

pytestmark = pytest.mark.usefixtures("optimized")


def resize(input: Tensor, case: Case) -> Tensor:
    return case.op(input, *case.arguments)


@pytest.mark.parametrize(("mode", "align_corners"), [("bilinear", False), ("bilinear", True), ("bicubic", False)])
def test_values_for_all_sizes(mode, align_corners):
    """One graph; sizes of 1, for which torch.compile makes one of their own, are in the test of packages."""

    def function(input: Tensor, like: Tensor, padded: Tensor) -> Tensor:
        size = like.shape[2:]
        padding = [a - b for a, b in zip(padded.shape[2:], size)]
        return op(input, size, align_corners, None, None, padding)

    def call(case: Case) -> tuple[Tensor, ...]:
        padded = [length + zeros for length, zeros in zip(case.to, case.padding)]
        return case.input(), torch.empty(1, 1, *case.to), torch.empty(1, 1, *padded)

    def is_one(case: Case) -> bool:
        same = case.align_corners == align_corners and case.scales == (None, None)
        return same and min(case.batch, *case.size, *case.to, *case.padding) > 1 and case.channels == 3

    op = Case(mode=mode).op
    first = call(Case(align_corners=align_corners, padding=(2, 2), to=(11, 12)))
    compiled = compile_and_run(function, *first, dynamic=True)
    assert compiled.kinds == ["template"] and compiled.templates == 1
    cases = [dataclasses.replace(case, mode=mode) for case in CASES.values() if is_one(case)]
    assert len(cases) >= 2
    with torch.compiler.set_stance("fail_on_recompile"):
        for case in cases:
            assert_close(compiled.function(*call(case)), oracle(case.input(), case), torch.float32)


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("name", ["scales", "one channel", "vector of channels", "channels in groups"])
@pytest.mark.parametrize("mode", MODES)
def test_values(name, mode):
    case = dataclasses.replace(CASES[name], mode=mode)
    compiled = compile_and_run(lambda input: resize(input, case), case.input())
    assert compiled.kinds == ["template"]
    assert_close(compiled.result, oracle(case.input(), case), torch.float32)


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_dtypes(dtype, mode):
    case = Case(dtype=dtype, mode=mode)
    compiled = compile_and_run(lambda input: resize(input, case), case.input())
    assert compiled.kinds == ["template"]
    assert_close(compiled.result, oracle(case.input(), case), dtype)


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize(
    ("channels", "mode"), [(3, "bilinear"), (37, "bilinear"), pytest.param(37, "bicubic", marks=pytest.mark.slow)]
)
def test_every_layout_and_number_of_threads_gives_the_same(channels, mode):
    """And what aten gives but for the last bits."""
    case = Case(channels=channels, to=(70, 33), mode=mode)
    inputs = [arrange(case.input(), layout) for layout in ("contiguous", "channels_last", "stepped")]
    compiled = compile_and_run(
        lambda *inputs: [resize(input, case) for input in inputs], *inputs, config={"cpp_wrapper": True}
    )
    assert compiled.kinds == ["template"] * len(inputs)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(result, compiled.result[0]) for result in compiled.function(*inputs))
    stock = resize(case.input(), case)
    assert (compiled.result[0] - stock).abs().max() <= 1e-6 * stock.abs().max()
    assert compiled.result[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("unoptimized")
def test_neighbours_are_fused():
    """A conversion, on its way into a convolution that is channels_last, by the kernel's own store. One that is undone
    is more than a conversion."""
    case = Case(batch=1, size=(40, 50), to=(60, 75))
    weight = torch.randn(8, 3, 3, 3).bfloat16()

    def function(input: Tensor) -> tuple[Tensor, ...]:
        converted = F.conv2d(resize(input, case).bfloat16(), weight)
        return converted, resize(input * 2, case).relu(), resize(input * 9, case).int().float()

    with torch.no_grad():
        compiled = compile_and_run(function, case.input())
        assert (compiled.kinds, compiled.templates, compiled.fused) == (["template"] * 3, 3, 3)
        assert re.search(r"DenseStore<true, at::BFloat16>\{", compiled.source)
        convolved = F.conv2d(oracle(case.input(), case).bfloat16(), weight)
    resized = [oracle(factor * case.input(), case) for factor in (2, 9)]
    assert_close(compiled.result[0], convolved, torch.bfloat16)
    assert_close(compiled.result[1], resized[0].relu(), torch.float32)
    assert (compiled.result[2] - resized[1]).abs().max() < 1.001
    assert torch.equal(compiled.result[2], compiled.result[2].trunc())


def test_gradients():
    """By aten's operator."""
    case = Case()

    def step(input: Tensor) -> Tensor:
        return torch.autograd.grad(resize(input, case).square().sum(), input)[0]

    input = case.input().requires_grad_()
    traced = trace_and_run(lambda input: resize(input, case), input)
    result = torch.autograd.grad(traced.result.square().sum(), input)[0]
    torch.testing.assert_close(result, step(input))


@pytest.mark.parametrize(("channels", "size"), [(3, (480, 640)), (3, (300, 300))])
def test_interpolate_of_users_is_left_alone(channels, size):
    input = torch.randn(1, channels, 8, 9)
    report = explain(lambda input: F.interpolate(input, size=size, mode="bilinear"), input)
    assert not report.paths
